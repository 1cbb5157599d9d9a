"""Files and frames that are wrong in every way: bars, or one error of ours that says why; never anything else."""

from __future__ import annotations

import gzip
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from campaigns import Figures, sized
from fuzzing import STRINGS, Tried, attempt, mutated_bytes

from ktrdr_async.market import Bars

TIMES = (
    "", "now", "today", "NaT", "0000-00-00", "1677-01-01", "2262-04-12", "9999-12-31 23:59:60", "2020-02-30", "1e9",
    "-1", "99999999999999999999", "1577836800", "2020-01-01T00:00:00+99:00", "2020-01-01T00:00Z", "01/02/2020",
    "2020-W01-1", "20200101", "2020-01-01T24:00", "2020-01-01 00:00 Europe/Berlin", "-292277022657",
    "\uff11\uff12\uff13\uff14-01-01",
)  # fmt: skip
CELLS = (
    "", "nan", "NaN", "NULL", "inf", "-inf", "1e400", "-1", "0", "-0.0", "1_000", "1,5", "1.5.2", "0x10", "1e-330",
    "\uff11\uff12", '"', "'", "1 000", "+1", "TRUE", "5e324", "None", "9" * 400,
)  # fmt: skip
NAMES = ("time", "date", "Datetime", "open", "HIGH", "low", "close", "volume", "symbol", "price", "", "x", "<CLOSE>")


def good(rng: Random) -> list[list[str]]:
    """A table of bars as a file has it."""
    rows = [["time", "open", "high", "low", "close", "volume"]]
    price, start = rng.choice((1e-6, 1.0, 100.0, 1e9)), np.datetime64(rng.choice(("2020-03-28", "1999-12-31")))
    for at in range(rng.choice((1, 2, 5, 30))):
        close = price * rng.uniform(0.9, 1.1)
        low, high = min(price, close) * 0.99, max(price, close) * 1.01
        stamp = str(start + np.timedelta64(at, "h")) if rng.random() < 0.99 else str(start)
        rows.append([stamp, *(repr(value) for value in (price, high, low, close)), str(rng.randrange(1000))])
        price = close
    return rows


def broken_table(rng: Random) -> tuple[str, list[list[str]]]:
    """A table with one kind of fault, and the kind's name."""
    rows = good(rng)
    at = rng.randrange(len(rows))
    column = rng.randrange(6)
    kind = rng.choice(("times", "cells", "columns", "names", "rows", "texts", "duplicates", "ragged"))
    if kind == "times":
        for row in rng.choices(rows[1:], k=rng.choice((1, 1, 3))):
            row[0] = rng.choice(TIMES)
    elif kind == "cells":
        rows[at][column] = rng.choice(CELLS)
    elif kind == "columns":
        rows = [row[:column] + row[column + 1 :] for row in rows]
    elif kind == "names":
        rows[0][column] = rng.choice(NAMES)
    elif kind == "rows":
        rows = [rows[0], *rng.sample(rows[1:], len(rows) - 1), *rows[1 : rng.choice((1, 3))]]
    elif kind == "texts":
        rows[at][column] = rng.choice(STRINGS)
    elif kind == "duplicates":
        rows.insert(at, list(rows[at]))
    else:
        rows[at] = rows[at][:column] + rows[at][:column] * rng.choice((0, 3, 500))
    return kind, rows


def written(rng: Random, rows: list[list[str]]) -> bytes:
    """The table as bytes in some dialect."""
    separator = rng.choice((*[","] * 6, ";", "\t", "|", ":", " "))
    end = rng.choice(("\n", "\n", "\r\n", "\r", "\n\n"))
    quote = rng.choice(("", "", '"'))
    text = end.join(separator.join(f"{quote}{cell}{quote}" for cell in row) for row in rows) + rng.choice(("", end))
    coding = rng.choice((*["utf-8"] * 9, "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp037"))
    return text.encode(coding, "replace")


def options(rng: Random) -> dict[str, Any]:
    """Some of the options of `Bars.read`, good or bad."""
    pools: dict[str, tuple[Any, ...]] = {
        "symbols": (("A",), ("A", "A"), ("open",), ("",), ("x" * 99,), ("\0",)),
        "timeframe": ("1h", "1d", "", "0h", "99999999999h", "1 h", "-1m"),
        "tz": ("UTC", "Europe/Berlin", "Nowhere/City", "../etc", "", "\0", "a" * 5000),
        "timestamps": ("open", "close"),
        "date_format": ("%Y-%m-%d", "ns", "%Q", "%", "iso", "%Y" * 500, "%z%Z"),
        "features": (("volume",), ("x",), ("x", "x"), ("time",)),
        "start": ("2020-03-28", "2030-01-01", "nonsense", "", "0001-01-01", "9999-12-31"),
        "end": ("2020-03-29", "1970-01-01", "12:00", "9" * 30),
    }
    names = rng.sample(sorted(pools), rng.choice((0, 0, 0, 0, 0, 0, 1, 2)))
    return {name: rng.choice(pools[name]) for name in names}


