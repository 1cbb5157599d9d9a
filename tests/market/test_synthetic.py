from __future__ import annotations

import hashlib
import math
from fractions import Fraction

import numpy as np
import pytest

from ktrdr_async.errors import DataError
from ktrdr_async.market import Bars, synthetic

GOLDEN = {
    "synthetic:?bars=1000&seed=7&timeframe=1h": ("1ce97685e6a1c3b9e3be4f26cb6fef0be0f71b015ce306b288887f4a05a30bab"),
    "synthetic:?bars=300000&seed=0&timeframe=4h&symbols=A": (
        "34250b6e9c9f312453e10a58790c176bbc422aaec8da6ee96ed819c950dcac11"
    ),
    "synthetic:?bars=5000&seed=1&timeframe=1m&symbols=A,B&start=2010-06-01": (
        "d4c3b5d8a84ea52a4fe00f818e2cf54d492a3b107c2b0e3cf7878a78764bbb80"
    ),
}


@pytest.mark.parametrize("reference", GOLDEN)
def test_the_market_has_the_same_bits_for_ever(reference: str) -> None:
    assert Bars.read(reference).fingerprint() == GOLDEN[reference]


def fold(level: int, reach: int) -> int:
    """Reflects by walking, where the market computes."""
    while abs(level) > reach:
        level = 2 * reach - level if level > 0 else -2 * reach - level
    return level


def test_prices_are_what_exact_arithmetic_gives() -> None:
    """The definition once more, one bar at a time, in integers and fractions that are rounded after each operation."""
    seed, symbol, bars, reach, hour_pace = 3, "XY", 1_500, 107_374_182, 64
    key = int.from_bytes(hashlib.sha256(f"{seed}/{symbol}".encode()).digest()[:16], "little")
    noise, regimes = np.random.Philox(key=key), np.random.Philox(key=key ^ 1)

    def price(level: int) -> float:
        x = Fraction(level, 2**27)
        up, down = float(1 + x), float(1 - x)
        ratio = float(Fraction(float(Fraction(1_000_000.0) * Fraction(up))) / Fraction(down))
        return float(Fraction(math.floor(ratio)) / 10_000)

    made = synthetic(bars, seed=seed, symbols=(symbol,))
    level = 0
    for i in range(bars):
        if i % 256 == 0:
            regime = int(regimes.random_raw()) >> 40
            wild = (1 + regime % 4) * hour_pace
            trend = (regime // 4) % 65_536 % 3 - 1
        one, two = int(noise.random_raw()), int(noise.random_raw())
        parts = [one >> shift & 0xFFFF for shift in (0, 16, 32, 48)]
        gap, up, down, turnover = (two >> shift & 0xFFFF for shift in (0, 16, 32, 48))
        shock = 2 * sum(parts) - 4 * 65_535
        opened = fold(level, reach) + (2 * gap - 65_535) * wild // 1_024
        level += (shock + 8_000 * trend) * wild // 64
        closed = fold(level, reach)
        high, low = max(opened, closed) + up * wild // 64, min(opened, closed) - down * wild // 64
        got = [float(column[i, 0]) for column in (made.open, made.high, made.low, made.close)]
        assert got == [price(each) for each in (opened, high, low, closed)]
        assert made.volume[i, 0] == 1_000 + turnover + abs(shock) * (wild // hour_pace) // 16


@pytest.mark.parametrize("timeframe", ["1m", "1h", "1d", "1w"])
@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1])
def test_every_market_keeps_the_rules_of_bars(seed: int, timeframe: str) -> None:
    made = synthetic(15_000, seed=seed, timeframe=timeframe, start="1700-01-01")
    again = Bars.from_arrays(
        made.timestamps, made.open, made.high, made.low, made.close, made.volume, symbols=made.symbols
    )
    assert again.fingerprint() == made.fingerprint()
    assert made.warnings == ()
    assert np.array_equal(made.close, np.round(made.close, 4))


