"""A seeded market, made of integers, + - * / and floor alone, so that its bits are the same on every IEEE machine.

Prices are a bounded random walk with calm and wild, rising and falling stretches. It walks in integers, where no order
of additions matters, and becomes a price by (1 + x) / (1 - x), which is near exp(2 x) without being computed by it.
A market with more bars begins with the bars of one with fewer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from urllib.parse import parse_qsl

import numpy as np
from numpy.typing import NDArray

from ktrdr_async.market.bars import Bars
from ktrdr_async.market.timeframes import UNITS, parse_timeframe, period_of
from ktrdr_async.market.validation import FIELDS, Floats, Integers, Source, check_size, check_symbols, unknown_symbol

SCHEME = "synthetic:"
DEFAULT_BARS = 35_000
DEFAULT_START = "2020-01-01"

_KEYS = ("bars", "seed", "timeframe", "symbols", "start")
_MAX_SEED = 2**63 - 1
_PIECE = 32_768  # bars that are made at a time; a multiple of _REGIME
_REGIME = 256  # bars for which trend and volatility stay
_SCALE = float(2**27)  # steps of the walk for x = 1: an hourly bar then moves by about 0.3 %
_REACH = 107_374_182  # 0.8 * 2**27: the walk turns round there, so prices stay between 1/9 and 9 times the first
_TICKS = 10_000.0  # a price unit's ticks
_FIRST_PRICE = 100.0


def read_synthetic(reference: str, symbols: Sequence[str] = (), timeframe: str | None = None) -> Bars:
    """Makes the market that a reference such as `synthetic:?bars=35000&seed=7&timeframe=1h` names.

    Args:
        reference: keys are bars (35,000), seed (0), timeframe (1h), symbols (ASSET) and start (2020-01-01).
        symbols: which of the reference's symbols to take; where it names none, the symbols to make.
        timeframe: used where the reference names none; where it does, the same.

    Raises:
        DataError: if a key is unknown or comes twice, or a value is out of range.
    """
    source = Source(reference)
    hint = (
        f"write it as {SCHEME}?bars=35000&seed=7&timeframe=1h&symbols=A,B&start=2020-01-01; every key may be left out"
    )
    query = reference.removeprefix(SCHEME)
    if query and not query.startswith("?"):
        raise source.error("a synthetic market's keys follow a question mark", hint=hint)
    try:
        pairs = parse_qsl(query[1:], keep_blank_values=True, strict_parsing=len(query) > 1, max_num_fields=20)
    except ValueError:
        raise source.error("a synthetic market is described by key=value pairs joined by &", hint=hint) from None
    given: dict[str, str] = {}
    for key, value in pairs:
        if key not in _KEYS:
            raise source.error(f"a synthetic market has no key {key!r}", hint=hint)
        if key in given:
            raise source.error(f"the key {key!r} comes twice", hint=hint)
        given[key] = value
    known = check_symbols(given["symbols"].split(","), source) if "symbols" in given else tuple(symbols) or ("ASSET",)
    for symbol in symbols:
        if symbol not in known:
            raise unknown_symbol(symbol, known, source)
    length = given.get("timeframe", timeframe or "1h")
    if timeframe is not None and parse_timeframe(timeframe) != parse_timeframe(length):
        raise source.error(f"the reference has another timeframe than {timeframe!r}", value=length)
    return synthetic(
        _integer(given.get("bars", str(DEFAULT_BARS)), "bars", source),
        seed=_integer(given.get("seed", "0"), "seed", source),
        timeframe=length,
        symbols=tuple(symbols) or known,  # each is made by its name alone, so those asked for are enough
        start=given.get("start", DEFAULT_START),
        reference=reference,
    )


def synthetic(
    bars: int = DEFAULT_BARS,
    *,
    seed: int = 0,
    timeframe: str = "1h",
    symbols: Sequence[str] = ("ASSET",),
    start: str = DEFAULT_START,
    reference: str | None = None,
) -> Bars:
    """Makes a market of the given number of bars, one a timeframe without gaps.

    A symbol's prices depend on the seed, its name and the timeframe alone, not on the other symbols.

    Args:
        bars: 1 to 100 million over all symbols.
        seed: 0 to 2**63 - 1.
        timeframe: a bar's length, such as `1h`.
        symbols: their names.
        start: the first bar's day or time, ISO 8601, UTC.
        reference: what the bars say that they were read from.

    Raises:
        DataError: if a value is out of range.
    """
    source = Source(reference or "synthetic market")
    names = check_symbols(symbols, source)
    if bars < 1:
        raise source.error("a synthetic market has at least one bar", value=bars)
    check_size(bars, len(names), source)
    if not 0 <= seed <= _MAX_SEED:
        raise source.error(f"a seed is 0 to {_MAX_SEED}", value=seed)
    step = parse_timeframe(timeframe)
    first = period_of(start, source.name)[0]
    if first + bars * step >= 2**63 - 1:
        raise source.error("the bars would end after the year 2262", value=f"{bars:,} bars of {timeframe}")
    timestamps = first + step * np.arange(bars, dtype=np.int64)
    fields: list[Floats] = [np.empty((bars, len(names))) for _ in FIELDS]
    for position, name in enumerate(names):
        _walk(seed, name, step, [values[:, position] for values in fields])
    return Bars(timestamps, fields, symbols=names, timeframe=step, features={}, reference=reference)


def _walk(seed: int, symbol: str, timeframe: int, fields: list[Floats]) -> None:
    """Fills one symbol's columns, a piece at a time."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{symbol}".encode()).digest()[:16], "little")
    noise = np.random.Philox(key=key)
    regimes = np.random.Philox(key=key ^ 1)
    pace = _pace(timeframe)
    bars = len(fields[0])
    level = 0  # the walk after the piece before, before it is folded
    for begin in range(0, bars, _PIECE):
        count = min(_PIECE, bars - begin)
        raw = noise.random_raw(2 * count).astype(np.uint64, copy=False).reshape(count, 2)
        regime = _spread(regimes.random_raw(-(-count // _REGIME)), count)
        wildness = 1 + (regime & 3)
        trend = ((regime >> 2) & 0xFFFF) % 3 - 1
        first, second = _quarters(raw[:, 0]), _quarters(raw[:, 1])
        shock = 2 * (first[0] + first[1] + first[2] + first[3]) - 4 * 0xFFFF  # near normal, mean 0, deviation 75,674
        steps = ((shock + 8_000 * trend) * wildness * pace) // 64
        walk = level + np.cumsum(steps)
        closes = _fold(walk)
        opens = np.empty_like(closes)
        opens[0] = _fold(np.array([level]))[0]
        opens[1:] = closes[:-1]
        opens += ((2 * second[0] - 0xFFFF) * wildness * pace) // 1024
        wick = wildness * pace
        highs = np.maximum(opens, closes) + (second[1] * wick) // 64
        lows = np.minimum(opens, closes) - (second[2] * wick) // 64
        end = begin + count
        for values, levels in zip(fields, (opens, highs, lows, closes), strict=False):
            values[begin:end] = _price(levels)
        fields[4][begin:end] = (1_000 + second[3] + (np.abs(shock) * wildness) // 16).astype(np.float64)
        level = int(walk[-1])


def _pace(timeframe: int) -> int:
    """How far a bar goes, 64 for an hour: it grows with the root of the length up to a week."""
    hours = min(timeframe, UNITS["w"]) / UNITS["h"]
    return max(1, int(np.floor(64.0 * np.sqrt(hours))))


def _spread(raw: NDArray[np.uint64], count: int) -> Integers:
    return np.repeat((raw >> np.uint64(40)).astype(np.int64), _REGIME)[:count]


def _quarters(raw: NDArray[np.uint64]) -> list[Integers]:
    """Cuts 64 random bits into four integers from 0 to 65,535."""
    return [((raw >> np.uint64(shift)) & np.uint64(0xFFFF)).astype(np.int64) for shift in (0, 16, 32, 48)]


def _fold(walk: Integers) -> Integers:
    """Reflects the walk at both ends of its reach."""
    around = (walk + _REACH) % (4 * _REACH)
    return np.minimum(around, 4 * _REACH - around) - _REACH


def _price(levels: Integers) -> Floats:
    x = levels.astype(np.float64) / _SCALE
    return np.floor(_FIRST_PRICE * _TICKS * (1.0 + x) / (1.0 - x)) / _TICKS


def _integer(text: str, key: str, source: Source) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 19:
        raise source.error(f"{key} is a whole number", value=text[:40])
    return int(text)
