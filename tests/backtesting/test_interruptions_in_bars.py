"""X1 inside a bar: between any two statements and in any await of an asynchronous strategy, and what the error says."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import numpy as np
import pytest
from engine_runs import checkpoint, finish, flat_bars, hourly
from numpy.typing import NDArray

import ktrdr_async as kt

pytestmark = pytest.mark.anyio

REQUEST = kt.BacktestRequest(initial_capital=50_000.0)
BARS = hourly(28)
BLOCK = 7


class InjectedError(Exception):
    pass


class Points:
    """Numbers every point that a run passes, and strikes at one of them: raises there, or cancels the run's task."""

    def __init__(self, strike_at: int = 0, *, cancels: bool = False) -> None:
        self.strike_at, self.cancels = strike_at, cancels
        self.passed = 0
        self.bars: dict[int, int] = {}  # point -> bar
        self.awaits: set[int] = set()

    def step(self, bar: int) -> None:
        """A point between two statements. A cancel is delivered at the run's next await."""
        self.passed += 1
        self.bars[self.passed] = bar
        if self.passed == self.strike_at:
            if not self.cancels:
                raise InjectedError(f"point {self.passed}")
            task = asyncio.current_task()
            assert task is not None
            task.cancel()

    async def answer(self, bar: int, value: float) -> float:
        """An await with a point on its way in, one while it waits, and one on its way out."""
        self.step(bar)
        await asyncio.sleep(0)
        self.step(bar)
        self.awaits.add(self.passed)
        await asyncio.sleep(0)
        self.step(bar)
        return value * 1.5


class Steps(msgspec.Struct):
    begun: int = 0
    done: int = 0
    score: float = 0.0
    path: list[float] = []
    grid: NDArray[np.float64] = msgspec.field(default_factory=lambda: np.zeros(4))
    fills: dict[str, float] = {}


class Awaiting(kt.AsyncStrategy):
    """Three awaits a bar, state written before, between and after them, orders in the middle."""

    resources = ("points",)

    def __init__(self, points: Any) -> None:
        self.points = points
        self.state = Steps()

    async def on_fill(self, bar: kt.Bar, fill: kt.Fill) -> None:
        state, points = self.state, self.points
        points.step(bar.index)
        state.fills[fill.symbol] = state.fills.get(fill.symbol, 0.0) + fill.quantity
        state.score += await points.answer(bar.index, fill.price)
        points.step(bar.index)

    async def on_trade(self, bar: kt.Bar, trade: kt.TradeClosed) -> None:
        self.state.score -= await self.points.answer(bar.index, trade.net_pnl)

    async def on_bar(self, bar: kt.Bar) -> None:
        state, points, close = self.state, self.points, bar.close[0]
        points.step(bar.index)
        state.begun += 1
        points.step(bar.index)
        first = await points.answer(bar.index, close)
        state.path.append(first)
        points.step(bar.index)
        state.grid[bar.index % 4] += first
        points.step(bar.index)
        if bar.index % 3 == 0:
            bar.order(0, 5.0 if state.path[-1] > state.path[0] else -7.0, tag=f"o{state.begun}")
            points.step(bar.index)
        second = await points.answer(bar.index, float(state.grid.sum()))
        state.score += second
        bar.record(score=state.score)
        points.step(bar.index)
        if bar.index % 7 == 6:
            bar.target_weight(0, -0.4 if bar.index % 2 else 0.4) if bar.index % 3 else bar.order(0, 1.0)
        third = await points.answer(bar.index, state.score)
        points.step(bar.index)
        state.score = third * 0.01
        state.done += 1
        points.step(bar.index)

    async def on_end(self, bar: kt.Bar) -> None:
        await self.points.answer(bar.index, 0.0)


def engine_of(points: Points, bars: kt.Bars = BARS) -> kt.BacktestingEngine:
    return kt.BacktestingEngine(REQUEST, bars, Awaiting(points), block_bars=BLOCK)


async def resumed(engine: kt.BacktestingEngine) -> tuple[object, ...]:
    """From the last boundary of an interrupted engine to the end; from bar 0 where there is none yet."""
    at = engine.boundary.bar_index
    state = None if at < 0 else checkpoint(engine)
    results = await finish(engine_of(Points()), state, audited=False)
    return results.digest, results.recorded_values, results.counters


