"""`resume`: goes on from the last checkpoint; of a completed operation the stored result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from ktrdr_async.cli.context import Context
from ktrdr_async.cli.options import (
    NO_TRUST,
    USUAL_DATABASE,
    USUAL_OUTPUT,
    USUAL_PACE,
    DatabaseOptions,
    OutputOptions,
    PaceOptions,
    TrustOptions,
)
from ktrdr_async.errors import InputError

if TYPE_CHECKING:
    from ktrdr_async.cli.running import Ended


def resume(
    operation: Annotated[str | None, Parameter(metavar="ID|PREFIX")] = None,
    /,
    *,
    last: bool = False,
    take_over: bool = False,
    accept_mismatch: bool = False,
    trust: TrustOptions = NO_TRUST,
    pace: PaceOptions = USUAL_PACE,
    where: DatabaseOptions = USUAL_DATABASE,
    out: OutputOptions = USUAL_OUTPUT,
    context: Annotated[Context, Parameter(parse=False)],
) -> int:
    """Go on with an operation from its last checkpoint.

    Args:
        operation: its id, or what no other id begins with.
        last: the most recent one that isn't completed.
        take_over: claim it although its process seems to be alive.
        accept_mismatch: go on although data, code or numbers differ; the result remembers it for ever.
        trust: what it may name.
        pace: how it runs.
        where: the database.
        out: what is printed.
        context: this command line.
    """
    from ktrdr_async.cli.running import report

    context.use(out)
    trust.find_in_cwd()
    if (operation is None) is not last:
        raise InputError("name one operation: its id, the beginning of its id, or --last", hint="ktrdr-async list")
    policy = pace.policy()

    async def work() -> Ended:
        from ktrdr_async.cli.running import Ended, Runner
        from ktrdr_async.operations.lifecycle import Status
        from ktrdr_async.supervision.stored import outcome_of
        from ktrdr_async.supervision.worker import BacktestWorker

        async with BacktestWorker.open(
            where.dsn, allow=trust.allow, data_roots=trust.data_root, tier=pace.tier, alone=True
        ) as worker:
            row = await (worker.operations.latest() if operation is None else worker.operations.find(operation))
            name = row.operation_id
            if row.status is Status.COMPLETED and row.result is not None and pace.output is None:
                outcome = outcome_of(row)  # no data are needed to show it
                return Ended(
                    operation_id=name,
                    status=row.status.value,
                    outcome=outcome,
                    request=row.request,
                    statistics=outcome.run,
                )
            runner = Runner(context, pace, dsn=where.dsn, allow=trust.allow, roots=trust.data_root)
            return await runner.carry_out(
                worker,
                name,
                lambda: worker.resume(
                    name,
                    policy=policy,
                    throttle=pace.throttle,
                    keep_state=pace.keep_state,
                    take_over=take_over,
                    accept_mismatch=accept_mismatch,
                ),
            )

    return report(context, context.drive(work))
