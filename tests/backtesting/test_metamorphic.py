"""What must not matter: the unit of prices, when it was, what comes after, what is never traded, how it is divided.

The campaign: pytest -m campaign tests/backtesting/test_metamorphic.py
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
from campaigns import Figures, sized
from engine_runs import bars_of, finish, request_of
from markets import random_market, random_quantities, random_script, random_terms, random_weights
from numpy.random import Generator
from numpy.typing import NDArray
from oracle import DAY_NS, Decision, Decisions, Market, Terms
from scripted import Rows, Script, Scripted, ScriptedAsync, ScriptedQuantities, ScriptedWeights

import ktrdr_async as kt
from ktrdr_async.strategies.base import AnyStrategy

pytestmark = pytest.mark.anyio

BUILT_INS = ("sma_cross", "donchian_breakout", "rsi_reversion", "async_reversion", "buy_and_hold", "momentum_rotation")
KINDS = ("weights", "quantities", "script", "async script", *BUILT_INS)


class Setting(NamedTuple):
    """A market and its terms, and where a case's rows and symbols stand in it."""

    market: Market
    terms: Terms
    rows: NDArray[np.int64]
    symbols: NDArray[np.int64]
    units: float = 1.0  # what one of the case's units is here

    async def run(self, make: Callable[[Setting], AnyStrategy]) -> kt.BacktestResults:
        return await finish(kt.BacktestingEngine(request_of(self.terms), bars_of(self.market), make(self)))


class Case(NamedTuple):
    kind: str
    sized: bool  # by quantity, not by weight
    setting: Setting
    make: Callable[[Setting], AnyStrategy]


def case_of(seed: int) -> Case:
    rng = np.random.default_rng(seed)
    market = random_market(rng, bars=int(rng.choice([30, 120])), symbols=int(rng.integers(1, 5)))
    # A warm-up counts rows, and rows are put between.
    terms = replace(random_terms(rng, market), warmup=0)
    n, k = market.close.shape
    setting = Setting(market, terms, np.arange(n), np.arange(k))
    kind = KINDS[seed % len(KINDS)]
    if kind in ("weights", "quantities"):
        weights = kind == "weights"
        values = random_weights(rng, market) if weights else random_quantities(rng, market, terms)

        def rows_of(here: Setting) -> AnyStrategy:
            spread = np.full(here.market.close.shape, np.nan)
            spread[np.ix_(here.rows, here.symbols)] = values if weights else values * here.units
            return (ScriptedWeights if weights else ScriptedQuantities)(Rows(spread))

        return Case(kind, True, setting, rows_of)
    if kind in ("script", "async script"):
        script = random_script(rng, market, terms)

        def script_of(here: Setting) -> AnyStrategy:
            moved: list[Decisions] = [{} for _ in here.market.close]
            for row, made in zip(here.rows, script, strict=True):
                moved[row] = {int(here.symbols[j]): _in_units(each, here.units) for j, each in made.items()}
            return (Scripted if kind == "script" else ScriptedAsync)(Script(moved))

        return Case(kind, True, setting, script_of)
    by_quantity = kind != "momentum_rotation" and bool(rng.random() < 0.6)
    few, many, short = int(rng.integers(2, 5)), int(rng.integers(5, 9)), bool(rng.random() < 0.5)
    lots = np.ceil(0.3 * terms.initial_capital / np.nanmedian(market.close) / terms.lot_size)
    quantity = float(lots) * terms.lot_size

    def built_in(here: Setting) -> AnyStrategy:
        units = quantity * here.units if by_quantity else None
        return {
            "sma_cross": lambda: kt.SmaCross(few, many, short, units),
            "donchian_breakout": lambda: kt.DonchianBreakout(many, few, short, units),
            "rsi_reversion": lambda: kt.RsiReversion(few, 40.0, 60.0, short, units),
            "async_reversion": lambda: kt.AsyncReversion(many, 1.0, quantity=units),
            "buy_and_hold": lambda: kt.BuyAndHold(units),
            "momentum_rotation": lambda: kt.MomentumRotation(many, top=1, every=few),
        }[kind]()

    return Case(kind, by_quantity, setting, built_in)


