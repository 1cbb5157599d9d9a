"""Each built-in against its docstring, written once more as another kind of strategy: same fills, in every bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from running import bars_of, bits, random_bars, run, same
from test_indicators import deviation_of, mean_of, plain_rsi

from ktrdr_async.errors import ParameterError
from ktrdr_async.market import Bars
from ktrdr_async.strategies import (
    AnyStrategy,
    AsyncReversion,
    Bar,
    BuyAndHold,
    DonchianBreakout,
    MomentumRotation,
    RsiReversion,
    Signals,
    SmaCross,
    Strategy,
    WeightStrategy,
    on_change,
)

pytestmark = pytest.mark.anyio


class Last(msgspec.Struct):
    said: dict[int, float] = {}


def own(bar: Bar, symbol: int, column: str = "close") -> list[float]:
    """The symbol's own bars up to this one; empty where it has none here."""
    values = getattr(bar.past, column)[:, symbol]
    return [] if math.isnan(values[-1]) else [value for value in values.tolist() if value == value]


class Plain(Strategy):
    """A position a symbol, said once at each change; `decide` gives None where nothing changes."""

    quantity: float | None = None

    def on_bar(self, bar: Bar) -> None:
        for symbol in range(len(bar.symbols)):
            position = self.decide(bar, symbol, self.state.said.get(symbol, 0.0))
            if position is None or position == self.state.said.get(symbol, 0.0):
                continue
            self.state.said[symbol] = position
            if self.quantity is None:
                bar.target_weight(symbol, position * (1.0 / len(bar.symbols)))
            else:
                bar.target_quantity(symbol, position * self.quantity)

    def decide(self, bar: Bar, symbol: int, now: float) -> float | None:
        raise NotImplementedError


class PlainSmaCross(Plain):
    def __init__(self, fast: int, slow: int, short: bool = False, quantity: float | None = None) -> None:
        self.fast, self.slow, self.short, self.quantity = fast, slow, short, quantity
        self.state = Last()

    def decide(self, bar: Bar, symbol: int, now: float) -> float | None:
        closes = own(bar, symbol)
        if len(closes) < self.slow:
            return None
        fast, slow = mean_of(closes[-self.fast :]), mean_of(closes[-self.slow :])
        if fast == slow:
            return None
        return 1.0 if fast > slow else (-1.0 if self.short else 0.0)


class PlainBuyAndHold(Plain):
    def __init__(self, quantity: float | None = None) -> None:
        self.quantity, self.state = quantity, Last()

    def decide(self, bar: Bar, symbol: int, now: float) -> float | None:
        return 1.0 if own(bar, symbol) else None


class PlainDonchian(Plain):
    def __init__(self, entry: int, exit: int, short: bool = False, quantity: float | None = None) -> None:
        self.entry, self.exit, self.short, self.quantity = entry, exit, short, quantity
        self.state = Last()

    def decide(self, bar: Bar, symbol: int, now: float) -> float | None:
        closes = own(bar, symbol)
        if len(closes) <= self.entry:
            return None
        close, highs, lows = closes[-1], own(bar, symbol, "high")[:-1], own(bar, symbol, "low")[:-1]
        if close > max(highs[-self.entry :]):
            return 1.0
        if close < min(lows[-self.entry :]) and self.short:
            return -1.0
        if now > 0 and close < min(lows[-self.exit :]):
            return 0.0
        if now < 0 and close > max(highs[-self.exit :]):
            return 0.0
        return None


class PlainMomentum(Strategy):
    def __init__(self, lookback: int, top: int, every: int) -> None:
        self.lookback, self.top, self.every = lookback, top, every

    def on_bar(self, bar: Bar) -> None:
        if bar.index < self.lookback or (bar.index - self.lookback) % self.every:
            return
        scores: list[tuple[float, int]] = []
        for symbol in range(len(bar.symbols)):
            closes = own(bar, symbol)
            if len(closes) > self.lookback and closes[-1] / closes[-1 - self.lookback] > 1.0:
                scores.append((-(closes[-1] / closes[-1 - self.lookback]), symbol))
        best = {symbol for _, symbol in sorted(scores)[: self.top]}
        for symbol in range(len(bar.symbols)):
            if not np.isnan(bar.past.close[:, symbol]).all():
                bar.target_weight(symbol, 1.0 / min(self.top, len(bar.symbols)) if symbol in best else 0.0)


