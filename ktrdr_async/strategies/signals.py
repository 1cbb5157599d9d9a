"""The built-in `signals`: decisions that were made elsewhere, read from a file."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np

from ktrdr_async.strategies.base import WeightStrategy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ktrdr_async.market import Bars
    from ktrdr_async.market.validation import Source

_MAX_BYTES = 2**28  # of a CSV, decompressed
_MAX_CELLS = 100_000_000  # of a Parquet file
_DELIMITERS = ",;\t|"
_MISSING = frozenset(("", "nan", "na", "n/a", "<na>", "null", "none"))


class Signals(WeightStrategy):
    """Does what a CSV or Parquet file says: a row a time, a column a symbol.

    The first column, or a Parquet file's index of times, names bars. A number in a bar's row is the symbol's target
    there, an order to go to it, once; an empty cell or NaN keeps what is. It was decided knowing that bar, and fills at
    the next one. Every symbol needs its column, and other columns aren't looked at; with one symbol and one column, the
    column may also be called signal, weight, target, position, quantity, units or value. Times increase, and each is
    a bar's.

    Args:
        file: path of the file.
        unit: whether numbers are weights, -1..1, or quantities in signed units.
        tz: zone of times that carry none; UTC where None.
        timestamps: whether times name a bar's opening or its end.
        date_format: how times are written, as for `strptime`, or the unit of an epoch (s, ms, us, ns); else ISO 8601.
        clip: whether rows before the first bar and after the last are left out, instead of being errors.

    Raises:
        ParameterError: if a parameter is of another type.
        DataError: by the methods, if the file can't be read, a symbol has no column, or a time is no bar's.
    """

    name = "signals"
    version = 1
    file_parameters = ("file",)  # which of the parameters name files
    roots: tuple[str, ...] | None = None  # directories that the file must lie in; set by `registry.make`

    def __init__(
        self,
        file: str,
        unit: Literal["weight", "quantity"] = "weight",
        tz: str | None = None,
        timestamps: Literal["open", "close"] = "open",
        date_format: str | None = None,
        clip: bool = False,
    ) -> None:
        self.file, self.unit, self.tz = file, unit, tz
        self.timestamps, self.date_format, self.clip = timestamps, date_format, clip

    @property
    def by_weight(self) -> bool:
        """Whether it gives weights."""
        return self.unit == "weight"

    def target_weights(self, bars: Bars) -> NDArray[np.float64]:
        """float64[n, k], the file's numbers in their bars' rows."""
        return self._targets(bars)

    def target_quantities(self, bars: Bars) -> NDArray[np.float64]:
        """float64[n, k], the file's numbers in their bars' rows."""
        return self._targets(bars)

    def _targets(self, bars: Bars) -> NDArray[np.float64]:
        from ktrdr_async.market.sources import opened
        from ktrdr_async.market.times import TimeReader
        from ktrdr_async.market.validation import Source, check_timestamps

        source = Source(self.file, show_values=self.roots is None)
        with opened(self.file, source, self.roots) as stream:
            table = _table(stream, source)
        reader = TimeReader(source, table.names[0] or "1 (unnamed)", self.tz, self.date_format)
        if isinstance(table.times, list):
            reader.feed(table.times)
        else:
            reader.feed_numbers(table.times)
        times = reader.finish()
        check_timestamps(times, source)
        rows, at = self._matched(times, bars, source, table.names[0])
        targets = np.full((len(bars), bars.k), np.nan)
        for symbol, column in enumerate(_columns_of(bars, table.names[1:], source)):
            targets[at, symbol] = _numbers(table.columns[column], table.names[1 + column], source)[rows]
        return targets

    def _matched(
        self, times: NDArray[np.int64], bars: Bars, source: Source, column: str
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The file's rows that count, and the bar of each."""
        from ktrdr_async.market.timeframes import format_time

        opening = times - bars.timeframe if self.timestamps == "close" else times
        first, last = int(bars.timestamps[0]), int(bars.timestamps[-1])
        rows = np.arange(len(times))
        if self.clip:
            rows = np.flatnonzero((opening >= first) & (opening <= last))
        at = np.searchsorted(bars.timestamps, opening[rows])
        wrong = bars.timestamps[np.minimum(at, len(bars) - 1)] != opening[rows]
        if wrong.any():
            row = int(rows[int(np.argmax(wrong))])
            outside = not first <= int(opening[row]) <= last
            raise source.error(
                "no bar has this time",
                row=row,
                column=column,
                value=format_time(int(times[row])),
                hint=f"the bars go from {format_time(first)} to {format_time(last)}"
                + ("; clip=true leaves out what is before and after them" if outside else "")
                + "; times without a zone are UTC unless `tz` says otherwise, and name a bar's opening",
            )
        return rows, at


