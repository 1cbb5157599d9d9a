"""`kt.verify`: a job run uninterrupted, then in every other way that must come to the same, and a certificate."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from ktrdr_async.backtesting.provenance import identity_of
from ktrdr_async.checkpoint.manifest import environment
from ktrdr_async.strategies.base import AnyStrategy, StrategyBase
from ktrdr_async.strategies.registry import make
from ktrdr_async.supervision.jobs import Job, job_of
from ktrdr_async.verification.certificate import Certificate, Difference, Step
from ktrdr_async.verification.plan import Plan
from ktrdr_async.verification.trials import Parted, Trials, time_of

if TYPE_CHECKING:
    from ktrdr_async.backtesting.request import BacktestRequest
    from ktrdr_async.supervision.jobs import Data

Factory = Callable[[], AnyStrategy]


async def verify(
    data: Data,
    strategy: AnyStrategy | Factory | str,
    *,
    request: BacktestRequest | None = None,
    interruptions: int | Literal["all"] = 20,
    kills: int = 2,
    hash_seeds: int = 2,
    block_sizes: Sequence[int] = (1, 7, 100),
    lookahead: int = 10,
    trial_seed: int = 0,
    on_step: Callable[[Step], None] | None = None,
    cwd: bool = False,
    **terms: Any,
) -> Certificate:
    """Proves on one job that its result doesn't depend on interruptions, processes, hash seeds, blocks or later bars.

    It starts the strategy about `interruptions + 3 * lookahead + 10` times, and its awaits and side effects happen as
    often. The first two runs that part end it. The state after each bar is in a temporary file meanwhile.

    A certificate speaks of this job alone: of these bars, and of what was tried. Look-ahead is found where another
    future changed a row of `prepare` or the targets, or the state at a bar that was looked at. What comes from
    elsewhere than the bars, such as a file or model that was made with later data, is out of its sight.

    Args:
        data: as for `backtest`.
        strategy: a name; a strategy, of which new ones are made with the same parameters; or what makes one.
        request: a whole request; `terms` override its fields.
        interruptions: how many, at random yields and inside random bars; "all": at every yield and inside every bar.
        kills: `kill -9` of child processes inside random bars.
        hash_seeds: child processes, each with another PYTHONHASHSEED.
        block_sizes: bars between two yields.
        lookahead: bars after which the future is raised, lowered and cut off.
        trial_seed: of what is chosen at random here; the request's own `seed` is one of the terms.
        on_step: called before each run.
        cwd: look for the strategy's module in the current directory too.
        terms: fields of `BacktestRequest`.

    Raises:
        InputError: if data, strategy or a term can't be used.
        UndeclaredStateError: if the strategy may not even start.
        StrategyError: if the strategy breaks a rule in the uninterrupted run; what it raises itself comes through.
        VerificationError: if a child process couldn't do what it was told.
        CancelledError: if the task was cancelled; no process and no file is left.
    """
    plan = Plan.checked(interruptions, kills, hash_seeds, block_sizes, lookahead, trial_seed)
    began = time.monotonic()
    job, new = await _job(data, strategy, request, cwd, terms)
    difference: Difference | None = None
    with TemporaryDirectory(prefix="ktrdr-verify-") as directory:
        trials = Trials(job, new, plan, directory, on_step or (lambda _: None))
        try:
            await trials.run()
        except Parted as parted:
            difference = parted.difference
        finally:
            trials.close()
    identity = identity_of(job.strategy)
    return Certificate(
        ok=difference is None,
        strategy=identity.name,
        parameters=identity.parameters,
        source=identity.source,
        symbols=job.bars.symbols,
        bars=len(job.bars),
        first=time_of(job.bars, 0),
        last=time_of(job.bars, len(job.bars) - 1),
        digest=trials.digest,
        trials=tuple(trials.done),
        untried=tuple(trials.untried),
        difference=difference,
        versions=_versions(),
        seconds=round(time.monotonic() - began, 3),
    )


def verify_sync(data: Data, strategy: AnyStrategy | Factory | str, **options: Any) -> Certificate:
    """`verify` for scripts. :raises RuntimeError: inside a running loop, where `await kt.verify(...)` serves."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(verify(data, strategy, **options))
    raise RuntimeError("a loop is running here: use `await kt.verify(...)` instead of kt.verify_sync(...)")


async def _job(
    data: Data, strategy: AnyStrategy | Factory | str, request: BacktestRequest | None, cwd: bool, terms: dict[str, Any]
) -> tuple[Job, Factory]:
    """What is run, and what makes a new strategy for each run."""
    given = strategy if isinstance(strategy, str | StrategyBase) else strategy()
    job = await job_of(data, given, request, terms, cwd=cwd)
    return job, _factory(job, strategy)


def _factory(job: Job, strategy: AnyStrategy | Factory | str) -> Factory:
    if isinstance(strategy, str):
        return lambda: make(strategy, job.request.parameters, trusted=True)
    if isinstance(strategy, StrategyBase):
        kind, parameters = type(strategy), dict(strategy._parameters)
        return lambda: kind(**parameters)
    return strategy


def _versions() -> dict[str, str]:
    from ktrdr_async import __version__

    return {"ktrdr_async": __version__, **environment()}
