"""Indicators against plain definitions, pandas and published figures; and in every bit against their own prefixes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running import bits

from ktrdr_async.errors import ParameterError
from ktrdr_async.strategies import indicators

NAN = float("nan")

# name -> (columns, n) -> result; each takes high, low and close, of which most look at the close alone.
ALL: dict[str, Callable[[Any, Any, Any, int], Any]] = {
    "sma": lambda high, low, close, n: indicators.sma(close, n),
    "rolling_std": lambda high, low, close, n: indicators.rolling_std(close, n),
    "rolling_max": lambda high, low, close, n: indicators.rolling_max(close, n),
    "rolling_min": lambda high, low, close, n: indicators.rolling_min(close, n),
    "lag": lambda high, low, close, n: indicators.lag(close, n),
    "ema": lambda high, low, close, n: indicators.ema(close, n),
    "rsi": lambda high, low, close, n: indicators.rsi(close, n),
    "atr": indicators.atr,
}


# The definitions once more, over one window or column of a symbol's own bars, as the docstrings say them.


def tree(window: list[float]) -> float:
    if len(window) == 1:
        return window[0]
    half = len(window) // 2
    return tree(window[:half]) + tree(window[half:])


def mean_of(window: list[float]) -> float:
    if min(window) == max(window):
        return window[0]
    rest, size, total = window, 1, None
    while rest:
        if len(window) & size:
            block = tree(rest[-size:])
            total = block if total is None else total + block
            rest = rest[:-size]
        size *= 2
    assert total is not None
    return total / len(window)


def deviation_of(window: list[float]) -> float:
    mean, total = mean_of(window), 0.0
    if len(window) == 1:
        return NAN
    for value in window:
        total += (value - mean) * (value - mean)
    return math.sqrt(total / (len(window) - 1))


def plain_ema(column: list[float], n: int) -> list[float]:
    found, total = [NAN] * len(column), 0.0
    for i, value in enumerate(column):
        if i < n:
            total = value if i == 0 else total + value
        if i == n - 1:
            found[i] = total / n
        elif i >= n:
            found[i] = found[i - 1] + 2.0 / (n + 1) * (value - found[i - 1])
    return found


def plain_rsi(column: list[float], n: int) -> list[float]:
    found = [NAN] * len(column)
    gain = loss = 0.0
    for i in range(1, len(column)):
        up, down = max(column[i] - column[i - 1], 0.0), max(column[i - 1] - column[i], 0.0)
        if i <= n:
            gain, loss = gain + up, loss + down
        if i == n:
            gain, loss = gain / n, loss / n
        elif i > n:
            gain, loss = (gain * (n - 1) + up) / n, (loss * (n - 1) + down) / n
        if i >= n:
            found[i] = 50.0 if gain == loss == 0.0 else 100.0 * gain / (gain + loss)
    return found


def plain_atr(high: list[float], low: list[float], close: list[float], n: int) -> list[float]:
    found, total = [NAN] * len(close), 0.0
    for i in range(len(close)):
        width = high[i] - low[i]
        if i > 0:
            width = max(width, abs(high[i] - close[i - 1]), abs(low[i] - close[i - 1]))
        if i < n:
            total += width
            found[i] = total / n if i == n - 1 else NAN
        else:
            found[i] = (found[i - 1] * (n - 1) + width) / n
    return found


def windowed(column: list[float], n: int, of: Callable[[list[float]], float]) -> list[float]:
    return [NAN if i < n - 1 else of(column[i - n + 1 : i + 1]) for i in range(len(column))]


PLAIN: dict[str, Callable[[list[float], list[float], list[float], int], list[float]]] = {
    "sma": lambda high, low, close, n: windowed(close, n, mean_of),
    "rolling_std": lambda high, low, close, n: windowed(close, n, deviation_of),
    "rolling_max": lambda high, low, close, n: windowed(close, n, max),
    "rolling_min": lambda high, low, close, n: windowed(close, n, min),
    "lag": lambda high, low, close, n: [NAN] * min(n, len(close)) + close[: max(0, len(close) - n)],
    "ema": lambda high, low, close, n: plain_ema(close, n),
    "rsi": lambda high, low, close, n: plain_rsi(close, n),
    "atr": plain_atr,
}


def plain(name: str, columns: tuple[np.ndarray, ...], n: int) -> np.ndarray:
    """The plain definition of every column over the rows in which the symbol has a bar."""
    result = np.full(columns[2].shape, NAN)
    for j in range(result.shape[1]):
        there = np.flatnonzero(~np.isnan(columns[2][:, j]))
        result[there, j] = PLAIN[name](*(column[there, j].tolist() for column in columns), n)
    return result


def prices(rng: np.random.Generator, rows: int, k: int, *, gaps: float = 0.0) -> tuple[np.ndarray, ...]:
    """High, low and close, float64[rows, k]; one column keeps to a coarse tick and stands still at times."""
    close = 100.0 + np.cumsum(rng.normal(size=(rows, k)), axis=0)
    close[:, 0] = np.round(close[:, 0]) / 10.0
    close[rows // 3 : rows // 2, 0] = 10.1
    high, low = close + rng.random((rows, k)), close - rng.random((rows, k))
    absent = rng.random((rows, k)) < gaps
    for column in (high, low, close):
        column[absent] = NAN
    return high, low, close


@st.composite
def markets(draw: st.DrawFn) -> tuple[tuple[np.ndarray, ...], int]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    gaps = draw(st.sampled_from([0.0, 0.0, 0.1, 0.7]))
    found = prices(rng, draw(st.integers(1, 70)), draw(st.integers(1, 3)), gaps=gaps)
    return found, draw(st.sampled_from([1, 2, 3, 5, 7, 10, 14, 16, 30]))


@pytest.mark.parametrize("name", ALL)
@given(market=markets())
@settings(max_examples=60, deadline=None)
def test_equals_its_definition_bit_for_bit(name: str, market: tuple[tuple[np.ndarray, ...], int]) -> None:
    columns, n = market
    assert bits(ALL[name](*columns, n)) == bits(plain(name, columns, n))


@pytest.mark.parametrize("name", ALL)
@given(market=markets(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_longer_history_changes_no_bit_of_the_past(
    name: str, market: tuple[tuple[np.ndarray, ...], int], data: st.DataObject
) -> None:
    columns, n = market
    rows = len(columns[2])
    upto = data.draw(st.integers(1, rows))
    head = ALL[name](*(column[:upto] for column in columns), n)
    assert bits(ALL[name](*columns, n)[:upto]) == bits(head)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    other = [np.concatenate([a[:upto], b]) for a, b in zip(columns, prices(rng, 9, columns[2].shape[1]), strict=True)]
    assert bits(ALL[name](*other, n)[:upto]) == bits(head)


@pytest.mark.parametrize("name", ALL)
@given(market=markets(), piece=st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_neither_pieces_nor_layout_change_a_bit(
    name: str, market: tuple[tuple[np.ndarray, ...], int], piece: int
) -> None:
    columns, n = market
    expected = bits(ALL[name](*columns, n))
    before = indicators._PIECE_VALUES
    indicators._PIECE_VALUES = piece
    try:
        assert bits(ALL[name](*columns, n)) == expected
    finally:
        indicators._PIECE_VALUES = before
    assert bits(ALL[name](*(np.asfortranarray(column) for column in columns), n)) == expected
    strided = [np.repeat(column, 2, axis=0)[::2] for column in columns]
    assert bits(ALL[name](*strided, n)) == expected
    apart = [ALL[name](*(column[:, j] for column in columns), n) for j in range(columns[2].shape[1])]
    assert all(one.ndim == 1 for one in apart)
    assert bits(np.stack(apart, axis=1)) == expected


@pytest.mark.parametrize("n", [1, 2, 7, 10, 30, 64, 100])
def test_agrees_with_pandas(n: int) -> None:
    close = prices(np.random.default_rng(n), 500, 2)[2]
    frame = pd.DataFrame(close)
    np.testing.assert_allclose(indicators.sma(close, n), frame.rolling(n).mean(), rtol=1e-12)
    np.testing.assert_allclose(indicators.rolling_std(close, n), frame.rolling(n).std(), rtol=1e-7, atol=1e-8)
    np.testing.assert_array_equal(indicators.rolling_max(close, n), frame.rolling(n).max())
    np.testing.assert_array_equal(indicators.rolling_min(close, n), frame.rolling(n).min())
    np.testing.assert_array_equal(indicators.lag(close, n), frame.shift(n))
    seeded = frame.copy()
    seeded.iloc[: n - 1] = NAN
    seeded.iloc[n - 1] = frame.iloc[:n].mean()
    np.testing.assert_allclose(
        indicators.ema(close, n), seeded.ewm(span=n, adjust=False, ignore_na=True).mean(), rtol=1e-12
    )


def test_rsi_agrees_with_the_figures_of_a_published_example() -> None:
    # StockCharts, ChartSchool, "Relative Strength Index": QQQQ, 14 days.
    closes = [
        44.3389, 44.0902, 44.1497, 43.6124, 44.3278, 44.8264, 45.0955, 45.4245, 45.8433, 46.0826, 45.8931, 46.0328,
        45.6140, 46.2820, 46.2820, 46.0028, 46.0328, 46.4116, 46.2222, 45.6439,
    ]  # fmt: skip
    found = indicators.rsi(closes)
    assert np.isnan(found[:14]).all()
    np.testing.assert_allclose(found[14:], [70.53, 66.32, 66.55, 69.41, 66.36, 57.97], atol=0.006)


def test_degenerate_cases() -> None:
    flat = np.full(40, 1.1)
    for n in range(1, 40):
        assert set(indicators.sma(flat, n)[n - 1 :].tolist()) == {1.1}
        assert np.nanmax(indicators.rolling_std(flat, n), initial=0.0) == 0.0
    assert np.isnan(indicators.rolling_std(flat, 1)).all()
    assert indicators.rolling_std([1.0, 2.0], 1, ddof=0).tolist() == [0.0, 0.0]
    assert set(indicators.rsi(flat)[14:].tolist()) == {50.0}
    assert indicators.rsi([1.0, 2.0, 3.0], 2)[2] == 100.0
    assert indicators.rsi([3.0, 2.0, 1.0], 2)[2] == 0.0
    assert indicators.atr([2.0], [1.5], [1.7], 1).tolist() == [0.5]
    for name, function in ALL.items():
        assert np.isnan(function(flat[:3], flat[:3], flat[:3], 4)).all(), name
        assert function(np.empty((0, 2)), np.empty((0, 2)), np.empty((0, 2)), 4).shape == (0, 2), name


def test_the_input_is_neither_changed_nor_handed_back() -> None:
    columns = prices(np.random.default_rng(5), 50, 2)
    before = [bits(column) for column in columns]
    for column in columns:
        column.flags.writeable = False
    for name, function in ALL.items():
        for n in (1, 3):
            result = function(*columns, n)
            assert result.flags.writeable, name
            assert not any(np.shares_memory(result, column) for column in columns), name
    assert [bits(column) for column in columns] == before


@pytest.mark.parametrize("n", [0, -1, 2.5, "3", True, None])
@pytest.mark.parametrize("name", ALL)
def test_a_bad_length_is_named(name: str, n: Any) -> None:
    with pytest.raises(ParameterError, match=rf"^{name}: n is .*; it must be an integer of at least 1"):
        ALL[name]([1.0], [1.0], [1.0], n)


def test_bad_shapes_are_named() -> None:
    with pytest.raises(ParameterError, match=r"not an array of shape \(1, 1, 1\)"):
        indicators.sma([[[1.0]]], 1)
    with pytest.raises(ParameterError, match=r"differ in shape: \(2,\), \(1,\), \(1,\)"):
        indicators.atr([1.0, 2.0], [1.0], [1.0], 1)
    with pytest.raises(ParameterError, match="ddof is -1"):
        indicators.rolling_std([1.0], 1, ddof=-1)
