"""Signals from files: what they mean, and every way in which a file can be wrong."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from running import HOUR, START, bars_of, run, same

from ktrdr_async.errors import DataError, DataNotAllowedError
from ktrdr_async.market import Bars
from ktrdr_async.strategies import Bar, Signals, Strategy, make

pytestmark = pytest.mark.anyio

NAN = float("nan")


@pytest.fixture
def bars() -> Bars:
    """Six hourly bars of A and B from 2020-01-01 on."""
    return bars_of([[10.0 + i, 20.0 - i] for i in range(6)], symbols=("A", "B"))


def written(tmp_path: Path, text: str) -> str:
    file = tmp_path / "signals.csv"
    file.write_text(text)
    return str(file)


async def test_a_number_is_an_order_once_and_an_empty_cell_keeps(tmp_path: Path, bars: Bars) -> None:
    file = written(tmp_path, "time,B,A\n2020-01-01 01:00,,0.5\n2020-01-01 02:00,-0.25,NaN\n\n2020-01-01T04:00:00Z,0,\n")
    with pytest.raises(DataError, match="either every time has a zone or none has"):
        Signals(file).target_weights(bars)
    file = written(tmp_path, "time,B,A\n2020-01-01 01:00,,0.5\n2020-01-01 02:00,-0.25,NaN\n\n2020-01-01 04:00,0,\n")
    expected = np.full((6, 2), NAN)
    expected[1, 0], expected[2, 1], expected[4, 1] = 0.5, -0.25, 0.0
    np.testing.assert_array_equal(Signals(file).target_weights(bars), expected)

    class Same(Strategy):
        def on_bar(self, bar: Bar) -> None:
            for symbol in range(2):
                if not np.isnan(expected[bar.index, symbol]):
                    bar.target_weight(symbol, float(expected[bar.index, symbol]))

    results = await run(Signals(file), bars)
    assert same(results, await run(Same(), bars))
    assert results.fills["bar"].tolist() == [2, 3, 5, 5]


async def test_quantities_are_signed_units(tmp_path: Path, bars: Bars) -> None:
    file = written(tmp_path, f"t;A;note;B\n{START // 10**9};7;x;\n{(START + HOUR) // 10**9};-3;y;12\n")
    results = await run(Signals(file, unit="quantity"), bars)
    assert results.fills["quantity"].tolist() == [7.0, -7.0, -3.0, 12.0, 3.0, -12.0]


async def test_with_one_symbol_the_column_may_have_any_name(tmp_path: Path) -> None:
    bars = bars_of([10.0, 11.0, 12.0])
    file = written(tmp_path, "when,signal\n2020-01-01 01:00,1\n")
    assert Signals(file).target_weights(bars)[1].tolist() == [1.0]


async def test_other_ways_to_write_times(tmp_path: Path) -> None:
    bars = bars_of([10.0, 11.0, 12.0])
    at = [1.0]
    for text, parameters in (
        ("01.01.2020 02:00", {"tz": "Europe/Berlin", "date_format": "%d.%m.%Y %H:%M"}),
        ("2020-01-01 02:00", {"timestamps": "close"}),
        ("2020-01-01T03:00:00+02:00", {}),
    ):
        file = written(tmp_path, f"time,S0\n{text},1\n")
        assert Signals(file, **parameters).target_weights(bars)[1].tolist() == at, text


@pytest.mark.parametrize("zone", [None, "UTC", "Europe/Berlin"])
@pytest.mark.parametrize("indexed", [True, False])
async def test_parquet_gives_what_csv_gives(tmp_path: Path, bars: Bars, zone: str | None, indexed: bool) -> None:
    times = pd.DatetimeIndex(bars.timestamps[[1, 4]], tz="UTC", name="time")
    times = times.tz_localize(None) if zone is None else times.tz_convert(zone)
    frame = pd.DataFrame({"A": [0.5, NAN], "B": [1, 0]}, index=times)
    file = tmp_path / "signals.parquet"
    (frame if indexed else frame.reset_index()).to_parquet(file)
    content = "time,A,B\n2020-01-01 01:00,0.5,1\n2020-01-01 04:00,,0\n"
    text = written(tmp_path, content)
    expected = Signals(text).target_weights(bars)
    np.testing.assert_array_equal(Signals(str(file)).target_weights(bars), expected)
    packed = tmp_path / "signals.csv.gz"
    packed.write_bytes(gzip.compress(content.encode()))
    np.testing.assert_array_equal(Signals(str(packed)).target_weights(bars), expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "time,A,B\n2020-01-01 01:00,1,1\n2020-01-01 01:30,1,1\n",
            r"line 3, column time: no bar .* 2020-01-01 01:30:00",
        ),
        ("time,A,B\n\n2031-01-01,1,1\n", r"line 3, column time: no bar has this time; found 2031-01-01 00:00:00 UTC"),
        ("time,A,B\n2020-01-01 01:00,x1,1\n", "line 2, column A: every value must be a number; found x1"),
        ("time,A,B\n2020-01-01 01:00,1,1_0\n", "line 2, column B: every value must be a number; found 1_0"),
        ("time,A,B\n2020-01-01 01:00,1,inf\n", "line 2, column B: a signal must be finite; found inf"),
        ("time,A,B\n2020-01-01 01:00,1\n", "line 2: a row needs 3 cells, as the first line has; found 2"),
        ("time,A,B\n2020-01-01 02:00,1,1\n2020-01-01 01:00,1,1\n", "line 3: timestamps must increase"),
        ("time,A,B\n2020-01-01 01:00,1,1\n2020-01-01 01:00,0,0\n", r"line 3: each timestamp comes once, .* in line 2"),
        ("time,A,B\nyesterday,1,1\n", "line 2, column time: .*can't be read as a time; found yesterday"),
        ("time,A,C\n2020-01-01 01:00,1,1\n", "B needs one column, there are 0"),
        ("time,A,B,A\n2020-01-01 01:00,1,1,1\n", "A needs one column, there are 2"),
        ("time,A,B\n", "there are no signals in it"),
        ("", "there are no signals in it"),
        ("time,A,B\n2020-01-01 01:00,1,\x00\n", "line 2, column B: every value must be a number|this is no CSV"),
    ],
)
async def test_what_is_wrong_is_named_with_row_and_value(tmp_path: Path, bars: Bars, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Signals(written(tmp_path, text)).target_weights(bars)


async def test_a_weight_out_of_range_is_an_order_error_that_names_the_bar(tmp_path: Path, bars: Bars) -> None:
    from ktrdr_async.errors import OrderError

    with pytest.raises(OrderError, match=r"1.5 of B at bar 1 \(2020-01-01T01:00:00Z\) is outside"):
        await run(Signals(written(tmp_path, "time,A,B\n2020-01-01 01:00,1,1.5\n")), bars)


async def test_clip_leaves_out_what_is_before_and_after_the_bars_alone(tmp_path: Path, bars: Bars) -> None:
    outside = "time,A,B\n2019-12-31 23:00,1,1\n2020-01-01 02:00,0.5,0.5\n2020-01-01 06:00,1,1\n"
    file = written(tmp_path, outside)
    with pytest.raises(DataError, match="line 2") as caught:
        Signals(file).target_weights(bars)
    assert "clip=true" in caught.value.hint
    weights = Signals(file, clip=True).target_weights(bars)
    assert np.flatnonzero(~np.isnan(weights[:, 0])).tolist() == [2]
    file = written(tmp_path, outside.replace("02:00", "02:30"))
    with pytest.raises(DataError, match="line 3"):
        Signals(file, clip=True).target_weights(bars)


async def test_files_that_are_none(tmp_path: Path, bars: Bars) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "latin.csv").write_bytes("time,A,B\n2020-01-01 01:00,1,\xe4\n".encode("latin-1"))
    for name, message in (
        ("missing.csv", "there is no such file"),
        ("broken.parquet", "this Parquet file can't be read"),
        ("latin.csv", "no CSV in UTF-8"),
    ):
        with pytest.raises(DataError, match=message):
            Signals(str(tmp_path / name)).target_weights(bars)


async def test_a_request_from_a_database_reads_only_below_the_roots_and_learns_no_content(
    tmp_path: Path, bars: Bars
) -> None:
    inside, outside = tmp_path / "roots", tmp_path / "elsewhere"
    inside.mkdir(), outside.mkdir()
    secret = written(outside, "time,A,B\nroot:x:0,secret,1\n")
    (inside / "link.csv").symlink_to(secret)
    for file in (secret, str(inside / "link.csv"), str(inside / ".." / "elsewhere" / "signals.csv")):
        strategy: Any = make("signals", {"file": file}, roots=(inside,))
        with pytest.raises(DataNotAllowedError):
            strategy.target_weights(bars)
    below = written(inside, "time,A,B\n2020-01-01 01:00,secret,1\n")
    strategy = make("signals", {"file": below}, roots=(inside,))
    with pytest.raises(DataError) as caught:
        strategy.target_weights(bars)
    assert "secret" not in str(caught.value) + caught.value.hint
    good = written(inside, "time,A,B\n2020-01-01 01:00,1,1\n")
    assert (await run(make("signals", {"file": good}, roots=(inside,)), bars)).ledger
