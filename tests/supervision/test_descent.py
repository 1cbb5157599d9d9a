"""Extensions, forks and accepted mismatches: runs that go on from another state than their own checkpoint's."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import msgspec
import pytest

import ktrdr_async as kt

pytestmark = pytest.mark.anyio

LONG = "synthetic:?bars=6000&seed=11"
SHORT = "synthetic:?bars=4150&seed=11"
EVERY = kt.CheckpointPolicy(500, max_overhead=None)


class Tally(msgspec.Struct):
    seen: int = 0
    tops: list[float] = []


class Climber(kt.Strategy):
    """Buys new highs of the last 50 closes, with a memory, tags, shorts and what it records."""

    warmup = 5

    def __init__(self, size: float = 0.5) -> None:
        self.size, self.state = size, Tally()

    def on_bar(self, bar: kt.Bar) -> None:
        state = self.state
        state.seen += 1
        state.tops = [*state.tops[-49:], bar.close[0]]
        if bar.close[0] >= max(state.tops):
            bar.target_weight(0, self.size, tag=f"top{state.seen % 3}")
        elif bar.close[0] <= min(state.tops):
            bar.target_weight(0, -self.size)
        if state.seen % 100 == 0:
            bar.record(equity=bar.portfolio.equity)


def request(data: str, **terms: object) -> kt.BacktestRequest:
    return kt.BacktestRequest(data=data, commission=0.0002, slippage=0.0001, **terms)


async def test_an_extension_equals_one_run_over_all_bars(dsn: str) -> None:
    whole = await kt.backtest(None, Climber(), request=request(LONG))
    async with kt.BacktestWorker.open(dsn) as worker:
        short = await worker.run(request(SHORT), "short", strategy=Climber(), policy=EVERY, keep_state=True)
        assert len(short.equity) == 4150
        longer = await worker.extend("short", "long", changes={"data": LONG}, strategy=Climber(), policy=EVERY)
        assert longer.digest == whole.digest
        assert longer.run.bars_computed == 6000 - 4150
        assert longer.run.resumed_from == [4149]
        assert (longer.recorded == whole.recorded).all(axis=None)
        again = await worker.results("long")
        assert again.digest == whole.digest
        row = await worker.operations.get("long")
        assert row.parent is not None
        assert (row.type, row.parent.operation_id, row.parent.bar_index) == ("extension", "short", 4149)
        assert again.accepted_mismatches == ()


async def test_an_extension_is_cancelled_and_resumed_like_any_run(dsn: str) -> None:
    whole = await kt.backtest(None, Climber(), request=request(LONG))
    async with kt.BacktestWorker.open(dsn) as worker:
        await worker.run(request(SHORT), "short", strategy=Climber(), keep_state=True)
        handle = await worker.extend_handle("short", "long", changes={"data": LONG}, strategy=Climber(), throttle=2000)
        async for now in handle.progress(0.01):
            if now.bar_index > 4200:
                break
        await handle.cancel()
        assert (await worker.operations.get("long")).checkpoint_bar is not None
        assert (await worker.resume("long", strategy=Climber())).digest == whole.digest


async def test_what_was_inherited_is_saved_at_the_first_boundary(dsn: str) -> None:
    never = kt.CheckpointPolicy(10**9, time_interval_seconds=1e9)
    async with kt.BacktestWorker.open(dsn) as worker:
        await worker.run(request(SHORT), "short", strategy=Climber(), keep_state=True)
        handle = await worker.extend_handle(
            "short", "long", changes={"data": LONG}, strategy=Climber(), policy=never, throttle=500
        )
        async for now in handle.progress(0.01):
            if now.bar_index >= 4299:
                break
        assert (await worker.operations.get("long")).checkpoint_bar == 4199
        await handle.cancel()


async def test_an_extension_that_died_before_its_first_save_begins_at_its_parents_end(dsn: str) -> None:
    whole = await kt.backtest(None, Climber(), request=request(LONG))
    async with kt.BacktestWorker.open(dsn) as worker:
        await worker.run(request(SHORT), "short", strategy=Climber(), keep_state=True)
        handle = await worker.extend_handle("short", "long", changes={"data": LONG}, strategy=Climber())
        await handle._actor.claimed.wait()
        await handle.cancel()  # before its first yield
        row = await worker.operations.get("long")
        if row.status is not kt.Status.COMPLETED:
            result = await worker.resume("long", strategy=Climber())
            assert result.run.resumed_from[0] >= 4149
            assert result.digest == whole.digest


async def test_an_extension_wants_the_same_prefix_and_a_kept_state(dsn: str) -> None:
    async with kt.BacktestWorker.open(dsn) as worker:
        await worker.run(request(SHORT), "kept", strategy=Climber(), keep_state=True)
        with pytest.raises(kt.CheckpointMismatchError, match="bars") as caught:
            await worker.extend("kept", "other", changes={"data": "synthetic:?bars=6000&seed=12"}, strategy=Climber())
        assert set(caught.value.differences) == {"bars"}
        await worker.run(request(SHORT), "bare", strategy=Climber())
        with pytest.raises(kt.InvalidTransitionError, match="without keeping its final state"):
            await worker.extend("bare", "long", changes={"data": LONG}, strategy=Climber())
        with pytest.raises(kt.ParameterError, match="commission can't be changed"):
            await worker.extend("kept", "long", changes={"commission": 0.5}, strategy=Climber())


async def test_a_fork_keeps_the_past_and_changes_what_follows(dsn: str) -> None:
    async with kt.BacktestWorker.open(dsn) as worker:
        handle = worker.start(request(LONG), "one", strategy=Climber(), policy=EVERY, throttle=20_000)
        async for now in handle.progress(0.01):
            if now.bar_index > 2000:
                break
        await handle.cancel()
        cut = (await worker.operations.get("one")).checkpoint_bar
        assert cut is not None
        original = await worker.resume("one", strategy=Climber())
    async with kt.BacktestWorker.open(dsn) as worker:
        with pytest.raises(kt.InvalidTransitionError, match="without keeping its final state"):
            await worker.fork("one", "two", changes={"commission": 0.0}, strategy=Climber())
        handle = worker.start(request(LONG, seed=1), "three", strategy=Climber(), policy=EVERY, throttle=20_000)
        async for now in handle.progress(0.01):
            if now.bar_index > 2000:
                break
        await handle.cancel()
        cut = (await worker.operations.get("three")).checkpoint_bar
        assert cut is not None
        dear = await worker.fork("three", "dear", changes={"commission": 0.01}, strategy=Climber())
        same = await worker.resume("three", strategy=Climber())
        before = dear.fills[dear.fills["bar"] <= cut]
        assert (before == same.fills[same.fills["bar"] <= cut]).where(before.notna(), True).all(axis=None)
        after = dear.fills[dear.fills["bar"] > cut]
        assert len(after) > 10
        assert (after["fee"] / (after["quantity"] * after["price"]).abs()).round(9).eq(0.01).all()
        assert dear.final_equity < same.final_equity
        assert dear.audit().ok
        assert len(original.equity) == len(dear.equity)
        with pytest.raises(kt.ParameterError, match="lot_size can't be changed"):
            await worker.fork("three", "four", changes={"lot_size": 2.0}, strategy=Climber())


SOURCE = """
import ktrdr_async as kt

