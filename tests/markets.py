"""Seeded random markets, terms and decision scripts, in the oracle's plain form.

Everything comes from the Generator that is handed in. Nothing here decides on a symbol before its first bar, mixes
a target and an `order()` of one symbol in one bar, or gives a weight outside -1..1: those are errors, not results.
"""

from typing import Literal

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from oracle import DAY_NS, Decision, Decisions, Market, Terms

Floats = NDArray[np.float64]
STEPS_NS = (60_000_000_000, 900_000_000_000, 3_600_000_000_000, DAY_NS)
START_NS = 1_577_836_800_000_000_000  # 2020-01-01T00:00:00Z


def random_market(rng: Generator, *, bars: int = 120, symbols: int | None = None, wild: float | None = None) -> Market:
    """A market of 1 to 5 symbols and at most `bars` bars; `wild` in 0..1 is the share of extreme moves.

    Symbols start late, stop early and have holes; rows in which no symbol has a bar are left out, so steps are uneven.
    """
    k = int(rng.integers(1, 6)) if symbols is None else symbols
    wild = float(rng.choice([0.0, 0.0, 0.01, 0.05])) if wild is None else wild
    columns = [_prices(rng, bars, wild) for _ in range(k)]
    prices = [np.stack([column[i] for column in columns], axis=1) for i in range(4)]
    there = np.stack([_presence(rng, bars) for _ in range(k)], axis=1)
    for array in prices:
        array[~there] = np.nan
    rows = there.any(axis=1)
    step = int(rng.choice(STEPS_NS))
    index = np.arange(bars, dtype=np.int64)
    if rng.random() < 0.3:
        index += 2 * (index // 5)  # weekends
    timestamps = (START_NS + index * step)[rows]
    return Market(timestamps, *(np.ascontiguousarray(array[rows]) for array in prices))


def _prices(rng: Generator, bars: int, wild: float) -> tuple[Floats, Floats, Floats, Floats]:
    """Open, high, low, close of one symbol that is there at every bar; each float64[bars]."""
    scale = 10.0 ** rng.uniform(-3, 5)
    volatility = float(rng.choice([0.002, 0.02, 0.1]))
    moves = volatility * rng.standard_normal(bars)
    gaps = 0.3 * volatility * rng.standard_normal(bars)
    jumps = rng.random(bars) < wild
    moves[jumps] += rng.choice([-2.5, -1.0, 1.0, 2.5], size=int(jumps.sum()))
    jumps = rng.random(bars) < wild
    gaps[jumps] += rng.choice([-2.5, -1.0, 1.0, 2.5], size=int(jumps.sum()))
    ranges = 0.5 * volatility * np.abs(rng.standard_normal((2, bars)))
    if rng.random() < 0.3:
        first = int(rng.integers(0, bars))
        flat = slice(first, first + int(rng.integers(2, 30)))
        for array in (moves, gaps, ranges[0], ranges[1]):
            array[flat] = 0.0
    # Levels wander within e**+-8 of the scale, so that lots stay far below 2**53.
    steps = np.stack([gaps, moves], axis=1).ravel()
    level = 0.0
    levels = np.empty(2 * bars)
    for i, step in enumerate(steps.tolist()):
        level = min(8.0, max(-8.0, level + step))
        levels[i] = level
    open_ = scale * np.exp(levels[0::2])
    close = scale * np.exp(levels[1::2])
    if rng.random() < 0.4:  # a coarse tick: equal prices and whole quotients
        tick = 10.0 ** np.floor(np.log10(scale) - float(rng.integers(1, 4)))
        open_ = np.maximum(np.round(open_ / tick), 1.0) * tick
        close = np.maximum(np.round(close / tick), 1.0) * tick
    high = np.maximum(open_, close) * (1 + ranges[0])
    low = np.minimum(open_, close) * np.maximum(1 - ranges[1], 0.01)
    return open_, high, low, close


def _presence(rng: Generator, bars: int) -> NDArray[np.bool_]:
    """bool[bars]: where one symbol has a bar; True somewhere."""
    there = np.ones(bars, dtype=np.bool_)
    if rng.random() < 0.3:
        there[: int(rng.integers(1, max(2, bars // 2)))] = False
    if rng.random() < 0.3:
        there[bars - int(rng.integers(1, max(2, bars // 3))) :] = False
    if rng.random() < 0.4:
        there &= rng.random(bars) >= float(rng.choice([0.05, 0.3, 0.6]))
    if rng.random() < 0.2:
        first = int(rng.integers(0, bars))
        there[first : first + int(rng.integers(2, 20))] = False
    if not there.any():
        there[int(rng.integers(0, bars))] = True
    return there


def random_terms(rng: Generator, market: Market) -> Terms:
    """Terms under which the cheapest price buys at most about 1e11 lots."""
    capital = float(np.round(10.0 ** rng.uniform(3, 6), 2))
    floor = capital / (1e11 * float(np.nanmin(market.low)))
    lot_sizes = [size for size in (1.0, 1.0, 1.0, 100.0, 0.1, 0.01, 1e-6) if size >= floor]
    return Terms(
        initial_capital=capital,
        commission=float(rng.choice([0.0, 0.001, 0.02])),
        slippage=float(rng.choice([0.0, 0.0005, 0.01])),
        lot_size=float(rng.choice(lot_sizes)) if lot_sizes else floor,
        min_trade=float(rng.choice([0.0, 0.0, 0.02, 0.2])),
        force_close=bool(rng.random() < 0.7),
        warmup=int(rng.choice([0, 1, 2, 20])),
    )


def first_bars(market: Market) -> list[int]:
    """Index of each symbol's first bar."""
    return [int(np.argmax(~np.isnan(column))) for column in market.close.T]


def random_weights(rng: Generator, market: Market) -> Floats:
    """Weights as a vectorised strategy gives them, float64[n, k]: NaN means keep, all NaN before the first bar."""
    n, k = market.close.shape
    weights = np.full((n, k), np.nan)
    often = float(rng.choice([0.03, 0.2, 0.7]))
    share = float(rng.choice([1.0, 1.0 / k]))
    for s, first in enumerate(first_bars(market)):
        last = 0.0
        for t in range(first, n):
            if rng.random() < often:
                last = share * _next_weight(rng, last / share)
                weights[t, s] = last
    weights[rng.random(n) < 0.1] = np.nan
    return weights


def _next_weight(rng: Generator, last: float) -> float:
    """A weight in -1..1: flat, a flip, a part of the last one, a whole one, tiny, or any."""
    kind = rng.integers(0, 7)
    if kind == 0:
        return 0.0
    if kind == 1:
        return -last
    if kind == 2:
        return last * float(rng.choice([0.25, 0.5, 0.9]))
    if kind == 3:
        return float(rng.choice([-1.0, 1.0]))
    if kind == 4 and rng.random() < 0.3:
        return float(rng.choice([-1e-7, 1e-7]))
    return float(rng.uniform(-1.0, 1.0))


def random_quantities(rng: Generator, market: Market, terms: Terms) -> Floats:
    """Target quantities in signed units, float64[n, k]: NaN means keep, and all are NaN before the first bar."""
    weights = random_weights(rng, market)
    units = weights * terms.initial_capital / _last_closes(market)
    whole = rng.random(units.shape) < 0.5
    units[whole] = np.round(units[whole] / terms.lot_size) * terms.lot_size
    return units


def _last_closes(market: Market) -> Floats:
    """float64[n, k]: each symbol's last close at each bar, NaN before its first bar."""
    closes = market.close.copy()
    for t in range(1, len(closes)):
        closes[t] = np.where(np.isnan(closes[t]), closes[t - 1], closes[t])
    return closes


def script_of(values: Floats, kind: Literal["weight", "quantity"]) -> list[Decisions]:
    """The same decisions one by one: a mapping a bar, without the NaN ones."""
    return [{s: Decision(kind, v) for s, v in enumerate(row) if not np.isnan(v)} for row in values.tolist()]


def random_script(rng: Generator, market: Market, terms: Terms) -> list[Decisions]:
    """Decisions of all kinds, with tags, NaN targets, several a bar; one mapping a bar."""
    weights = random_weights(rng, market)
    units = random_quantities(rng, market, terms)
    closes = _last_closes(market)
    firsts = first_bars(market)
    chances = rng.dirichlet([1.0, 1.0, 1.0])
    script: list[Decisions] = []
    for t in range(len(closes)):
        made: dict[int, Decision | list[Decision]] = {}
        for s in range(closes.shape[1]):
            if t < firsts[s]:
                continue
            tag = str(rng.choice(["", "", "entry", "exit", "überhang"]))
            kind = int(rng.choice(3, p=chances))
            if kind == 0 and not np.isnan(weights[t, s]):
                made[s] = Decision("weight", float(weights[t, s]), tag)
            elif kind == 1 and not np.isnan(units[t, s]):
                made[s] = Decision("quantity", float(units[t, s]), tag)
            elif kind == 2 and rng.random() < 0.3:
                worth = 0.3 * terms.initial_capital / closes[t, s]
                count = int(rng.integers(1, 4))
                made[s] = [Decision("order", float(worth * rng.uniform(-1, 1)), f"{tag}{i}") for i in range(count)]
            only = made.get(s)
            if isinstance(only, Decision) and rng.random() < 0.05:
                made[s] = [Decision("weight", float(rng.uniform(-1, 1)), "replaced"), only]
            elif s not in made and rng.random() < 0.02:
                made[s] = Decision("weight", float("nan"), "keep")
        script.append(made)
    return script
