"""What the engine and its peers are both asked: markets, random scripts, and each built-in told a second time.

The second telling is by symbol and bar, in plain Python, from the built-in's docstring and nothing else.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean

import numpy as np
import pandas as pd
from markets import random_market
from numpy.random import Generator
from oracle import DAY_NS, Decision, Decisions, Market, Terms
from peers import Decider, Job, Prices, Wish
from scripted import Script, Scripted

import ktrdr_async as kt
from ktrdr_async.strategies.base import AnyStrategy

Rule = Callable[[float, float, float], int | None]  # high, low, close -> 1, 0, -1; None: as it was
BUILT_INS = ("sma_cross", "donchian_breakout", "rsi_reversion", "async_reversion", "buy_and_hold")
MOST_UNITS = 50


def cross(fast: int, slow: int, short: bool) -> Rule:
    closes: list[float] = []

    def rule(high: float, low: float, close: float) -> int | None:
        closes.append(close)
        if len(closes) < slow:
            return None
        near, far = fmean(closes[-fast:]), fmean(closes[-slow:])
        return None if near == far else 1 if near > far else -1 if short else 0

    return rule


def channel(entry: int, leave: int, short: bool) -> Rule:
    highs: list[float] = []
    lows: list[float] = []
    held = 0

    def rule(high: float, low: float, close: float) -> int | None:
        nonlocal held
        if len(highs) >= entry:
            if close > max(highs[-entry:]):
                held = 1
            elif close < min(lows[-entry:]) and short:
                held = -1
            elif (held > 0 and close < min(lows[-leave:])) or (held < 0 and close > max(highs[-leave:])):
                held = 0
        highs.append(high)
        lows.append(low)
        return held

    return rule


def strength(period: int, low_level: float, high_level: float, short: bool) -> Rule:
    last = gain = loss = math.nan
    changes: list[float] = []

    def rule(high: float, low: float, close: float) -> int | None:
        nonlocal last, gain, loss
        changes.append(close - last)
        last = close
        up, down = max(changes[-1], 0.0), max(-changes[-1], 0.0)
        if len(changes) <= period:
            return None
        if len(changes) == period + 1:
            gain, loss = (fmean(max(sign * c, 0.0) for c in changes[1:]) for sign in (1, -1))
        else:
            gain, loss = (gain * (period - 1) + up) / period, (loss * (period - 1) + down) / period
        index = 100 * gain / (gain + loss) if gain + loss else 50.0
        return 1 if index < low_level else (-1 if short else 0) if index > high_level else None

    return rule


def reversion(period: int, entry: float, leave: float) -> Rule:
    closes: list[float] = []

    def rule(high: float, low: float, close: float) -> int | None:
        closes.append(close)
        if len(closes) < period:
            return None
        window = closes[-period:]
        mean = fmean(window)
        deviation = math.sqrt(math.fsum((c - mean) ** 2 for c in window) / (period - 1))
        score = (mean - close) / deviation if deviation else 0.0
        return 1 if score > entry else 0 if score < leave else None

    return rule


def once() -> Rule:
    return lambda high, low, close: 1


def by_position(rule: Callable[[], Rule], k: int, quantity: float) -> Decider:
    """Wishes `quantity` units times a rule's position where that changes; every symbol has a rule of its own."""
    rules, held = [rule() for _ in range(k)], [0] * k

    def decide(row: int, bars: list[Prices | None]) -> Iterable[Wish]:
        for j, prices in enumerate(bars):
            position = None if prices is None else rules[j](*prices[1:])
            if position is not None and position != held[j]:
                held[j] = position
                yield Wish(j, "quantity", position * quantity)

    return decide


