"""CSV files: Arrow parses them, and what Arrow refuses is read once more, row by row, to say where it is wrong.

Both ways give decimals that are exact to the last bit, and neither needs pandas' import. Sizes are bounded at every
step: the file's, a line's length, the number of columns and of rows.
"""

from __future__ import annotations

import codecs
import csv
import io
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import chain, islice
from typing import Any, BinaryIO

import msgspec
import numpy as np

from ktrdr_async.errors import DataError
from ktrdr_async.market.join import validated
from ktrdr_async.market.layout import Group, Layout, layout_of, symbol_bars
from ktrdr_async.market.times import TimeReader
from ktrdr_async.market.validation import MAX_BARS, Floats, Source, SymbolBars, check_size

MAX_BYTES = 2**34
MAX_LINE = 1_000_000  # characters
MAX_COLUMNS = 20_000

_PIECE = 100_000  # cells that are held as text at a time
_READ = 262_144  # bytes that are read at a time
_DELIMITERS = ",;\t|"
_MISSING = frozenset(("", "nan", "-nan", "na", "n/a", "#n/a", "<na>", "null", "none"))


def csv_items(
    stream: BinaryIO,
    source: Source,
    *,
    symbols: tuple[str, ...],
    tz: str | None,
    features: Sequence[str],
    default_symbol: str,
    date_format: str | None,
) -> list[SymbolBars]:
    """Reads one CSV as a record a symbol.

    Args:
        stream: the bytes, decompressed; it is read again from the start to find the line of an error.
        source: names the file; it is taught to name lines.
        symbols: as for `Bars.read`.
        tz: as for `Bars.read`.
        features: as for `Bars.read`.
        default_symbol: the name of the one symbol where none is given.
        date_format: as for `Bars.read`.

    Raises:
        DataError: if it is no CSV, a column is missing, or a cell is no number or no time.
    """
    table = _Table(stream, source)
    layout = table.tickers(symbols, features) or layout_of(
        table.names, source, symbols=symbols, features=features, default_symbol=default_symbol
    )
    try:
        with closing(_arrow_pieces(table, layout)) as pieces:
            return _collected(pieces, table, layout, source, tz, date_format)
    except _RefusedError:
        return _collected(_row_pieces(table, layout, source), table, layout, source, tz, date_format)


class _RefusedError(Exception):
    """Arrow can't read this file."""


class _Column:
    """A column that grows: room that isn't filled yet takes no memory, while a list of pieces would take it twice."""

    def __init__(self) -> None:
        self._room = np.empty(131_072)
        self._filled = 0

    def append(self, values: Floats) -> None:
        end = self._filled + len(values)
        if end > len(self._room):
            room = np.empty(max(end, 2 * len(self._room)))
            room[: self._filled] = self._room[: self._filled]
            self._room = room
        self._room[self._filled : end] = values
        self._filled = end

    def values(self) -> Floats:
        return self._room[: self._filled]


class _Piece(msgspec.Struct):
    """Some rows of the columns that are wanted."""

    times: list[str]
    numbers: dict[int, Floats]
    keys: list[str]  # empty where no column names the symbols


def _collected(
    pieces: Iterable[_Piece], table: _Table, layout: Layout, source: Source, tz: str | None, date_format: str | None
) -> list[SymbolBars]:
    reader = TimeReader(source, table.names[layout.time[0]] or "1 (unnamed)", tz, date_format)
    columns = {at: _Column() for at in layout.numeric}
    keys: list[str] | None = None if layout.key is None else []
    rows = 0
    for piece in pieces:
        rows += len(piece.times)
        if rows > MAX_BARS:
            raise source.error(f"more than {MAX_BARS:,} bars are refused")
        reader.feed(piece.times)
        for at, values in piece.numbers.items():
            columns[at].append(values)
        if keys is not None:
            keys += piece.keys
    check_size(rows, 1, source)
    numbers = {at: column.values() for at, column in columns.items()}
    return validated(symbol_bars(layout, table.names, reader.finish(), numbers, keys, source))