class PlainTargets(WeightStrategy):
    """Positions from a loop over each symbol's own bars; `positions_of` gives one a bar, None where nothing changes."""

    def __init__(self, positions_of: Any, quantity: float | None = None) -> None:
        self.positions_of, self.quantity = positions_of, quantity

    @property
    def by_weight(self) -> bool:
        return self.quantity is None

    def rows(self, bars: Bars, unit: float) -> np.ndarray:
        rows = np.full((len(bars), bars.k), np.nan)
        for symbol in range(bars.k):
            there = np.flatnonzero(~np.isnan(bars.close[:, symbol]))
            said = 0.0
            for at, position in zip(there, self.positions_of(bars.close[there, symbol].tolist()), strict=True):
                if position is not None and position != said:
                    rows[at, symbol] = position * unit
                    said = position
        return rows

    def target_weights(self, bars: Bars) -> np.ndarray:
        return self.rows(bars, 1.0 / bars.k)

    def target_quantities(self, bars: Bars) -> np.ndarray:
        assert self.quantity is not None
        return self.rows(bars, self.quantity)


def plain_rsi_reversion(period: int, low: float, high: float, short: bool) -> Callable[[list[float]], list[Any]]:
    def positions(closes: list[float]) -> list[Any]:
        index = plain_rsi(closes, period)
        return [1.0 if each < low else (-1.0 if short else 0.0) if each > high else None for each in index]

    return positions


def plain_reversion(period: int, entry: float, exit: float) -> Callable[[list[float]], list[Any]]:
    def positions(closes: list[float]) -> list[Any]:
        found: list[Any] = [None] * len(closes)
        for i in range(period - 1, len(closes)):
            window = closes[i - period + 1 : i + 1]
            deviation = deviation_of(window)
            score = (mean_of(window) - closes[i]) / deviation if deviation > 0.0 else 0.0
            found[i] = 1.0 if score > entry else 0.0 if score < exit else None
        return found

    return positions