def by_growth(lookback: int, top: int, every: int, k: int) -> Decider:
    """`momentum_rotation`."""
    closes: list[list[float]] = [[] for _ in range(k)]

    def decide(row: int, bars: list[Prices | None]) -> Iterable[Wish]:
        for own, prices in zip(closes, bars, strict=True):
            own += [] if prices is None else [prices[3]]
        if row < lookback or (row - lookback) % every:
            return
        growth = {j: own[-1] / own[-1 - lookback] for j, own in enumerate(closes) if bars[j] and len(own) > lookback}
        risen = sorted((j for j, g in growth.items() if g > 1), key=lambda j: (-growth[j], j))
        for j in range(k):
            if closes[j]:
                yield Wish(j, "weight", 1 / min(top, k) if j in risen[:top] else 0.0)

    return decide


def by_script(script: list[Decisions]) -> Decider:
    def decide(row: int, bars: list[Prices | None]) -> Iterable[Wish]:
        for j, made in script[row].items():
            for each in made if isinstance(made, list) else [made]:
                yield Wish(j, each.kind, each.value)

    return decide


def built_in(name: str, rng: Generator, k: int, quantity: float) -> tuple[AnyStrategy, Decider]:
    """A built-in with random parameters, and its second telling."""
    short = bool(rng.random() < 0.5)
    few, many = int(rng.integers(2, 6)), int(rng.integers(6, 25))
    if name == "momentum_rotation":
        top = int(rng.integers(1, k + 1))
        return kt.MomentumRotation(many, top=top, every=few), by_growth(many, top, few, k)
    made: dict[str, tuple[AnyStrategy, Callable[[], Rule]]] = {
        "sma_cross": (kt.SmaCross(few, many, short, quantity), lambda: cross(few, many, short)),
        "donchian_breakout": (kt.DonchianBreakout(many, few, short, quantity), lambda: channel(many, few, short)),
        "rsi_reversion": (kt.RsiReversion(few, 40.0, 60.0, short, quantity), lambda: strength(few, 40.0, 60.0, short)),
        "async_reversion": (kt.AsyncReversion(many, 1.0, quantity=quantity), lambda: reversion(many, 1.0, 0.0)),
        "buy_and_hold": (kt.BuyAndHold(quantity), once),
    }
    strategy, rule = made[name]
    return strategy, by_position(rule, k, quantity)


def random_orders(rng: Generator, market: Market, size: float, *, first: int = 0) -> list[Decisions]:
    """Targets, and orders for what leads there, of at most MOST_UNITS * size units; from row `first` on."""
    n, k = market.close.shape
    starts = np.argmax(~np.isnan(market.close), axis=0)
    often = float(rng.choice([0.05, 0.3, 0.8]))
    plan = [0] * k
    script: list[Decisions] = []
    for t in range(n):
        made: dict[int, Decision | list[Decision]] = {}
        for j in range(k):
            if t < max(first, starts[j]) or rng.random() >= often:
                continue
            new = int(rng.choice([0, -plan[j], rng.integers(-MOST_UNITS, MOST_UNITS + 1)]))
            step = new - plan[j]
            half = int(rng.integers(-5, 6))
            made[j] = [
                Decision("quantity", new * size),
                Decision("order", step * size),
                [Decision("order", half * size), Decision("order", (step - half) * size)],
            ][int(rng.integers(0, 3))]
            plan[j] = new
        script.append(made)
    return script


