from __future__ import annotations

import hashlib
import pickle
import struct
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktrdr_async.errors import DataError
from ktrdr_async.market import Bars, format_timeframe, parse_timeframe
from ktrdr_async.market.timeframes import infer_timeframe

HOUR = 3_600_000_000_000
DAY = 24 * HOUR
START = 1_577_836_800_000_000_000  # 2020-01-01


def make(n: int = 6, k: int = 1, *, step: int = HOUR, **changes: Any) -> Bars:
    """Plain valid bars whose close of symbol j at bar i is 100 + i + 10 j."""
    close = 100.0 + np.arange(n, dtype=float)[:, None] + 10.0 * np.arange(k)[None, :]
    given: dict[str, Any] = {
        "timestamps": START + step * np.arange(n, dtype=np.int64),
        "open": close - 0.5,
        "high": close + 1.0,
        "low": close - 1.0,
        "close": close,
        "volume": np.full((n, k), 7.0),
        "symbols": tuple("ABCDEFGH"[:k]),
    }
    given.update(changes)
    return Bars.from_arrays(**given)


def spoiled(field: str, row: int, value: float, **more: Any) -> Bars:
    good = make()
    column = np.array(getattr(good, field))
    column[row] = value
    changes: dict[str, Any] = {field: column, **more}
    return make(**changes)


def test_columns_have_the_shapes_and_types_of_the_contract() -> None:
    bars = make(5, 3)
    assert len(bars) == 5
    assert bars.k == 3
    assert bars.timestamps.dtype == np.int64
    for name in ("open", "high", "low", "close", "volume"):
        column = getattr(bars, name)
        assert column.shape == (5, 3)
        assert column.dtype == np.float64
        assert column.flags.c_contiguous
    assert bars.timeframe == HOUR
    assert bars.first_bar.tolist() == [0, 0, 0]
    assert bars.reference is None
    assert repr(bars) == "<Bars: 5 of 1h, A, B, C, 2020-01-01 00:00:00 UTC to 2020-01-01 04:00:00 UTC>"


def test_nothing_can_be_changed() -> None:
    five = np.full(3, 5.0)
    times = START + HOUR * np.arange(3)
    bars = Bars.from_arrays(times, five, five, five, five, symbols="A", features={"x": [1, 2, 3]})
    five[:] = 9.0
    assert bars.close[:, 0].tolist() == [5.0, 5.0, 5.0]
    with pytest.raises(AttributeError, match="can't be changed"):
        bars.close = five.reshape(3, 1)
    with pytest.raises(AttributeError, match="can't be changed"):
        del bars.close
    for column in (bars.timestamps, bars.close, bars.volume, bars.first_bar, bars.features["x"], bars.head(2).open):
        with pytest.raises(ValueError, match="read-only"):
            column[0] = 1
    with pytest.raises(TypeError):
        bars.features["y"] = bars.close  # type: ignore[index]