def _in_units(made: Decision | list[Decision], units: float) -> Decision | list[Decision]:
    if isinstance(made, list):
        return [d if d.kind == "weight" else d._replace(value=d.value * units) for d in made]
    return made if made.kind == "weight" else made._replace(value=made.value * units)


def told(
    results: kt.BacktestResults,
    here: Setting,
    *,
    price: float = 1.0,
    money: float = 1.0,
    last: int | None = None,
) -> dict[str, Any]:
    """A run as values that are equal when their bits are, in the units and at the places of a changed setting.

    Prices and money are multiplied by powers of two, which rounds nothing. A forced close is at bar `last`.
    """
    rows, symbols = here.rows.tolist(), here.symbols.tolist()
    last = len(here.market.close) - 1 if last is None else last

    def at(bar: int, reason: str) -> int:
        return last if reason == "forced_close" else rows[bar]

    return {
        "ledger": [
            (at(e.bar, e.reason), symbols[e.symbol], e.lots, e.requested, (e.price * price).hex(),
             (e.fee * money).hex(), (e.cash_after * money).hex(), e.part, e.reason, e.tag)
            for e in results.ledger
        ],
        "trades": [
            (symbols[t.symbol], t.side, rows[t.entry_bar], at(t.exit_bar, t.reason), t.lots,
             *((x * price).hex() for x in (t.entry_price, t.exit_price)),
             *((x * money).hex() for x in (t.fees, t.net_pnl, t.mae, t.mfe)))
            for t in results.trade_records
        ],
        "equity": [(x * money).hex() for x in results.equity.tolist()],
        "unfilled": [(symbols[u.symbol], u.lots, u.tag) for u in results.unfilled_orders],
        "counted": (results.counters.cut, results.counters.cut_to_zero, results.counters.refused_after_ruin,
                    sum(results.counters.zero_lots)),
        "ruined": None if results.ruined_at is None else rows[results.ruined_at],
    }  # fmt: skip


def there(results: kt.BacktestResults) -> dict[str, Any]:
    """A run of the changed setting, as `told` says what it should be."""
    n, k = results.bars.close.shape
    return told(results, Setting(Market(*[results.bars.close] * 5), Terms(), np.arange(n), np.arange(k)))


def scaled(setting: Setting, factor: float) -> Market:
    return Market(setting.market.timestamps, *(prices * factor for prices in setting.market[1:]))


async def smaller_lots(case: Case, base: kt.BacktestResults, rng: Generator) -> list[str]:
    """Prices times a power of two, lots and quantities divided by it: money stays, to the last bit."""
    factor = 2.0 ** int(rng.choice([-20, -3, -1, 1, 2, 17]))
    terms = replace(case.setting.terms, lot_size=case.setting.terms.lot_size / factor)
    here = case.setting._replace(market=scaled(case.setting, factor), terms=terms, units=1 / factor)
    assert there(await here.run(case.make)) == told(base, here, price=factor)
    return ["prices scaled, lots smaller"]


async def larger_capital(case: Case, base: kt.BacktestResults, rng: Generator) -> list[str]:
    """Prices and capital times a power of two, the same quantities: P&L is multiplied by it, to the last bit."""
    factor = 2.0 ** int(rng.choice([-20, -3, -1, 1, 2, 17]))
    terms = replace(case.setting.terms, initial_capital=case.setting.terms.initial_capital * factor)
    here = case.setting._replace(market=scaled(case.setting, factor), terms=terms)
    assert there(await here.run(case.make)) == told(base, here, price=factor, money=factor)
    return ["prices scaled, capital larger"]


