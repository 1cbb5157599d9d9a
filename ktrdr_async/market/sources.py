"""Data references: plain strings that another machine can read again, and the files that they name.

Reading evaluates nothing, and takes regular files alone.
"""

from __future__ import annotations

import gzip
import os
import re
import stat
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from ktrdr_async.errors import DataError, DataNotAllowedError
from ktrdr_async.market.bars import Bars, Stamp
from ktrdr_async.market.csv_files import MAX_BYTES, csv_items
from ktrdr_async.market.join import joined
from ktrdr_async.market.synthetic import SCHEME, read_synthetic
from ktrdr_async.market.timeframes import parse_timeframe
from ktrdr_async.market.validation import (
    MAX_BARS,
    MAX_SYMBOLS,
    Source,
    SymbolBars,
    check_size,
    check_symbols,
    shortened,
    unknown_symbol,
)

SUFFIXES = (".csv", ".csv.gz", ".tsv", ".txt", ".parquet", ".pq")

_PAIRS = re.compile(r"[^=,/\\]+=[^,]+(,[^=,/\\]+=[^,]+)*")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:(//|\?)")
_OTHER_KINDS = {b"PK\x03\x04": "a zip archive or Excel file", b"\x89HDF": "an HDF5 file", b"ARROW1": "a Feather file"}


def read(
    reference: str | os.PathLike[str],
    *,
    symbols: Sequence[str] = (),
    timeframe: str | None = None,
    tz: str | None = None,
    timestamps: Stamp = "open",
    date_format: str | None = None,
    features: Sequence[str] = (),
    start: str | None = None,
    end: str | None = None,
    roots: Sequence[str | os.PathLike[str]] | None = None,
) -> Bars:
    """Does what `Bars.read` says."""
    text = os.fspath(reference)
    source = Source(text, show_values=roots is None)
    wanted = check_symbols(symbols, source) if symbols else ()
    if text.startswith(SCHEME):
        bars = read_synthetic(text, wanted, timeframe)
        if features:
            raise source.error("a synthetic market has no further columns", value=", ".join(features))
    else:
        if timeframe is not None:
            parse_timeframe(timeframe)
        if roots is not None and not _PAIRS.fullmatch(text):
            _permitted(text, roots)  # before anything is listed or opened
        items: list[SymbolBars] = []
        for symbol, path in _chosen(text, wanted, source):
            own = Source(path, show_values=roots is None)
            names = wanted if symbol is None else (symbol,)
            with opened(path, own, roots) as stream:
                items += _file_items(
                    stream, path, own, symbols=names, tz=tz, features=features, date_format=date_format
                )
        bars = joined(items, source, timeframe=timeframe, timestamps=timestamps, reference=text)
    if start is None and end is None:
        return bars
    return bars._rows(bars._span(start, end), text)


def files_of(reference: str | os.PathLike[str]) -> dict[str | None, str]:
    """Returns the files that a reference names, by symbol; None where the file itself says what is in it.

    A synthetic market has none.

    Raises:
        DataError: if the reference can't be understood, or a directory has no file of bars.
    """
    text = os.fspath(reference)
    if text.startswith(SCHEME):
        return {}
    source = Source(text)
    if not text or "\0" in text:
        raise source.error("a data reference is the path of a file, A=a.csv,B=b.csv, or synthetic:?bars=1000")
    if os.path.isdir(text):
        return _directory(text, source)
    if not os.path.exists(text) and _PAIRS.fullmatch(text):
        pairs = [pair.partition("=") for pair in text.split(",")]
        names = check_symbols([symbol.strip() for symbol, _, _ in pairs], source)
        return dict(zip(names, (path.strip() for _, _, path in pairs), strict=True))
    if not os.path.exists(text) and _SCHEME.match(text):
        raise source.error("only files and synthetic: are read", hint="fetch the data first, and give the file's path")
    return {None: text}


def _directory(path: str, source: Source) -> dict[str | None, str]:
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        raise source.error(f"the directory can't be read: {error.strerror}") from None
    found = [name for name in names if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
    if not found:
        raise source.error("the directory has no CSV or Parquet file in it")
    if len(found) > MAX_SYMBOLS:
        raise source.error(f"more than {MAX_SYMBOLS:,} files are refused", value=len(found))
    symbols = check_symbols([symbol_of(name) for name in found], source)
    return {symbol: os.path.join(path, name) for symbol, name in zip(symbols, found, strict=True)}


def symbol_of(path: str) -> str:
    """Gives the symbol that a file's name stands for: `data/EURUSD.csv.gz` is EURUSD."""
    name = os.path.basename(path)
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)]
    return name


