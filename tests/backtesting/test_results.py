"""What a run came to: metrics in their degenerate cases, accounting and audit, frames, files, warnings, the digest."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest
from engine_runs import finish, flat_bars, hourly
from living import Busy
from scripted import order, quantity, scripted, weight

import ktrdr_async as kt
from ktrdr_async.backtesting.results import BacktestResults

pytestmark = pytest.mark.anyio

FREE = kt.BacktestRequest(initial_capital=1_000.0, commission=0.0, slippage=0.0)
nan = math.nan


async def run(bars: kt.Bars, at: dict[int, Any], request: kt.BacktestRequest = FREE, **kwargs: Any) -> BacktestResults:
    return await finish(kt.BacktestingEngine(request, bars, scripted(len(bars), at), **kwargs))


# Metrics where there is little to measure.


async def test_no_trades_and_flat_equity() -> None:
    results = await run(flat_bars([10.0, 11.0, 12.0] * 20), {})
    m = results.metrics
    assert (m.trades, m.fees, m.turnover, m.exposure, m.costs_share) == (0, 0.0, 0.0, 0.0, 0.0)
    assert [m.win_rate, m.profit_factor, m.average_trade, m.best_trade, m.worst_trade] == [None] * 5
    assert [m.sharpe, m.sortino, m.sharpe_per_bar] == [None] * 3
    assert (m.volatility, m.annual_return, m.total_return, m.max_drawdown, m.longest_drawdown_bars) == (0, 0, 0, 0, 0)
    assert m.notes == ["the returns don't vary: no Sharpe ratio"]
    assert m.buy_and_hold_return == pytest.approx(12 / 11 - 1)
    assert results.audit().ok


async def test_one_bar() -> None:
    results = await run(flat_bars([10.0]), {0: {0: order(3.0, "late")}})
    m = results.metrics
    assert (m.bars, m.trades, m.final_equity) == (1, 0, 1_000.0)
    assert [m.buy_and_hold_return, m.annual_return, m.sharpe, m.periods_per_year, m.volatility] == [None] * 5
    assert results.unfilled.to_dict("records") == [{"symbol": "A", "quantity": 3.0, "tag": "late"}]
    assert "need 30 days" in m.notes[0]


async def test_under_30_days_nothing_is_annualised_and_the_reason_is_given() -> None:
    prices = [10.0 + (i % 3) for i in range(31)]
    short = await run(flat_bars(prices[:30]), {0: {0: weight(0.5)}})
    m = short.metrics
    assert [m.annual_return, m.volatility, m.sharpe, m.sortino, m.sharpe_per_bar] == [None] * 5
    assert m.notes == ["annualised figures need 30 days; the bars span 29.0"]
    assert m.notes[0] in short.warnings
    assert m.periods_per_year == pytest.approx(365.25)
    full = (await run(flat_bars(prices), {0: {0: weight(0.5)}})).metrics
    assert full.sharpe is not None
    assert full.notes == []


async def test_ruin() -> None:
    prices = [10.0, 10.0, 25.0, 24.0] + [10.0] * 40
    results = await run(flat_bars(prices), {0: {0: weight(-1.0)}, 5: {0: weight(1.0)}, 6: {0: order(1.0)}})
    m = results.metrics
    assert (results.ruined_at, m.final_equity, m.total_return) == (2, -400.0, pytest.approx(-1.4))
    assert m.max_drawdown == pytest.approx(-1.5)
    assert [m.sharpe, m.sortino, m.volatility, m.annual_return] == [None] * 4
    assert m.notes == ["annualised figures and Sharpe ratios need an equity above zero throughout"]
    assert "equity was gone at bar 2; 2 later orders were refused" in results.warnings
    assert [e.reason for e in results.ledger] == ["order", "ruin"]


async def test_wins_losses_and_what_they_come_to() -> None:
    # 10 units: 10 -> 12 (+20), 12 -> 11 (-10); fees 0.
    bars = flat_bars([10.0, 10.0, 12.0, 12.0, 11.0] + [11.0] * 35)
    at = {0: {0: quantity(10)}, 1: {0: quantity(0)}, 2: {0: quantity(10)}, 3: {0: quantity(0)}}
    m = (await run(bars, at)).metrics
    assert (m.trades, m.win_rate, m.profit_factor, m.average_trade) == (2, 0.5, 2.0, 5.0)
    assert (m.best_trade, m.worst_trade, m.net_pnl) == (20.0, -10.0, 10.0)
    assert m.turnover == pytest.approx((100 + 120 + 120 + 110) / 1_000)
    assert m.exposure == 2 / 40
    only_won = (await run(bars, {0: {0: quantity(10)}, 1: {0: quantity(0)}})).metrics
    assert (only_won.win_rate, only_won.profit_factor) == (1.0, None)


async def test_costs_are_fees_and_what_slippage_took() -> None:
    request = kt.BacktestRequest(initial_capital=1_000.0, commission=0.01, slippage=0.25)
    results = await run(flat_bars([8.0] * 40), {0: {0: quantity(10)}, 20: {0: quantity(0)}}, request)
    # Bought at 10, sold at 6: 20 each way; fees 1 and 0.6.
    assert results.metrics.slippage_paid == pytest.approx(40.0)
    assert results.metrics.fees == pytest.approx(1.6)
    assert results.metrics.costs_share == pytest.approx(0.0416)


async def test_options_of_the_metrics_change_no_digest() -> None:
    results = await finish(kt.BacktestingEngine(FREE, hourly(2_000), Busy()))
    digest = results.digest
    a, b = results.compute_metrics(risk_free=0.05), results.compute_metrics(bars_per_year=6_000.0)
    assert a.sharpe is not None
    assert results.metrics.sharpe is not None
    assert a.sharpe < results.metrics.sharpe
    assert (b.periods_per_year, results.digest) == (6_000.0, digest)


# Accounting.


def tampered(results: BacktestResults, **changes: Any) -> BacktestResults:
    kept = {
        "request": results.request, "bars": results.bars, "strategy": results.strategy, "ledger": results.ledger,
        "recorded": results.recorded_values, "counters": results.counters, "unfilled": results.unfilled_orders,
        "equity": results.equity.copy(),
    }  # fmt: skip
    return BacktestResults(**(kept | changes))


async def test_an_audit_can_fail() -> None:
    costly = kt.BacktestRequest(initial_capital=1_000.0)
    results = await finish(kt.BacktestingEngine(costly, hourly(1_000), Busy()))
    assert results.audit().ok is True
    middle = len(results.ledger) // 2
    for name, change in (("price", 0.01), ("fee", 0.01), ("lots", 1), ("cash_after", 0.01)):
        ledger = list(results.ledger)
        ledger[middle] = msgspec.structs.replace(ledger[middle], **{name: getattr(ledger[middle], name) + change})
        assert not tampered(results, ledger=tuple(ledger)).audit().ok, name
    assert not tampered(results, ledger=results.ledger[:-1]).audit().ok
    assert not tampered(results, ledger=results.ledger[:middle] + results.ledger[middle + 1 :]).audit().ok
    for value in (results.equity[500] + 0.01, nan):
        equity = results.equity.copy()
        equity[500] = value
        assert not tampered(results, equity=equity).audit().ok, value
    request = msgspec.structs.replace(costly, initial_capital=1_001.0)
    assert not tampered(results, request=request).audit().ok
    trades = results.trade_records
    wrong = tampered(results)
    wrong.__dict__["trade_records"] = [
        msgspec.structs.replace(trades[0], net_pnl=trades[0].net_pnl + 0.01),
        *trades[1:],
    ]
    assert not wrong.audit().ok


async def test_fractional_lots_come_back_to_zero() -> None:
    request = msgspec.structs.replace(FREE, lot_size=1e-6)
    at = {0: {0: order(0.1)}, 1: {0: order(0.2)}, 2: {0: order(-0.3)}}
    results = await run(flat_bars([100.0, 101.0, 99.0, 102.0, 100.0]), at, request)
    assert [e.lots for e in results.ledger] == [100_000, 200_000, -300_000]
    assert len(results.trade_records) == 1
    assert results.open_positions == {}
    assert results.fills["quantity"].tolist() == pytest.approx([0.1, 0.2, -0.3], rel=1e-15)


async def test_round_trips_are_first_in_first_out() -> None:
    request = msgspec.structs.replace(FREE, commission=0.01, initial_capital=10_000.0)
    at = {0: {0: order(10)}, 1: {0: order(20)}, 2: {0: order(-15)}, 3: {0: order(-25)}}
    results = await run(flat_bars([10.0, 10.0, 12.0, 11.0, 13.0, 9.0]), at, request)
    trips = results.round_trips
    # bought 10 at 10 and 20 at 12; sold 15 at 11 and 15 + (short 10) at 13; the short goes at 9.
    assert trips[["entry_bar", "exit_bar", "quantity", "entry_price", "exit_price"]].to_numpy().tolist() == [
        [1, 3, 10, 10, 11], [2, 3, 5, 12, 11], [2, 4, 15, 12, 13], [4, 5, 10, 13, 9],
    ]  # fmt: skip
    assert trips["side"].tolist() == ["long", "long", "long", "short"]
    assert trips["fees"].sum() == pytest.approx(results.metrics.fees)
    assert trips["net_pnl"].sum() == pytest.approx(results.metrics.net_pnl)
    assert trips["net_pnl"].iloc[0] == pytest.approx(10.0 - 1.0 - 1.1)


async def test_an_order_waits_over_gaps_and_is_unfilled_at_the_end() -> None:
    bars = flat_bars([10.0] * 8, [20.0, nan, nan, 25.0, nan, nan, nan, nan])
    at = {0: {1: order(5.0, "in")}, 3: {1: quantity(2.0, "less")}, 7: {0: order(1.0)}}
    results = await run(bars, at)
    assert [(e.bar, e.symbol, e.lots, e.reason, e.tag) for e in results.ledger] == [
        (3, 1, 5, "order", "in"),
        (7, 1, -5, "forced_close", None),
    ]
    assert results.unfilled.to_dict("records") == [
        {"symbol": "A", "quantity": 1.0, "tag": None}, {"symbol": "B", "quantity": -3.0, "tag": "less"},
    ]  # fmt: skip
    assert results.stale_bars == {"B": 4}
    assert any(w.startswith("B was held for 4 bars at which it had no bar") for w in results.warnings)


async def test_without_a_forced_close() -> None:
    request = msgspec.structs.replace(FREE, force_close=False)
    results = await run(flat_bars([10.0, 10.0, 12.0]), {0: {0: quantity(10.0)}}, request)
    assert results.open_positions == {"A": 10.0}
    assert (results.final_equity, len(results.ledger), results.trade_records) == (1_020.0, 1, [])
    assert "left open: 10 A" in results.warnings
    assert results.outcome().open_positions == ["A"]
    closed = await run(flat_bars([10.0, 10.0, 12.0]), {0: {0: quantity(10.0)}})
    assert closed.open_positions == {}
    assert closed.ledger[-1].reason == "forced_close"


async def test_min_trade_skips_small_rebalances() -> None:
    request = msgspec.structs.replace(FREE, min_trade=0.1)
    at = {0: {0: weight(0.5)}, 1: {0: weight(0.41)}, 2: {0: weight(0.4)}, 3: {0: weight(0.0)}}
    results = await run(flat_bars([10.0] * 6), at, request)
    assert [(e.bar, e.lots) for e in results.ledger] == [(1, 50), (3, -10), (4, -40)]
    assert results.counters.ordered_rows == 3


async def test_a_cut_fill_keeps_what_was_requested() -> None:
    results = await run(flat_bars([10.0, 12.5, 12.5], [10.0, 10.0, 10.0]), {0: {0: weight(1.0), 1: weight(1.0)}})
    assert (results.ledger[0].lots, results.ledger[0].requested) == (80, 100)
    assert results.fills["requested"].iloc[0] == 100.0
    assert (results.counters.cut, results.counters.cut_to_zero) == (2, 1)
    assert "2 orders were cut to the buying power, 1 of them to nothing" in results.warnings
    assert json.loads(json.dumps(results.to_dict(), allow_nan=False))["counters"]["cut"] == 2


async def test_recorded_values_as_a_frame() -> None:
    class Recording(kt.Strategy):
        def on_bar(self, bar: kt.Bar) -> None:
            if bar.index == 1:
                bar.record(a=1.0, b=-0.0)
            if bar.index == 3:
                bar.record(b=nan)
                bar.record(c=math.inf, a=2.0)

        def on_end(self, bar: kt.Bar) -> None:
            bar.record(end=bar.portfolio.equity)

    frame = (await finish(kt.BacktestingEngine(FREE, flat_bars([10.0] * 5), Recording()))).recorded
    assert frame.columns.tolist() == ["bar", "time", "a", "b", "c", "end"]
    assert frame["bar"].tolist() == [1, 3, 4]
    assert frame["a"].tolist()[:2] == [1.0, 2.0]
    assert math.copysign(1, frame["b"][0]) == -1
    assert (frame["c"][1], frame["end"][2]) == (math.inf, 1_000.0)
    assert str(frame["time"].dtype) == "datetime64[ns, UTC]"


def test_on_change_keeps_changes_alone() -> None:
    rows = np.array([[0.0, nan], [0.5, 0.2], [0.5, 0.2], [nan, 0.2], [0.5, -0.2], [0.0, -0.2]])
    expected = np.array([[nan, nan], [0.5, 0.2], [nan, nan], [nan, nan], [nan, -0.2], [0.0, nan]])
    before = rows.copy()
    assert np.array_equal(kt.on_change(rows), expected, equal_nan=True)
    assert np.array_equal(rows, before, equal_nan=True)
    index = pd.date_range("2024-01-01", periods=6, tz="UTC")
    frame = pd.DataFrame(rows, columns=["A", "B"], index=index)
    assert np.array_equal(kt.on_change(frame).to_numpy(), expected, equal_nan=True)
    assert kt.on_change(frame).index.equals(index)
    assert np.array_equal(kt.on_change(frame["A"]).to_numpy(), expected[:, 0], equal_nan=True)