def ticks(rng: Generator, bars: int, k: int, *, gaps: bool, holes: bool) -> Market:
    """Prices in ticks of 1/64 around 100, so that sums are exact and ties are ties; flat stretches between."""
    moves = rng.integers(-40, 41, (bars, k)) * (rng.random((bars, k)) < 0.8)
    jumps = rng.integers(-60, 61, (bars, k)) if gaps else np.zeros((bars, k), dtype=np.int64)
    closes = 6400 + np.cumsum(moves + jumps, axis=0)
    closes = 1600 + np.abs(closes - 1600)
    opens = np.vstack([closes[:1], closes[:-1]]) + jumps
    opens = np.maximum(opens, 64)
    highs = np.maximum(opens, closes) + rng.integers(0, 20, (bars, k))
    lows = np.minimum(opens, closes) - rng.integers(0, 20, (bars, k))
    prices = [values / 64.0 for values in (opens, highs, lows, closes)]
    if holes:
        gone = rng.random((bars, k)) < 0.1
        gone[: int(rng.integers(0, bars // 4)), 0] = True
        for values in prices:
            values[gone] = np.nan
        rows = ~gone.all(axis=1)
        prices = [values[rows] for values in prices]
    stamps = np.int64(1_577_836_800_000_000_000) + np.arange(len(prices[0]), dtype=np.int64) * DAY_NS
    return Market(stamps, *prices)


def enough(market: Market, size: float) -> float:
    """A capital that no order of the job ever exhausts."""
    return float(np.ceil(100 * market.close.shape[1] * MOST_UNITS * size * np.nanmax(market.high)))


def random_job(seed: int, *, symbols: int | None = None, slippage: bool = True, first: int = 0) -> tuple[str, Job]:
    """Its kind and itself: a script of random orders, or a built-in. Nothing is decided before row `first`."""
    rng = np.random.default_rng(seed)
    k = symbols or int(rng.integers(1, 5))
    commission = float(rng.choice([0.0, 0.001, 0.02]))
    slipped = float(rng.choice([0.0, 0.0005, 0.01])) if slippage else 0.0
    size = float(rng.choice([1.0, 1.0, 100.0])) if symbols == 1 else float(rng.choice([1.0, 0.25, 100.0]))
    kinds = ["script", *BUILT_INS[: 4 if first else 5], "momentum_rotation"]
    kind = "script" if seed % 2 else kinds[1 + seed // 2 % (len(kinds) - 1)]
    if kind == "script":
        market = random_market(rng, bars=int(rng.integers(30, 240)), symbols=k, wild=float(rng.choice([0.0, 0.02])))
        script = random_orders(rng, market, size, first=first)
        strategy: AnyStrategy = Scripted(Script(script))
        decider = by_script(script)
    elif kind == "momentum_rotation":
        # By weight, so that what is bought must fit: opens at the close before, every bar there, no costs.
        market = ticks(rng, int(rng.integers(60, 240)), k, gaps=False, holes=False)
        strategy, decider = built_in(kind, rng, k, size)
        return kind, Job(market, Terms(1_000_000.015625, force_close=False), strategy, decider)
    else:
        market = ticks(rng, int(rng.integers(60, 240)), k, gaps=bool(rng.random() < 0.7), holes=k > 1)
        strategy, decider = built_in(kind, rng, k, size * int(rng.integers(1, MOST_UNITS)))
    capital = enough(market, size)
    return kind, Job(market, Terms(capital, commission, slipped, size, force_close=False), strategy, decider)


def real_frame(name: str) -> pd.DataFrame:
    """A file that the package `backtesting` carries."""
    spec = importlib.util.find_spec("backtesting")
    assert spec is not None
    assert spec.origin is not None
    return pd.read_csv(Path(spec.origin).parent / "test" / name, index_col=0, parse_dates=True)


def real_market(name: str, rng: Generator | None = None) -> Market:
    """EURUSD or GOOG; with `rng` a second time beside itself, with a late start and holes."""
    frame = real_frame(name)
    prices = [frame[column].to_numpy(np.float64)[:, None] for column in ("Open", "High", "Low", "Close")]
    if rng is not None:
        gone = rng.random((len(frame), 1)) < 0.1
        gone[: len(frame) // 10] = True
        prices = [np.hstack([values, np.where(gone, np.nan, values)]) for values in prices]
    return Market(pd.DatetimeIndex(frame.index).as_unit("ns").asi8, *prices)


def real_job(name: str, kind: str, rng: Generator, *, beside: bool, slippage: float) -> Job:
    """A built-in or a script on real data: one symbol, or with `beside` two."""
    market = real_market(name, rng if beside else None)
    k = market.close.shape[1]
    terms = Terms(enough(market, 1.0), 0.001, slippage, force_close=False)
    if kind == "script":
        script = random_orders(rng, market, 1.0, first=1)
        return Job(market, terms, Scripted(Script(script)), by_script(script))
    return Job(market, terms, *built_in(kind, rng, k, 7.0))
