"""The oracle itself, pinned: examples worked out on paper, invariants on random markets, another package's fills."""

import importlib.util
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from markets import first_bars, random_market, random_quantities, random_script, random_terms, random_weights, script_of
from numpy.typing import NDArray
from oracle import (
    DAY_NS,
    Decision,
    Decisions,
    Market,
    Outcome,
    Snapshot,
    Terms,
    Unfilled,
    metrics,
    run,
    whole_lots,
)

nan = math.nan
Bar = tuple[float, float, float, float]
GAP: Bar = (nan, nan, nan, nan)


def market_of(*symbols: list[Bar]) -> Market:
    """A daily market from one list of (open, high, low, close) a symbol."""
    prices = np.array(symbols, dtype=np.float64).transpose(2, 1, 0)
    timestamps = np.arange(prices.shape[1], dtype=np.int64) * DAY_NS
    return Market(timestamps, *(np.ascontiguousarray(p) for p in prices))


def flat(*prices: float) -> list[Bar]:
    """Bars whose four prices are one; NaN is a missing bar."""
    return [(p, p, p, p) for p in prices]


def weight(w: float) -> Decision:
    return Decision("weight", w)


def quantity(q: float) -> Decision:
    return Decision("quantity", q)


def order(q: float, tag: str = "") -> Decision:
    return Decision("order", q, tag)


def script(n: int, at: dict[int, Decisions]) -> list[Decisions]:
    return [at.get(t, {}) for t in range(n)]


def short(outcome: Outcome) -> list[tuple[int, int, int, int, float, str, str]]:
    return [(f.bar, f.symbol, f.lots, f.requested, f.price, f.part, f.reason) for f in outcome.fills]


# Examples on paper. Slippage and commission are 0 and capital is 1000 where nothing else is said.


def test_flip() -> None:
    # bar 0, close 10, w = 0.5:  500 / (10 * 1.01) = 49.504.. -> 49
    # bar 1, open 10: buy 49: notional 490, fee 4.90, cash 505.10; close 12: equity 505.10 + 588 = 1093.10
    #   w = -0.5: 546.55 / (12 * 1.01 = 12.12) = 45.09.. -> -45; order -45 - 49 = -94
    # bar 2, open 11: close 49: +539 - 5.39 -> 1038.71; open -45 (limit 1038.71 / 11.11 = 93): +495 - 4.95 -> 1528.76
    #   close 10: equity 1528.76 - 450 = 1078.76
    # end: buy 45 at 10: -450 - 4.50 -> 1074.26
    # long: P&L 539 - 490 - 4.90 - 5.39 = 38.71; flow -494.90; bar 1 low 9: -53.90, high 12: 93.10; exit 11: 44.10
    # short: P&L 495 - 450 - 4.95 - 4.50 = 35.55; flow 490.05; bar 2 low 9: 85.05, high 12: -49.95; exit 10: 40.05
    market = market_of([(10, 10, 10, 10), (10, 12, 9, 12), (11, 12, 9, 10)])
    decisions = script(3, {0: {0: weight(0.5)}, 1: {0: weight(-0.5)}})
    got = run(market, decisions, Terms(initial_capital=1000, commission=0.01))
    assert short(got) == [
        (1, 0, 49, 49, 10.0, "open", "order"),
        (2, 0, -49, -49, 11.0, "close", "order"),
        (2, 0, -45, -45, 11.0, "open", "order"),
        (2, 0, 45, 45, 10.0, "close", "forced_close"),
    ]
    assert [f.fee for f in got.fills] == pytest.approx([4.90, 5.39, 4.95, 4.50], rel=1e-12)
    assert [f.cash for f in got.fills] == pytest.approx([505.10, 1038.71, 1528.76, 1074.26], rel=1e-12)
    assert got.equity == pytest.approx([1000, 1093.10, 1074.26], rel=1e-12)
    long, sold = got.trades
    assert long[:5] == (0, 1, 1, 2, 49)
    assert long[5:] == pytest.approx((10, 11, 10.29, 38.71, -53.90, 93.10), rel=1e-12)
    assert sold[:5] == (0, -1, 2, 2, 45)
    assert sold[5:] == pytest.approx((11, 10, 9.45, 35.55, -49.95, 85.05), rel=1e-12)
    assert got.unfilled == []
    assert got.cuts == got.cuts_to_zero == got.zero_lots == 0


