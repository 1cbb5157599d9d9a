"""The rules that a bar must keep, and how a broken one is named: file, row, column, value, rule.

Nothing here repairs data: a bar that breaks a rule is an error, a doubtful one a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from ktrdr_async.errors import DataError
from ktrdr_async.market.timeframes import DAY, format_time

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

FIELDS = ("open", "high", "low", "close", "volume")
MAX_BARS = 100_000_000
MAX_SYMBOLS = 10_000
MAX_SYMBOL_LENGTH = 64
LARGE_MOVE = 0.4  # fraction of the previous close

_UNSAID = object()


class Source:
    """Where rows come from: makes the errors that name a place as a person sees it.

    Args:
        name: the file or object, as the user wrote it.
        row_name: turns a row's index into what a person would look for, such as `line 7`.
        show_values: whether errors may quote what the source holds; not where the reader may not see the source.
    """

    def __init__(self, name: str, row_name: Callable[[int], str] | None = None, *, show_values: bool = True) -> None:
        self.name = name
        self.row_name = row_name or (lambda row: f"row {row}")
        self.show_values = show_values

    def error(
        self, rule: str, *, row: int | None = None, column: str = "", value: object = _UNSAID, hint: str = ""
    ) -> DataError:
        """Makes the error for a broken rule, with the value that broke it unless values are hidden."""
        places = [shortened(self.name, 1_000)]
        if row is not None:
            places.append(self.row_name(row))
        if column:
            places.append(f"column {shortened(column)}")
        found = "" if value is _UNSAID or not self.show_values else f"; found {_quoted(value)}"
        return DataError(f"{rule}{found}", where=", ".join(places), hint=hint)


class SymbolBars(msgspec.Struct, frozen=True):
    """One symbol's bars as a source gave them, before they are joined with other symbols'."""

    symbol: str
    timestamps: Integers  # ns since the epoch, UTC
    fields: Mapping[str, Floats]  # every name of FIELDS: float64[n]
    features: Mapping[str, Floats]  # float64[n] each
    source: Source
    rows: Integers | None = None  # the source's row of each bar, where that isn't its position
    columns: Mapping[str, str] = {}  # what the source calls a field or feature, where it has columns


def _quoted(value: object) -> str:
    if isinstance(value, float):
        return repr(float(value))
    return shortened(value if isinstance(value, str) else repr(value))


def shortened(text: str, length: int = 300) -> str:
    """The text as a message quotes it: whatever was handed over, a message stays short."""
    return text if len(text) <= length else text[:length] + "..."


def check_size(rows: int, symbols: int, source: Source) -> None:
    """Refuses what would not fit in memory before anything is allocated for it."""
    if rows < 1:
        raise source.error("there are no bars in it", hint="a file needs a header line and at least one row below it")
    if rows > MAX_BARS or rows * symbols > MAX_BARS:
        raise source.error(f"more than {MAX_BARS:,} bars are refused", value=f"{rows:,} rows of {symbols:,} symbols")


def check_symbols(symbols: Sequence[str], source: Source) -> tuple[str, ...]:
    """Returns the names as a tuple if each is a printable word that comes once."""
    names = (symbols,) if isinstance(symbols, str) else tuple(symbols)
    if not names:
        raise source.error("at least one symbol is needed")
    if len(names) > MAX_SYMBOLS:
        raise source.error(f"more than {MAX_SYMBOLS:,} symbols are refused", value=len(names))
    for name in names:
        if not isinstance(name, str) or not name.strip() or name != name.strip() or not name.isprintable():
            raise source.error("a symbol is a printable name without spaces around it", value=repr(name))
        if len(name) > MAX_SYMBOL_LENGTH:
            raise source.error(f"a symbol has at most {MAX_SYMBOL_LENGTH} characters", value=name)
    if len(set(names)) < len(names):
        twice = next(name for position, name in enumerate(names) if name in names[:position])
        raise source.error("a symbol comes once", value=twice)
    return names


def unknown_symbol(name: str, known: Sequence[str], source: Source) -> DataError:
    """Makes the error for a symbol that the data don't have."""
    listed = shortened(", ".join(known[:20]) + (", ..." if len(known) > 20 else ""))
    return source.error(
        "there is no such symbol", value=name, hint=f"there are: {listed}" if source.show_values else ""
    )


def check_timestamps(timestamps: Integers, source: Source, rows: Integers | None = None, symbol: str = "") -> None:
    """Checks that timestamps increase strictly; an error names the first row that doesn't."""
    steps = np.diff(timestamps)
    if not len(steps) or bool(steps.min() > 0):
        return
    at = int(np.argmax(steps <= 0)) + 1
    row = at if rows is None else int(rows[at])
    now = int(timestamps[at])
    earlier = int(np.searchsorted(timestamps[:at], now))
    of = f" of {symbol}" if rows is not None else ""
    if timestamps[earlier] == now:
        first = source.row_name(earlier if rows is None else int(rows[earlier]))
        raise source.error(
            f"each timestamp{of} comes once, this one was in {first} already",
            row=row,
            value=format_time(now),
            hint="remove the second bar; if it is the doubled hour of a clock change, export the data in UTC, or with "
            "offsets such as +01:00: `tz` alone can't tell the two hours apart",
        )
    raise source.error(
        f"timestamps{of} must increase from row to row",
        row=row,
        value=f"{format_time(now)} after {format_time(int(timestamps[at - 1]))}",
        hint="sort the data by time, oldest first; if it steps back by a clock change, export it in UTC or with "
        "offsets: `tz` alone can't tell the doubled hour apart",
    )