@pytest.mark.parametrize("cancels", [False, True])
async def test_struck_at_every_point(cancels: bool) -> None:
    counted = Points()
    results = await finish(engine_of(counted))
    expected = (results.digest, results.recorded_values, results.counters)
    assert len(results.trade_records) >= 2
    assert counted.passed > 450
    assert len(counted.awaits) > 90
    for at in range(1, counted.passed + 1):
        points = Points(at, cancels=cancels)
        engine = engine_of(points)
        error = asyncio.CancelledError if cancels else InjectedError
        run = asyncio.create_task(finish(engine))
        with pytest.raises(error) as caught:
            await run
        bar = points.bars[at]
        if not cancels:
            time = str(np.datetime64(int(BARS.timestamps[bar]), "ns").astype("datetime64[s]")) + "Z"
            assert engine.failed_bar == bar
            assert caught.value.__notes__ == [f"in Awaiting at bar {bar}, {time}, symbols A, B"]
            assert engine.boundary.bar_index == (bar // BLOCK * BLOCK - 1 if bar < 27 else _last(engine))
        assert await resumed(engine) == expected


def _last(engine: kt.BacktestingEngine) -> int:
    # At the last bar a point may be of the closing step, which comes after the last boundary.
    assert engine.boundary.bar_index in (20, 27)
    return engine.boundary.bar_index


async def test_struck_again_and_again_until_it_comes_through() -> None:
    """Each run gets some points further than its checkpoint, raising and being cancelled in turn."""
    results = await finish(engine_of(Points()))
    expected = (results.digest, results.recorded_values, results.counters)
    state, runs = None, 0
    while True:
        points = Points(170 + 3 * runs, cancels=runs % 2 == 1)
        engine = engine_of(points)
        runs += 1
        try:
            done = await asyncio.create_task(finish(engine, state, audited=False))
        except (InjectedError, asyncio.CancelledError):
            state = checkpoint(engine) if engine.boundary.bar_index >= 0 else None
            continue
        assert (done.digest, done.recorded_values, done.counters) == expected
        break
    assert runs >= 3


class Raising(kt.Strategy):
    resources = ("at",)

    def __init__(self, at: int, what: str = "bar") -> None:
        self.at, self.what = at, what

    def on_bar(self, bar: kt.Bar) -> None:
        if bar.index == 0:
            bar.order(0, 1.0)
        if bar.index == self.at:
            if self.what == "weight":
                bar.target_weight(0, 1.5)
            elif self.what == "symbol":
                bar.order("ZZZ", 1.0)
            elif self.what == "lots":
                bar.target_quantity(0, 1e300)
            elif self.what == "attribute":
                self.hidden = bar.index
            else:
                raise ZeroDivisionError("by the strategy")

    def on_end(self, bar: kt.Bar) -> None:
        if self.what == "end":
            raise ZeroDivisionError("at the end")


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("bar", ZeroDivisionError, "by the strategy"),
        ("weight", kt.OrderError, r"weight 1.5 of A is outside -1..1"),
        ("symbol", kt.OrderError, "there is no symbol 'ZZZ'"),
        ("lots", kt.OrderError, r"more than 2\*\*53 lots of 1.0"),
        ("attribute", kt.UndeclaredStateError, "hidden was set after __init__"),
    ],
)
async def test_an_error_names_bar_time_and_symbols(what: str, error: type[Exception], message: str) -> None:
    bars = flat_bars(*([10.0] * 12 for _ in range(3)))
    engine = kt.BacktestingEngine(REQUEST, bars, Raising(8, what), block_bars=5)
    with pytest.raises(error, match=message) as caught:
        await finish(engine)
    assert caught.value.__notes__ == ["in Raising at bar 8, 2024-01-09T00:00:00Z, symbols A, B, C"]
    assert (engine.failed_bar, engine.boundary.bar_index) == (8, 4)
    if isinstance(caught.value, kt.StrategyError):
        assert caught.value.bar_index == 8
        assert caught.value.timestamp.startswith("2024-01-09T00:00:00")
    with pytest.raises(RuntimeError, match="hasn't come to its end"):
        engine.results()
    assert checkpoint(engine).bar_index == 4


async def test_an_error_in_on_end_leaves_the_last_boundary() -> None:
    bars = flat_bars([10.0] * 12)
    engine = kt.BacktestingEngine(REQUEST, bars, Raising(-1, "end"), block_bars=5)
    with pytest.raises(ZeroDivisionError) as caught:
        await finish(engine)
    assert caught.value.__notes__ == ["in Raising at bar 11, 2024-01-12T00:00:00Z, symbols A"]
    state = checkpoint(engine)
    assert (state.bar_index, [e.reason for e in state.ledger]) == (11, ["order"])