def test_slippage_and_commission_in_price_size_and_limit() -> None:
    # All exact in binary: slippage 1/4, commission 1/4. w = 1: 1000 / (16 * 1.25 * 1.25 = 25) = 40.
    # bar 1, open 20: room for 1000 / (20 * 1.25 * 1.25 = 31.25) = 32; at 25: notional 800, fee 200, cash 0.
    # close 16: equity 512. bar 2, open 32: sell at 24: +768 - 192 = 576.
    market = market_of([(16, 16, 16, 16), (20, 20, 16, 16), (32, 32, 32, 32)])
    got = run(market, script(3, {0: {0: weight(1)}, 1: {0: weight(0)}}), Terms(1000.0, 0.25, 0.25))
    assert [(f.lots, f.requested, f.price, f.fee, f.cash) for f in got.fills] == [
        (32, 40, 25.0, 200.0, 0.0),
        (-32, -32, 24.0, 192.0, 576.0),
    ]
    assert got.equity.tolist() == [1000.0, 512.0, 576.0]
    # flow -1000; bar 1 low 16: 512 - 1000 = -488, high 20: -360; exit at 24: 768 - 1000 = -232
    assert [(t.net_pnl, t.mae, t.mfe) for t in got.trades] == [(-424.0, -488.0, -232.0)]


@pytest.mark.parametrize(
    ("w", "open_price", "filled", "cash"),
    # 1000 / 10 = 100 lots are wanted; at 12.5 there is room for 1000 / 12.5 = 80, on either side; at 8 for 125.
    [(1.0, 12.5, 80, 0.0), (-1.0, 12.5, -80, 2000.0), (1.0, 8.0, 100, 200.0), (-1.0, 8.0, -100, 1800.0)],
)
def test_cut(w: float, open_price: float, filled: int, cash: float) -> None:
    market = market_of(flat(10, open_price, open_price))
    got = run(market, script(3, {0: {0: weight(w)}}), Terms(1000.0, force_close=False))
    assert short(got) == [(1, 0, filled, 100 if w > 0 else -100, open_price, "open", "order")]
    assert got.cash == cash
    assert (got.cuts, got.cuts_to_zero) == (int(abs(filled) < 100), 0)
    assert got.unfilled == []  # what was cut away doesn't wait


def test_cut_to_zero_is_counted_and_is_no_fill() -> None:
    # Both want 100 lots at 10. A takes all 1000; free is 0 for B. A short in A leaves B as little: 2000 - 1000 - 1000.
    for w in (1.0, -1.0):
        market = market_of(flat(10, 10), flat(10, 10))
        got = run(market, script(2, {0: {0: weight(w), 1: weight(1)}}), Terms(1000.0, force_close=False))
        assert [(f.symbol, f.lots) for f in got.fills] == [(0, 100 if w > 0 else -100)]
        assert (got.cuts, got.cuts_to_zero) == (0, 1)


def test_closing_parts_of_all_symbols_fund_opening_parts() -> None:
    # bar 1: B long 100 at 10, cash 0. At close 1: A to 1 (1000 / 10 = 100 lots), B to 0.
    # bar 2: A's order stands first, but B's close at 9 comes first: cash 900; A: free 900 -> cut to 90; cash 0.
    # bar 3: A to -0.5: equity 900, price 10: 45 -> order -135: close 90 (+900), free 900, open -45: cash 1350.
    market = market_of(flat(10, 10, 10, 10), flat(10, 10, 9, 9))
    decisions = script(4, {0: {1: weight(1)}, 1: {0: weight(1), 1: weight(0)}, 2: {0: weight(-0.5)}})
    got = run(market, decisions, Terms(1000.0, force_close=False))
    assert [(f.bar, f.symbol, f.lots, f.requested, f.part, f.cash) for f in got.fills] == [
        (1, 1, 100, 100, "open", 0.0),
        (2, 1, -100, -100, "close", 900.0),
        (2, 0, 90, 100, "open", 0.0),
        (3, 0, -90, -90, "close", 900.0),
        (3, 0, -45, -45, "open", 1350.0),
    ]
    assert (got.cuts, got.cuts_to_zero) == (1, 0)
    assert [(t.symbol, t.entry_bar, t.exit_bar, t.net_pnl) for t in got.trades] == [(1, 1, 2, -100.0), (0, 2, 3, 0.0)]
    assert [(t.symbol, t.lots, t.net_pnl) for t in got.open_trades] == [(0, 45, 0.0)]


