from __future__ import annotations

import gzip
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktrdr_async.errors import DataError, DataNotAllowedError
from ktrdr_async.market import Bars

# pandas 2.3 on numpy 2.5, in its own arithmetic of times.
pytestmark = pytest.mark.filterwarnings("ignore:The 'generic' unit for NumPy:DeprecationWarning")

HOUR = 3_600 * 10**9
HEADER = "Date,Open,High,Low,Close,Volume"
ROWS = (
    "2017-04-19 09:00:00,1.0716,1.0722,1.07083,1.07219,1413",
    "2017-04-19 10:00:00,1.07214,1.07296,1.07214,1.0726,1241",
    "2017-04-19 11:00:00,1.07256,1.07299,1.0717,1.07192,1025",
    "2017-04-19 12:00:00,1.07195,1.0728,1.07195,1.07202,1460",
)
NINE = 1_492_592_400 * 10**9  # 2017-04-19 09:00 UTC

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes lines into a file and returns its path."""

    def write(*lines: str, name: str = "EURUSD.csv", end: str = "\n", encoding: str = "utf-8") -> str:
        path = tmp_path / name
        path.write_bytes("".join(line + end for line in lines).encode(encoding))
        return str(path)

    return write


@pytest.fixture
def expected(write: Write) -> Bars:
    bars = Bars.read(write(HEADER, *ROWS))
    assert bars.symbols == ("EURUSD",)
    assert bars.timestamps.tolist() == [NINE + HOUR * i for i in range(4)]
    assert bars.open[:, 0].tolist() == [1.0716, 1.07214, 1.07256, 1.07195]
    assert bars.high[:, 0].tolist() == [1.0722, 1.07296, 1.07299, 1.0728]
    assert bars.low[:, 0].tolist() == [1.07083, 1.07214, 1.0717, 1.07195]
    assert bars.close[:, 0].tolist() == [1.07219, 1.0726, 1.07192, 1.07202]
    assert bars.volume[:, 0].tolist() == [1413.0, 1241.0, 1025.0, 1460.0]
    assert bars.timeframe == HOUR
    assert bars.warnings == ()
    return bars


def packaged(name: str) -> str:
    """A file of real bars that the package `backtesting` carries."""
    found = importlib.util.find_spec("backtesting")
    assert found is not None
    assert found.submodule_search_locations
    return os.path.join(found.submodule_search_locations[0], "test", name)


# What people have


@pytest.mark.parametrize(("name", "rows", "timeframe"), [("EURUSD", 5_000, HOUR), ("GOOG", 2_148, 24 * HOUR)])
def test_real_files_read_as_pandas_reads_them(name: str, rows: int, timeframe: int) -> None:
    path = packaged(f"{name}.csv")
    bars = Bars.read(path)
    assert (len(bars), bars.symbols, bars.timeframe, bars.reference) == (rows, (name,), timeframe, path)
    frame = pd.read_csv(path, index_col=0, parse_dates=True)
    assert Bars.from_pandas(frame, symbols=[name]).fingerprint() == bars.fingerprint()
    assert bars.timestamps.tolist() == pd.DatetimeIndex(frame.index).as_unit("ns").asi8.tolist()
    assert bars.close[:, 0].tolist() == frame["Close"].tolist()


@pytest.mark.parametrize(
    "header",
    [
        "Datetime,Open,High,Low,Close,Volume",
        "timestamp,open,high,low,close,volume",
        "TIME,OPEN,HIGH,LOW,CLOSE,VOLUME",
        ",Open,High,Low,Close,Volume",
        "Unnamed: 0,Open,High,Low,Close,Volume",
        " Date , Open , High , Low , Close , Volume ",
        '"Date","Open","High","Low","Close","Volume"',
        "Gmt time,Open,High,Low,Close,Vol",
    ],
)
def test_headers_in_any_case(write: Write, expected: Bars, header: str) -> None:
    assert Bars.read(write(header, *ROWS)).fingerprint() == expected.fingerprint()


def quoted(line: str) -> str:
    return ",".join(f'"{cell}"' for cell in line.split(","))


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("quote", [False, True])
def test_every_common_dialect(
    write: Write, expected: Bars, delimiter: str, end: str, encoding: str, quote: bool
) -> None:
    lines = [quoted(line) if quote else line for line in (HEADER, *ROWS)]
    lines = [line.replace(",", delimiter) for line in lines]
    assert Bars.read(write(*lines, end=end, encoding=encoding)).fingerprint() == expected.fingerprint()


def restamped(stamp: Callable[[pd.Timestamp], object]) -> list[str]:
    times = pd.DatetimeIndex([row.split(",")[0] for row in ROWS])
    return [f"{stamp(time)},{row.split(',', 1)[1]}" for time, row in zip(times, ROWS, strict=True)]


@pytest.mark.parametrize(
    ("stamp", "date_format"),
    [
        (lambda t: t.isoformat(), None),
        (lambda t: t.isoformat() + "Z", None),
        (lambda t: t.strftime("%Y-%m-%d %H:%M"), None),
        (lambda t: t.strftime("%Y/%m/%d %H:%M"), None),
        (lambda t: t.strftime("%Y.%m.%d %H:%M:%S.000"), None),
        (lambda t: t.strftime("%Y%m%dT%H%M%S"), None),
        (lambda t: t.strftime("%Y-%m-%d %H:%M:%S UTC"), None),
        (lambda t: t.tz_localize("UTC").tz_convert("Europe/Berlin").isoformat(), None),
        (lambda t: t.strftime("%Y-%m-%d %H:%M:%S+0000"), None),
        (lambda t: f"{(t - pd.Timedelta(hours=t.hour % 3)).isoformat()}-0{t.hour % 3}:00", None),
        (lambda t: int(t.timestamp()), None),
        (lambda t: int(t.timestamp()) * 10**3, None),
        (lambda t: int(t.timestamp()) * 10**6, None),
        (lambda t: int(t.timestamp()) * 10**9, None),
        (lambda t: float(t.timestamp()), None),
        (lambda t: f"{t.timestamp():.2f}", "s"),
        (lambda t: int(t.timestamp()) * 10**3, "ms"),
        (lambda t: t.strftime("%d.%m.%Y %H:%M"), "%d.%m.%Y %H:%M"),
        (lambda t: t.strftime("%m/%d/%Y %I:%M %p"), "%m/%d/%Y %I:%M %p"),
        (lambda t: t.strftime("%Y%m%d %H%M%S"), "%Y%m%d %H%M%S"),
        (lambda t: (t + pd.Timedelta(hours=2)).strftime("%d/%m/%Y %H:%M +0200"), "%d/%m/%Y %H:%M %z"),
    ],
)
def test_times_as_people_write_them(
    write: Write, expected: Bars, stamp: Callable[[pd.Timestamp], object], date_format: str | None
) -> None:
    bars = Bars.read(write(HEADER, *restamped(stamp)), date_format=date_format)
    assert bars.timestamps.tolist() == expected.timestamps.tolist()
    assert bars.fingerprint() == expected.fingerprint()


def test_fractions_of_a_second_are_kept(write: Write) -> None:
    tail = ",1,1,1,1,1"
    times = ["2017-04-19 09:00:00.000000001", "2017-04-19 09:00:00.500000003"]
    bars = Bars.read(write(HEADER, *(time + tail for time in times)))
    assert (bars.timestamps - NINE).tolist() == [1, 500_000_003]
    bars = Bars.read(write(HEADER, *(f"{time}+00:00{tail}" for time in times)))
    assert (bars.timestamps - NINE).tolist() == [1, 500_000_003]
    bars = Bars.read(write(HEADER, f"1492592400.25{tail}", f"1492592400.5{tail}"))
    assert (bars.timestamps - NINE).tolist() == [250_000_000, 500_000_000]


def test_compact_dates_are_dates_and_no_epoch(write: Write) -> None:
    bars = Bars.read(write(HEADER, "20170419,1,1,1,1,1", "20170420,1,1,1,1,1"))
    assert bars.timestamps.tolist() == [NINE - 9 * HOUR, NINE + 15 * HOUR]


def test_a_date_and_a_time_column_are_one_time(write: Write, expected: Bars) -> None:
    lines = [row.replace(" ", "\t", 1).replace(",", "\t").replace("-", ".") for row in ROWS]
    path = write("<DATE>\t<TIME>\t<OPEN>\t<HIGH>\t<LOW>\t<CLOSE>\t<VOL>", *lines)
    assert Bars.read(path).fingerprint() == expected.fingerprint()


def test_a_zone_is_applied_to_times_without_one(write: Write, expected: Bars) -> None:
    path = write(HEADER, *restamped(lambda t: t + pd.Timedelta(hours=2)))
    assert Bars.read(path, tz="Europe/Berlin").fingerprint() == expected.fingerprint()
    with_offsets = write(HEADER, *restamped(lambda t: f"{t}Z"))
    assert Bars.read(with_offsets, tz="Europe/Berlin").fingerprint() == expected.fingerprint()


def test_a_volume_may_be_absent_or_empty(write: Write) -> None:
    bars = Bars.read(write("Date,Open,High,Low,Close", *(row.rpartition(",")[0] for row in ROWS)))
    assert bars.volume[:, 0].tolist() == [0.0] * 4
    bars = Bars.read(write(HEADER, *(row.rpartition(",")[0] + "," for row in ROWS)))
    assert bars.volume[:, 0].tolist() == [0.0] * 4


def test_other_columns_stay_out_and_features_travel(write: Write, expected: Bars) -> None:
    lines = [f"{row},{note},{at / 4}" for at, (row, note) in enumerate(zip(ROWS, ("x", "", "NaN", "?"), strict=True))]
    path = write(HEADER + ",Comment,RSI", *lines)
    assert Bars.read(path).fingerprint() == expected.fingerprint()
    bars = Bars.read(path, features=("rsi",))
    assert list(bars.features) == ["rsi"]
    assert bars.features["rsi"].tolist() == [[0.0], [0.25], [0.5], [0.75]]
    with pytest.raises(DataError, match="line 2, column Comment: every value must be a number; found 'x'"):
        Bars.read(path, features=("Comment",))
    with pytest.raises(DataError, match="no column for score; found the columns: Date, Open, High"):
        Bars.read(path, features=("score",))
    with pytest.raises(DataError, match="further column"):
        Bars.read(path, features=("Close",))


def test_times_of_the_close_become_those_of_the_open(write: Write, expected: Bars) -> None:
    path = write(HEADER, *restamped(lambda t: t + pd.Timedelta(hours=1)))
    assert Bars.read(path, timestamps="close").fingerprint() == expected.fingerprint()
    assert Bars.read(path, timestamps="close", timeframe="4h").timestamps[0] == NINE - 3 * HOUR
    with pytest.raises(DataError, match="open or close"):
        Bars.read(path, timestamps="middle")  # type: ignore[arg-type]


def test_compressed_files_and_unknown_extensions(write: Write, expected: Bars, tmp_path: Path) -> None:
    plain = Path(write(HEADER, *ROWS))
    packed = tmp_path / "gz" / "EURUSD.csv.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert Bars.read(packed).fingerprint() == expected.fingerprint()
    other = plain.rename(tmp_path / "bars.dat")
    assert Bars.read(str(other), symbols="EURUSD").fingerprint() == expected.fingerprint()
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(DataError, match="to its end"):
        Bars.read(packed)


def test_blank_lines_and_trailing_delimiters(write: Write, expected: Bars) -> None:
    lines = ["", *(line + "," for line in (HEADER, *ROWS[:2])), "", "", *(line + "," for line in ROWS[2:]), ""]
    assert Bars.read(write(*lines)).fingerprint() == expected.fingerprint()


def test_a_yfinance_frame_that_was_saved_as_csv(write: Write) -> None:
    lines = ["Price,Close,Close,High,High,Low,Low,Open,Open", "Ticker,AAPL,MSFT,AAPL,MSFT,AAPL,MSFT,AAPL,MSFT"]
    lines += ["Date,,,,,,,,", "2020-01-02,1.5,2.5,2,3,1,2,1.25,2.25", "2020-01-03,1.75,,2,,1,,1.25,"]
    path = write(*lines)
    bars = Bars.read(path)
    assert bars.symbols == ("AAPL", "MSFT")
    assert bars.close[0].tolist() == [1.5, 2.5]
    assert np.isnan(bars.close[1, 1])
    assert Bars.read(path, symbols=("MSFT",)).open[:, 0].tolist() == [2.25]
    lines[4] = lines[4].replace("1.75", "x")
    with pytest.raises(DataError, match="line 5, column Close: every value must be a number; found 'x'"):
        Bars.read(write(*lines))


CELLS = st.sampled_from(
    ["1", "1.0", " 1.25", "1e0", "1.1", "0.1", "1.00000000000000000001", "1.7976931348623157", "5e-1"]
)


@settings(max_examples=40, deadline=None)
@given(cells=st.lists(CELLS, min_size=1, max_size=30), blank=st.booleans())
def test_the_fast_and_the_careful_reading_agree(
    cells: list[str], blank: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("agree")
    rows = [f"{at * 60},{cell},{cell},{cell},{cell},{at}" for at, cell in enumerate(cells)]
    lines = [HEADER, *rows]
    if blank:
        lines.insert(1, "")
    (directory / "A.csv").write_text("\n".join(lines))
    lines[-1] += ",,"  # Arrow refuses a row that is too long, so this file is read row by row
    (directory / "B.csv").write_text("\n".join(lines))
    fast, careful = (Bars.read(directory / name, symbols="S", date_format="s") for name in ("A.csv", "B.csv"))
    assert fast.fingerprint() == careful.fingerprint()
    assert fast.close[:, 0].tolist() == [float(cell) for cell in cells]


def test_many_rows_of_random_doubles_come_back_to_the_last_bit(tmp_path: Path) -> None:
    close = np.random.Generator(np.random.Philox(1)).random(40_000) + 1e-9
    frame = pd.DataFrame(dict.fromkeys(("open", "high", "low", "close"), close))
    frame.insert(0, "time", 60 * np.arange(len(frame)))
    frame.to_csv(tmp_path / "A.csv", index=False)
    bars = Bars.read(tmp_path / "A.csv", date_format="s")
    assert bars.close[:, 0].tolist() == close.tolist()
    text = (tmp_path / "A.csv").read_text().splitlines()
    text[30_000] = text[30_000].rpartition(",")[0] + ",-1"
    (tmp_path / "A.csv").write_text("\n".join(text))
    with pytest.raises(DataError, match=r"line 30001, column (low|close): "):
        Bars.read(tmp_path / "A.csv", date_format="s")


def test_an_error_early_in_a_long_file_names_its_line(tmp_path: Path) -> None:
    """Arrow reads ahead in a thread of its own while the first rows are looked at: the line must still be right."""
    lines = [HEADER, *(f"{60 * at},1.0,1.0,1.0,1.0,{at}" for at in range(200_000))]
    for row, cells in ((4_000, "1,1,1,1,1,1"), (60_000, "x,1,1,1,1,1"), (150_000, f"{60 * 149_999},-1,1,1,1,1")):
        path = tmp_path / "A.csv"
        path.write_text("\n".join([*lines[:row], cells, *lines[row + 1 :]]))
        for _ in range(3):
            with pytest.raises(DataError, match=f"line {row + 1}[,:]"):
                Bars.read(path)


# What breaks a rule


def broken(row: int, **changes: str) -> list[str]:
    """The good rows with cells of one of them changed."""
    names = HEADER.split(",")
    rows = [line.split(",") for line in ROWS]
    for name, cell in changes.items():
        rows[row][names.index(name)] = cell
    return [",".join(cells) for cells in rows]


@pytest.mark.parametrize(
    ("row", "changes", "where", "words"),
    [
        (1, {"Open": "abc"}, "line 3, column Open", ["must be a number", "'abc'"]),
        (1, {"Open": "1_0"}, "line 3, column Open", ["must be a number", "'1_0'"]),
        (3, {"Volume": "many"}, "line 5, column Volume", ["must be a number", "'many'"]),
        (0, {"Low": ""}, "line 2, column Low", ["all of open, high, low and close", "nan"]),
        (0, {"Close": "NA"}, "line 2, column Close", ["or none"]),
        (2, {"Close": "0"}, "line 4, column Close", ["above 0", "0.0"]),
        (2, {"Low": "-1.07"}, "line 4, column Low", ["above 0", "-1.07"]),
        (2, {"High": "inf"}, "line 4, column High", ["finite"]),
        (2, {"Low": "1.0725"}, "line 4, column Low", ["low must not be above", "1.0725", "1.07256 and 1.07192"]),
        (2, {"High": "1.0719"}, "line 4, column High", ["high must not be below", "1.0719"]),
        (2, {"Volume": "-5"}, "line 4, column Volume", ["not below 0", "-5.0"]),
        (2, {"Date": "2017-04-19 10:00:00"}, "line 4", ["comes once", "line 3", "2017-04-19 10:00:00 UTC"]),
        (2, {"Date": "2017-04-18 10:00:00"}, "line 4", ["must increase", "2017-04-18 10:00:00 UTC after 2017-04-19"]),
        (3, {"Date": "yesterday"}, "line 5, column Date", ["time", "yesterday"]),
        (3, {"Date": ""}, "line 5, column Date", ["time is missing"]),
        (3, {"Date": "now"}, "line 5, column Date", ["time", "now"]),
        (3, {"Date": "NaT"}, "line 5, column Date", ["time", "NaT"]),
        (3, {"Date": "2017-02-30 10:00"}, "line 5, column Date", ["time", "2017-02-30"]),
        (0, {"Date": "0001-01-01"}, "line 2, column Date", ["time", "0001-01-01"]),
        (3, {"Date": "2017-04-19 12:00:00+02:00"}, "line 5, column Date", ["zone", "+02:00"]),
        (3, {"Date": "1492592400"}, "line 5, column Date", ["time", "1492592400"]),
    ],
)
def test_an_error_names_file_line_column_value_and_rule(
    write: Write, row: int, changes: dict[str, str], where: str, words: list[str]
) -> None:
    path = write(HEADER, *broken(row, **changes))
    with pytest.raises(DataError) as caught:
        Bars.read(path)
    assert caught.value.where == f"{path}, {where}"
    for word in words:
        assert word in str(caught.value)


def test_lines_are_counted_as_an_editor_counts_them(write: Write) -> None:
    lines = ["", HEADER, "", ROWS[0], "", *broken(1, High="1")[1:2]]
    with pytest.raises(DataError, match="line 6, column High"):
        Bars.read(write(*lines))
    lines = [HEADER + ",note", ROWS[0] + ',"a\nb"', ROWS[1] + ",", *(line + "," for line in broken(2, High="1")[2:])]
    with pytest.raises(DataError, match="line 5, column High"):
        Bars.read(write(*lines))


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], "the file is empty"),
        (["", ""], "the file is empty"),
        ([HEADER], "no bars"),
        (
            ["Date,Open,High,Low,Volume", "2017-04-19,1,1,1,1"],
            "no column for close; found the columns: Date, Open, High",
        ),
        (["Day,Open,High,Low,Close", "2017-04-19,1,1,1,1"], "no column for a time"),
        (["Date,Close", "2017-04-19,1"], "no column for open, high, low"),
        (["Date,Volume", "2017-04-19,1"], "no column for open, high, low, close"),
        (["Date,Open,High,Low,Close,close", "2017-04-19,1,1,1,1,1"], "a column comes once; found 2 of them"),
        (["2017-04-19 09:00:00,1,1,1,1"] * 2, "line 1: this is no CSV of bars"),
        (["once upon a time"], "line 1: this is no CSV of bars"),
        ([HEADER, "2017-04-19,1,1,1"], "line 2: a row needs 6 cells, as the first line has; found 4"),
        ([HEADER, ROWS[0], ROWS[1] + ",7"], "line 3: a row needs 6 cells, as the first line has; found 7"),
        ([HEADER, "2017-04-19,1,1,1,1,1", "2017-04-20,1,1,1,1,\0"], "zero bytes"),
        ([HEADER, "2017-04-19,1,1,1,1," + "1" * 1_100_000], "1,000,000 characters"),
        ([HEADER, '2017-04-19,1,1,1,1,"' + "1" * 200_000 + '"'], "no CSV: field larger"),
        ([HEADER, "01/02/2017,1,1,1,1,1"], "line 2, column Date: this can't be read as a time; found 01/02/2017"),
        ([HEADER, "99999999999999999999,1,1,1,1,1"], "years 1678 to 2261"),
        ([HEADER, "1,234.5,1,1,1,1"], "line 2"),
        (["Date;Open;High;Low;Close", "2017-04-19;1,5;1,5;1,5;1,5"], "column Open: every value must be a number"),
    ],
)
def test_what_is_no_csv_of_bars(write: Write, lines: list[str], words: str) -> None:
    with pytest.raises(DataError) as caught:
        Bars.read(write(*lines))
    assert words in str(caught.value)


def test_a_hint_says_what_to_do(write: Write) -> None:
    with pytest.raises(DataError) as caught:
        Bars.read(write(HEADER, "01/02/2017,1,1,1,1,1"))
    assert "date_format" in caught.value.hint
    with pytest.raises(DataError) as caught:
        Bars.read(write("Date;Open;High;Low;Close", "2017-04-19;1,5;1,5;1,5;1,5"))
    assert "point" in caught.value.hint


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("%d.%m.%Y", "must be written as '%d.%m.%Y'; found 2017-04-19 09:00:00"),
        ("%Q", "can't be used"),
        ("iso", "date_format is a format"),
        ("ms", "number"),
    ],
)
def test_a_format_that_does_not_fit(write: Write, form: str, words: str) -> None:
    with pytest.raises(DataError) as caught:
        Bars.read(write(HEADER, *ROWS), date_format=form)
    assert words in str(caught.value)


BACK = [f"2017-11-05 0{hour}:30:00,1,1,1,1,1" for hour in (0, 1, 1, 2)]
FORWARD = [f"2017-03-12 0{hour}:30:00,1,1,1,1,1" for hour in (1, 2, 3)]


def test_a_doubled_hour_is_an_error_that_names_tz(write: Write) -> None:
    with pytest.raises(DataError, match="line 3, column Date: this time came twice") as caught:
        Bars.read(write(HEADER, *BACK), tz="America/New_York")
    assert "tz='America/New_York'" in str(caught.value)
    with pytest.raises(DataError, match="line 4: each timestamp comes once") as caught:
        Bars.read(write(HEADER, *BACK))
    assert "`tz`" in caught.value.hint
    with pytest.raises(DataError, match=r"line 3, column Date: this time never came.*tz='America/New_York'"):
        Bars.read(write(HEADER, *FORWARD), tz="America/New_York")
    assert len(Bars.read(write(HEADER, *FORWARD))) == 3


@pytest.mark.parametrize("tz", ["Mars/Olympus", "../../etc/passwd", "/etc/passwd", "", "Europe", "X\0"])
def test_an_unknown_zone(write: Write, tz: str) -> None:
    with pytest.raises(DataError, match="no time zone"):
        Bars.read(write(HEADER, *ROWS), tz=tz)


def test_what_is_no_readable_file(tmp_path: Path) -> None:
    for reference in (
        "",
        "a\0b",
        str(tmp_path / "none.csv"),
        str(tmp_path),
        "https://example.com/a.csv",
        "A=none.csv,B=x.csv",
    ):
        with pytest.raises(DataError):
            Bars.read(reference)
    pipe = tmp_path / "pipe.csv"
    os.mkfifo(pipe)
    with pytest.raises(DataError, match="no regular file"):
        Bars.read(pipe)


@pytest.mark.parametrize(
    "head", [b"PK\x03\x04", b"\x89PNG\r\n", b"\xff\xfe\x00", b"\x1f\x8b\x08", b"PAR1", b"\xff" * 99]
)
def test_other_kinds_of_files(tmp_path: Path, head: bytes) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(head + b"\x00\x01\xfe" * 50)
    with pytest.raises(DataError) as caught:
        Bars.read(path)
    assert str(path) in str(caught.value)


@settings(max_examples=150, deadline=None)
@given(
    content=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda text: text.encode("utf-8", "ignore")))
)
def test_whatever_is_in_a_file_the_error_is_a_data_error(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.csv"
    for lead in (b"", HEADER.encode() + b"\n", (HEADER + "\n" + ROWS[0]).encode() + b"\n"):
        path.write_bytes(lead + content)
        try:
            Bars.read(path)
        except DataError as error:
            assert str(path) in str(error)  # noqa: PT017


CELL = st.one_of(
    st.sampled_from(
        ["", "nan", "1", "-1", "1.5", "inf", "x", "2017-04-19", "1e400", "1_0", '"', "2017-04-19T10:00+01:00"]
    ),
    st.text(alphabet="0123456789-:.TZ+ ,", max_size=22),
)


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(st.lists(CELL, min_size=6, max_size=6), min_size=1, max_size=4))
def test_whatever_a_cell_holds_the_error_is_a_data_error(
    rows: list[list[str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "cells.csv"
    path.write_text("\n".join([HEADER, *(",".join(row) for row in rows)]))
    try:
        bars = Bars.read(path)
    except DataError as error:
        assert str(path) in str(error)  # noqa: PT017
    else:
        assert (np.diff(bars.timestamps) > 0).all()
        assert (bars.low > 0).all()


# Several symbols


def two_files(write: Write) -> tuple[str, str]:
    first = write(HEADER, *ROWS[:3], name="A.csv")
    second = write(HEADER, *ROWS[1:], name="B.csv")
    return first, second


def test_symbols_are_joined_on_the_union_of_their_times(write: Write, expected: Bars) -> None:
    first, second = two_files(write)
    bars = Bars.read(f"X={first},Y={second}")
    assert bars.symbols == ("X", "Y")
    assert bars.timestamps.tolist() == expected.timestamps.tolist()
    assert np.isnan(bars.close[[3, 0], [0, 1]]).all()
    assert np.isnan(bars.volume[[3, 0], [0, 1]]).all()
    assert bars.close[:3, 0].tolist() == expected.close[:3, 0].tolist()
    assert bars.close[1:, 1].tolist() == expected.close[1:, 0].tolist()
    assert bars.first_bar.tolist() == [0, 1]
    assert bars.warnings == ("X: 1 of 4 bars are missing (25.0 %)", "Y: 1 of 4 bars are missing (25.0 %)")
    assert bars.reference == f"X={first},Y={second}"
    alone = Bars.read(bars.reference, symbols=["Y"])
    assert alone.fingerprint() == bars.select(["Y"]).fingerprint()
    with pytest.raises(DataError, match="no such symbol; found Z") as caught:
        Bars.read(bars.reference, symbols=["Z"])
    assert caught.value.hint == "there are: X, Y"


def test_a_directory_holds_a_file_a_symbol(write: Write, tmp_path: Path) -> None:
    first, second = two_files(write)
    (tmp_path / "notes.md").write_text("no bars")
    bars = Bars.read(tmp_path)
    assert bars.symbols == ("A", "B")
    assert bars.fingerprint() == Bars.read(f"A={first},B={second}").fingerprint()
    assert Bars.read(tmp_path, symbols=["B"]).symbols == ("B",)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no CSV or Parquet file"):
        Bars.read(tmp_path / "empty")


def test_an_error_in_one_of_several_files_names_it(write: Write) -> None:
    first, second = two_files(write)
    Path(second).write_text("\n".join([HEADER, *broken(1, Close="-1")]))
    with pytest.raises(DataError) as caught:
        Bars.read(f"X={first},Y={second}")
    assert caught.value.where == f"{second}, line 3, column Close"


def test_a_column_names_the_symbol_of_each_row(write: Write) -> None:
    lines = ["date,symbol,open,high,low,close"]
    lines += [f"2020-01-0{day},{name},{price},{price},{price},{price}" for day, name, price in
              ((1, "B", 10), (1, "A", 20), (2, "A", 21), (3, "B", 12), (3, "A", 22))]  # fmt: skip
    path = write(*lines)
    bars = Bars.read(path)
    assert bars.symbols == ("A", "B")
    assert bars.close[:, 0].tolist() == [20.0, 21.0, 22.0]
    assert bars.close[[0, 2], 1].tolist() == [10.0, 12.0]
    assert np.isnan(bars.close[1, 1])
    assert Bars.read(path, symbols=["B"]).close[:, 0].tolist() == [10.0, 12.0]
    with pytest.raises(DataError, match="no such symbol; found C"):
        Bars.read(path, symbols=["C"])
    with pytest.raises(DataError, match="line 7: each timestamp of B comes once, this one was in line 5 already"):
        Bars.read(write(*lines, lines[4], name="twice.csv"))
    frame = pd.read_csv(path, parse_dates=["date"])
    assert Bars.from_pandas(frame).fingerprint() == bars.fingerprint()


def test_a_column_of_closes_a_symbol(write: Write) -> None:
    lines = ["Date,AAPL,MSFT,VIX", "2020-01-01,10,,15", "2020-01-02,11,20,16", "2020-01-03,12,21,"]
    path = write(*lines)
    bars = Bars.read(path, symbols=("MSFT", "AAPL"), features=("VIX",))
    assert bars.symbols == ("MSFT", "AAPL")
    assert bars.close[1].tolist() == [20.0, 11.0]
    for name in ("open", "high", "low"):
        assert np.array_equal(getattr(bars, name), bars.close, equal_nan=True)
    assert bars.first_bar.tolist() == [1, 0]
    assert bars.features["VIX"][:2].tolist() == [[15.0, 15.0], [16.0, 16.0]]
    assert Bars.read(path).symbols == ("AAPL", "MSFT", "VIX")
    with pytest.raises(DataError, match="line 3, column MSFT"):
        Bars.read(write(*lines[:2], "2020-01-02,11,-20,16"))
    low = write("Date,LOW,OPEN", "2020-01-01,10,20")
    assert Bars.read(low, symbols=("LOW", "OPEN")).close[0].tolist() == [10.0, 20.0]
    with pytest.raises(DataError, match="no column for high, close"):
        Bars.read(low)


def test_several_symbols_need_several_columns_or_files(write: Write) -> None:
    with pytest.raises(DataError, match="several symbols were asked for"):
        Bars.read(write(HEADER, *ROWS), symbols=("A", "B"))


# Parquet and frames


def frame_of(bars: Bars) -> pd.DataFrame:
    frame = bars.to_pandas()
    frame.columns = frame.columns.get_level_values(1)
    return frame


def test_bars_and_frames_go_both_ways(expected: Bars) -> None:
    frame = expected.to_pandas()
    assert str(frame.index.dtype) == "datetime64[ns, UTC]"
    assert [*map(tuple, frame.columns)] == [("EURUSD", name) for name in ("open", "high", "low", "close", "volume")]
    assert Bars.from_pandas(frame).fingerprint() == expected.fingerprint()
    frame.iloc[0, 0] = 99.0
    assert expected.open[0, 0] == 1.0716


@pytest.mark.parametrize(
    "change",
    [
        lambda frame: frame.tz_localize(None),
        lambda frame: frame.tz_convert("Asia/Tokyo"),
        lambda frame: frame.set_axis(frame.index.as_unit("us")),
        lambda frame: frame.set_axis(frame.index.tz_localize(None).as_unit("s")),
        lambda frame: frame.reset_index(),
        lambda frame: frame.reset_index().rename(columns={"timestamp": "Date"}),
        lambda frame: frame.set_axis(frame.index.asi8),
        lambda frame: frame.set_axis(frame.index.asi8 // 10**6).rename_axis("time").reset_index(),
        lambda frame: frame.set_axis([str(time) for time in frame.index]),
        lambda frame: frame.set_axis(frame.index.tz_localize(None).to_period("h")),
        lambda frame: frame.astype(object),
        lambda frame: frame.astype(str),
        lambda frame: frame.astype("Float64"),
        lambda frame: frame.rename(columns=str.upper),
        lambda frame: frame.assign(note="text"),
    ],
)
def test_frames_as_people_have_them(expected: Bars, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    bars = Bars.from_pandas(change(frame_of(expected)), symbols="EURUSD")
    assert bars.fingerprint() == expected.fingerprint()
    assert bars.reference is None


def test_a_local_index_needs_its_zone(expected: Bars) -> None:
    local = frame_of(expected).tz_convert("Europe/Berlin").tz_localize(None)
    assert Bars.from_pandas(local, symbols="EURUSD", tz="Europe/Berlin").fingerprint() == expected.fingerprint()
    index = pd.DatetimeIndex(["2017-10-29 01:00", "2017-10-29 02:00", "2017-10-29 03:00"])
    with pytest.raises(DataError, match="row 1, column index: this time came twice"):
        Bars.from_pandas(frame_of(expected).iloc[:3].set_axis(index), tz="Europe/Berlin")


@pytest.mark.parametrize("ticker_level", [0, 1])
def test_both_orders_of_yfinances_columns(ticker_level: int) -> None:
    names = ("Adj Close", "Close", "High", "Low", "Open", "Volume")
    parts = {
        (ticker, name) if ticker_level == 0 else (name, ticker): [base, base + 1.0]
        for ticker, base in (("MSFT", 10.0), ("AAPL", 20.0))
        for name in names
    }
    frame = pd.DataFrame(parts, index=pd.DatetimeIndex(["2020-01-01", "2020-01-02"], name="Date"))
    bars = Bars.from_pandas(frame)
    assert bars.symbols == ("MSFT", "AAPL")
    assert bars.close.tolist() == [[10.0, 20.0], [11.0, 21.0]]
    assert Bars.from_pandas(frame, symbols=["AAPL"]).close[:, 0].tolist() == [20.0, 21.0]
    assert Bars.from_pandas(frame.reset_index()).fingerprint() == bars.fingerprint()
    with pytest.raises(DataError, match="no such symbol"):
        Bars.from_pandas(frame, symbols=["TSLA"])


def test_a_frame_a_symbol_and_features(expected: Bars) -> None:
    first = frame_of(expected).assign(score=[0.0, np.nan, 2.0, 3.0])
    second = first.iloc[1:]
    bars = Bars.from_pandas({"X": first, "Y": second}, features=["score"])
    assert bars.features["score"].shape == (4, 2)
    assert np.isnan(bars.features["score"][[1, 0], [0, 1]]).all()
    assert bars.features["score"][2].tolist() == [2.0, 2.0]
    assert tuple(bars.to_pandas().columns[5]) == ("X", "score")
    assert Bars.from_pandas({"X": first, "Y": second}, symbols=["Y"]).symbols == ("Y",)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda frame: frame.iloc[:0], "no bars"),
        (lambda frame: frame.drop(columns="low"), "frame: there is no column for low; found the columns: open, high"),
        (lambda frame: frame.reset_index(drop=True), "no column for a time"),
        (lambda frame: frame.iloc[::-1], "frame, row 1: timestamps must increase"),
        (lambda frame: frame.assign(low=[0.5, 0.5, -0.5, 0.5]), "frame, row 2, column low: a price must be above 0"),
        (lambda frame: frame.assign(low=["0.5", None, "x", "0.5"]), "row 2, column low: every value must be a number"),
        (lambda frame: frame.assign(volume=[True] * 4), "column volume: every value must be a number"),
        (lambda frame: frame.assign(volume=frame.index), "column volume: every value must be a number"),
        (lambda frame: frame.set_axis(["a", "b", "c", "d"]), "row 0, column time: this can't be read as a time"),
        (lambda frame: frame.set_axis([pd.NaT, *frame.index[1:]]), "row 0, column index: a time is missing"),
        (lambda frame: pd.concat([frame, frame[["low"]]], axis=1), "a column comes once"),
        (lambda frame: frame[["close"]].rename(columns={"close": "A"}).astype(str) + "x", "column A"),
    ],
)
def test_frames_that_break_a_rule(expected: Bars, change: Callable[[pd.DataFrame], pd.DataFrame], words: str) -> None:
    with pytest.raises(DataError) as caught:
        Bars.from_pandas(change(frame_of(expected)))
    assert words in str(caught.value)


@pytest.mark.parametrize("data", [None, [], {}, 5, {"A": 5}])
def test_what_is_no_frame(data: object) -> None:
    with pytest.raises(DataError):
        Bars.from_pandas(data)  # type: ignore[arg-type]


def test_parquet(expected: Bars, tmp_path: Path) -> None:
    frame = frame_of(expected)
    for at, table in enumerate((frame, frame.reset_index(), frame.tz_localize(None), frame.rename_axis(None))):
        path = tmp_path / str(at) / "EURUSD.parquet"
        path.parent.mkdir()
        table.to_parquet(path)
        bars = Bars.read(path)
        assert bars.fingerprint() == expected.fingerprint()
        assert bars.reference == str(path)
    expected.to_pandas().to_parquet(tmp_path / "both.parquet")
    assert Bars.read(tmp_path / "both.parquet").fingerprint() == expected.fingerprint()
    frame.assign(low=[0.5, 0.5, -0.5, 0.5]).to_parquet(path)
    with pytest.raises(DataError, match=r"row 2, column low: a price must be above 0; found -0\.5"):
        Bars.read(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="can't be read"):
        Bars.read(path)


# Where not everyone is trusted


def test_only_files_in_the_roots_are_read(write: Write, expected: Bars, tmp_path: Path) -> None:
    inside = Path(write(HEADER, *ROWS))
    root = tmp_path / "root"
    root.mkdir()
    kept = inside.rename(root / "EURUSD.csv")
    assert Bars.read(kept, roots=[root]).fingerprint() == expected.fingerprint()
    outside = write(HEADER, *ROWS)
    (root / "link.csv").symlink_to(outside)
    for path in (
        outside,
        root / "link.csv",
        root / ".." / "EURUSD.csv",
        f"A={outside}",
        "/etc/passwd",
        root / "none.csv",
    ):
        with pytest.raises(DataNotAllowedError):
            Bars.read(path, roots=[root])
    for reference in (kept, tmp_path, f"A={kept}"):
        with pytest.raises(DataNotAllowedError):
            Bars.read(reference, roots=[])
    with pytest.raises(DataNotAllowedError):
        Bars.read(tmp_path, roots=[root])
    assert Bars.read(root, roots=[tmp_path], symbols=["EURUSD"]).fingerprint() == expected.fingerprint()
    assert len(Bars.read("synthetic:?bars=5", roots=[])) == 5


@pytest.mark.parametrize(
    "lines",
    [
        ["secret,words,here", "1,2,3"],
        ["secret"],
        [HEADER, "2017-04-19,secret,1,1,1,1"],
        [HEADER, "secret,1,1,1,1,1"],
        [HEADER, "2017-04-19,31415,1,1,1,1"],
        ["date,symbol,open,high,low,close", "2017-04-19,secret,1,1,1,1"],
        ["date,symbol,open,high,low,close", *["2017-04-19,\x07secret,1,1,1,1"] * 2],
    ],
)
def test_errors_quote_nothing_of_files_in_roots(write: Write, tmp_path: Path, lines: list[str]) -> None:
    path = write(*lines)
    wanted = ("EURUSD",) if "symbol" in lines[0] and "\x07" not in lines[1] else ()
    with pytest.raises(DataError) as caught:
        Bars.read(path, roots=[tmp_path], symbols=wanted)
    told = f"{caught.value} {caught.value.hint}"
    assert "secret" not in told
    assert "31415" not in told


def test_reading_a_csv_does_not_import_pandas() -> None:
    code = "import sys; from ktrdr_async.market import Bars; Bars.read(sys.argv[1]); print('pandas' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, packaged("EURUSD.csv")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