def looks_like_bars(bars: Bars) -> None:
    """What is taken keeps every rule of bars."""
    assert (np.diff(bars.timestamps) > 0).all()
    there = ~np.isnan(bars.close)
    assert there.any(axis=1).all()
    low, high = bars.low[there], bars.high[there]
    assert (low > 0).all()
    assert np.isfinite(high).all()
    for prices in (bars.open[there], bars.close[there]):
        assert ((low <= prices) & (prices <= high)).all()


def try_file(place: Path, content: bytes, rng: Random, tried: Tried, kind: str, number: int, suffix: str) -> None:
    """Reads one file; afterwards the directory is as it was."""
    path = place / f"a{suffix}"  # gzip is told by its content
    path.write_bytes(content)
    roots = rng.choice((None, None, None, (place,)))
    given = options(rng)
    try:
        bars, error = attempt(Bars.read, str(path), roots=roots, **given)
        tried.note(kind, error)
        if error is None:
            looks_like_bars(bars)
        elif roots is not None:
            assert "; found" not in error.message, error
        assert [each.name for each in place.iterdir()] == [path.name]
        assert path.read_bytes() == content
    except BaseException as failure:
        failure.add_note(f"input {number}, {kind}, {given}, roots {roots}: {content[:400]!r}")
        raise


@sized("trials", ci=700, whole=45_000, minutes=20)
def test_a_csv_is_read_or_refused(trials: int, campaign_seed: int, figures: Figures, tmp_path: Path) -> None:
    tried = Tried()
    for number in range(trials):
        rng = Random(f"csv {campaign_seed} {number}")
        kind, rows = broken_table(rng) if rng.random() < 0.7 else ("as it should be", good(rng))
        content = written(rng, rows)
        if rng.random() < 0.35:
            kind, content = "bytes", mutated_bytes(rng, content)
        if rng.random() < 0.1:
            packed = gzip.compress(content, 1)
            kind = "gzip"
            content = mutated_bytes(rng, packed) if rng.random() < 0.5 else packed
        try_file(tmp_path, content, rng, tried, kind, number, ".csv")
    assert tried.taken > trials // 50
    assert tried.refused["bad_data"] > trials // 5
    figures.add("CSV files", str(tried))


def columns_of(rng: Random, rows: list[list[str]]) -> dict[str, Any]:
    """A table's columns with types as programs write them."""
    made: dict[str, Any] = {}
    for at, name in enumerate(rows[0]):
        cells = [row[at] if at < len(row) else "" for row in rows[1:]]
        try:
            made[plain(name)] = (
                pd.to_datetime(pd.Series(cells), format="ISO8601") if at == 0 else list(map(float, cells))
            )
        except ValueError:
            made[plain(name)] = [plain(cell) for cell in cells]
    return made


def plain(text: str) -> str:
    """The text as a file can hold it."""
    return text.encode("utf-8", "replace").decode()


WRONG: dict[str, Callable[[Random, int], Any]] = {
    "text": lambda rng, n: [rng.choice(CELLS) for _ in range(n)],
    "flags": lambda rng, n: [rng.random() < 0.5 for _ in range(n)],
    "lists": lambda rng, n: [[1.0]] * n,
    "structs": lambda rng, n: [{"a": 1}] * n,
    "bytes": lambda rng, n: [b"\xff\x00"] * n,
    "nothing": lambda rng, n: [None] * n,
    "huge": lambda rng, n: [rng.choice((1e308, -1e308, 5e-324, np.inf, np.nan)) for _ in range(n)],
    "integers": lambda rng, n: [rng.choice((0, -1, 2**62, 7)) for _ in range(n)],
    "decimals": lambda rng, n: pa.array([None] * n, pa.decimal128(38, 10)),
    "durations": lambda rng, n: pa.array([3] * n, pa.duration("ns")),
    "days": lambda rng, n: pa.array([rng.choice((0, -(2**31), 2**31 - 1))] * n, pa.date32()),
    "seconds": lambda rng, n: pa.array([rng.choice((0, 2**43, -(2**43)))] * n, pa.timestamp("s")),
    "zoned": lambda rng, n: pa.array([rng.randrange(2**50) for _ in range(n)], pa.timestamp("us", "Asia/Tokyo")),
    "categories": lambda rng, n: pa.array(["a"] * n).dictionary_encode(),
    "times of day": lambda rng, n: pa.array([5] * n, pa.time64("ns")),
}


@sized("trials", ci=200, whole=12_000, minutes=20)
def test_a_parquet_file_is_read_or_refused(trials: int, campaign_seed: int, figures: Figures, tmp_path: Path) -> None:
    tried = Tried()
    for number in range(trials):
        rng = Random(f"parquet {campaign_seed} {number}")
        rows = good(rng) if rng.random() < 0.5 else broken_table(rng)[1]
        columns = columns_of(rng, rows)
        kind = rng.choice(("flipped", "flipped", "schema", "rows", "index"))
        if kind == "schema":
            for name in rng.choices(sorted(columns) or ["a"], k=rng.choice((1, 1, 2))):
                columns[name] = WRONG[rng.choice(sorted(WRONG))](rng, len(rows) - 1)
        stream = io.BytesIO()
        if kind == "index" and columns:
            pd.DataFrame(columns).set_index(rng.choice(sorted(columns))).to_parquet(stream)
        else:
            pq.write_table(pa.table(columns), stream, coerce_timestamps="us", allow_truncated_timestamps=True)
        content = stream.getvalue()
        if kind == "flipped":
            content = mutated_bytes(rng, content)
        try_file(tmp_path, content, rng, tried, kind, number, ".parquet")
    assert tried.taken > trials // 50
    assert tried.refused["bad_data"] > trials // 5
    figures.add("Parquet files", str(tried))