def test_missing_bars() -> None:
    # B has no bar at 0, 2, 3. bar 1: both to 0.4: A 400 / 10 = 40; B 400 / 20 = 20.
    # bar 2: A fills (cash 600); B waits. bar 3: A to 0.
    # bar 4: A closes at 10 (1000); B opens at 25, 20 lots: 500.
    # bar 5: B is gone: marked at 25: equity 1000. Closed at the end at 25, bar 5; bar 5 gives no excursion.
    market = market_of(flat(10, 10, 10, 10, 10, 10), [GAP, *flat(20), GAP, GAP, (25, 30, 24, 25), GAP])
    decisions = script(6, {1: {0: weight(0.4), 1: weight(0.4)}, 3: {0: weight(0)}, 4: {1: order(5)}})
    got = run(market, decisions, Terms(1000.0))
    assert short(got) == [
        (2, 0, 40, 40, 10.0, "open", "order"),
        (4, 0, -40, -40, 10.0, "close", "order"),
        (4, 1, 20, 20, 25.0, "open", "order"),
        (5, 1, -20, -20, 25.0, "close", "forced_close"),
    ]
    assert got.equity.tolist() == [1000.0] * 6
    assert [(t.mae, t.mfe) for t in got.trades] == [(0.0, 0.0), (-20.0, 100.0)]
    assert got.unfilled == [Unfilled(1, 5, "order", "")]


def test_free_marks_a_symbol_without_a_bar_at_its_last_close() -> None:
    # B: 50 lots at 10, then its close is 8 and its bar at 2 is missing: mark 8. Equity at close 1 is 500 + 400 = 900,
    # so A wants 90 lots; free = 500 + 400 - 400 = 500 -> 50.
    market = market_of(flat(10, 10, 10), [(10, 10, 10, 10), (10, 10, 8, 8), GAP])
    got = run(market, script(3, {0: {1: weight(0.5)}, 1: {0: weight(1)}}), Terms(1000.0, force_close=False))
    assert [(f.symbol, f.lots, f.requested) for f in got.fills] == [(1, 50, 50), (0, 50, 90)]
    # B short: cash 1500 after it, mark 8: free = 1500 - 400 - 400 = 700 -> 70 of (1500 - 400) / 10 = 110.
    short_b = script(3, {0: {1: weight(-0.5)}, 1: {0: weight(1)}})
    got = run(market, short_b, Terms(1000.0, force_close=False))
    assert [(f.symbol, f.lots, f.requested) for f in got.fills] == [(1, -50, -50), (0, 70, 110)]
    # With a bar at 2 its mark is the open there, 12, not the close before: 1500 - 600 - 600 = 300 -> 30.
    market = market_of(flat(10, 10, 10), [(10, 10, 10, 10), (10, 10, 8, 8), (12, 12, 8, 8)])
    got = run(market, short_b, Terms(1000.0, force_close=False))
    assert [(f.symbol, f.lots, f.requested) for f in got.fills] == [(1, -50, -50), (0, 30, 110)]


def test_waiting_orders_add_up_and_targets_replace() -> None:
    # B has bars at 0 and 5 alone, so that all wait. Targets are less what is held (0), not less what waits.
    market = market_of(flat(10, 10, 10, 10, 10, 10), flat(10, nan, nan, nan, nan, 10))

    def waits(at: dict[int, Decision | list[Decision]]) -> list[int]:
        got = run(market, script(6, {t: {1: d} for t, d in at.items()}), Terms(1000.0, force_close=False))
        return [f.lots for f in got.fills]

    assert waits({0: order(3), 1: order(4)}) == [7]
    assert waits({0: [order(3), order(4), order(-1.5)]}) == [6]  # each floored toward zero: 3 + 4 - 1
    assert waits({0: order(3), 1: order(-3)}) == []
    assert waits({0: weight(0.5), 1: order(4)}) == [54]
    assert waits({0: order(4), 1: weight(0.5)}) == [50]
    assert waits({0: weight(0.5), 1: quantity(20)}) == [20]
    assert waits({0: weight(0.5), 1: weight(0)}) == []
    assert waits({0: [weight(0.5), quantity(7)]}) == [7]
    assert waits({0: weight(0.5), 1: weight(nan)}) == [50]


def test_ruin() -> None:
    # w = -1: short 100 at 10: cash 2000. Close 25: equity 2000 - 2500 = -500: ruined at bar 2.
    # The order and weight of bar 2 and later are ignored. bar 3: buy 100 at 24: cash -400. Nothing after.
    market = market_of(flat(10, 10, 25, 24, 10, 10), flat(10, 10, 10, 10, 10, 10))
    decisions = script(6, {0: {0: weight(-1)}, 2: {0: order(7), 1: weight(1)}, 4: {0: weight(1), 1: order(1)}})
    got = run(market, decisions, Terms(1000.0))
    assert short(got) == [(1, 0, -100, -100, 10.0, "open", "order"), (3, 0, 100, 100, 24.0, "close", "ruin")]
    assert got.ruined_at == 2
    assert got.equity.tolist() == [1000.0, 1000.0, -500.0, -400.0, -400.0, -400.0]
    assert [t.net_pnl for t in got.trades] == [-1400.0]
    assert got.unfilled == []