def check_prices(item: SymbolBars) -> None:
    """Checks every bar's prices and volume; NaN in all four prices means no bar, which is no error."""
    opened, high, low, close, volume = (item.fields[name] for name in FIELDS)
    good = (low > 0) & (low <= opened) & (low <= close) & (opened <= high) & (close <= high) & (high < np.inf)
    if not good.all():
        absent = np.isnan(opened) & np.isnan(high) & np.isnan(low) & np.isnan(close)
        bad = ~(good | absent)
        if bad.any():
            raise _price_error(item, int(np.argmax(bad)))
    bad = (volume < 0) | np.isinf(volume)
    if bad.any():
        at = int(np.argmax(bad))
        raise _error(item, at, "volume", "a volume must be finite and not below 0", float(volume[at]))
    for name, values in item.features.items():
        bad = np.isinf(values)
        if bad.any():
            at = int(np.argmax(bad))
            raise _error(item, at, name, "a feature must be finite or NaN", float(values[at]))


def _price_error(item: SymbolBars, at: int) -> DataError:
    prices = {name: float(item.fields[name][at]) for name in FIELDS[:4]}
    for name, price in prices.items():
        if np.isnan(price):
            return _error(item, at, name, "a bar has all of open, high, low and close, or none of them", price)
    for name, price in prices.items():
        if not price > 0:
            return _error(item, at, name, "a price must be above 0", price)
        if price == np.inf:
            return _error(item, at, name, "a price must be finite", price)
    body = (prices["open"], prices["close"])
    repair = "if adjusting the prices rounded them apart, set low to the row's minimum and high to its maximum first"
    if prices["low"] > min(body):
        rule = "low must not be above open and close"
        if item.source.show_values:
            rule += f" ({prices['open']!r} and {prices['close']!r})"
        return _error(item, at, "low", rule, prices["low"], repair)
    rule = "high must not be below open and close"
    if item.source.show_values:
        rule += f" ({prices['open']!r} and {prices['close']!r})"
    return _error(item, at, "high", rule, prices["high"], repair)


def _error(item: SymbolBars, at: int, column: str, rule: str, value: float, hint: str = "") -> DataError:
    row = at if item.rows is None else int(item.rows[at])
    name = item.columns.get(column) or f"{column} of {item.symbol}"
    return item.source.error(rule, row=row, column=name, value=value, hint=hint)


def doubtful(timestamps: Integers, close: Floats, symbols: Sequence[str], timeframe: int) -> tuple[str, ...]:
    """Lists what is permitted but seldom meant, once a symbol: missing bars, and moves of more than 40 %.

    Args:
        timestamps: int64[n], ns.
        close: float64[n, k], NaN where a symbol has no bar.
        symbols: k names.
        timeframe: ns; moves are looked at where it is a day or less.
    """
    found = []
    rows = len(timestamps)
    for position, symbol in enumerate(symbols):
        present = ~np.isnan(close[:, position])
        count = int(np.count_nonzero(present))
        if count < rows:
            missing = rows - count
            found.append(f"{symbol}: {missing:,} of {rows:,} bars are missing ({100 * missing / rows:.1f} %)")
        if timeframe > DAY or count < 2:
            continue
        prices = close[:, position] if count == rows else close[present, position]
        moves = np.diff(prices)
        moved = np.abs(moves, out=moves) > LARGE_MOVE * prices[:-1]
        if moved.any():
            at = int(np.argmax(moved))
            when = int(timestamps[np.flatnonzero(present)[at + 1]])
            total = int(np.count_nonzero(moved))
            more = f", and {total - 1:,} more of that kind" if total > 1 else ""
            found.append(
                f"{symbol}: the close moved by more than 40 % in one bar, from {prices[at]:g} to {prices[at + 1]:g} "
                f"at {format_time(when)}{more}; a split that isn't adjusted for?"
            )
    return tuple(found)


def as_times(values: ArrayLike, source: Source) -> Integers:
    """Copies into int64[n] nanoseconds."""
    array = np.asarray(values)
    if array.dtype.kind == "M":
        return array.astype("datetime64[ns]").astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise source.error("timestamps are int64[n] nanoseconds or datetime64[n]", value=f"{array.dtype}{array.shape}")
    return array.astype(np.int64)


def as_numbers(value: ArrayLike, name: str, n: int, k: int, source: Source, *, shared: bool = False) -> Floats:
    """Copies into C-contiguous float64[n, k]; a shared feature of several symbols stays float64[n]."""
    try:
        array = np.array(value, dtype=np.float64, order="C")
    except (TypeError, ValueError):
        raise source.error("every value must be a number", column=name) from None
    if array.shape == (n,) and k == 1:
        array = array.reshape(n, 1)
    if array.shape != (n, k) and not (shared and array.shape == (n,)):
        raise source.error(
            f"{n} timestamps and {k} symbols need values of shape ({n}, {k})", column=name, value=str(array.shape)
        )
    array[np.isnan(array)] = np.nan
    return array