PAIRS: dict[str, tuple[Callable[[], AnyStrategy], Callable[[], AnyStrategy]]] = {
    "sma_cross": (lambda: SmaCross(3, 8), lambda: PlainSmaCross(3, 8)),
    "sma_cross short": (lambda: SmaCross(2, 5, short=True), lambda: PlainSmaCross(2, 5, True)),
    "sma_cross quantity": (lambda: SmaCross(1, 7, True, 2.5), lambda: PlainSmaCross(1, 7, True, 2.5)),
    "buy_and_hold": (BuyAndHold, PlainBuyAndHold),
    "buy_and_hold quantity": (lambda: BuyAndHold(3.0), lambda: PlainBuyAndHold(3.0)),
    "donchian": (lambda: DonchianBreakout(8, 4), lambda: PlainDonchian(8, 4)),
    "donchian short": (lambda: DonchianBreakout(5, 5, short=True), lambda: PlainDonchian(5, 5, True)),
    "donchian quantity": (lambda: DonchianBreakout(4, 1, True, 2.0), lambda: PlainDonchian(4, 1, True, 2.0)),
    "momentum": (lambda: MomentumRotation(7, 2, 5), lambda: PlainMomentum(7, 2, 5)),
    "momentum every bar": (lambda: MomentumRotation(1, 9, 1), lambda: PlainMomentum(1, 9, 1)),
    "rsi": (lambda: RsiReversion(4, 35.0, 65.0), lambda: PlainTargets(plain_rsi_reversion(4, 35.0, 65.0, False))),
    "rsi short": (
        lambda: RsiReversion(3, 40.0, 60.0, short=True, quantity=4.0),
        lambda: PlainTargets(plain_rsi_reversion(3, 40.0, 60.0, True), quantity=4.0),
    ),
    "async": (lambda: AsyncReversion(5, 1.0, 0.2), lambda: PlainTargets(plain_reversion(5, 1.0, 0.2))),
    "async quantity": (
        lambda: AsyncReversion(9, 1.5, -0.5, quantity=2.0),
        lambda: PlainTargets(plain_reversion(9, 1.5, -0.5), quantity=2.0),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
async def test_its_docstring_written_as_another_kind_gives_the_same_fills(name: str) -> None:
    built_in, plain = PAIRS[name]
    fills = 0
    for seed in range(8):
        bars = random_bars(seed)
        one, other = await run(built_in(), bars), await run(plain(), bars)
        assert same(one, other), seed
        assert one.audit().ok
        fills += len(one.ledger)
    assert fills > 20


@pytest.mark.parametrize("name", PAIRS)
async def test_warmup_hides_no_decision(name: str) -> None:
    bars, kind = random_bars(3, symbols=1), PAIRS[name][0]
    told = kind()
    untold = kind()
    object.__setattr__(untold, "warmup", 0)
    assert same(await run(told, bars), await run(untold, bars))


# X3: no future data.


def changed_after(bars: Bars, last: int, seed: int, gaps: float = 0.1) -> Bars:
    """The same bars up to `last`; afterwards other prices, and other gaps."""
    rng = np.random.default_rng(seed)
    columns = [np.array(getattr(bars, name)) for name in ("open", "high", "low", "close")]
    tail = slice(last + 1, None)
    factor = np.exp(rng.normal(scale=0.3, size=columns[0][tail].shape))
    factor[rng.random(factor.shape) < gaps] = np.nan
    factor[-1] = 1.0
    for column in columns:
        column[tail] *= factor
    return Bars.from_arrays(bars.timestamps, *columns, symbols=bars.symbols, timeframe="1h")


@pytest.mark.parametrize("name", PAIRS)
async def test_x3_bars_after_t_change_nothing_up_to_t(name: str) -> None:
    kind = PAIRS[name][0]
    decided = 0
    for seed in range(6):
        bars = random_bars(seed, bars=100)
        whole = await run(kind(), bars, force_close=False)
        for last in np.random.default_rng(seed).integers(5, len(bars) - 1, size=4).tolist():
            past = [event for event in whole.ledger if event.bar <= last]
            decided += len(past)
            cut = await run(kind(), bars.head(last + 1), force_close=False)
            assert list(cut.ledger) == past
            assert bits(cut.equity) == bits(whole.equity[: last + 1])
            other = await run(kind(), changed_after(bars, last, seed), force_close=False)
            assert [event for event in other.ledger if event.bar <= last] == past
            assert bits(other.equity[: last + 1]) == bits(whole.equity[: last + 1])
    assert decided > 20


async def test_x3_holds_for_signals(tmp_path: Path) -> None:
    bars = random_bars(4, symbols=2)
    file = tmp_path / "signals.csv"
    rng = np.random.default_rng(1)
    first = int(bars.first_bar.max())
    rows = [f"{t},{rng.uniform(-0.5, 0.5)},{rng.uniform(-0.5, 0.5)}" for t in bars.timestamps[first::3].tolist()]
    file.write_text("time,S0,S1\n" + "\n".join(rows))
    whole = await run(Signals(str(file)), bars, force_close=False)
    for last in (first + 10, len(bars) - 20):
        past = [event for event in whole.ledger if event.bar <= last]
        assert past
        cut = await run(Signals(str(file), clip=True), bars.head(last + 1), force_close=False)
        assert list(cut.ledger) == past
        other = await run(Signals(str(file)), changed_after(bars, last, 3, gaps=0.0), force_close=False)
        assert [event for event in other.ledger if event.bar <= last] == past


# Cases that one can compute in one's head.


async def test_sma_cross_first_compares_at_bar_slow_minus_1() -> None:
    results = await run(SmaCross(2, 4), bars_of([10.0, 11.0, 12.0, 13.0, 14.0, 15.0]), commission=0.0, slippage=0.0)
    assert [(event.bar, event.price) for event in results.ledger] == [(4, 14.0), (5, 15.0)]  # decided at bar 3
    assert results.ledger[-1].reason == "forced_close"


async def test_sma_cross_is_unchanged_where_the_means_are_equal() -> None:
    rising = [10.0, 10.0, 10.0, 10.0, 12.0, 13.0]
    still = [13.0] * 6  # the means meet at 13 and stay equal
    falling = [9.0, 8.0, 8.0]
    weights = SmaCross(2, 4).target_weights(bars_of(rising + still + falling))[:, 0]
    assert np.flatnonzero(~np.isnan(weights)).tolist() == [4, 12]
    assert weights[[4, 12]].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("price", [1.1, 0.1, 1.2345, 3.3, 1e-6])
async def test_a_flat_market_makes_no_crossing(price: float) -> None:
    for fast, slow in ((10, 30), (3, 7), (1, 50)):
        assert np.isnan(SmaCross(fast, slow, short=True).target_weights(bars_of([price] * 120))).all()


async def test_each_of_k_symbols_gets_its_share() -> None:
    bars = bars_of([[1.0, 2.0, 4.0]] * 3 + [[2.0, 4.0, 8.0]] * 3)
    assert BuyAndHold().target_weights(bars)[0].tolist() == [1 / 3] * 3
    assert SmaCross(1, 2).target_weights(bars)[3].tolist() == [1 / 3] * 3
    assert SmaCross(1, 2, quantity=5.0).target_quantities(bars)[3].tolist() == [5.0] * 3


async def test_momentum_takes_the_earlier_symbol_of_equal_ones_and_none_that_fell() -> None:
    bars = bars_of([[10.0, 10.0, 10.0, 10.0], [9.0, 12.0, 13.0, 13.0]])
    weights = MomentumRotation(lookback=1, top=1, every=1).target_weights(bars)
    assert np.isnan(weights[0]).all()
    assert weights[1].tolist() == [0.0, 0.0, 1.0, 0.0]
    assert MomentumRotation(1, 8, 1).target_weights(bars)[1].tolist() == [0.0, 0.25, 0.25, 0.25]


async def test_the_models_latency_has_no_effect_on_the_result() -> None:
    bars = random_bars(2, bars=60)
    one, other = await run(AsyncReversion(4), bars), await run(AsyncReversion(4, latency_ms=0.5), bars)
    assert one.ledger
    assert same(one, other)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SmaCross(30, 30), "fast=30 is not below slow=30"),
        (lambda: SmaCross(fast=0), "fast=0"),
        (lambda: SmaCross(quantity=0.0), r"quantity=0\.0"),
        (lambda: SmaCross(fast="x"), "fast='x'"),
        (lambda: SmaCross(speed=3), "no parameter 'speed'"),
        (lambda: BuyAndHold(quantity=-1.0), "quantity=-1.0"),
        (lambda: DonchianBreakout(5, 6), "exit=6 is above entry=5"),
        (lambda: RsiReversion(low=70.0, high=70.0), r"low=70\.0 is not below high=70\.0"),
        (lambda: RsiReversion(high=101.0), r"high=101\.0"),
        (lambda: MomentumRotation(every=0), "every=0"),
        (lambda: AsyncReversion(period=1), "period=1"),
        (lambda: AsyncReversion(entry=1.0, exit=1.1), r"exit=1\.1 is above entry=1\.0"),
        (lambda: AsyncReversion(entry=math.nan), "entry=nan"),
        (lambda: Signals(), "needs the parameter 'file'"),
        (lambda: Signals("a.csv", unit="lots"), "unit='lots'"),
    ],
)
async def test_bad_parameters_are_named(make: Callable[[], AnyStrategy], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        make()


async def test_one_object_runs_twice_alike() -> None:
    bars = random_bars(6)
    for kind, _ in PAIRS.values():
        strategy = kind()
        assert same(await run(strategy, bars), await run(strategy, bars))


def test_on_change_keeps_what_differs() -> None:
    weights = np.array([[0.0, 1.0], [0.0, 1.0], [1.0, np.nan], [1.0, 0.5], [0.0, 0.5]])
    nan = np.nan
    expected = np.array([[nan, 1.0], [nan, nan], [1.0, nan], [nan, 0.5], [0.0, nan]])
    np.testing.assert_array_equal(on_change(weights), expected)
    np.testing.assert_array_equal(on_change(weights[:, 0]), expected[:, 0])