def test_ruin_replaces_what_waits_and_waits_for_the_next_bar() -> None:
    # A short 80 at 10, B long 20 at 10 (cash 1600). bar 2: A 25, B missing: 1600 - 2000 + 200 = -200: ruined.
    # B's waiting order (+3 of bar 1) gives way to -20, which finds no bar: unfilled, and the closing step sells B.
    market = market_of(flat(10, 10, 25, 20, 20), flat(10, 10, nan, nan, nan))
    decisions = script(5, {0: {0: order(-80), 1: order(20)}, 1: {1: order(3)}})
    got = run(market, decisions, Terms(1000.0))
    assert [(f.bar, f.symbol, f.lots, f.part, f.reason) for f in got.fills] == [
        (1, 0, -80, "open", "order"),
        (1, 1, 20, "open", "order"),
        (3, 0, 80, "close", "ruin"),
        (4, 1, -20, "close", "forced_close"),
    ]
    assert got.unfilled == [Unfilled(1, -20, "ruin", "")]
    assert got.equity.tolist() == [1000.0, 1000.0, -200.0, 200.0, 200.0]  # no way back: equity above 0 changes nothing


def test_ruin_at_exactly_zero() -> None:
    got = run(market_of(flat(10, 10, 20, 20)), script(4, {0: {0: order(-100)}}), Terms(1000.0))
    assert got.ruined_at == 2
    assert got.equity.tolist() == [1000.0, 1000.0, 0.0, 0.0]


def test_forced_close() -> None:
    # bar 1: buy 10 at 10: fee 1, cash 899; bar 2 close 12: equity 899 + 120 = 1019.
    # end: sell at 12 * 0.5 = 6 (slippage 1/2 so that it shows; the buy at 15: notional 150, fee 1.5, cash 848.5).
    terms = Terms(1000.0, commission=0.01, slippage=0.5)
    market = market_of([(10, 10, 10, 10), (10, 11, 9, 10), (10, 13, 8, 12)])
    decisions = script(3, {0: {0: order(10)}, 2: {0: order(1, "late")}})
    got = run(market, decisions, terms)
    # end: +60 - 0.6: cash 907.9; P&L -92.1; flow -151.5: low 8: -71.5, high 13: -21.5, exit at 6: -91.5
    assert [(f.bar, f.lots, f.price, f.reason) for f in got.fills] == [
        (1, 10, 15.0, "order"),
        (2, -10, 6.0, "forced_close"),
    ]
    assert got.equity == pytest.approx([1000, 948.5, 907.9], rel=1e-12)
    assert got.trades[0][3:] == pytest.approx((2, 10, 15, 6, 2.1, -92.1, -91.5, -21.5), rel=1e-12)
    assert got.unfilled == [Unfilled(0, 1, "order", "late")]
    assert got.open_trades == []

    kept = run(market, decisions, Terms(1000.0, commission=0.01, slippage=0.5, force_close=False))
    assert kept.equity == pytest.approx([1000, 948.5, 968.5], rel=1e-12)
    assert (len(kept.fills), kept.trades, kept.lots) == (1, [], (10,))
    (held,) = kept.open_trades
    assert held[:5] == (0, 1, 1, -1, 10)
    assert math.isnan(held.exit_price)
    assert held[7:] == pytest.approx((1.5, -31.5, -71.5, -21.5), rel=1e-12)


def test_partial_reduction_is_one_trade() -> None:
    # buy 40 at 10, sell 10 at 12, buy 20 at 11, sell 5 and 45 at 13. Entry (400 + 220) / 60, exit (120 + 650) / 60.
    # flows: -400, -280, -500, -435, then +585: P&L 150. Largest held 50.
    # Excursions: bar 1: 0; bar 2: 30 * 12 - 280 = 80; bar 3: 50 * 11 - 500 = 50; bar 4: 45 * 13 - 435 = 150; exit: 150.
    targets = (40, 30, 50, 45, 0)
    decisions = script(6, {t: {0: quantity(q)} for t, q in enumerate(targets)})
    got = run(market_of(flat(10, 10, 12, 11, 13, 13)), decisions, Terms(1000.0))
    assert [(f.lots, f.part) for f in got.fills] == [
        (40, "open"),
        (-10, "close"),
        (20, "open"),
        (-5, "close"),
        (-45, "close"),
    ]
    (trade,) = got.trades
    assert trade[:5] == (0, 1, 1, 5, 50)
    assert trade[5:] == pytest.approx((620 / 60, 770 / 60, 0, 150, 0, 150), rel=1e-12)