def _arrow_pieces(table: _Table, layout: Layout) -> Generator[_Piece, None, None]:
    """Reads plain files fast; raises _RefusedError for all others, whose rows are then looked at one by one."""
    import pyarrow as pa
    from pyarrow import csv as arrow

    texts = [*layout.time, *(() if layout.key is None else (layout.key,))]
    try:
        batches = arrow.open_csv(
            pa.PythonFile(table.lent(), mode="r"),
            read_options=arrow.ReadOptions(
                column_names=[str(at) for at in range(len(table.names))], skip_rows=table.header_lines
            ),
            parse_options=arrow.ParseOptions(delimiter=table.delimiter),
            convert_options=arrow.ConvertOptions(
                column_types={
                    str(at): pa.string() if at in texts else pa.float64() for at in (*texts, *layout.numeric)
                },
                include_columns=[str(at) for at in (*texts, *layout.numeric)],
                null_values=sorted(_MISSING | {word.upper() for word in _MISSING} | {"NaN", "None", "-NaN", "Null"}),
                strings_can_be_null=False,
            ),
        )
        for batch in batches:
            cells = [batch.column(str(at)).to_pylist() for at in texts]
            numbers = {at: _floats(batch.column(str(at))) for at in layout.numeric}
            keys = [] if layout.key is None else [key.strip() for key in cells[-1]]
            yield _Piece(_times(cells[: len(layout.time)]), numbers, keys)
    except (pa.ArrowException, UnicodeDecodeError):
        raise _RefusedError from None
    finally:
        table.take_back()


def _floats(array: Any) -> Floats:
    """Views an Arrow array, or copies one with gaps; its own to_numpy would import pandas."""
    if array.null_count:
        return np.array(array.to_pylist(), dtype=np.float64)
    return np.frombuffer(array.buffers()[1], dtype=np.float64, count=len(array), offset=8 * array.offset)


def _row_pieces(table: _Table, layout: Layout, source: Source) -> Iterator[_Piece]:
    """Reads every file that can be read, or names the line that can't."""
    done = 0
    for columns in table.pieces():
        numbers = {at: _numbers(columns[at], table.names[at], done, source) for at in layout.numeric}
        times = _times([columns[at] for at in layout.time])
        keys = [] if layout.key is None else [key.strip() for key in columns[layout.key]]
        yield _Piece(times, numbers, keys)
        done += len(times)


def _times(columns: Sequence[Sequence[str]]) -> list[str]:
    if len(columns) == 1:
        return list(columns[0])
    return [f"{day} {time}" for day, time in zip(*columns, strict=True)]


class _Lent(io.RawIOBase):
    """A stream as Arrow gets it: not to be closed, and taken back before the line of an error is looked up in it.

    Arrow reads ahead in threads of its own, which may be at it when the rows before are found wrong.
    """

    def __init__(self, stream: BinaryIO, source: Source) -> None:
        super().__init__()
        self._stream: BinaryIO | None = stream
        self._source = source
        self._lock = threading.Lock()
        self._given = 0  # bytes

    def take_back(self) -> None:
        """Waits for a read that goes on; every later one finds the end."""
        with self._lock:
            self._stream = None

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        with self._lock:
            data = b"" if self._stream is None else self._stream.read(size)
        self._given += len(data)
        if self._given > MAX_BYTES:
            raise _too_large(self._source)
        return data


