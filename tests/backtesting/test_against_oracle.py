"""The engine against the independent oracle: every fill, every equity, every trade, bit for bit, on random markets."""

from __future__ import annotations

import functools
import math
import struct
import warnings
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import oracle
import pytest
from campaigns import Figures
from engine_runs import bars_of, cancel_at, checkpoint, finish, request_of
from markets import first_bars, random_market, random_quantities, random_script, random_terms, random_weights, script_of
from oracle import Decisions, Market, Outcome, Terms
from scripted import Rows, Script, Scripted, ScriptedAsync, ScriptedQuantities, ScriptedWeights

import ktrdr_async as kt
from ktrdr_async.strategies.base import AnyStrategy

pytestmark = pytest.mark.anyio

SEEDS = 330
KINDS = ("weight", "quantity", "script")


def bits(value: float) -> bytes:
    return struct.pack("<d", value)


class Case:
    """One random market with its terms and decisions, and the three kinds of strategy that make them."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.kind = KINDS[seed % 3]
        self.market: Market = random_market(rng, bars=int(rng.choice([2, 30, 120, 240])))
        self.terms: Terms = random_terms(rng, self.market)
        self.rows = None
        if self.kind == "weight":
            self.rows = random_weights(rng, self.market)
            self.decisions: list[Decisions] = script_of(self.rows, "weight")
        elif self.kind == "quantity":
            self.rows = random_quantities(rng, self.market, self.terms)
            self.decisions = script_of(self.rows, "quantity")
        else:
            self.decisions = random_script(rng, self.market, self.terms)
        self.bars = bars_of(self.market)
        self.request = request_of(self.terms)
        self.expected: Outcome = oracle.run(self.market, self.decisions, self.terms)

    def strategies(self) -> list[AnyStrategy]:
        made: list[AnyStrategy] = []
        if self.rows is not None:
            vectorised = ScriptedWeights if self.kind == "weight" else ScriptedQuantities
            made.append(vectorised(Rows(self.rows), self.terms.warmup))
        script = Script(self.decisions)
        return [*made, Scripted(script, self.terms.warmup), ScriptedAsync(script, self.terms.warmup)]

    def refused(self, ruined_at: int | None) -> int:
        """Decisions of a symbol and bar from the bar of ruin on."""
        if ruined_at is None:
            return 0
        start = max(ruined_at, self.terms.warmup - 1)
        listed = [d if isinstance(d, list) else [d] for made in self.decisions[start:] for d in made.values()]
        return sum(any(not math.isnan(d.value) for d in each) for each in listed)


@functools.cache
def case_of(seed: int) -> Case:
    return Case(seed)


def ledger_of(results: kt.BacktestResults) -> list[tuple[Any, ...]]:
    return [
        (e.bar, e.symbol, e.lots, e.requested, bits(e.price), bits(e.fee), bits(e.cash_after), e.part, e.reason,
         e.tag or "")
        for e in results.ledger
    ]  # fmt: skip


def compare(case: Case, results: kt.BacktestResults, expected: Outcome) -> None:
    assert ledger_of(results) == [(*f[:4], bits(f.price), bits(f.fee), bits(f.cash), *f[7:]) for f in expected.fills]
    assert results.equity.tobytes() == expected.equity.tobytes()
    assert [
        (
            t.symbol,
            t.side,
            t.entry_bar,
            t.exit_bar,
            t.lots,
            *map(bits, (t.entry_price, t.exit_price, t.fees, t.net_pnl)),
        )
        for t in results.trade_records
    ] == [(*t[:5], *map(bits, t[5:9])) for t in expected.trades]
    assert [(bits(t.mae or 0.0), bits(t.mfe or 0.0)) for t in results.trade_records] == [
        (bits(t.mae), bits(t.mfe)) for t in expected.trades
    ]
    assert [(u.symbol, u.lots, u.tag or "") for u in results.unfilled_orders] == [
        (u.symbol, u.lots, u.tag) for u in expected.unfilled
    ]
    counters = results.counters
    assert (counters.cut - counters.cut_to_zero, counters.cut_to_zero) == (expected.cuts, expected.cuts_to_zero)
    if case.kind == "weight":  # the oracle counts target quantities of zero lots in the same number
        assert sum(counters.zero_lots) == expected.zero_lots
    if case.kind == "quantity":
        assert sum(counters.zero_lots) == 0
    assert results.ruined_at == expected.ruined_at
    assert counters.refused_after_ruin == case.refused(expected.ruined_at)
    held = {case.bars.symbols[j]: lots * case.terms.lot_size for j, lots in enumerate(expected.lots) if lots}
    assert results.open_positions == held


async def test_fills_equity_trades_and_counters_in_all_three_kinds() -> None:
    for seed in range(SEEDS):
        case = case_of(seed)
        expected = case.expected
        rows = set()
        for strategy in case.strategies():
            with np.testing.assert_no_warnings():
                # The kinds' results are equal, and so is what an audit says of them.
                engine = kt.BacktestingEngine(case.request, case.bars, strategy)
                results = await finish(engine, audited=isinstance(strategy, kt.Strategy))
            try:
                compare(case, results, expected)
            except AssertionError as error:
                raise AssertionError(f"seed {seed}, {type(strategy).__name__}: {error}") from error
            rows.add((results.counters.ordered_rows, tuple(results.counters.zero_lots)))
        assert len(rows) == 1, f"seed {seed}: the kinds count differently: {rows}"


async def test_resumed_runs_agree_with_the_oracle_too() -> None:
    """Gaps, late starts, ruin and cuts on both sides of a checkpoint; every kind, blocks of 7."""
    for seed in range(0, SEEDS, 2):
        case = case_of(seed)
        expected = case.expected
        yields = -(-len(case.bars) // 7)
        at = 1 + seed % yields
        for first, second in zip(case.strategies(), case.strategies(), strict=True):
            engine = kt.BacktestingEngine(case.request, case.bars, first, block_bars=7)
            await cancel_at(engine, at)
            resumed = kt.BacktestingEngine(case.request, case.bars, second, block_bars=7)
            results = await finish(resumed, checkpoint(engine), audited=False)
            try:
                compare(case, results, expected)
            except AssertionError as error:
                raise AssertionError(f"seed {seed}, {type(first).__name__}, yield {at}: {error}") from error


def rules_met(case: Case) -> set[str]:
    """Which of the market's rules made a difference in a case."""
    market, terms, got = case.market, case.terms, case.expected
    orders = [f for f in got.fills if f.reason == "order"]
    firsts, missing = first_bars(market), np.isnan(market.close)
    there = np.argwhere(~missing)
    lasts = {int(j): int(t) for t, j in there}
    opens = {(int(t), int(j)) for t, j in there if t and market.open[t, j] != market.close[t - 1, j]}
    flips = {(f.bar, f.symbol) for f in orders if f.part == "open"} & {
        (f.bar, f.symbol) for f in orders if f.part == "close"
    }
    waits = any(missing[f.bar - 1, f.symbol] and f.bar > firsts[f.symbol] and f.requested == f.lots for f in orders)
    held = np.zeros(len(market.close[0]), dtype=np.int64)
    for f in got.fills:
        held[f.symbol] += f.lots if f.reason != "forced_close" else 0
    forced = any(f.reason == "forced_close" for f in got.fills)
    met = {
        "commission": any(f.fee > 0 for f in orders),
        "slippage": bool(orders) and terms.slippage > 0,
        "no costs": bool(orders) and terms.slippage == terms.commission == 0,
        "lots above 1": bool(orders) and terms.lot_size > 1,
        "lots below 1": bool(orders) and terms.lot_size < 1,
        "min_trade skipped": got.skipped > 0,
        "warm-up": bool(orders) and terms.warmup > 1,
        "shorts": any(t.side < 0 for t in [*got.trades, *got.open_trades]),
        "flips": bool(flips),
        "added to or reduced": len(orders) > 2 * len(got.trades) + len(got.open_trades),
        "opening gaps": any((f.bar, f.symbol) in opens for f in orders),
        "missing bars": any(missing[firsts[j] : last, j].any() for j, last in lasts.items()),
        "fills after a gap": waits,
        "late listing": any(f.symbol == j for f in orders for j, first in enumerate(firsts) if first),
        "held past the last bar": any(held[j] and last < len(missing) - 1 for j, last in lasts.items()),
        "ruin": got.ruined_at is not None,
        "closed by ruin": any(f.reason == "ruin" for f in got.fills),
        "refused after ruin": case.refused(got.ruined_at) > 0,
        "closed by force_close": forced,
        "left open without force_close": bool(got.open_trades),
        "several symbols": len({f.symbol for f in orders}) > 1,
        "closings and openings of several at one open": any(
            a.bar == b.bar and a.symbol != b.symbol and a.part != b.part for a, b in pairwise(orders)
        ),
        "cut to buying power": got.cuts > 0,
        "cut to zero": got.cuts_to_zero > 0,
        "zero lots": got.zero_lots > 0,
        "unfilled": bool(got.unfilled),
        "tags": any(f.tag for f in got.fills),
        "one bar only": len(market.close) == 1,
    }
    return {rule for rule, is_met in met.items() if is_met}


