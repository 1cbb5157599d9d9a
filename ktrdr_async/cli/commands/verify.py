"""`verify`: proves on one's own strategy and data that interruptions, processes and later bars change nothing."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from ktrdr_async.cli.context import Context
from ktrdr_async.cli.failures import FAILED, failure_of
from ktrdr_async.cli.options import HOW, USUAL_OUTPUT, OutputOptions, RequestOptions
from ktrdr_async.cli.output import blank
from ktrdr_async.cli.progress import ELSEWHERE
from ktrdr_async.errors import UndeclaredStateError

if TYPE_CHECKING:
    from ktrdr_async.verification.certificate import Certificate, Step

Count = Annotated[int, Parameter(group=HOW, metavar="N", allow_leading_hyphen=True, show_default=True)]
Sizes = Annotated[tuple[int, ...], Parameter(group=HOW, metavar="N", consume_multiple=True, show_default=True)]
Many = Annotated[
    int | Literal["all"], Parameter(group=HOW, metavar="N|all", allow_leading_hyphen=True, show_default=True)
]


def verify(
    *,
    what: RequestOptions,
    interruptions: Many = 20,
    kills: Count = 2,
    hash_seeds: Count = 2,
    block_sizes: Sizes = (1, 7, 100),
    look_ahead: Count = 10,
    trial_seed: Count = 0,
    out: OutputOptions = USUAL_OUTPUT,
    context: Annotated[Context, Parameter(parse=False)],
) -> int:
    """Prove on your own strategy and data that interruptions, processes and later bars change nothing.

    It ends with a certificate (exit 0), or with the first bar at which two runs part (exit 1). No database is used.

    Args:
        what: the backtest.
        interruptions: cancels and errors, about half at yields and half inside bars; all: at every one of them.
        kills: `kill -9` of child processes inside random bars.
        hash_seeds: child processes, each with another PYTHONHASHSEED.
        block_sizes: bars between two yields; several may follow.
        look_ahead: bars after which the future is raised, lowered and cut off.
        trial_seed: of what is chosen at random here; --seed is the strategy's.
        out: what is printed.
        context: this command line.
    """
    context.use(out)
    request = what.request()

    async def work() -> Certificate:
        from ktrdr_async.verification.verify import verify as prove

        return await prove(
            request.data,
            request.strategy or "",
            request=request,
            interruptions=interruptions,
            kills=kills,
            hash_seeds=hash_seeds,
            block_sizes=block_sizes,
            lookahead=look_ahead,
            trial_seed=trial_seed,
            on_step=_Told(context),
            cwd=True,
        )

    try:
        certificate = context.drive(work)
    except UndeclaredStateError as error:  # it may not even start
        return context.fail(failure_of(error), {"status": "failed"})
    if context.output.json:
        context.output.emit(_described(certificate))
    else:
        for line in str(certificate).splitlines():
            context.output.line(line)
    return 0 if certificate.ok else FAILED


def _described(certificate: Certificate) -> dict[str, object]:
    difference = certificate.difference
    found = blank() | {
        "status": "verified" if certificate.ok else "failed",
        "result_digest": certificate.digest,
        "bars": certificate.bars,
        "certificate": certificate.to_dict(),
    }
    if difference is not None:
        where = "before the first bar" if difference.bar < 0 else f"at bar {difference.bar}"
        message = f"two runs part {where}: {difference.reason}"
        found["error"] = {"code": difference.kind, "message": message, "hint": difference.hint}
    return found


class _Told:
    """Says which kind of trial is at work, once, and again every few seconds."""

    def __init__(self, context: Context) -> None:
        self._output = context.output
        self._what = ""
        self._shown = 0.0

    def __call__(self, step: Step) -> None:
        now = time.monotonic()
        if self._output.quiet or (step.what == self._what and now - self._shown < ELSEWHERE):
            return
        self._what, self._shown = step.what, now
        self._output.note(f"{step.what}: {step.done + 1:,} of {step.of:,}" if step.of > 1 else step.what)
