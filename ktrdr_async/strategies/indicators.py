"""Indicators: one definition each, the same bits on every IEEE machine and in every history that has the same past.

Values are float64[n], or float64[n, k] column by column, and the result has their shape. NaN means that a symbol has
no bar in that row: windows are over the symbol's own bars, and a row without one gives NaN. Row i is computed from
rows 0..i alone, with + - * /, sqrt and comparisons in an order that neither the number of rows nor their layout in
memory has a part in.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ktrdr_async import compiling
from ktrdr_async.errors import ParameterError
from ktrdr_async.strategies import kernels

Floats = NDArray[np.float64]

_PIECE_VALUES = 32_768  # values that are computed at a time, so that they stay in the processor's cache


def sma(values: ArrayLike, n: int) -> Floats:
    """Mean of the last n bars; NaN before the n-th.

    The sum is a fixed tree: from the newest value back the window is cut into blocks whose lengths are the powers of
    two in n, the smallest first; a block's sum is its older half's plus its newer half's, and blocks are added from
    the newest on. That is divided by n. A window of equal values has exactly that mean, so means of a flat market are
    equal whatever their n.

    Raises:
        ParameterError: if n isn't an integer of at least 1.
    """
    n = _length("sma", n)
    fast = compiling.compiled("ktrdr_async.strategies.kernels")
    if fast is None:
        return _over_windows(values, n, lambda window: _means(window, n))
    array = _as_floats(values)
    result = np.full(array.shape, np.nan)
    columns, filled = _columns(array), _columns(result)
    part, other, total = (np.empty(kernels.PIECE + n) for _ in range(3))
    for j in range(columns.shape[1]):
        own, there = own_bars(columns[:, j])
        if len(own) >= n:
            whole = there is None and columns.shape[1] == 1
            found = filled[:, j] if whole else np.full(len(own), np.nan)
            fast.sma(own, n, part, other, total, found)
            if not whole:
                filled[slice(None) if there is None else there, j] = found
    return result


def rolling_std(values: ArrayLike, n: int, *, ddof: int = 1) -> Floats:
    """Standard deviation of the last n bars, square root of the squares' sum by n - ddof; NaN before the n-th.

    Squares of the distances from the window's `sma` are added one by one, the oldest first. A window of equal values
    gives 0. n <= ddof gives NaN everywhere.

    Raises:
        ParameterError: if n isn't an integer of at least 1, or ddof one of at least 0.
    """
    n = _length("rolling_std", n)
    if operator.index(ddof) < 0:
        raise ParameterError(f"rolling_std: ddof is {ddof}; it must be an integer of at least 0")

    def deviations(window: Floats) -> Floats:
        means = _means(window, n)
        if n <= ddof:
            return np.full(means.shape, np.nan)
        total = np.zeros(means.shape)
        for age in range(n):
            distance = window[age : age + len(means)] - means
            distance *= distance
            total += distance
        total /= n - ddof
        return np.sqrt(total, out=total)

    return _over_windows(values, n, deviations)


def rolling_max(values: ArrayLike, n: int) -> Floats:
    """Largest of the last n bars; NaN before the n-th. :raises ParameterError: if n isn't an integer of at least 1."""
    n = _length("rolling_max", n)
    return _over_windows(values, n, lambda window: _extremes(window, n, np.maximum))


def rolling_min(values: ArrayLike, n: int) -> Floats:
    """Smallest of the last n bars; NaN before the n-th. :raises ParameterError: if n isn't an integer of at least 1."""
    n = _length("rolling_min", n)
    return _over_windows(values, n, lambda window: _extremes(window, n, np.minimum))


def lag(values: ArrayLike, n: int = 1) -> Floats:
    """The value n of the symbol's own bars before; NaN at the first n. :raises ParameterError: if n isn't 1 or more."""
    n = _length("lag", n)
    return _over_windows(values, n + 1, lambda window: window[: len(window) - n])


def ema(values: ArrayLike, n: int) -> Floats:
    """Exponential mean with a = 2 / (n + 1); NaN before the n-th bar.

    At the n-th bar it is the plain mean of the first n, added one by one, the oldest first; afterwards
    `e + a * (value - e)`. It starts at the symbol's first bar, so no bar before is forgotten.

    Raises:
        ParameterError: if n isn't an integer of at least 1.
    """
    n = _length("ema", n)
    return _over_columns("ema", [values], n, n)


def rsi(values: ArrayLike, n: int = 14) -> Floats:
    """Relative Strength Index, 0..100; NaN before the (n + 1)-th bar, when n changes exist.

    J. W. Wilder, New Concepts in Technical Trading Systems, 1978, section VI. Means of gains and of losses start as
    plain means of the first n, added one by one, the oldest first; afterwards `(mean * (n - 1) + change) / n`. The
    index is `100 * gain / (gain + loss)`, which is Wilder's `100 - 100 / (1 + gain / loss)` where that exists: 100
    without any loss, and 50 where there was neither gain nor loss.

    Raises:
        ParameterError: if n isn't an integer of at least 1.
    """
    n = _length("rsi", n)
    return _over_columns("rsi", [values], n, n + 1)