def _chosen(text: str, wanted: tuple[str, ...], source: Source) -> Iterator[tuple[str | None, str]]:
    files = files_of(text)
    if None in files or not wanted:
        yield from files.items()
        return
    known = [str(symbol) for symbol in files]
    for symbol in wanted:
        if symbol not in files:
            raise unknown_symbol(symbol, known, source)
        yield symbol, files[symbol]


@contextmanager
def opened(path: str, source: Source, roots: Sequence[str | os.PathLike[str]] | None) -> Iterator[BinaryIO]:
    """Opens a regular file that lies in the roots; a file that is compressed with gzip is given decompressed."""
    if roots is not None:
        path = _permitted(path, roots)
    # A FIFO would block at open, and a link planted after the check would lead out of the roots.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    if roots is not None:
        flags |= getattr(os, "O_NOFOLLOW", 0)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        raise source.error(
            "there is no such file", hint="a relative path starts at the program's current directory"
        ) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise source.error(f"the file can't be read: {reason}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise source.error("this is no regular file", hint="a data reference must be readable again")
    with os.fdopen(descriptor, "rb") as raw:
        head = raw.read(8)
        raw.seek(0)
        for magic, kind in _OTHER_KINDS.items():
            if head.startswith(magic):
                raise source.error(f"this is {kind}, not CSV or Parquet")
        try:
            if head.startswith(b"\x1f\x8b"):
                with gzip.open(raw) as unpacked:
                    yield cast(BinaryIO, unpacked)
            else:
                yield raw
        except (EOFError, OSError, zlib.error) as error:
            raise source.error(f"the file can't be read to its end: {error}") from None


def _permitted(path: str, roots: Sequence[str | os.PathLike[str]]) -> str:
    try:
        real = os.path.realpath(path, strict=True)
    except (OSError, ValueError):
        real = ""
    for root in roots:
        if real and Path(real).is_relative_to(os.path.realpath(root)):
            return real
    raise DataNotAllowedError(
        f"{shortened(path, 1_000)}: the data lie outside the permitted directories, or don't exist",
        hint="permit their directory with open(data_roots=(...)) or --data-root",
    )


def _file_items(
    stream: BinaryIO,
    path: str,
    source: Source,
    *,
    symbols: tuple[str, ...],
    tz: str | None,
    features: Sequence[str],
    date_format: str | None,
) -> list[SymbolBars]:
    head = stream.read(4)
    stream.seek(0)
    if head == b"PAR1":
        return _parquet_items(
            stream, path, source, symbols=symbols, tz=tz, features=features, date_format=date_format
        )  # fmt: skip
    return csv_items(
        stream,
        source,
        symbols=symbols,
        tz=tz,
        features=features,
        default_symbol=symbol_of(path),
        date_format=date_format,
    )


def _parquet_items(
    stream: BinaryIO,
    path: str,
    source: Source,
    *,
    symbols: tuple[str, ...],
    tz: str | None,
    features: Sequence[str],
    date_format: str | None,
) -> list[SymbolBars]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ktrdr_async.market.frames import frame_items

    try:
        with pq.ParquetFile(stream) as file:
            check_size(file.metadata.num_rows, 1, source)
            cells = file.metadata.num_rows * file.metadata.num_columns
            if cells > 10 * MAX_BARS:
                raise source.error(f"more than {10 * MAX_BARS:,} cells are refused", value=cells)
            size = sum(file.metadata.row_group(at).total_byte_size for at in range(file.metadata.num_row_groups))
            if size > MAX_BYTES:
                raise source.error(f"a Parquet file of more than {MAX_BYTES / 2**30:.0f} GiB is refused", value=size)
            table = file.read()
            table.validate(full=True)  # texts that are none would be found at their first use, wherever that is
            frame = table.to_pandas()
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, NotImplementedError) as error:
        raise source.error("this Parquet file can't be read", value=str(error)) from None
    return frame_items(
        frame,
        source,
        symbols=symbols,
        tz=tz,
        features=features,
        default_symbol=symbol_of(path),
        date_format=date_format,
    )
