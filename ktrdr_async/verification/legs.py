"""One leg of a run: an engine from its start or a checkpoint on, observed at each boundary, perhaps interrupted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import msgspec

from ktrdr_async.backtesting.checkpoint_builder import build_backtest_checkpoint_state
from ktrdr_async.backtesting.engine import BLOCK_BARS, BacktestingEngine
from ktrdr_async.backtesting.ledger import LedgerEvent
from ktrdr_async.backtesting.request import BacktestRequest
from ktrdr_async.backtesting.results import BacktestResults, Unfilled
from ktrdr_async.backtesting.tiers import TierName
from ktrdr_async.backtesting.turn import NoTurn, Turn
from ktrdr_async.checkpoint.schemas import BacktestCheckpointState, Counters
from ktrdr_async.errors import StrategyError, UndeclaredStateError
from ktrdr_async.market import Bars
from ktrdr_async.strategies.base import AnyStrategy
from ktrdr_async.supervision.shielding import until_done
from ktrdr_async.verification.strikes import InjectedError, Strike, StrikingTurn, raise_at

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Recorded = tuple[int, str, float]  # bar, name, value


class Snapshot(msgspec.Struct, frozen=True, array_like=True):
    """The whole state at a boundary, in parts that have names."""

    bar: int
    digest: str  # hex, of the state
    book: list[list[Any]]  # the columns of `execution.Book`
    tags: list[str | None]  # of the waiting orders, a symbol each
    events: list[LedgerEvent]  # since the boundary before
    recorded: list[Recorded]  # since the boundary before
    state: bytes | None  # the strategy's


class Ending(msgspec.Struct, frozen=True):
    """All that a run comes to, also what its digest leaves out."""

    digest: str
    equity: bytes  # float64[n]
    ledger: list[LedgerEvent]
    recorded: list[Recorded]
    counters: Counters
    unfilled: list[Unfilled]


class Ran(msgspec.Struct):
    """How a leg ended."""

    columns: dict[str, NDArray[np.float64]]  # what `prepare` or the targets gave; empty where it didn't get so far
    ending: Ending | None = None  # None: it was stopped, interrupted, or broke
    error: str = ""  # what was raised, other than the interruption
    error_bar: int = -1  # -1: none, or before the first bar
    state: BacktestCheckpointState | None = None  # the checkpoint of an interrupted leg; None before the first boundary
    struck: bool = False
    exception: Exception | None = None  # what `error` says


class Leg(msgspec.Struct, frozen=True):
    """What is run.

    `last` stops it at the first boundary there or later; nothing is interrupted by that.
    """

    request: BacktestRequest
    bars: Bars
    block_bars: int = BLOCK_BARS
    tier: TierName = "interpreted"
    state: BacktestCheckpointState | None = None
    strike: Strike | None = None
    last: int | None = None


async def run_leg(
    leg: Leg,
    strategy: AnyStrategy,
    watch: Callable[[Snapshot], bool],
    *,
    turn: Turn | None = None,
    at_boundary: Callable[[BacktestingEngine], None] | None = None,
) -> Ran:
    """Runs a leg in a task of its own, which is the one that is cancelled.

    Args:
        leg: what.
        strategy: a new object, or one that ran before.
        watch: gets the snapshot of each boundary, and says whether to stop there.
        turn: who else may compute.
        at_boundary: gets the engine at each boundary, after `watch`.

    Raises:
        UndeclaredStateError: if the strategy could change outside its `state`.
        CancelledError: if the caller was cancelled.
    """
    task: asyncio.Task[bool] | None = None

    def blow() -> None:
        assert task is not None  # noqa: S101 - it is what runs here
        task.cancel()

    used: Turn = turn or NoTurn()
    striking: StrikingTurn | None = None
    if leg.strike is not None:
        used = striking = StrikingTurn(used, leg.strike, strategy=strategy, blow=blow)
    engine = BacktestingEngine(leg.request, leg.bars, strategy, turn=used, block_bars=leg.block_bars, tier=leg.tier)
    if leg.strike is not None and leg.strike.how == "raise":
        raise_at(strategy, leg.strike.bar)
    task = asyncio.ensure_future(_consume(engine, leg, watch, striking, blow, at_boundary))
    try:
        await asyncio.wait({task})
    except asyncio.CancelledError:
        task.cancel()
        await until_done(task)
        raise
    ran = Ran(columns=dict(engine.decided.columns))
    error = asyncio.CancelledError() if task.cancelled() else task.exception()
    if error is None:
        ran.ending = ending_of(engine.results()) if task.result() else None
    elif isinstance(error, asyncio.CancelledError | InjectedError) and leg.strike is not None:
        ran.struck = True
        try:
            ran.state = checkpoint_of(engine)
        except UndeclaredStateError as lost:
            ran.error, ran.error_bar = _said(lost), engine.boundary.bar_index
    elif isinstance(error, Exception | asyncio.CancelledError):
        if isinstance(error, asyncio.CancelledError):  # nobody struck
            error = StrategyError("something that the strategy awaited was cancelled; nobody has cancelled the run")
            error.bar_index = -1 if engine.failed_bar is None else engine.failed_bar
        ran.error = _said(error)
        bar = error.bar_index if isinstance(error, StrategyError) else -1
        ran.error_bar = bar if bar >= 0 or engine.failed_bar is None else engine.failed_bar
        ran.exception = error
        if leg.state is not None and engine.boundary.bar_index == leg.state.bar_index:
            # It broke in its first block, perhaps in restoring: then what was restored says what is missing.
            watch(snapshot_of(engine, len(engine.portfolio.events), len(engine.portfolio.recorded)))
    else:
        raise error
    return ran


async def _consume(
    engine: BacktestingEngine,
    leg: Leg,
    watch: Callable[[Snapshot], bool],
    striking: StrikingTurn | None,
    blow: Callable[[], None],
    at_boundary: Callable[[BacktestingEngine], None] | None,
) -> bool:
    """Whether it came to its end."""
    n, size = len(leg.bars), leg.block_bars
    events, recorded, first = 0, 0, 0
    if leg.state is not None:
        events, recorded, first = len(leg.state.ledger), len(leg.state.recorded), leg.state.bar_index + 1
    if striking is not None:
        striking.begin(first, min(n, (first // size + 1) * size))
    async with aclosing(engine.run(leg.state)) as blocks:
        async for block in blocks:
            boundary, first = engine.boundary, block.bar_index + 1
            stop = watch(snapshot_of(engine, events, recorded))
            events, recorded = boundary.events, boundary.recorded
            if at_boundary is not None:
                at_boundary(engine)
            if leg.strike is not None and leg.strike == Strike(block.bar_index, "yield"):
                blow()
                await asyncio.sleep(0)
            if stop or (leg.last is not None and block.bar_index >= leg.last):
                return False
            if striking is not None:
                striking.begin(first, min(n, (first // size + 1) * size))
    return True


def snapshot_of(engine: BacktestingEngine, events: int, recorded: int) -> Snapshot:
    """The state at the engine's boundary; events and recorded values from these counts on."""
    boundary, portfolio = engine.boundary, engine.portfolio
    return Snapshot(
        bar=boundary.bar_index,
        digest=portfolio.state_digest(boundary),
        book=[list(column) for column in boundary.book],
        tags=[None if number < 0 else portfolio.tags[number] for number in boundary.book.waiting_tag],
        events=portfolio.events[events : boundary.events],
        recorded=portfolio.recorded[recorded : boundary.recorded],
        state=boundary.strategy_state,
    )


def ending_of(results: BacktestResults) -> Ending:
    """All of a result that two runs are compared in."""
    return Ending(
        digest=results.digest,
        equity=results.equity.astype("<f8", copy=False).tobytes(),
        ledger=list(results.ledger),
        recorded=list(results.recorded_values),
        counters=results.counters,
        unfilled=list(results.unfilled_orders),
    )


def checkpoint_of(engine: BacktestingEngine) -> BacktestCheckpointState | None:
    """The checkpoint of the last boundary, as a database gives it back; None before the first."""
    at = engine.boundary.bar_index
    if at < 0:
        return None
    return from_text(to_text(build_backtest_checkpoint_state(engine, at, int(engine.bars.timestamps[at]))))


def to_text(state: BacktestCheckpointState) -> str:
    """A state as JSON, in which no value is NaN or infinite."""
    return json.dumps(state.to_dict(), allow_nan=False)


def from_text(text: str) -> BacktestCheckpointState:
    """The state that `to_text` wrote."""
    return BacktestCheckpointState.from_dict(json.loads(text))


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