def atr(high: ArrayLike, low: ArrayLike, close: ArrayLike, n: int = 14) -> Floats:
    """Average True Range, in the price's unit; NaN before the n-th bar.

    J. W. Wilder, New Concepts in Technical Trading Systems, 1978, section III. True range: the largest of high - low,
    |high - close before| and |low - close before|; of a symbol's first bar high - low. The average starts as the
    plain mean of the first n, added one by one, the oldest first; afterwards `(average * (n - 1) + range) / n`.

    Args:
        high: float64[n] or float64[n, k]; NaN in one of the three means that there is no bar.
        low: as high.
        close: as high.
        n: bars.

    Raises:
        ParameterError: if n isn't an integer of at least 1, or the shapes differ.
    """
    n = _length("atr", n)
    return _over_columns("atr", [high, low, close], n, n)


def _length(name: str, n: int) -> int:
    try:
        number = operator.index(n)
    except TypeError:
        number = 0
    if number < 1 or isinstance(n, bool):
        raise ParameterError(f"{name}: n is {n!r}; it must be an integer of at least 1")
    return number


def _as_floats(values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim not in (1, 2):
        raise ParameterError(f"an indicator takes float64[n] or float64[n, k], not an array of shape {array.shape}")
    return array


def _over_windows(values: ArrayLike, n: int, compute: Callable[[Floats], Floats]) -> Floats:
    """Hands each column's bars to `compute`, which gives one value for every window of n rows that is full."""
    array = _as_floats(values)
    result = np.full(array.shape, np.nan)
    missing = np.isnan(array)
    with np.errstate(invalid="ignore", over="ignore"):
        if not missing.any():
            _in_pieces(array, n, compute, result)
            return result
        columns, filled, absent = _columns(array), _columns(result), _columns(missing)
        for j in range(columns.shape[1]):
            there = np.flatnonzero(~absent[:, j])
            own = columns[there, j]
            found = np.full(own.shape, np.nan)
            _in_pieces(own, n, compute, found)
            filled[there, j] = found
    return result


def _columns(array: NDArray[Any]) -> NDArray[Any]:
    return array[:, None] if array.ndim == 1 else array


def _in_pieces(array: Floats, n: int, compute: Callable[[Floats], Floats], result: Floats) -> None:
    width = array.shape[1] if array.ndim == 2 else 1
    rows = max(_PIECE_VALUES // max(1, width), 2 * n)
    for start in range(n - 1, len(array), rows):
        stop = min(len(array), start + rows)
        result[start:stop] = compute(array[start - n + 1 : stop])


def _means(window: Floats, n: int) -> Floats:
    rows = len(window) - n + 1
    part, size, done = window, 1, 0  # part[j] is the sum of window[j : j + size]
    total: Floats | None = None
    while True:
        if n & size:
            done += size
            block = part[n - done : n - done + rows]
            total = block if total is None else block + total
        if 2 * size > n:
            break
        part = part[:-size] + part[size:]
        size *= 2
    assert total is not None  # noqa: S101 - n has a bit that is set
    means = total / n
    if n > 1:
        same = _extremes(window[1:] == window[:-1], n - 1, np.logical_and)
        if same.any():
            means[same] = window[n - 1 :][same]
    return means


def _extremes(window: NDArray[Any], n: int, pick: Callable[..., NDArray[Any]]) -> NDArray[Any]:
    rows = len(window) - n + 1
    part, size = window, 1  # part[j] is picked from window[j : j + size]
    while 2 * size <= n:
        part = pick(part[:-size], part[size:])
        size *= 2
    return part[:rows] if size == n else pick(part[:rows], part[n - size : n - size + rows])


def own_bars(column: Floats) -> tuple[Floats, NDArray[np.int64] | None]:
    """A symbol's values without its gaps, read-only and in one piece, and their rows; None: all rows."""
    there = None
    missing = np.isnan(column)
    if missing.any():
        there = np.flatnonzero(~missing)
        column = column[there]
    own = np.ascontiguousarray(column).view()
    own.flags.writeable = False
    return own, there


def _over_columns(kernel: str, arrays: list[ArrayLike], n: int, full: int) -> Floats:
    """Hands each column's bars to a kernel, which gives the values from the bar on where `full` bars are there."""
    given = [_as_floats(each) for each in arrays]
    if any(each.shape != given[0].shape for each in given):
        raise ParameterError(f"an indicator's columns differ in shape: {', '.join(str(each.shape) for each in given)}")
    result = np.full(given[0].shape, np.nan)
    columns, filled = [_columns(each) for each in given], _columns(result)
    fast = compiling.compiled("ktrdr_async.strategies.kernels")
    compute = getattr(fast or kernels, kernel)
    for j in range(filled.shape[1]):
        missing = np.isnan(columns[0][:, j])
        for each in columns[1:]:
            missing |= np.isnan(each[:, j])
        there = np.flatnonzero(~missing)
        if len(there) < full:
            continue
        if fast is None:
            found: Any = [np.nan] * len(there)
            compute(*(each[there, j].tolist() for each in columns), n, found)
        else:
            found = np.full(len(there), np.nan)
            compute(*(each[there, j] for each in columns), n, found)
        filled[there, j] = found
    return result