def test_min_trade() -> None:
    # 10 % of 1000 = 100 = 10 lots at 10. bar 1: 50 lots. To 0.41: order -9: skipped. To 0.4: -10 isn't less: done.
    # To 0.3 is 10 again; then an order() of 1 isn't asked; then -> 0 from 1 lot isn't either.
    market = market_of(flat(*[10.0] * 6))
    terms = Terms(1000.0, min_trade=0.1, force_close=False)
    decisions = script(
        6, {0: {0: weight(0.5)}, 1: {0: weight(0.41)}, 2: {0: weight(0.4)}, 3: {0: order(-39)}, 4: {0: weight(0)}}
    )
    got = run(market, decisions, terms)
    assert [(f.bar, f.lots) for f in got.fills] == [(1, 50), (3, -10), (4, -39), (5, -1)]
    assert got.skipped == 1


def test_min_trade_takes_a_waiting_order_back() -> None:
    # B's order of 50 waits; at bar 1 a target of 5 (50 < 100) is skipped, and so nothing waits any more.
    market = market_of(flat(10, 10, 10, 10), flat(10, nan, nan, 10))
    decisions = script(4, {0: {1: quantity(50)}, 1: {1: quantity(5)}})
    got = run(market, decisions, Terms(1000.0, min_trade=0.1))
    assert (got.fills, got.skipped, got.unfilled) == ([], 1, [])


def test_fractional_lots_come_back_to_zero() -> None:
    # 0.1 + 0.2 - 0.3 isn't 0 in floats: 100000 + 200000 - 300000 lots of 1e-6 is.
    market = market_of(flat(100, 100, 100, 100, 100))
    decisions = script(5, {0: {0: order(0.1)}, 1: {0: order(0.2)}, 2: {0: order(-0.3)}})
    got = run(market, decisions, Terms(1000.0, lot_size=1e-6))
    assert [(f.lots, f.part) for f in got.fills] == [(100_000, "open"), (200_000, "open"), (-300_000, "close")]
    assert (got.lots, len(got.trades)) == ((0,), 1)
    assert got.fills[0].cash == pytest.approx(990.0, rel=1e-12)
    # w = 1/3: 333.33.. / (100 * 1e-6) = 3333333.33
    assert run(market, script(5, {0: {0: weight(1 / 3)}}), Terms(1000.0, lot_size=1e-6)).fills[0].lots == 3_333_333


def test_whole_lots() -> None:
    assert 0.3 / 0.1 < 3
    assert whole_lots(0.3 / 0.1) == 3
    assert [whole_lots(q) for q in (0.0, 0.5, 0.999999998, 0.9999999995, 1.0, 7.9, 8.0)] == [0, 0, 0, 1, 1, 7, 8]
    # Relative: within 1e-9 * 1_000_000 = 0.001 of the next integer.
    assert [whole_lots(q) for q in (999_999.9985, 999_999.9995)] == [999_999, 1_000_000]


def test_zero_lots_are_counted() -> None:
    # w = 0.005 of 1000 is half a lot of 10. It flattens what is held, as any target does.
    market = market_of(flat(10, 10, 10, 10, 10))
    made = (quantity(5), weight(0.005), quantity(-0.5), order(0.5), weight(0))
    got = run(market, [{0: decision} for decision in made], Terms(1000.0))
    assert [f.lots for f in got.fills] == [5, -5]
    assert (got.zero_lots, got.zero_lot_orders) == (2, 1)


@pytest.mark.parametrize(("warmup", "bar"), [(0, 1), (1, 1), (2, 2), (4, 4), (9, None)])
def test_warmup(warmup: int, bar: int | None) -> None:
    seen: list[Snapshot] = []

    def decide(now: Snapshot) -> Decisions:
        seen.append(now)
        return {0: quantity(1)}

    got = run(market_of(flat(*[10.0] * 6)), decide, Terms(1000.0, warmup=warmup, force_close=False))
    assert [f.bar for f in got.fills] == ([] if bar is None else [bar])
    assert [now.bar for now in seen] == list(range(max(warmup - 1, 0), 6))
    if bar == 1:
        assert seen[1] == Snapshot(1, 990.0, 1000.0, (1,))


