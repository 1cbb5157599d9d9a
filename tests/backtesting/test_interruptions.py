"""X1: whatever interrupts a run, and wherever, it comes to the digest of a run that was never interrupted."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import msgspec
import pytest
from engine_runs import Hops, cancel_at, checkpoint, finish, hourly, through_json
from living import Busy, BusyAsync, Crossing, Living

import ktrdr_async as kt
from ktrdr_async.strategies.base import AnyStrategy

pytestmark = pytest.mark.anyio


class Drawing(kt.Strategy):
    """Draws at each bar, and after the last one."""

    def on_bar(self, bar: kt.Bar) -> None:
        bar.record(x=bar.rng.random())

    def on_end(self, bar: kt.Bar) -> None:
        bar.record(x=bar.rng.random())


async def test_what_the_closing_step_draws_is_the_same_after_a_resume_from_the_last_boundary() -> None:
    bars, request = hourly(120), kt.BacktestRequest()
    whole = await finish(kt.BacktestingEngine(request, bars, Drawing()))
    engine = kt.BacktestingEngine(request, bars, Drawing())
    await cancel_at(engine, 2)
    assert engine.boundary.bar_index == 119
    again = await finish(kt.BacktestingEngine(request, bars, Drawing()), checkpoint(engine))
    assert again.recorded_values == whole.recorded_values
    assert whole.recorded_values[-1][2] != whole.recorded_values[-2][2]


REQUEST = kt.BacktestRequest(initial_capital=50_000.0, seed=11)
KINDS = (Busy, BusyAsync, Crossing)


def engine_of(bars: kt.Bars, strategy: AnyStrategy, **kwargs: object) -> kt.BacktestingEngine:
    return kt.BacktestingEngine(REQUEST, bars, strategy, **kwargs)  # type: ignore[arg-type]


def whole(results: kt.BacktestResults) -> tuple[object, ...]:
    """All that a run comes to, also what its digest leaves out."""
    recorded = [(bar, name, value.hex()) for bar, name, value in results.recorded_values]
    return (results.digest, recorded, results.counters, results.unfilled_orders, results.metrics)


async def test_cancelled_at_each_of_200_yields() -> None:
    """A chain of runs, each cancelled one yield on; every checkpoint is that of a run that was never interrupted, and
    leads to its end."""
    bars = hourly(20_000)
    engine = engine_of(bars, Busy())
    async with aclosing(engine.run()) as blocks:
        digests = [engine.portfolio.state_digest(engine.boundary) async for _ in blocks]
    expected = engine.results()
    assert len(digests) == len(set(digests)) == 200
    assert len(expected.trade_records) > 500
    assert {trade.side for trade in expected.trade_records} == {1, -1}
    assert {event.symbol for event in expected.ledger} == {0, 1}
    state, equal = None, 0
    for at in range(1, 201):
        if at % 20 == 0:  # from the beginning, not from the checkpoint before
            state, engine = None, engine_of(bars, Busy())
            await cancel_at(engine, at)
        else:
            engine = engine_of(bars, Busy())
            await cancel_at(engine, 1, state)
        state = checkpoint(engine)
        assert (state.bar_index, state.state_digest) == (at * 100 - 1, digests[at - 1])
        results = await finish(engine_of(bars, Busy()), state, audited=at % 40 == 0)
        equal += whole(results) == whole(expected)
    assert equal == 200


@pytest.mark.parametrize("kind", [BusyAsync, Crossing])
async def test_cancelled_at_each_yield_in_the_other_kinds(kind: type[AnyStrategy]) -> None:
    bars = hourly(1_500)
    expected = whole(await finish(engine_of(bars, kind())))
    for at in range(1, 61):
        engine = engine_of(bars, kind(), block_bars=25)
        await cancel_at(engine, at)
        assert (
            whole(await finish(engine_of(bars, kind(), block_bars=25), checkpoint(engine), audited=False)) == expected
        )


@pytest.mark.parametrize("kind", KINDS)
async def test_cancelled_and_resumed_at_every_yield_in_a_chain(kind: type[AnyStrategy]) -> None:
    bars = hourly(1_500)
    expected = whole(await finish(engine_of(bars, kind())))
    state = None
    for number in range(50):
        engine = engine_of(bars, kind(), block_bars=30)
        await cancel_at(engine, 1, state)
        assert engine.boundary.bar_index == number * 30 + 29
        state = checkpoint(engine)
    assert whole(await finish(engine_of(bars, kind()), state)) == expected


@pytest.mark.parametrize("kind", KINDS)
async def test_block_sizes_give_one_result_and_resume_each_other(kind: type[AnyStrategy]) -> None:
    bars = hourly(700)
    expected = whole(await finish(engine_of(bars, kind())))
    digests = set()
    for size, turn in ((1, None), (7, None), (100, None), (1, Hops()), (7, Hops(3)), (1_000, Hops(2))):
        assert whole(await finish(engine_of(bars, kind(), block_bars=size, turn=turn))) == expected
    for size, at in ((1, 349), (7, 50), (50, 7)):  # each of these boundaries is at bar 349 or 348
        engine = engine_of(bars, kind(), block_bars=size)
        await cancel_at(engine, at + (size == 1))
        digests.add((engine.boundary.bar_index, checkpoint(engine).state_digest))
        for other in (1, 7, 100):
            resumed = engine_of(bars, kind(), block_bars=other)
            assert whole(await finish(resumed, checkpoint(engine), audited=False)) == expected
    assert digests == {(349, next(iter(digests))[1])}


@pytest.mark.parametrize("kind", KINDS)
async def test_the_boundary_after_a_resume_is_where_the_absolute_index_puts_it(kind: type[AnyStrategy]) -> None:
    bars = hourly(250)
    engine = engine_of(bars, kind(), block_bars=7)
    await cancel_at(engine, 5)
    seen = []
    async with aclosing(engine_of(bars, kind()).run(checkpoint(engine))) as blocks:
        async for block in blocks:
            assert block.timestamp == bars.timestamps[block.bar_index]
            seen.append(block.bar_index)
    assert engine.boundary.bar_index == 34
    assert seen == [99, 199, 249]


@pytest.mark.parametrize("kind", KINDS)
async def test_resumed_at_the_last_bar_only_the_closing_step_is_left(kind: type[AnyStrategy]) -> None:
    bars = hourly(300)
    expected = whole(await finish(engine_of(bars, kind())))
    engine = engine_of(bars, kind())
    await cancel_at(engine, 3)
    resumed = engine_of(bars, kind())
    blocks = [block async for block in resumed.run(checkpoint(engine))]
    assert blocks == []
    assert whole(resumed.results()) == expected
    done = engine_of(bars, kind())  # a checkpoint asked for after the end is still that of the last boundary
    await finish(done)
    assert checkpoint(done).state_digest == checkpoint(engine).state_digest


@pytest.mark.parametrize("kind", KINDS)
async def test_cancelled_in_every_pass_on(kind: type[AnyStrategy]) -> None:
    """The engine suspends between bars; some of these cancels come before the first boundary, which needs no row."""
    bars = hourly(160)
    expected = whole(await finish(engine_of(bars, kind())))
    counted = Hops()
    await finish(engine_of(bars, kind(), turn=counted, block_bars=20), audited=False)
    assert counted.passed >= len(bars) // 20
    for at in range(1, counted.passed + 1):
        engine = engine_of(bars, kind(), turn=Hops(cancel_at=at), block_bars=20)
        with pytest.raises(asyncio.CancelledError):
            await asyncio.create_task(finish(engine))
        assert engine.boundary.bar_index % 20 == 19
        state = None if engine.boundary.bar_index < 0 else checkpoint(engine)
        assert whole(await finish(engine_of(bars, kind()), state, audited=False)) == expected


async def test_an_engine_that_was_cancelled_before_its_first_boundary_has_no_checkpoint() -> None:
    bars = hourly(160)
    engine = engine_of(bars, Busy(), turn=Hops(cancel_at=3))
    with pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(finish(engine))
    assert engine.boundary.bar_index == -1
    with pytest.raises(ValueError, match="boundary is at bar -1"):
        kt.build_backtest_checkpoint_state(engine, -1, 0)


async def test_the_object_that_was_interrupted_can_run_again_from_its_beginning() -> None:
    """State that a cancelled run left in the strategy's object is not where the next run starts."""
    bars = hourly(400)
    expected = whole(await finish(engine_of(bars, Busy())))
    strategy = Busy()
    engine = engine_of(bars, strategy)
    await cancel_at(engine, 2)
    assert strategy.state != Living()
    assert whole(await finish(engine_of(bars, strategy))) == expected
    assert whole(await finish(engine_of(bars, strategy), checkpoint(engine))) == expected