@pytest.mark.parametrize(
    ("field", "row", "value", "words"),
    [
        ("open", 2, float("nan"), ["row 2", "open of A", "all of open, high, low and close", "nan"]),
        ("close", 0, float("nan"), ["row 0", "close of A", "or none"]),
        ("low", 3, 0.0, ["row 3", "low of A", "above 0", "0.0"]),
        ("open", 3, -1.5, ["row 3", "open of A", "above 0", "-1.5"]),
        ("high", 4, float("inf"), ["row 4", "high of A", "finite", "inf"]),
        ("low", 1, 100.75, ["row 1", "low of A", "low must not be above open and close", "100.5 and 101.0", "100.75"]),
        ("high", 5, 104.75, ["row 5", "high of A", "high must not be below open and close", "104.75"]),
        ("volume", 2, -3.0, ["row 2", "volume of A", "not below 0", "-3.0"]),
        ("volume", 2, float("inf"), ["row 2", "volume of A", "finite"]),
    ],
)
def test_a_broken_rule_names_row_column_value_and_rule(field: str, row: int, value: float, words: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        spoiled(field, row, value)
    for word in words:
        assert word in str(caught.value)
    assert caught.value.where.startswith("arrays, row")


def test_the_first_broken_row_is_named() -> None:
    low = np.array(make().low)
    low[2] = low[4] = -1.0
    with pytest.raises(DataError, match="row 2"):
        make(low=low)


def test_timestamps_increase() -> None:
    times = np.array(make().timestamps)
    times[3] = times[1] - 5
    with pytest.raises(DataError, match=r"row 3.*must increase.*2020-01-01 02:00:00 UTC"):
        make(timestamps=times)
    times = np.array(make().timestamps)
    times[3] = times[2]
    with pytest.raises(DataError, match="row 3: each timestamp comes once, this one was in row 2 already") as caught:
        make(timestamps=times)
    assert "`tz`" in caught.value.hint


def test_a_symbol_without_a_bar_has_nan_in_all_five() -> None:
    full = make(4, 2)
    columns: dict[str, Any] = {
        name: np.array(getattr(full, name)) for name in ("open", "high", "low", "close", "volume")
    }
    for name in ("open", "high", "low", "close"):
        columns[name][0, 1] = np.nan
    bars = make(4, 2, **columns)
    assert all(np.isnan(getattr(bars, name)[0, 1]) for name in columns)
    assert bars.first_bar.tolist() == [0, 1]
    assert bars.warnings == ("B: 1 of 4 bars are missing (25.0 %)",)


def test_rows_without_any_bar_are_left_out() -> None:
    columns: dict[str, Any] = {name: np.array(getattr(make(4), name)) for name in ("open", "high", "low", "close")}
    for column in columns.values():
        column[2] = np.nan
    bars = make(4, **columns, features={"x": [0.0, 1.0, 2.0, 3.0]})
    assert bars.close[:, 0].tolist() == [100.0, 101.0, 103.0]
    assert bars.features["x"][:, 0].tolist() == [0.0, 1.0, 3.0]
    for column in columns.values():
        column[:] = np.nan
    with pytest.raises(DataError, match="no bars"):
        make(4, **columns)


def test_a_missing_volume_is_zero() -> None:
    assert make(volume=None).volume.tolist() == [[0.0]] * 6
    assert spoiled("volume", 2, float("nan")).volume[2, 0] == 0.0


@pytest.mark.parametrize(
    "changes",
    [
        {"symbols": ()},
        {"symbols": ("A", "B")},
        {"symbols": ("",)},
        {"symbols": (" A",)},
        {"symbols": ("A\0",)},
        {"symbols": ("A" * 65,)},
        {"close": [1.0]},
        {"close": ["x"] * 6},
        {"timestamps": [1.0] * 6},
        {"timestamps": []},
        {"timeframe": "1 hour"},
        {"timeframe": 0},
        {"features": {"x": [1.0]}},
        {"features": {"x": [1.0, 2.0, 3.0, 4.0, 5.0, float("inf")]}},
    ],
)
def test_what_fits_nothing_is_a_data_error(changes: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        make(**changes)


def test_moves_of_more_than_forty_percent_are_warned_about_once_a_symbol() -> None:
    close = np.array([100.0, 100.0, 59.0, 59.0, 100.0, 100.0])
    changes: dict[str, Any] = {"open": close, "high": close, "low": close, "close": close}
    (warning,) = make(**changes, step=DAY).warnings
    assert "from 100 to 59 at 2020-01-03 00:00:00 UTC" in warning
    assert "1 more" in warning
    assert make(**changes, step=7 * DAY).warnings == ()
    exactly = np.array([100.0, 60.0, 84.0, 84.0, 84.0, 84.0])
    assert make(open=exactly, high=exactly, low=exactly, close=exactly, step=DAY).warnings == ()


def test_a_move_is_looked_at_across_missing_bars() -> None:
    close = np.array([[100.0, 10.0], [100.0, np.nan], [100.0, 20.0]])
    bars = Bars.from_arrays(START + DAY * np.arange(3), close, close, close, close, symbols=("A", "B"))
    assert [warning[:3] for warning in bars.warnings] == ["B: ", "B: "]
    assert "from 10 to 20 at 2020-01-03" in bars.warnings[1]


def reference_digest(bars: Bars, rows: int) -> str:
    """The fingerprint, written down a second time: a header and then each row's values, little-endian."""
    names = ",".join(f'"{name}"' for name in bars.symbols)
    extra = ",".join(f'["{name}",{column.ndim}]' for name, column in bars.features.items())
    header = f'["ktrdr-bars-1",{{"symbols":[{names}],"timeframe":{bars.timeframe},"features":[{extra}]}}]\n'
    digest = hashlib.sha256(header.encode())
    for i in range(rows):
        digest.update(struct.pack("<q", int(bars.timestamps[i])))
        columns = [bars.open, bars.high, bars.low, bars.close, bars.volume, *bars.features.values()]
        for column in columns:
            values = np.atleast_1d(column[i]).tolist()
            digest.update(struct.pack(f"<{len(values)}d", *values))
    return digest.hexdigest()


@settings(max_examples=60, deadline=None)
@given(asked=st.lists(st.integers(0, 39), min_size=1, max_size=12), k=st.integers(1, 3))
def test_a_fingerprint_is_that_of_the_prefix_in_whatever_order_it_is_asked_for(asked: list[int], k: int) -> None:
    bars = make(40, k, features={"x": np.arange(40.0), "y": np.ones((40, k))})
    for upto in asked:
        assert bars.fingerprint(upto) == reference_digest(bars, upto + 1)
    assert bars.fingerprint() == bars.fingerprint(39)


def test_a_fingerprint_across_pieces_is_that_of_the_prefix() -> None:
    n = 40_000
    ones = np.ones(n)
    bars = Bars.from_arrays(START + HOUR * np.arange(n), ones, ones, ones, ones, symbols="A")
    fresh = {upto: bars.head(upto + 1).fingerprint() for upto in (0, 16_383, 16_384, 16_385, 39_999)}
    for upto in (16_385, 39_999, 0, 16_384, 16_383):
        assert bars.fingerprint(upto) == fresh[upto]
    assert len(set(fresh.values())) == 5


@pytest.mark.parametrize("field", ["open", "high", "low", "close", "volume", "x"])
def test_a_fingerprint_sees_every_value_up_to_the_bar_and_none_after(field: str) -> None:
    x = np.zeros(6)
    base = make(features={"x": x})
    column = np.array(base.features["x"] if field == "x" else getattr(base, field))
    column[3] += 0.25
    changes: dict[str, Any] = {} if field == "x" else {field: column}
    other = make(features={"x": column if field == "x" else x}, **changes)
    assert other.fingerprint(2) == base.fingerprint(2)
    assert other.fingerprint(3) != base.fingerprint(3)
    assert other.fingerprint() != base.fingerprint()


def test_a_fingerprint_covers_names_and_timeframe() -> None:
    prints = {
        make().fingerprint(0),
        make(symbols=("Z",)).fingerprint(0),
        make(timeframe="4h").fingerprint(0),
        make(features={"x": np.zeros(6)}).fingerprint(0),
        make(features={"y": np.zeros(6)}).fingerprint(0),
    }
    assert len(prints) == 5


def test_every_nan_has_one_fingerprint() -> None:
    odd = np.array([0x7FF8_0000_0000_0001] * 6, dtype=np.uint64).view(np.float64)
    assert make(features={"x": odd}).fingerprint() == make(features={"x": np.full(6, np.nan)}).fingerprint()


def test_there_is_no_fingerprint_of_a_bar_that_is_not_there() -> None:
    for upto in (-1, 6):
        with pytest.raises(IndexError):
            make().fingerprint(upto)


def test_head_is_the_prefix() -> None:
    bars = make(6, 2, features={"x": np.arange(6.0)})
    head = bars.head(4)
    assert len(head) == 4
    assert head.fingerprint() == bars.fingerprint(3)
    assert head.features["x"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert len(bars.head(99)) == 6
    with pytest.raises(DataError):
        bars.head(0)


def test_head_keeps_the_timeframe_of_the_whole() -> None:
    times = START + DAY * np.array([0, 3, 4, 5, 6, 7])
    assert make(timestamps=times).head(2).timeframe == DAY


@pytest.mark.parametrize(
    ("start", "end", "rows"),
    [
        (None, None, 60),
        ("2020-01-02", None, 36),
        (None, "2020-01-01", 24),
        ("2020-01-01 22:00", "2020-01-02", 26),
        ("2020-01-01T22:00Z", "2020-01-01 23", 2),
        ("2020-01-01 21:30", "2020-01-01 22:00:00", 1),
        ("2020", "2020", 60),
        ("2020-01", "2020-01-02 00:00", 25),
    ],
)
def test_between_takes_both_ends_as_pandas_label_slices(start: str | None, end: str | None, rows: int) -> None:
    bars = make(60)
    part = bars.between(start, end)
    assert len(part) == rows
    plain = slice(*(bound.replace("Z", "") if bound else None for bound in (start, end)))
    assert part.timestamps.tolist() == [int(t.value) for t in bars.to_pandas().tz_localize(None).loc[plain].index]


@pytest.mark.parametrize(
    ("start", "end"), [("now", None), ("2021", None), (None, "2019-12-31"), ("x", None), ("2020-13-01", None), ("", "")]
)
def test_between_refuses_what_is_no_time_and_leaves_no_empty_bars(start: str | None, end: str | None) -> None:
    with pytest.raises(DataError):
        make().between(start, end)


def test_select_gives_what_reading_these_symbols_alone_would_give() -> None:
    close = np.array([[1.0, np.nan, 3.0], [1.0, 2.0, 3.0], [1.0, np.nan, 3.0], [1.0, 2.0, np.nan]])
    shared, own = np.arange(4.0), np.arange(12.0).reshape(4, 3)
    times, features = START + DAY * np.arange(4), {"s": shared, "o": own}
    bars = Bars.from_arrays(times, close, close, close, close, symbols=("A", "B", "C"), features=features)
    chosen = bars.select(("C", "B"))
    assert chosen.symbols == ("C", "B")
    assert chosen.close[0].tolist()[0] == 3.0
    assert chosen.features["o"][1].tolist() == [5.0, 4.0]
    alone = bars.select(["B"])
    assert alone.close[:, 0].tolist() == [2.0, 2.0]
    assert alone.features["s"].tolist() == [1.0, 3.0]
    with pytest.raises(DataError, match="there is no such symbol; found X"):
        bars.select(["X"])
    with pytest.raises(DataError, match="comes once"):
        bars.select(["A", "A"])


def test_bars_survive_pickling() -> None:
    bars = make(6, 2, features={"x": np.arange(6.0)})
    copy = pickle.loads(pickle.dumps(bars))
    assert copy.fingerprint() == bars.fingerprint()
    assert not copy.close.flags.writeable


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1m", 60), ("5m", 300), ("15m", 900), ("1h", 3_600), ("4h", 14_400), ("1d", 86_400), ("1w", 604_800)],
)
def test_timeframes_read_back(text: str, seconds: int) -> None:
    assert parse_timeframe(text) == seconds * 10**9
    assert format_timeframe(parse_timeframe(text)) == text


@pytest.mark.parametrize("text", ["", "h", "0h", "1M", "1 h", "-1h", "1.5h", "hour", "99999w", "1h\n", "\u0661h"])
def test_other_timeframes_are_refused(text: str) -> None:
    with pytest.raises(DataError, match="not a timeframe"):
        parse_timeframe(text)


def test_the_timeframe_is_the_most_common_step() -> None:
    assert infer_timeframe(np.array([0, 1, 2, 5, 6]) * DAY) == DAY
    assert infer_timeframe(np.array([0, 3, 4]) * DAY) == DAY
    assert infer_timeframe(np.array([0])) == DAY


def test_bars_load_no_heavy_module() -> None:
    code = "import sys, ktrdr_async.market.bars; print([m for m in ('pandas', 'pyarrow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