def test_errors() -> None:
    market = market_of(flat(10, 10), flat(nan, 10))
    cases: list[tuple[Decision | list[Decision], str]] = [
        (weight(0.1), "before its first bar"),
        ([weight(0.1), order(1)], "first bar|target and an order"),
    ]
    for decision, message in cases:
        with pytest.raises(ValueError, match=message):
            run(market, [{1: decision}, {}])
    with pytest.raises(ValueError, match="target and an order"):
        run(market, [{0: [order(1), weight(0.1)]}, {}])
    with pytest.raises(ValueError, match=r"outside -1\.\.1"):
        run(market, [{0: weight(-1.01)}, {}])


def test_tag_of_the_last_decision_stands() -> None:
    market = market_of(flat(10, 10), flat(10, nan))
    got = run(market, [{0: [order(1, "a"), order(1, "b")], 1: order(1, "c")}, {1: order(1, "d")}], Terms(1000.0))
    assert [f.tag for f in got.fills] == ["b", ""]
    assert got.unfilled == [Unfilled(1, 2, "order", "d")]


# Metrics on paper


def test_metrics_of_daily_bars() -> None:
    # Equities 100, 110, 99, 99 over 30 + days: returns 0.1, -0.1, 0; mean 0; deviation sqrt(0.02 / 2) = 0.1.
    days = np.array([0, 10, 20, 31], dtype=np.int64) * DAY_NS
    got = metrics(days, np.array([100.0, 110.0, 99.0, 99.0]), 100.0, timeframe=DAY_NS)
    a_year = 3 / (31 / 365.25)
    assert got["total_return"] == pytest.approx(-0.01, rel=1e-12)
    assert got["max_drawdown"] == pytest.approx(-0.1, rel=1e-12)
    assert got["periods_per_year"] == pytest.approx(a_year, rel=1e-12)
    assert got["volatility"] == pytest.approx(0.1 * math.sqrt(a_year), rel=1e-12)
    assert got["sharpe"] == pytest.approx(0, abs=1e-12)
    # Equities 100, 120, 108, 108: returns 0.2, -0.1, 0: mean 1/30; squares (1/6)^2 + (2/15)^2 + (1/30)^2 = 7/150;
    # deviation sqrt(7/300); downside sqrt(0.01 / 2).
    got = metrics(days, np.array([100.0, 120.0, 108.0, 108.0]), 100.0, timeframe=DAY_NS)
    assert got["sharpe"] == pytest.approx(1 / 30 / math.sqrt(7 / 300) * math.sqrt(a_year), rel=1e-12)
    assert got["sharpe_per_bar"] == got["sharpe"]
    assert got["sortino"] == pytest.approx(1 / 30 / math.sqrt(0.005) * math.sqrt(a_year), rel=1e-12)


def test_metrics_of_intraday_bars_use_the_last_equity_of_each_utc_day() -> None:
    # Two bars a day; day 31 has bars, days 2..30 have none. Last equities: 100, 120, 108, 108 as above.
    times = np.array([0, 0.5, 1, 1.5, 31, 31.5, 32, 32.5])
    equity = np.array([100.0, 100.0, 50.0, 120.0, 130.0, 108.0, 90.0, 108.0])
    got = metrics((times * DAY_NS).astype(np.int64), equity, 100.0)
    a_year = 3 / (32.5 / 365.25)
    assert got["sharpe"] == pytest.approx(1 / 30 / math.sqrt(7 / 300) * math.sqrt(a_year), rel=1e-12)
    assert got["max_drawdown"] == pytest.approx(-0.5, rel=1e-12)
    assert got["periods_per_year"] == pytest.approx(7 / (32.5 / 365.25), rel=1e-12)
    assert got["sharpe_per_bar"] not in (None, got["sharpe"])


def test_metrics_that_do_not_exist_are_none() -> None:
    ratios = ("sharpe", "sortino", "sharpe_per_bar")
    days = np.arange(40, dtype=np.int64) * DAY_NS
    level = metrics(days, np.full(40, 100.0), 100.0)
    assert [level[name] for name in ratios] == [None] * 3
    assert level["volatility"] == 0.0
    rising = metrics(days, 100.0 + np.arange(40.0), 100.0)
    assert rising["sortino"] is None
    assert rising["sharpe"] is not None
    soon = metrics(days[:30], 100.0 + np.arange(30.0), 100.0)  # 29 days
    assert [soon[name] for name in (*ratios, "volatility")] == [None] * 4
    assert soon["periods_per_year"] == pytest.approx(365.25, rel=1e-12)
    one = metrics(days[:1], np.array([90.0]), 100.0)
    assert one["total_return"] == one["max_drawdown"] == pytest.approx(-0.1)
    assert one["periods_per_year"] is None
    ruined = metrics(days, 100.0 - 5 * np.arange(40.0), 100.0)
    assert [ruined[name] for name in ratios] == [None] * 3
    assert ruined["max_drawdown"] == pytest.approx(-1.95)