async def test_one_checkpoint_serves_many_resumes_and_is_not_changed_by_them() -> None:
    bars = hourly(400)
    engine = engine_of(bars, Busy())
    await cancel_at(engine, 2)
    state = checkpoint(engine)
    before = state.to_dict()
    first = whole(await finish(engine_of(bars, Busy()), state))
    assert state.to_dict() == before
    assert whole(await finish(engine_of(bars, Busy()), through_json(state))) == first


async def test_checkpoints_while_it_runs_change_nothing() -> None:
    bars = hourly(600)
    expected = whole(await finish(engine_of(bars, Busy())))
    engine = engine_of(bars, Busy(), block_bars=10)
    async with aclosing(engine.run()) as blocks:
        async for _ in blocks:
            checkpoint(engine)
    assert whole(engine.results()) == expected


class Number(msgspec.Struct):
    number: float = 0.0


class Lossy(kt.Strategy):
    """For 50 bars an int stands in a float's field, which no float is equal to."""

    def __init__(self) -> None:
        self.state = Number()

    def on_bar(self, bar: kt.Bar) -> None:
        if bar.index == 120:
            self.state.number = 2**53 + 1
        if bar.index == 170:
            bar.target_weight(0, 0.5 if int(self.state.number) % 2 else -0.5)
            self.state.number = 0.0


@pytest.mark.parametrize("at", range(13, 18))
async def test_a_state_that_would_come_back_as_another_value_makes_no_checkpoint(at: int) -> None:
    """The engine proves it at each tenth boundary; a checkpoint of any other one has to prove it too."""
    engine = engine_of(hourly(300), Lossy(), block_bars=10)
    await cancel_at(engine, at)
    with pytest.raises(kt.UndeclaredStateError, match=r"Number\.number holds 9007199254740993"):
        checkpoint(engine)