async def test_the_cases_reach_every_rule(figures: Figures) -> None:
    """A generator that no longer makes cuts, ruin or flips would leave the tests above empty."""
    seen: Counter[str] = Counter()
    kinds: Counter[tuple[str, str]] = Counter()
    for seed in range(SEEDS):
        case = case_of(seed)
        met = rules_met(case)
        seen.update(met)
        kinds.update((case.kind, rule) for rule in met)
    assert len(seen) == 28
    assert min(seen.values()) >= 10, seen
    figures.add(
        f"of {SEEDS} random markets equal to the oracle", ", ".join(f"{n} {w}" for w, n in sorted(seen.items()))
    )
    everywhere = set(seen) - {"tags", "one bar only"}
    assert not [(kind, rule) for kind in KINDS for rule in everywhere if not kinds[kind, rule]]


async def test_metrics_agree_with_the_oracle() -> None:
    """Of runs whose equity stays above zero; the oracle's figures are sums of another order, so approximately."""
    names = ("total_return", "max_drawdown", "periods_per_year", "sharpe", "sortino", "volatility", "sharpe_per_bar")
    compared = dict.fromkeys(names, 0)
    for seed in range(SEEDS):
        case = case_of(seed)
        expected = case.expected
        engine = kt.BacktestingEngine(case.request, case.bars, case.strategies()[0])
        metrics = (await finish(engine, audited=False)).metrics
        theirs = oracle.metrics(
            case.market.timestamps, expected.equity, case.terms.initial_capital, timeframe=case.bars.timeframe
        )
        if expected.equity.min() <= 0:
            assert metrics.sharpe is None
            continue
        for name in names:
            ours, other = getattr(metrics, name), theirs[name]
            if other is None or ours is None:
                # A deviation that is rounding and nothing else counts as zero here, not there.
                assert (ours is None and other is None) or len(set(expected.equity.tolist())) <= 2, (seed, name)
                continue
            assert ours == pytest.approx(other, rel=1e-9, abs=1e-9), (seed, name)
            compared[name] += 1
    assert min(compared.values()) >= 20, compared


