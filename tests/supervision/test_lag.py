"""How late the loop was beside a run, and which strategy held it: measured, stored, said once."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from contextlib import aclosing
from typing import Any

import msgspec
import pytest
from supervision_runs import NEVER, REQUEST, Counter, Gate, Held, digest_of, market

import ktrdr_async as kt
from ktrdr_async.backtesting.results import Lag, RunStatistics
from ktrdr_async.operations.lifecycle import Operation
from ktrdr_async.supervision import turns as turns_module
from ktrdr_async.supervision.holding import watched
from ktrdr_async.supervision.lag import BUSY_SECONDS, IDLE_TICKS, LoopLag
from ktrdr_async.supervision.turns import LONG_CALL_SECONDS, Turns
from ktrdr_async.supervision.worker import BacktestWorker

pytestmark = pytest.mark.anyio
LONG = 1.2 * LONG_CALL_SECONDS


class Clock:
    """Seconds that pass only when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Ticking:
    """A ticker whose ticks come when the test says so."""

    def __init__(self, *, busy: bool = True) -> None:
        self.clock, self.busy = Clock(), busy
        self.lag = LoopLag(lambda: self.busy, self.clock)

    def tick(self, late: float) -> None:
        assert self.lag._timer is not None
        self.lag._timer.cancel()
        self.clock.now = self.lag._due + late
        self.lag._tick()


def about(seconds: float) -> Any:
    """Figures are ends of buckets: never too small, and at most 5 % too large."""
    return pytest.approx(seconds * 1e3 * 1.025, rel=0.026)


async def test_figures_are_those_of_the_ticks() -> None:
    ticking = Ticking()
    with ticking.lag.watch() as watch:
        assert watch.figures() is None
        for _ in range(970):
            ticking.tick(0.0003)
        for _ in range(28):
            ticking.tick(0.004)
        assert watch.figures() == Lag(about(0.0003), about(0.004), about(0.004))
        ticking.tick(0.08)
        ticking.tick(0.0)
        assert watch.figures() == Lag(about(0.0003), about(0.004), about(0.08))


async def test_each_watch_sees_what_came_since_it_began() -> None:
    ticking = Ticking()
    with ticking.lag.watch() as first:
        ticking.tick(0.05)
        with ticking.lag.watch() as second:
            ticking.tick(0.001)
            assert second.figures() == Lag(*[about(0.001)] * 3)
        ticking.tick(0.001)
        assert first.figures() == Lag(about(0.001), about(0.05), about(0.05))


async def test_a_tick_counts_for_the_time_that_it_stands_for() -> None:
    """A second of waiting and a second of computing weigh the same, though the first has fewer ticks."""
    ticking = Ticking(busy=False)
    with ticking.lag.watch() as watch:
        ticking.tick(0.0001)  # the first one is a busy one
        for _ in range(10):
            assert ticking.lag._due - ticking.clock.now == pytest.approx(IDLE_TICKS * BUSY_SECONDS)
            ticking.tick(0.0001)
        ticking.busy = True
        ticking.tick(0.0001)
        for _ in range(10 * IDLE_TICKS - 1):
            assert ticking.lag._due - ticking.clock.now == pytest.approx(BUSY_SECONDS)
            ticking.tick(0.01)
        figures = watch.figures()
        assert figures is not None
        assert figures.p50 == about(0.0001)
        for _ in range(10):
            ticking.tick(0.01)
        figures = watch.figures()
        assert figures is not None
        assert figures.p50 == about(0.01)


async def test_what_begins_is_looked_at_closely() -> None:
    ticking = Ticking(busy=False)
    with ticking.lag.watch():
        ticking.tick(0.0001)
        assert ticking.lag._due - ticking.clock.now == pytest.approx(IDLE_TICKS * BUSY_SECONDS)
        with ticking.lag.watch() as second:
            assert ticking.lag._due - ticking.clock.now == pytest.approx(BUSY_SECONDS)
            ticking.tick(0.0001)
        ticking.clock.now = ticking.lag._due + 0.02  # and what is late already isn't lost
        with ticking.lag.watch():
            figures = second.figures()
            assert figures is not None
            assert figures.max == about(0.02)


async def test_a_loop_that_stands_still_is_seen_before_its_next_turn() -> None:
    turns = Turns()
    with turns.lag.watch() as watch:
        time.sleep(0.03)  # noqa: ASYNC251 - the loop is to stand
        figures = watch.figures()
        assert figures is not None
        assert figures.max >= 30 - 1e3 * BUSY_SECONDS
        await asyncio.sleep(0)  # and by the tick itself
        figures = watch.figures()
        assert figures is not None
        assert figures.max >= 30 - 1e3 * BUSY_SECONDS