def broken_frame(rng: Random) -> tuple[str, Any]:
    """What somebody hands over as a frame."""
    rows = good(rng) if rng.random() < 0.6 else broken_table(rng)[1]
    columns = columns_of(rng, rows)
    kind = rng.choice(("types", "index", "levels", "names", "mapping", "object", "as it is", "as it is"))
    n = len(rows) - 1
    if kind == "types" and columns:
        value = WRONG[rng.choice(sorted(WRONG))](rng, n)
        try:
            columns[rng.choice(sorted(columns))] = value.to_pandas() if isinstance(value, pa.Array) else value
        except (ValueError, pa.ArrowException):
            columns.popitem()  # pandas has no such values
    frame = pd.DataFrame(columns)
    if kind == "index" and len(frame.columns):
        frame = frame.set_index(list(frame.columns[: rng.choice((1, 1, 2))]))
    elif kind == "levels" and len(frame.columns):
        pairs = [(rng.choice(("A", "B", "")), str(name)) for name in frame.columns]
        frame.columns = pd.MultiIndex.from_tuples([pair[:: rng.choice((1, -1))] for pair in pairs])
    elif kind == "names":
        frame.columns = pd.Index([rng.choice((*NAMES, 3, None, 1.5, ("a", "b"))) for _ in frame.columns], dtype=object)
    elif kind == "mapping":
        return kind, {rng.choice(("A", "B", "", 5, None)): rng.choice((frame, frame, None, 7)) for _ in range(2)}
    elif kind == "object":
        return kind, rng.choice((None, 3, "x", [], {}, frame.to_numpy(), frame.iloc[:0], frame.iloc[:, :0]))
    return kind, frame


@sized("trials", ci=200, whole=10_000, minutes=20)
def test_a_frame_is_taken_or_refused_and_not_changed(trials: int, campaign_seed: int, figures: Figures) -> None:
    tried = Tried()
    for number in range(trials):
        rng = Random(f"frame {campaign_seed} {number}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pandas, while the wrong frame is made
            kind, frame = broken_frame(rng)
        names = ("symbols", "timeframe", "tz", "timestamps", "features")
        given = {name: value for name, value in options(rng).items() if name in names}
        before = frame.copy(deep=True) if isinstance(frame, pd.DataFrame) else None
        try:
            bars, error = attempt(Bars.from_pandas, frame, **given)
            tried.note(kind, error)
            if error is None:
                looks_like_bars(bars)
            if before is not None:
                pd.testing.assert_frame_equal(frame, before)
        except BaseException as failure:
            failure.add_note(f"input {number}, {kind}, {given}: {frame!r:.600}")
            raise
    assert tried.taken > trials // 50
    assert tried.refused["bad_data"] > trials // 5
    figures.add("frames", str(tried))


@sized("trials", ci=200, whole=5_000, minutes=10)
def test_a_reference_is_read_or_refused(trials: int, campaign_seed: int, figures: Figures, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(written(Random(1), good(Random(1))))
    good_ones = (
        "synthetic:?bars=50&seed=7", "synthetic:?bars=20&seed=1&timeframe=1h&symbols=A,B&start=2020-01-01",
        str(tmp_path / "a.csv"), f"A={tmp_path}/a.csv,B={tmp_path}/a.csv", str(tmp_path), "memory:ab", "http://x/y.csv",
    )  # fmt: skip
    tried = Tried()
    for number in range(trials):
        rng = Random(f"reference {campaign_seed} {number}")
        text = rng.choice(good_ones)
        for _ in range(rng.choice((0, 1, 1, 2, 4))):
            at = rng.randrange(len(text) + 1)
            piece = rng.choice((*STRINGS, "&bars=99999999999999", "&seed=-1", "=", ",", "&", "?", "..", "//", "%00"))
            text = text[:at] + piece + text[at + rng.choice((0, 0, 1, 5)) :]
        if "bars" in text and any(len(part) > 7 for part in text.replace("=", "&").split("&") if part.isdigit()):
            text = text.replace("99999999999999", "9" * 30)  # a huge one, never one that fits
        roots = rng.choice((None, (tmp_path,)))
        given = options(rng)
        try:
            bars, error = attempt(Bars.read, text, roots=roots, **given)
            tried.note(text.partition(":")[0] if text.startswith("synthetic:") else "path", error)
            if error is None:
                looks_like_bars(bars)
        except BaseException as failure:
            failure.add_note(f"input {number}, {given}, roots {roots}: {text[:400]!r}")
            raise
    figures.add("data references", str(tried))