class _Table:
    """A file's columns as they are written; the first name is that of the times."""

    def __init__(self, names: Sequence[str], times: list[str] | NDArray[Any], columns: Sequence[Any]) -> None:
        self.names, self.times, self.columns = names, times, columns


def _table(stream: BinaryIO, source: Source) -> _Table:
    head = stream.read(4)
    stream.seek(0)
    return _parquet(stream, source) if head == b"PAR1" else _csv(stream, source)


def _csv(stream: BinaryIO, source: Source) -> _Table:
    data = stream.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise source.error(f"signals of more than {_MAX_BYTES // 2**20} MiB as CSV are refused", hint="use Parquet")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise source.error("this is no CSV in UTF-8", hint="save it as CSV UTF-8") from None
    head = text.partition("\n")[0]
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=max(_DELIMITERS, key=head.count), skipinitialspace=True
    )
    rows: list[list[str]] = []
    lines: list[int] = []
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                rows.append(row)
                lines.append(reader.line_num)
    except csv.Error as error:
        raise source.error(f"this is no CSV: {error}") from None
    if len(rows) < 2:
        raise source.error("there are no signals in it", hint="it needs a line of names and at least one row below it")
    source.row_name = lambda row: f"line {lines[row + 1]}"
    width = len(rows[0])
    for at, row in enumerate(rows):
        if len(row) != width:
            raise source.error(f"a row needs {width} cells, as the first line has", row=at - 1, value=len(row))
    times, *columns = zip(*rows[1:], strict=True)
    return _Table([name.strip() for name in rows[0]], list(times), columns)


def _parquet(stream: BinaryIO, source: Source) -> _Table:
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(stream) as file:
            cells = file.metadata.num_rows * file.metadata.num_columns
            if not 0 < cells <= _MAX_CELLS:
                raise source.error(f"signals are 1 to {_MAX_CELLS:,} cells", value=cells)
            table = file.read()
            table.validate(full=True)
            frame = table.to_pandas()
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, NotImplementedError) as error:
        raise source.error(f"this Parquet file can't be read: {error}") from None
    names = [str(name) for name in frame.columns]
    columns = [frame.iloc[:, at] for at in range(len(names))]
    if isinstance(frame.index, pd.DatetimeIndex):
        names, columns = [str(frame.index.name or "index"), *names], [frame.index.to_series(), *columns]
    times: Any = columns[0]
    if pd.api.types.is_numeric_dtype(times.dtype) and not times.hasnans:
        times = times.to_numpy()
    else:
        times = ["" if value is None or value is pd.NaT else str(value) for value in times]
    return _Table(names, times, columns[1:])


_GENERAL = ("signal", "signals", "weight", "target", "position", "quantity", "units", "value")


def _columns_of(bars: Bars, names: Sequence[str], source: Source) -> list[int]:
    """The column of each symbol."""
    if bars.k == 1 and len(names) == 1 and names[0].lower() in (bars.symbols[0].lower(), *_GENERAL):
        return [0]
    for symbol in bars.symbols:
        if names.count(symbol) != 1:
            raise source.error(
                f"{symbol} needs one column, there are {names.count(symbol)}",
                hint=f"the columns are: {', '.join(names[:20])}" if source.show_values else "",
            )
    return [names.index(symbol) for symbol in bars.symbols]


def _numbers(cells: Any, column: str, source: Source) -> NDArray[np.float64]:
    """float64, NaN where there is nothing."""
    if hasattr(cells, "to_numpy") and cells.dtype.kind in "iuf":
        found: NDArray[np.float64] = cells.to_numpy(dtype=np.float64, na_value=np.nan)
    else:
        found = np.empty(len(cells))
        for at, cell in enumerate(cells):
            text = "" if cell is None else str(cell).strip()
            try:
                found[at] = np.nan if text.lower() in _MISSING else float("" if "_" in text else text)
            except ValueError:
                raise source.error("every value must be a number", row=at, column=column, value=text) from None
    endless = np.isinf(found)
    if endless.any():
        at = int(np.argmax(endless))
        raise source.error("a signal must be finite", row=at, column=column, value=float(found[at]))
    return found