async def test_metrics_agree_with_empyrical() -> None:
    """Daily bars, where its rules are ours: a return a bar, ddof 1, risk-free 0.

    Its annual figures count 252 periods a year where ours count bars, so the period count is handed over; its
    Sortino divides by the count, ours by the count less one; its drawdown starts at the first equity.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import empyrical

    checked = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        market = random_market(rng, bars=400, symbols=2, wild=0.0)
        terms = random_terms(rng, market)
        days = np.int64(1_577_836_800_000_000_000) + np.arange(len(market.close), dtype=np.int64) * oracle.DAY_NS
        market = market._replace(timestamps=days)
        rows = random_weights(rng, market)
        results = await finish(
            kt.BacktestingEngine(request_of(terms), bars_of(market), ScriptedWeights(Rows(rows), terms.warmup))
        )
        if results.ruined_at is not None or len(results.ledger) < 4:
            continue
        m, a_year = results.metrics, 365.25
        assert m.periods_per_year == pytest.approx(a_year, rel=1e-12)
        returns = results.equity[1:] / results.equity[:-1] - 1.0
        # Equity at the first bar is the initial capital: nothing fills there.
        padded = np.concatenate([[0.0], returns])
        assert m.max_drawdown == pytest.approx(empyrical.max_drawdown(padded), rel=1e-9)
        assert m.sharpe == pytest.approx(empyrical.sharpe_ratio(returns, annualization=a_year), rel=1e-9)
        assert m.sharpe_per_bar == m.sharpe
        assert m.volatility == pytest.approx(empyrical.annual_volatility(returns, annualization=a_year), rel=1e-9)
        theirs = empyrical.sortino_ratio(returns, annualization=a_year)
        assert m.sortino == pytest.approx(theirs * math.sqrt((len(returns) - 1) / len(returns)), rel=1e-9)
        assert m.annual_return == pytest.approx(empyrical.annual_return(returns, annualization=a_year), rel=1e-9)
        assert m.total_return == pytest.approx(empyrical.cum_returns_final(returns), rel=1e-9)
        checked += 1
    assert checked >= 20