class _Table:
    """The lines of names and the rows of a CSV; blank lines are left out."""

    def __init__(self, stream: BinaryIO, source: Source) -> None:
        self._headers = 1
        self._lent: _Lent | None = None
        self._source = source
        self._stream = stream
        source.row_name = self._line
        rows = _Reader(stream, source)
        header = rows.take(1)
        if not header:
            raise source.error("the file is empty", hint="its first line must name the columns")
        self.header_lines = rows.line
        self.delimiter = rows.delimiter
        self.names = [name.strip() for name in header[0]]
        while len(self.names) > 1 and not self.names[-1]:
            self.names.pop()
        if len(self.names) > MAX_COLUMNS:
            raise source.error(f"more than {MAX_COLUMNS:,} columns are refused", value=len(self.names))
        if len(self.names) < 2 or all(name[:1].isdigit() for name in self.names):
            raise source.error(
                "this is no CSV of bars: its first line must name the columns, joined by a comma, semicolon, tab or |",
                row=-1,
                value=", ".join(self.names)[:200],
            )
        self._next = rows.take(2)
        self._next_line = rows.line

    def lent(self) -> _Lent:
        """Lends the stream from its start, until it is taken back."""
        self._stream.seek(0)
        self._lent = _Lent(self._stream, self._source)
        return self._lent

    def take_back(self) -> None:
        """Ends what was lent."""
        if self._lent is not None:
            self._lent.take_back()
            self._lent = None

    def tickers(self, symbols: tuple[str, ...], features: Sequence[str]) -> Layout | None:
        """Understands the three lines of names that a frame of yfinance has as a CSV: Price, Ticker, Date."""
        if len(self._next) < 2 or self.names[0].lower() != "price":
            return None
        tickers, dates = ([cell.strip() for cell in row] for row in self._next)
        if tickers[0].lower() != "ticker" or any(dates[1:]):
            return None
        self._headers, self.header_lines = 3, self._next_line
        groups = []
        for symbol in symbols or tuple(dict.fromkeys(tickers[1:])):
            at = [0, *(place for place in range(1, len(tickers)) if tickers[place] == symbol)]
            names = ["Date", *(self.names[place] for place in at[1:])]
            own = layout_of(names, self._source, symbols=(symbol,), features=features, default_symbol=symbol).groups[0]
            fields, further = ({name: at[place] for name, place in part.items()} for part in (own.fields, own.features))
            groups.append(Group(symbol=symbol, fields=fields, features=further))
        return Layout(time=(0,), groups=tuple(groups))

    def pieces(self) -> Iterator[list[tuple[str, ...]]]:
        """Gives the columns of the next rows until there are none."""
        reader = _Reader(self._stream, self._source)
        reader.take(self._headers)
        done = 0
        while rows := reader.take(max(1, _PIECE // len(self.names))):
            try:
                columns = list(zip(*rows, strict=True))
            except ValueError:
                columns = []
            if len(columns) != len(self.names):
                fitted = [self._fitted(done + at, row) for at, row in enumerate(rows)]
                columns = list(zip(*fitted, strict=True))
            yield columns
            done += len(rows)

    def _fitted(self, at: int, row: list[str]) -> list[str]:
        width = len(self.names)
        if len(row) < width or any(cell.strip() for cell in row[width:]):
            raise self._source.error(f"a row needs {width} cells, as the first line has", row=at, value=len(row))
        return row[:width]

    def _line(self, row: int) -> str:
        """Finds a row's line by reading the file again: blank lines and line ends in quotes make it no sum."""
        self.take_back()
        reader = _Reader(self._stream, self._source)
        reader.skip(row + self._headers)
        reader.take(1)
        return f"line {reader.line}"


class _Reader:
    """Rows of cells from the start of a stream, without the blank lines."""

    def __init__(self, stream: BinaryIO, source: Source) -> None:
        stream.seek(0)
        lines = _lines(stream, source)
        skipped = 0
        for first in lines:
            if first:
                break
            skipped += 1
        else:
            first = ""
        self.delimiter = max(_DELIMITERS, key=first.count)
        self._skipped = skipped
        self._source = source
        self._reader = csv.reader(
            chain([first] if first else [], lines), delimiter=self.delimiter, skipinitialspace=True
        )
        self._rows = filter(None, self._reader)

    @property
    def line(self) -> int:
        """The line at which the row that was taken last ends, the first being 1."""
        return self._skipped + self._reader.line_num

    def take(self, count: int) -> list[list[str]]:
        """Returns the next rows, fewer at the end."""
        try:
            return list(islice(self._rows, count))
        except csv.Error as error:
            raise self._source.error(f"this is no CSV: {error}") from None

    def skip(self, count: int) -> None:
        """Passes over the next rows."""
        next(islice(self._rows, count, count), None)


def _lines(stream: BinaryIO, source: Source) -> Iterator[str]:
    """Gives the lines of UTF-8, or of UTF-16 with a mark, without their ends."""
    block = stream.read(_READ)
    encoding = "utf-16" if block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(encoding)(), translate=True)
    size, rest = 0, ""
    while block:
        size += len(block)
        if size > MAX_BYTES:
            raise _too_large(source)
        try:
            text = decoder.decode(block)
        except UnicodeDecodeError:
            raise source.error("this is no CSV in UTF-8", hint="save it as CSV UTF-8") from None
        if "\0" in text:
            raise source.error("this is no CSV: there are zero bytes in it")
        lines = (rest + text).split("\n")
        rest = lines.pop()
        if max(map(len, lines), default=0) > MAX_LINE or len(rest) > MAX_LINE:
            raise source.error(f"a line of more than {MAX_LINE:,} characters is refused")
        yield from lines
        block = stream.read(_READ)
    if rest:
        yield rest


def _too_large(source: Source) -> DataError:
    return source.error(f"a CSV of more than {MAX_BYTES / 2**30:.0f} GiB is refused")


def _numbers(cells: Sequence[str], column: str, done: int, source: Source) -> Floats:
    if "_" not in "".join(cells):  # float() reads 1_000 as a number
        try:
            return np.fromiter(map(float, cells), dtype=np.float64, count=len(cells))
        except ValueError:
            pass
    values = np.empty(len(cells))
    for at, cell in enumerate(cells):
        values[at] = _number(cell, done + at, column, source)
    return values


def _number(cell: str, row: int, column: str, source: Source) -> float:
    text = cell.strip().lower()
    if text in _MISSING:
        return float("nan")
    try:
        if "_" in text:
            raise ValueError
        return float(text)
    except ValueError:
        raise _no_number(cell, row, column, source) from None


def _no_number(cell: str, row: int, column: str, source: Source) -> DataError:
    hint = "write decimals with a point and no separator of thousands" if "," in cell else ""
    return source.error("every value must be a number", row=row, column=column, value=repr(cell), hint=hint)