async def test_nobody_watches_nothing_ticks(worker: BacktestWorker) -> None:
    assert worker._turns.lag._timer is None
    handle = worker.start(REQUEST, "op", bars=market(), strategy=Held(gate := Gate(345)), policy=NEVER)
    await gate.reached.wait()
    assert worker._turns.lag._timer is not None
    await handle.cancel()
    assert worker._turns.lag._timer is None
    with pytest.raises(ZeroDivisionError):
        await worker.run(REQUEST, "failing", bars=market(), strategy=Counter(fail_at=500))
    assert worker._turns.lag._timer is None
    await kt.backtest(market(), Counter(), request=REQUEST)
    assert turns_module.turns_of_this_loop().lag._timer is None


class Blocking(kt.AsyncStrategy):
    """Holds the loop in `prepare`, and at its first bar."""

    async def prepare(self, bars: kt.Bars) -> dict[str, Any]:
        time.sleep(0.03)  # noqa: ASYNC251 - it is to hold the loop
        return {}

    async def on_bar(self, bar: kt.Bar) -> None:
        if bar.index == 0:
            time.sleep(LONG)  # noqa: ASYNC251 - as above


async def test_a_results_statistics_tell_the_lag(worker: BacktestWorker) -> None:
    results = await worker.run(REQUEST, "op", bars=market(), strategy=Blocking())
    lag, prepare = results.run.loop_lag_ms, results.run.prepare_lag_ms
    assert lag is not None
    assert prepare is not None
    assert prepare >= 30 - 1e3 * BUSY_SECONDS
    assert 0 < lag.p50 <= lag.p99 <= lag.max
    assert lag.max >= max(prepare, 1e3 * (LONG - IDLE_TICKS * BUSY_SECONDS))
    stored = await worker.results("op", bars=market())
    assert stored.run == results.run
    said = f"loop late by {lag.p50:.1f} ms, p99 {lag.p99:.1f}, at most {lag.max:.1f}, {prepare:.1f} at most in prepare"
    assert results.run.lag_text() == said
    assert said in stored.summary()
    clean = await kt.backtest(market(), Counter(), request=REQUEST)
    assert clean.run.loop_lag_ms is not None
    assert clean.run.prepare_lag_ms is not None
    assert clean.digest == await digest_of(Counter, "counter"), "no part of the digest"


async def test_results_that_were_stored_without_it_are_read(worker: BacktestWorker) -> None:
    await worker.run(REQUEST, "op", bars=market(), strategy=Counter())
    new = ("loop_lag_ms", "prepare_lag_ms", "long_calls", "longest_call_ms", "long_call")

    def as_before(row: Operation) -> dict[str, Any]:
        assert row.result is not None
        old = {name: value for name, value in row.result["run"].items() if name not in new}
        assert len(old) == len(row.result["run"]) - len(new)
        return row.result | {"run": old}

    old = as_before(await worker.operations.get("op"))
    async with worker.database.connection() as connection:
        text = msgspec.json.encode(old).decode()
        await connection.execute("ALTER TABLE ktrdr.operations DISABLE TRIGGER USER")
        await connection.execute("UPDATE ktrdr.operations SET result = $1::text::jsonb", text)
    results = await worker.results("op", bars=market())
    assert results.run.loop_lag_ms is None
    assert results.run.long_calls == 0
    assert results.run.lag_text() == ""
    assert "loop late" not in results.summary()


# Who held it.


class Slow(kt.Strategy):
    """Takes long at some bars, by the test's clock."""

    resources = ("clock",)

    def __init__(self, clock: Any = None, at: Any = ()) -> None:
        self.clock, self.at = clock, tuple(at)

    def on_bar(self, bar: kt.Bar) -> None:
        if bar.index in self.at:
            self.clock.now += LONG
        else:
            self.clock.now += 0.00001


class SlowAsync(kt.AsyncStrategy):
    """As `Slow`; it also waits, which holds nobody."""

    resources = ("clock",)

    def __init__(self, clock: Any = None, at: Any = ()) -> None:
        self.clock, self.at = clock, tuple(at)

    async def prepare(self, bars: kt.Bars) -> dict[str, Any]:
        if -1 in self.at:
            self.clock.now += LONG
        return {}

    async def on_bar(self, bar: kt.Bar) -> None:
        if bar.index in self.at:
            self.clock.now += LONG / 2
            await asyncio.sleep(0)
            self.clock.now += LONG
            await asyncio.sleep(0)
        elif bar.index % 100 == 50:
            asyncio.get_running_loop().call_soon(self._pass)
            await asyncio.sleep(0)

    def _pass(self) -> None:
        self.clock.now += 10 * LONG