async def another_time(case: Case, base: kt.BacktestResults, rng: Generator) -> list[str]:
    """Later or earlier: nothing changes but the time; by whole days no metric does either."""
    days = int(rng.integers(-9_000, 9_000))
    part = int(rng.integers(1, DAY_NS)) if rng.random() < 0.5 else 0
    market = case.setting.market._replace(timestamps=case.setting.market.timestamps + days * DAY_NS + part)
    here = case.setting._replace(market=market)
    moved = await here.run(case.make)
    assert there(moved) == told(base, here)
    if not part:
        assert msgspec.to_builtins(moved.metrics) == msgspec.to_builtins(base.metrics)
    assert (moved.fills["time"] - base.fills["time"]).eq(np.timedelta64(days * DAY_NS + part, "ns")).all()
    return ["another time"]


async def flat_bars(case: Case, base: kt.BacktestResults, rng: Generator) -> list[str]:
    """Bars at every symbol's last close appended: what was before stays, and nothing more is won or lost.

    Built-ins may decide at the new bars, and what still waited fills at the first of them: then only the first holds.
    """
    market, terms, n = case.setting.market, case.setting.terms, len(case.setting.market.close)
    more = int(rng.integers(1, 20))
    closes = market.close
    lasts = np.array([column[~np.isnan(column)][-1] for column in closes.T])
    stamps = market.timestamps[-1] + base.bars.timeframe * np.arange(1, more + 1)
    longer = Market(np.append(market.timestamps, stamps), *(np.vstack([p, *[lasts] * more]) for p in market[1:]))
    here = case.setting._replace(market=longer)
    results = await here.run(case.make)
    now, before = there(results), told(base, here)
    ordered = [event for event in before["ledger"] if event[8] != "forced_close"]
    assert now["ledger"][: len(ordered)] == ordered
    assert all(event[0] >= n for event in now["ledger"][len(ordered) :])
    closed = len(ordered) < len(before["ledger"])  # the last equity is then after the closing step
    assert now["equity"][: n - closed] == before["equity"][: n - closed]
    if case.kind not in BUILT_INS and not base.unfilled_orders:
        held = results.equity[n - 1 :].tolist()
        assert len(set(held[:-1])) == 1
        assert now["equity"][-1] == before["equity"][-1]
        assert all(now[name] == before[name] for name in ("ledger", "trades", "unfilled", "counted", "ruined"))
        assert terms.force_close or results.open_positions == base.open_positions
        return ["flat bars appended", "of them nothing changed to the end"]
    return ["flat bars appended"]


async def untraded_symbol(case: Case, base: kt.BacktestResults, rng: Generator) -> list[str]:
    """A symbol that is never traded, before, between or after the others, with bars of its own between theirs.

    For built-ins it is flat, so that none of them wants it; and with weights they divide by the number of symbols,
    where `momentum_rotation` divides by how many it may hold, but counts rows.
    """
    whole = case.kind == "momentum_rotation"
    if case.kind == "buy_and_hold" or not (case.sized or whole):
        return []
    market, terms = case.setting.market, case.setting.terms
    n, k = market.close.shape
    own = np.zeros(0, dtype=np.int64) if whole else rng.integers(0, n, int(rng.integers(0, 6)))
    own = own[(own == 0) | (np.diff(market.timestamps, prepend=0)[own] > 10)]
    order = np.sort(np.append(np.arange(n), own - 0.5))
    rows, place = np.searchsorted(order, np.arange(n)), int(rng.integers(0, k + 1))
    length = len(order)
    stamps = np.zeros(length, dtype=np.int64)
    stamps[rows] = market.timestamps
    for i in range(length - 1, -1, -1):
        stamps[i] = stamps[i] or stamps[i + 1] - 1
    added = _flat(length, rng) if case.kind in BUILT_INS else _walk(length, rng)
    gone = rng.random(length) < 0.3
    gone[~np.isin(np.arange(length), rows)] = False
    columns = []
    for old, new in zip(market[1:], added, strict=True):
        spread = np.full((length, k), np.nan)
        spread[rows] = old
        columns.append(np.insert(spread, place, np.where(gone, np.nan, new), axis=1))
    here = Setting(Market(stamps, *columns), terms, rows, np.delete(np.arange(k + 1), place))
    if np.isnan(columns[3][:, place]).all():
        return []
    results = await here.run(case.make)
    now, then = there(results), told(base, here)
    equity = now.pop("equity")
    assert [equity[row] for row in rows] == then.pop("equity")
    between = [equity[row - 1] if row else terms.initial_capital.hex() for row in range(length) if row not in rows]
    assert [equity[row] for row in range(length) if row not in rows] == between
    assert now == then
    where = "before" if place == 0 else "after" if place == k else "between"
    return ["a symbol untraded", f"of them {where} the others", *["of them with bars of its own"] * bool(len(own))]


