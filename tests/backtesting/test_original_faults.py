"""The faults of the original's engine, by name: each of them made a resumed result another one than an uninterrupted.

Those of its saving, its threads and its database are tested where these live.
"""

from __future__ import annotations

from contextlib import aclosing

import numpy as np
import pytest
from engine_runs import cancel_at, checkpoint, finish, flat_bars, hourly
from living import Busy, Crossing
from scripted import Scripted, quantity, scripted, weight

import ktrdr_async as kt

pytestmark = pytest.mark.anyio

REQUEST = kt.BacktestRequest(initial_capital=10_000.0, commission=0.0, slippage=0.0)
# Rises to a peak, falls, and stays below it after the cut.
PRICES = [10.0, 10.0, 20.0, 40.0, 30.0, 20.0, 15.0, 25.0, 12.0, 18.0, 22.0, 19.0] + [21.0, 23.0, 20.0] * 12
BARS = flat_bars(PRICES)


def buys() -> Scripted:
    return scripted(len(PRICES), {0: {0: quantity(500.0, "in")}, 40: {0: weight(0.0, "out")}})


async def both(
    strategy: type[Busy] | type[Crossing] | None, cut: int, bars: kt.Bars = BARS
) -> tuple[kt.BacktestResults, kt.BacktestResults]:
    """An uninterrupted run, and one that was cancelled after `cut` bars and resumed."""

    def made() -> kt.BacktestingEngine:
        return kt.BacktestingEngine(REQUEST, bars, buys() if strategy is None else strategy(), block_bars=1)

    engine = made()
    await cancel_at(engine, cut)
    assert engine.boundary.bar_index == cut - 1
    return await finish(made()), await finish(made(), checkpoint(engine))


async def test_pending_signals_are_saved() -> None:
    """An order that was decided before the cut and fills after it was lost."""
    engine = kt.BacktestingEngine(REQUEST, BARS, buys(), block_bars=1)
    await cancel_at(engine, 1)
    state = checkpoint(engine)
    assert [(o.symbol, o.lots, o.reason, o.tag) for o in state.waiting] == [(0, 500, "order", "in")]
    assert state.ledger == []
    results = await finish(kt.BacktestingEngine(REQUEST, BARS, buys()), state)
    assert [(e.bar, e.lots, e.tag) for e in results.ledger] == [(1, 500, "in"), (41, -500, "out")]


async def test_peak_and_drawdown_after_a_resume() -> None:
    """The peak was before the cut; starting anew from the resume point it would be the equity there."""
    whole, resumed = await both(None, 8)
    assert whole.metrics.max_drawdown == pytest.approx((5_000 + 500 * 12) / (5_000 + 500 * 40) - 1)
    after = whole.equity[8:]
    assert float((after / np.maximum.accumulate(after)).min()) - 1 > whole.metrics.max_drawdown
    assert resumed.metrics.max_drawdown == whole.metrics.max_drawdown
    assert resumed.metrics.longest_drawdown_bars == whole.metrics.longest_drawdown_bars


async def test_returns_and_sharpe_after_a_resume() -> None:
    """The returns before the cut were lost, and with them the ratio."""
    whole, resumed = await both(None, 20)
    assert whole.metrics.sharpe is not None
    returns = whole.equity[20:] / whole.equity[19:-1] - 1
    alone = returns.mean() / returns.std(ddof=1) * np.sqrt(365.25)
    assert abs(alone - whole.metrics.sharpe) > 0.01
    assert resumed.metrics == whole.metrics


async def test_excursions_after_a_resume() -> None:
    """The best price of a position that is held over the cut was before it, and so was its worst."""
    whole, resumed = await both(None, 10)
    (trade,) = whole.trade_records
    assert trade.mfe == 500 * 30.0
    assert trade.mae == 0.0
    assert resumed.trade_records == whole.trade_records
    engine = kt.BacktestingEngine(REQUEST, BARS, buys(), block_bars=1)
    await cancel_at(engine, 10)
    (position,) = checkpoint(engine).positions
    assert (position.entry_bar, position.entry_price, position.mae, position.mfe) == (1, 10.0, 0.0, 15_000.0)


async def test_the_equity_curve_is_whole_after_a_resume() -> None:
    """It came back as its samples, every hundredth value."""
    bars = hourly(1_000)
    whole, resumed = await both(Busy, 737, bars)
    assert not np.isnan(resumed.equity).any()
    assert resumed.equity.tobytes() == whole.equity.tobytes()
    engine = kt.BacktestingEngine(REQUEST, bars, Busy(), block_bars=1)
    await cancel_at(engine, 737)
    samples = checkpoint(engine).equity_samples
    assert [s.bar for s in samples] == list(range(0, 737, 100))
    assert [s.equity for s in samples] == whole.equity[[s.bar for s in samples]].tolist()
    assert [s.timestamp for s in samples] == bars.timestamps[[s.bar for s in samples]].tolist()


async def test_further_checkpoints_after_a_resume_work() -> None:
    """After a resume every later save failed with a logged KeyError. Here each is the uninterrupted run's."""
    bars = hourly(1_000)
    engine = kt.BacktestingEngine(REQUEST, bars, Busy())
    expected = {}
    async with aclosing(engine.run()) as blocks:
        async for block in blocks:
            expected[block.bar_index] = checkpoint(engine).to_dict()
    first = kt.BacktestingEngine(REQUEST, bars, Busy())
    await cancel_at(first, 3)
    resumed = kt.BacktestingEngine(REQUEST, bars, Busy())
    seen = []
    async with aclosing(resumed.run(checkpoint(first))) as blocks:
        async for block in blocks:
            assert checkpoint(resumed).to_dict() == expected[block.bar_index]
            seen.append(block.bar_index)
    assert seen == [399, 499, 599, 699, 799, 899, 999]


async def test_the_bar_index_is_absolute_after_a_resume() -> None:
    """It counted from the resume point, so that the second resume went on at the wrong bar."""
    bars = hourly(1_000)
    state = None
    for number in range(10):
        engine = kt.BacktestingEngine(REQUEST, bars, Busy())
        await cancel_at(engine, 1, state)
        state = checkpoint(engine)
        assert state.bar_index == number * 100 + 99
        assert state.current_date == str(np.datetime64(int(bars.timestamps[state.bar_index]), "ns")) + "Z"
        assert all(event.bar <= state.bar_index for event in state.ledger)
        assert [event.bar for event in state.ledger] == sorted(event.bar for event in state.ledger)
    whole, resumed = await both(Busy, 150, bars)
    assert [e.bar for e in resumed.ledger] == [e.bar for e in whole.ledger]
    assert [bar for bar, _, _ in resumed.recorded_values] == [bar for bar, _, _ in whole.recorded_values]


async def test_28_cut_points_give_28_equal_results() -> None:
    """Of the original's resumed results none was equal."""
    bars = hourly(2_900)
    equal = 0
    for strategy in (Busy, Crossing):
        expected = await finish(kt.BacktestingEngine(REQUEST, bars, strategy()))
        for cut in range(1, 15):
            engine = kt.BacktestingEngine(REQUEST, bars, strategy())
            await cancel_at(engine, cut * 2)
            results = await finish(kt.BacktestingEngine(REQUEST, bars, strategy()), checkpoint(engine))
            equal += results.digest == expected.digest and results.metrics == expected.metrics
    assert equal == 28