async def run_of(strategy: Any, clock: Clock, *, alone: bool = False) -> RunStatistics:
    turn, run = Turns(clock=clock).turn(), RunStatistics()
    engine = kt.BacktestingEngine(REQUEST, market(), strategy, turn=turn)
    async with aclosing(engine.run()) as blocks:
        async for _ in watched(blocks, turn, strategy, run, "op", alone=alone, clock=clock):
            clock.now += 10 * LONG  # what the consumer does isn't the strategy's
            await turn.give_way()
    return run


@pytest.mark.parametrize("kind", [Slow, SlowAsync])
@pytest.mark.parametrize("at", [(), (0,), (345, 399, 400, 999), (99,), (100,)])
async def test_calls_that_hold_the_loop_are_counted(
    kind: Any, at: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    run = await run_of(kind(clock, at), clock)
    assert run.long_calls == len(at)
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    if not at:
        assert run.long_call == ""
        assert said == []
        return
    assert run.long_call == f"{kind.__name__} held the loop for 60 ms in its call at bar {at[0]}"
    assert run.longest_call_ms == pytest.approx(60, abs=1)
    assert said == [f"op: {run.long_call}, and everybody else on it waited; more calls like that are only counted"]


async def test_prepare_on_the_loop_is_counted_too() -> None:
    clock = Clock()
    run = await run_of(SlowAsync(clock, (-1, 7)), clock)
    assert run.long_call == "SlowAsync held the loop for 60 ms in prepare"
    assert run.long_calls == 2


async def test_where_nobody_else_is_on_the_loop_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    run = await run_of(Slow(clock, (345,)), clock, alone=True)
    assert (run.long_calls, run.long_call) == (1, "")
    assert caplog.records == []


async def test_the_hosts_garbage_collection_is_not_the_strategys() -> None:
    clock = Clock()

    class Collected(Slow):
        def on_bar(self, bar: kt.Bar) -> None:
            if bar.index == 345:
                gc.collect()
            super().on_bar(bar)

    async def long_calls(at: tuple[int, ...]) -> int:
        turn, run, strategy = Turns(clock=clock).turn(), RunStatistics(), Collected(clock, at)
        engine = kt.BacktestingEngine(REQUEST, market(), strategy, turn=turn)
        with turn.lag.watch():
            async with aclosing(engine.run()) as blocks:
                async for _ in watched(blocks, turn, strategy, run, "op"):
                    await asyncio.sleep(2 * BUSY_SECONDS)  # a tick between two blocks
        return run.long_calls

    assert await long_calls((345,)) == 0
    assert await long_calls((555,)) == 1


async def test_what_a_callback_does_is_not_the_strategys(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setitem(turns_module._shared, asyncio.get_running_loop(), Turns(clock=clock))

    def look(_: kt.Block) -> None:
        clock.now += LONG

    results = await kt.backtest(market(), Slow(clock), request=REQUEST, on_block=look)
    assert results.run.long_calls == 0
    results = await kt.backtest(market(), Slow(clock, (345,)), request=REQUEST, on_block=look)
    assert results.run.long_calls == 1


async def test_the_result_warns_of_it(worker: BacktestWorker, caplog: pytest.LogCaptureFixture) -> None:
    class Sleeper(kt.Strategy):
        def on_bar(self, bar: kt.Bar) -> None:
            if bar.index in (0, 500):
                time.sleep(LONG)

    results = await worker.run(REQUEST, "op", bars=market(), strategy=Sleeper())
    said = [record.getMessage() for record in caplog.records if "held the loop" in record.getMessage()]
    assert len(said) == 1
    assert "op: Sleeper held the loop for " in said[0]
    assert "at bar 0" in said[0]
    (warned,) = [each for each in results.warnings if "held the loop" in each]
    assert warned.startswith(results.run.long_call)
    assert f"{results.run.long_calls} calls took more than 50 ms" in warned
    assert (await worker.results("op", bars=market())).warnings == results.warnings


async def test_a_cancellation_gets_through_to_what_is_timed() -> None:
    """The steps of a coroutine that is timed are those that asyncio takes: it is cancelled where it waits."""
    clock, gate = Clock(), Gate(345)
    strategy = Held(gate)
    task = asyncio.ensure_future(run_of(strategy, clock))
    await gate.reached.wait()
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    assert not strategy._running
