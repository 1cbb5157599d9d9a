"""Indicators and decisions as loops, in the subset of Python that a compiler for numeric code takes.

Columns are lists where the source is interpreted and arrays where it is compiled; each holds one symbol's own bars,
without gaps. What has a definition is defined in `indicators` and in the strategies.
"""

from __future__ import annotations

from typing import Any

Floats = Any
Ints = Any

PIECE = 2048  # values that are computed at a time, so that they stay in the processor's cache


def ema(column: Floats, n: int, out: Floats) -> None:
    """`indicators.ema` from the n-th bar on: out[i] is of bar i."""
    a = 2.0 / (n + 1)
    e = _first_mean(column, n)
    out[n - 1] = e
    for i in range(n, len(column)):
        e = e + a * (column[i] - e)
        out[i] = e


def rsi(column: Floats, n: int, out: Floats) -> None:
    """`indicators.rsi` from the (n + 1)-th bar on: out[i] is of bar i."""
    gain = 0.0
    loss = 0.0
    for i in range(1, n + 1):
        change = column[i] - column[i - 1]
        if change > 0.0:
            gain += change
        elif change < 0.0:
            loss -= change
    gain = gain / n
    loss = loss / n
    out[n] = 100.0 * gain / (gain + loss) if gain + loss > 0.0 else 50.0
    for i in range(n + 1, len(column)):
        change = column[i] - column[i - 1]
        gain = (gain * (n - 1) + (change if change > 0.0 else 0.0)) / n
        loss = (loss * (n - 1) + (-change if change < 0.0 else 0.0)) / n
        out[i] = 100.0 * gain / (gain + loss) if gain + loss > 0.0 else 50.0


def atr(highs: Floats, lows: Floats, closes: Floats, n: int, out: Floats) -> None:
    """`indicators.atr` from the n-th bar on: out[i] is of bar i."""
    mean = highs[0] - lows[0]
    if n == 1:
        out[0] = mean
    for i in range(1, len(highs)):
        before = closes[i - 1]
        widest = max(highs[i] - lows[i], abs(highs[i] - before), abs(lows[i] - before))
        if i < n:
            mean += widest
            if i == n - 1:
                mean = mean / n
                out[i] = mean
        else:
            mean = (mean * (n - 1) + widest) / n
            out[i] = mean


def _first_mean(column: Floats, n: int) -> float:
    total = column[0]
    for i in range(1, n):
        total += column[i]
    return float(total / n)


def sma(column: Floats, n: int, part: Floats, other: Floats, means: Floats, out: Floats) -> None:
    """`indicators.sma` from the n-th bar on: out[i] is of bar i. The other three have room for PIECE + n values."""
    start = n - 1
    while start < len(column):
        count = min(PIECE, len(column) - start)
        _sums(column, start, count, n, n, part, other, means, means)
        _to_means(column, start, count, n, _equal_pairs(column, start, count, n), means)
        for i in range(count):
            out[start + i] = means[i]
        start += count


def cross(
    column: Floats,
    fast: int,
    slow: int,
    below: int,
    part: Floats,
    other: Floats,
    fasts: Floats,
    slows: Floats,
    bars: Ints,
    positions: Ints,
) -> int:
    """The positions that `sma_cross` orders: bars[m] is where, positions[m] is 1 or `below`. Returns how many."""
    found = 0
    position = 0
    start = slow - 1
    while start < len(column):
        count = min(PIECE, len(column) - start)
        _sums(column, start, count, slow, fast, part, other, slows, fasts)
        pairs = _equal_pairs(column, start, count, slow)
        _to_means(column, start, count, fast, pairs, fasts)
        _to_means(column, start, count, slow, pairs, slows)
        for i in range(count):
            if fasts[i] > slows[i]:
                if position != 1:
                    position = 1
                    bars[found] = start + i
                    positions[found] = position
                    found += 1
            elif fasts[i] < slows[i] and position != below:
                position = below
                bars[found] = start + i
                positions[found] = position
                found += 1
        start += count
    return found


def _equal_pairs(column: Floats, start: int, count: int, n: int) -> int:
    """How many values equal the one before them, in the windows of n values that end at bars start..start+count-1."""
    window = column[start - n + 1 : start + count]
    pairs = 0
    for i in range(count + n - 2):
        pairs += window[i + 1] == window[i]
    return pairs


def _to_means(column: Floats, start: int, count: int, n: int, pairs: int, total: Floats) -> None:
    """Turns sums of n values into their means; n equal values have exactly that mean."""
    for i in range(count):
        total[i] = total[i] / n
    if pairs < n - 1:
        return
    window = column[start - n + 1 : start + count]
    run = 1
    if n == 1:
        total[0] = window[0]
    for i in range(count + n - 2):
        run = run + 1 if window[i + 1] == window[i] else 1
        if run >= n:
            total[i + 2 - n] = window[i + 1]


def _sums(
    column: Floats,
    start: int,
    count: int,
    n: int,
    fewer: int,
    part: Floats,
    other: Floats,
    total: Floats,
    total_of_fewer: Floats,
) -> None:
    """Sums of the last n values, and of the last `fewer` of them, at bars start..start+count-1; both are one tree."""
    rows = count + n - 1
    window = column[start - n + 1 : start + count]
    for p in range(rows):
        part[p] = window[p]
    size = 1  # part[p] is the sum of `size` values from there on
    done = 0
    done_of_fewer = 0
    while True:
        if fewer != n and fewer & size:
            _add(part, n - done_of_fewer - size, count, done_of_fewer == 0, total_of_fewer)
            done_of_fewer += size
        if n & size:
            _add(part, n - done - size, count, done == 0, total)
            done += size
        if 2 * size > n:
            break
        later = part[size:rows]
        for p in range(rows - 2 * size + 1):
            other[p] = part[p] + later[p]
        part, other = other, part
        size *= 2


def _add(part: Floats, shift: int, count: int, first: bool, total: Floats) -> None:
    blocks = part[shift : shift + count]  # a slice: an index that may be negative keeps a loop from being vectorised
    if first:
        for i in range(count):
            total[i] = blocks[i]
    else:
        for i in range(count):
            total[i] = blocks[i] + total[i]