# Random markets

SEEDS = range(150)


def case(seed: int) -> tuple[Market, list[Decisions], Terms]:
    rng = np.random.default_rng(seed)
    market = random_market(rng)
    terms = random_terms(rng, market)
    kind = seed % 3
    if kind == 0:
        return market, script_of(random_weights(rng, market), "weight"), terms
    if kind == 1:
        return market, script_of(random_quantities(rng, market, terms), "quantity"), terms
    return market, random_script(rng, market, terms), terms


def head(market: Market, bars: int) -> Market:
    return Market(market.timestamps[:bars], *(prices[:bars] for prices in market[1:]))


def test_random_markets_hold_the_rules_of_bars() -> None:
    for seed in SEEDS:
        market, decisions, _ = case(seed)
        there = ~np.isnan(market.close)
        assert there.any(axis=1).all()
        assert there.any(axis=0).all()
        assert (np.diff(market.timestamps) > 0).all()
        assert market.timestamps.dtype == np.int64
        for prices in market[1:]:
            assert (np.isnan(prices) == ~there).all()
        assert (market.low[there] > 0).all()
        assert (market.low <= np.minimum(market.open, market.close))[there].all()
        assert (market.high >= np.maximum(market.open, market.close))[there].all()
        assert len(decisions) == len(market.timestamps)
        firsts = first_bars(market)
        assert all(t >= firsts[s] for t, made in enumerate(decisions) for s in made)
        again, same, _ = case(seed)
        assert repr(same) == repr(decisions)
        assert np.array_equal(again.close, market.close, equal_nan=True)


def test_invariants_on_random_markets() -> None:
    """Net P&L adds up to the change of equity; exposure after an opening fill is at most equity; parts are parts."""
    for seed in SEEDS:
        market, decisions, terms = case(seed)
        got = run(market, decisions, terms)
        traded = sum(abs(f.lots) * terms.lot_size * f.price for f in got.fills)
        pnl = math.fsum(t.net_pnl for t in got.trades + got.open_trades)
        assert abs(pnl - (got.equity[-1] - terms.initial_capital)) <= 1e-9 * max(traded, 1.0)
        held = [0] * market.close.shape[1]
        for f in got.fills:
            opens = held[f.symbol] * f.lots >= 0
            assert f.part == ("open" if opens else "close")
            assert opens or abs(f.lots) <= abs(held[f.symbol])
            assert 0 < abs(f.lots) <= abs(f.requested)
            assert f.lots == f.requested or f.part == "open"
            held[f.symbol] += f.lots
            if f.part == "open" and market.close.shape[1] == 1:
                exposure = abs(held[0]) * terms.lot_size * market.open[f.bar, 0]
                equity = f.cash + held[0] * terms.lot_size * market.open[f.bar, 0]
                # A lot may be gained at the 1e-9 of the floor.
                assert exposure <= equity + 1e-8 * exposure + 1e-9 * terms.initial_capital
        assert tuple(held) == got.lots
        assert all(t.mae <= t.mfe for t in got.trades)
        if got.ruined_at is not None:
            assert all(f.part == "close" for f in got.fills if f.bar > got.ruined_at)
        if terms.force_close:
            assert not any(got.lots)


def test_later_bars_change_nothing_before() -> None:
    for seed in SEEDS:
        market, decisions, terms = case(seed)
        terms = Terms(**{**vars(terms), "force_close": False})
        whole = run(market, decisions, terms)
        cut = len(decisions) * 2 // 3
        if np.isnan(market.close[:cut]).all(axis=0).any():
            decisions = [{s: d for s, d in made.items() if first_bars(market)[s] < cut} for made in decisions]
        part = run(head(market, cut), decisions[:cut], terms)
        assert part.equity.tolist() == whole.equity[:cut].tolist()
        assert part.fills == [f for f in whole.fills if f.bar < cut]