def _flat(n: int, rng: Generator) -> list[NDArray[np.float64]]:
    return [np.full(n, float(rng.uniform(1.0, 1000.0)))] * 4


def _walk(n: int, rng: Generator) -> list[NDArray[np.float64]]:
    close = 100.0 + 50.0 * np.sin(np.cumsum(rng.standard_normal(n)))
    return [close - 1.0, close + 2.0, close - 3.0, close]


RELATIONS = (smaller_lots, larger_capital, another_time, flat_bars, untraded_symbol)


@sized("cases", ci=20, whole=500, minutes=20)
async def test_what_must_not_matter_does_not(cases: int, campaign_seed: int, figures: Figures) -> None:
    held: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    fills = 0
    for number in range(cases):
        seed = campaign_seed * 1_000 + number
        case = case_of(seed)
        base = await case.setting.run(case.make)
        fills += len(base.ledger)
        kinds[case.kind] += bool(base.ledger)
        for relation in RELATIONS:
            try:
                held.update(await relation(case, base, np.random.default_rng([seed, 1])))
            except AssertionError as error:
                raise AssertionError(f"case {seed}, {case.kind}, {relation.__name__}: {error}") from error
    if cases >= 500:
        assert len(held) == 10
        assert min(held.values()) >= 50, held
        assert min(kinds[kind] for kind in KINDS) >= 25, kinds
    figures.add("metamorphic cases", f"{cases}, {fills:,} fills: " + ", ".join(f"{n} {w}" for w, n in held.items()))
    figures.add("metamorphic cases with fills, by kind", ", ".join(f"{n} {w}" for w, n in sorted(kinds.items())))


@sized("cases", ci=10, whole=500, minutes=10)
async def test_a_quantity_divided_over_two_equal_symbols_comes_to_the_same(
    cases: int, campaign_seed: int, figures: Figures
) -> None:
    """Lots and prices at each bar exactly; P&L to the rounding of its sums. Cuts, which go by symbol, are left out."""
    fills = 0
    for number in range(cases):
        rng = np.random.default_rng([campaign_seed, number])
        market = random_market(rng, bars=100, symbols=1, wild=0.0)
        lots = rng.integers(-20, 21, market.close.shape).astype(np.float64)
        lots[rng.random(lots.shape) < 0.5] = np.nan
        terms = replace(random_terms(rng, market), lot_size=1.0, min_trade=0.0, warmup=0)
        terms = replace(terms, initial_capital=float(np.ceil(1_000 * np.nanmax(market.high))))
        half = np.floor(lots / 2)
        twice = Market(market.timestamps, *(np.hstack([prices, prices]) for prices in market[1:]))
        one, two = [
            await finish(kt.BacktestingEngine(request_of(terms), bars_of(each), ScriptedQuantities(Rows(rows))))
            for each, rows in ((market, lots), (twice, np.hstack([half, lots - half])))
        ]
        assert one.counters.cut == two.counters.cut == 0
        by = ["bar", "reason", "part", "price"]
        assert one.fills.groupby(by)["lots"].sum().equals(two.fills.groupby(by)["lots"].sum()), f"case {number}"
        traded = float((one.fills["lots"].abs() * one.fills["price"]).sum())
        assert two.final_equity == pytest.approx(one.final_equity, abs=1e-12 * (traded + terms.initial_capital))
        fills += len(two.fills)
    figures.add("a quantity divided over two symbols", f"{cases} cases, {fills:,} fills")