LEVEL = {level}

class Own(kt.Strategy):
    def on_bar(self, bar):
        bar.target_weight(0, LEVEL if bar.index % 50 < 25 else 0.0)
"""


async def test_an_accepted_mismatch_is_remembered_for_ever(
    dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for name, level in (("descent_one", 0.5), ("descent_two", 0.4)):
        (tmp_path / f"{name}.py").write_text(SOURCE.format(level=level))
    one, two = (importlib.import_module(name).Own for name in ("descent_one", "descent_two"))
    async with kt.BacktestWorker.open(dsn) as worker:
        handle = worker.start(request(LONG), "one", strategy=one(), throttle=20_000)
        async for now in handle.progress(0.01):
            if now.bar_index > 1000:
                break
        await handle.cancel()
        # The same class after an edit of what it uses: another module of the same name.
        two.__module__, two.__qualname__ = "descent_one", "Own"
        sys.modules["descent_one"] = sys.modules["descent_two"]
        with pytest.raises(kt.CheckpointMismatchError, match=r"strategy_source\.descent_one"):
            await worker.resume("one", strategy=two())
        assert (await worker.operations.get("one")).status is kt.Status.CANCELLED
        handle = worker.resume_handle("one", strategy=two(), accept_mismatch=True, throttle=20_000)
        async for now in handle.progress(0.01):
            if now.bar_index > 3000:
                break
        await handle.cancel()
        results = await worker.resume("one", strategy=two())  # the new checkpoint is of the new source
        assert len(results.accepted_mismatches) == 1
        assert "strategy_source.descent_one" in results.accepted_mismatches[0]
        assert any("went on in spite of a difference" in warning for warning in results.warnings)
        assert (await worker.results("one")).accepted_mismatches == results.accepted_mismatches