def test_random_markets_reach_every_rule() -> None:
    """A generator that no longer makes cuts, ruin or flips would leave the engine's tests empty."""
    seen = dict.fromkeys(
        ("flip", "reduced", "ruin", "gap", "cut", "zero", "zero_lots", "skipped", "unfilled", "open"), 0
    )
    for seed in SEEDS:
        market, decisions, terms = case(seed)
        got = run(market, decisions, terms)
        pairs = list(zip(got.fills, got.fills[1:], strict=False))
        seen["flip"] += any(a.bar == b.bar and a.symbol == b.symbol and a.part != b.part for a, b in pairs)
        seen["reduced"] += len([f for f in got.fills if f.part == "close"]) > len(got.trades)
        seen["ruin"] += any(f.reason == "ruin" for f in got.fills)
        seen["gap"] += bool(np.isnan(market.close).any())
        seen["cut"] += got.cuts > 0
        seen["zero"] += got.cuts_to_zero > 0
        seen["zero_lots"] += got.zero_lots > 0
        seen["skipped"] += got.skipped > 0
        seen["unfilled"] += bool(got.unfilled)
        seen["open"] += bool(got.open_trades)
    assert min(seen.values()) >= 10, seen


# The package `backtesting`


def real_bars(name: str) -> pd.DataFrame:
    spec = importlib.util.find_spec("backtesting")
    assert spec is not None
    assert spec.origin is not None
    return pd.read_csv(Path(spec.origin).parent / "test" / name, index_col=0, parse_dates=True)


def sma_targets(close: NDArray[np.float64], *, short_side: bool) -> list[float]:
    """Target units at each close: 1 where the mean of 10 closes is above that of 30, 0 or -1 below; NaN: keep."""
    targets = [nan] * len(close)
    last = 0.0
    for t in range(29, len(close)):
        fast, slow = float(np.mean(close[t - 9 : t + 1])), float(np.mean(close[t - 29 : t + 1]))
        target = 1.0 if fast > slow else last if fast == slow else -1.0 if short_side else 0.0
        if target != last:
            targets[t] = last = target
    return targets


@pytest.mark.parametrize("short_side", [False, True])
@pytest.mark.parametrize("name", ["EURUSD.csv", "GOOG.csv"])
def test_agrees_with_backtesting_py(name: str, short_side: bool) -> None:
    """Same fills (bar, side, price) and equity as backtesting.py for one unit a trade.

    What makes its rules ours (0.6.6, backtesting.py):
    - trade_on_close=False: a market order fills at the next bar's open.
    - exclusive_orders=True: a new order first closes the open trade at that same open, so that buy(size=1) while short
      is our flip: a closing and an opening fill of one lot at one price.
    - commission=0.001 is relative and taken at entry and at exit; spread=0, since a spread is charged at entry only,
      where our slippage is charged on every fill.
    - No `self.I` indicator: one of w leading NaN would put the first next() at bar w + 1; without any it is at bar 1.
    - finalize_trades=False and force_close=False: its finalising runs the last bar again and so exits at that bar's
      *open*, where ours exits at the last close. It warns of open trades; its other warnings are pandas' deprecations.
    - margin=1 cancels orders that cash doesn't cover, where ours are cut: enough cash, so that neither happens.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TQDM_DISABLE", "1")
        import backtesting

    data = real_bars(name)
    close = data["Close"].to_numpy(np.float64)
    targets = sma_targets(close, short_side=short_side)

    class OneUnit(backtesting.Strategy):  # type: ignore[misc]
        def init(self) -> None:
            pass

        def next(self) -> None:
            target = targets[len(self.data) - 1]
            if target == 1:
                self.buy(size=1)
            elif target == -1:
                self.sell(size=1)
            elif target == 0:
                self.position.close()

    theirs = backtesting.Backtest(
        data, OneUnit, cash=1_000_000, commission=0.001, spread=0.0, trade_on_close=False, exclusive_orders=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stats: Any = theirs.run()
    table = stats["_trades"]
    expected = [
        *zip(table["EntryBar"], table["Size"], table["EntryPrice"], strict=True),
        *zip(table["ExitBar"], -table["Size"], table["ExitPrice"], strict=True),
        *((t.entry_bar, t.size, t.entry_price) for t in stats["_strategy"].trades),
    ]

    prices = [data[c].to_numpy(np.float64).reshape(-1, 1) for c in ("Open", "High", "Low", "Close")]
    stamps = pd.DatetimeIndex(data.index).as_unit("ns").asi8
    decisions: list[Decisions] = [{} if math.isnan(t) else {0: quantity(t)} for t in targets]
    got = run(Market(stamps, *prices), decisions, Terms(1_000_000.0, commission=0.001, force_close=False))

    assert len(got.trades) > 30
    assert sorted((f.bar, f.lots, f.price) for f in got.fills) == sorted(expected)
    assert [(t.entry_bar, t.exit_bar, t.side) for t in got.trades] == list(
        zip(table["EntryBar"], table["ExitBar"], np.sign(table["Size"]), strict=True)
    )
    assert got.equity == pytest.approx(stats["_equity_curve"]["Equity"].to_numpy(), rel=1e-12)