def test_a_long_market_stays_in_its_bounds() -> None:
    made = synthetic(600_000, seed=7)
    assert made.low.min() > 5
    assert made.high.max() < 2_000
    moves = np.abs(np.diff(made.close[:, 0]) / made.close[:-1, 0])
    assert 0.001 < np.median(moves) < 0.01
    assert moves.max() < 0.1
    assert np.count_nonzero(made.open[1:] == made.close[:-1]) < len(made) / 10


def test_more_bars_begin_with_the_bars_of_fewer() -> None:
    long = Bars.read("synthetic:?bars=270000&seed=5")
    for bars in (1, 255, 256, 1_000, 262_143, 262_144, 262_145):
        assert Bars.read(f"synthetic:?bars={bars}&seed=5").fingerprint() == long.fingerprint(bars - 1)


def test_a_symbol_does_not_depend_on_the_others() -> None:
    both = Bars.read("synthetic:?bars=500&seed=5&symbols=A,B")
    assert both.symbols == ("A", "B")
    assert not np.array_equal(both.close[:, 0], both.close[:, 1])
    only = Bars.read("synthetic:?bars=500&seed=5&symbols=A,B", symbols=["B"])
    assert only.fingerprint() == both.select(["B"]).fingerprint()
    assert Bars.read("synthetic:?bars=500&seed=5", symbols=["B"]).fingerprint() == only.fingerprint()


def test_seeds_differ() -> None:
    assert len({Bars.read(f"synthetic:?bars=50&seed={seed}").fingerprint() for seed in range(20)}) == 20


def test_a_reference_has_defaults_and_says_where_bars_are_from() -> None:
    made = Bars.read("synthetic:")
    assert len(made) == 35_000
    assert made.symbols == ("ASSET",)
    assert made.reference == "synthetic:"
    assert made.timestamps[0] == np.datetime64("2020-01-01", "ns").astype(np.int64)
    part = Bars.read("synthetic:?bars=100", start="2020-01-02", end="2020-01-02")
    assert (len(part), part.reference) == (24, "synthetic:?bars=100")
    assert Bars.read("synthetic:?bars=10", timeframe="4h").timeframe == 4 * 3_600 * 10**9


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("synthetic:bars=10", "question mark"),
        ("synthetic:?bars", "key=value"),
        ("synthetic:?bars=10&color=red", "no key 'color'"),
        ("synthetic:?bars=10&bars=11", "comes twice"),
        ("synthetic:?bars=0", "at least one bar"),
        ("synthetic:?bars=-5", "whole number"),
        ("synthetic:?bars=1e6", "whole number"),
        ("synthetic:?bars=", "whole number"),
        ("synthetic:?bars=100000001", "refused"),
        ("synthetic:?bars=60000000&symbols=A,B", "refused"),
        ("synthetic:?bars=99999999999999999999999", "whole number"),
        ("synthetic:?seed=9223372036854775808", "a seed is"),
        ("synthetic:?timeframe=hour", "not a timeframe"),
        ("synthetic:?bars=50000000&timeframe=1w", "2262"),
        ("synthetic:?start=now", "not a time"),
        ("synthetic:?start=2020-13-01", "not a time"),
        ("synthetic:?symbols=A,A", "comes once"),
        ("synthetic:?symbols=", "printable"),
        ("synthetic:?" + "&".join(["bars=1"] * 30), "key=value"),
    ],
)
def test_a_bad_reference_is_a_data_error_that_quotes_it(reference: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        Bars.read(reference)


def test_what_contradicts_the_reference_is_refused() -> None:
    with pytest.raises(DataError, match="another timeframe"):
        Bars.read("synthetic:?bars=10&timeframe=1h", timeframe="1d")
    with pytest.raises(DataError, match="no such symbol"):
        Bars.read("synthetic:?bars=10&symbols=A", symbols=["B"])
    with pytest.raises(DataError, match="no further columns"):
        Bars.read("synthetic:?bars=10", features=["rsi"])
