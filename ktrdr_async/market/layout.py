"""Which column is what: finds times, prices, symbols and features among the names of a table's columns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from ktrdr_async.errors import DataError
from ktrdr_async.market.validation import (
    FIELDS,
    Floats,
    Integers,
    Source,
    SymbolBars,
    check_symbols,
    shortened,
    unknown_symbol,
)

PRICES = FIELDS[:4]

_TIMES = ("datetime", "timestamp", "date", "time", "date time", "gmt time", "open time", "open_time", "unix", "epoch")
_KEYS = ("symbol", "ticker")
_UNNAMED = ("", "unnamed: 0", "index")
# A table that has one of these but no prices is an OHLCV table with a fault, not a column of closes a symbol.
_NEVER_SYMBOLS = ("volume", "vol", "adj close", "adj_close", "price", "last", "bid", "ask", "value")


class Group(msgspec.Struct, frozen=True):
    """The columns of one symbol, by position; a table of closes has `close` alone."""

    symbol: str
    fields: Mapping[str, int]
    features: Mapping[str, int]


class Layout(msgspec.Struct, frozen=True):
    """What the columns of a table are, by position."""

    time: tuple[int, ...]  # one column, two (date and time), or none where the table has an index of times
    groups: tuple[Group, ...]
    key: int | None = None  # the column that names each row's symbol; there is one group then
    wanted: tuple[str, ...] = ()  # the symbols to take from the key column; empty for all

    @property
    def numeric(self) -> tuple[int, ...]:
        """The columns that must be numbers, each once."""
        found = {at for group in self.groups for at in (*group.fields.values(), *group.features.values())}
        return tuple(sorted(found))


def layout_of(
    names: Sequence[str],
    source: Source,
    *,
    symbols: tuple[str, ...],
    features: Sequence[str],
    default_symbol: str,
    indexed: bool = False,
) -> Layout:
    """Finds out what the columns of a table are.

    Args:
        names: the columns' names.
        source: names the table in errors.
        symbols: the name of the one symbol, or the ones to take; empty for all.
        features: names of further columns to take.
        default_symbol: the name of the one symbol where none is given.
        indexed: whether the table has an index of times, so that it needs no column of them.

    Raises:
        DataError: if a column is missing, comes twice, or can't be told from another.
    """
    plain = [name.strip().removeprefix("<").removesuffix(">").strip().lower() for name in names]
    time = _time_columns(plain, source, names, indexed)
    further = {name: _column(name, names, plain, source) for name in features}
    for name, at in further.items():
        if at in time or plain[at] in FIELDS:
            raise source.error("a feature is a further column, not time, price or volume", column=name)
    prices = [field for field in PRICES if field in plain]
    asked_for_closes = bool(symbols) and all(symbol in names for symbol in symbols)
    if len(prices) < len(PRICES) and (asked_for_closes or not prices) and not set(plain) & set(_NEVER_SYMBOLS):
        taken = {*time, *further.values()}
        closes = [at for at in range(len(names)) if at not in taken and plain[at] not in _UNNAMED]
        if closes:
            return _closes(names, closes, time, source, symbols, further)
    missing = [field for field in PRICES if field not in plain]
    if missing:
        raise _missing(missing, names, source)
    fields = {field: _only(field, plain, names, source) for field in FIELDS if field in plain}
    if "volume" not in fields and plain.count("vol") == 1:
        fields["volume"] = plain.index("vol")
    key = next((plain.index(name) for name in _KEYS if plain.count(name) == 1), None)
    if key is not None:
        group = Group(symbol="", fields=fields, features=further)
        return Layout(time=time, groups=(group,), key=key, wanted=symbols)
    if len(symbols) > 1:
        raise source.error(
            "this is one symbol's table, several symbols were asked for",
            value=", ".join(symbols),
            hint="name a file for each: A=a.csv,B=b.csv",
        )
    symbol = check_symbols(symbols or (default_symbol,), source)[0]
    return Layout(time=time, groups=(Group(symbol=symbol, fields=fields, features=further),))


def symbol_bars(
    layout: Layout,
    names: Sequence[str],
    times: Integers,
    numbers: Mapping[int, Floats],
    keys: Sequence[str] | None,
    source: Source,
) -> list[SymbolBars]:
    """Sorts a table's columns, and where a column names the symbols its rows, into one record a symbol.

    Raises:
        DataError: if a symbol that was asked for has no row.
    """
    found = []
    for group in layout.groups:
        close = numbers[group.fields["close"]]
        fields = {field: numbers[group.fields.get(field, group.fields["close"])] for field in PRICES}
        volume = group.fields.get("volume")
        fields["volume"] = np.zeros(len(close)) if volume is None else numbers[volume]
        features = {name: numbers[at] for name, at in group.features.items()}
        columns = {**group.fields, **group.features}
        called = {name: names[columns.get(name, group.fields["close"])] for name in (*FIELDS, *features)}
        item = SymbolBars(group.symbol, times, fields, features, source, columns=called)
        found += [item] if keys is None else _split(item, keys, layout.wanted)
    return found


def _split(item: SymbolBars, keys: Sequence[str], wanted: tuple[str, ...]) -> list[SymbolBars]:
    labels, codes = np.unique(np.array(keys, dtype=np.str_), return_inverse=True)
    known = [str(label) for label in labels]
    names = wanted or tuple(known)
    for name in names:
        if name not in known:
            raise unknown_symbol(name, known, item.source)
    check_symbols(names, item.source)
    parts = []
    order = np.argsort(codes, kind="stable").astype(np.int64)
    ends = np.cumsum(np.bincount(codes, minlength=len(known)))
    for name in names:
        code = known.index(name)
        rows = order[(ends[code - 1] if code else 0) : ends[code]]
        parts.append(
            SymbolBars(
                name,
                item.timestamps[rows],
                {field: values[rows] for field, values in item.fields.items()},
                {feature: values[rows] for feature, values in item.features.items()},
                item.source,
                rows=rows,
                columns=item.columns,
            )
        )
    return parts


_FIELD_OF_A_SYMBOL = re.compile(r"[^a-z](open|high|low|close|volume)\s*$", re.IGNORECASE)


def _closes(
    names: Sequence[str],
    closes: Sequence[int],
    time: tuple[int, ...],
    source: Source,
    symbols: tuple[str, ...],
    features: Mapping[str, int],
) -> Layout:
    known = [names[at].strip() for at in closes]
    for at in closes:
        if not symbols and _FIELD_OF_A_SYMBOL.search(names[at]):
            raise source.error(
                "this column is one field of a symbol, and the table is read as a column of closes a symbol",
                column=names[at],
                hint="write one file a symbol, or the columns' names in two header lines as yfinance does",
            )
    for symbol in symbols:
        if symbol not in known:
            raise unknown_symbol(symbol, known, source)
    chosen = check_symbols(symbols or known, source)
    groups = [Group(symbol=name, fields={"close": closes[known.index(name)]}, features=features) for name in chosen]
    return Layout(time=time, groups=tuple(groups))


def _time_columns(plain: Sequence[str], source: Source, names: Sequence[str], indexed: bool) -> tuple[int, ...]:
    if indexed:
        return ()
    if "date" in plain and "time" in plain and "datetime" not in plain and "timestamp" not in plain:
        return _only("date", plain, names, source), _only("time", plain, names, source)
    for name in _TIMES:
        if name in plain:
            return (_only(name, plain, names, source),)
    if plain and plain[0] in _UNNAMED:
        return (0,)
    raise _missing(["a time (Date, Datetime, Timestamp, Time or an unnamed first column)"], names, source)


def _column(name: str, names: Sequence[str], plain: Sequence[str], source: Source) -> int:
    if names.count(name) == 1:
        return names.index(name)
    if name.lower() not in plain:
        raise _missing([name], names, source)
    return _only(name.lower(), plain, names, source)


def _only(name: str, plain: Sequence[str], names: Sequence[str], source: Source) -> int:
    if plain.count(name) > 1:
        raise source.error("a column comes once", column=names[plain.index(name)], value=f"{plain.count(name)} of them")
    return plain.index(name)


def _missing(missing: Sequence[str], names: Sequence[str], source: Source) -> DataError:
    found = ", ".join(name or "(unnamed)" for name in names[:40]) + (", ..." if len(names) > 40 else "")
    columns = f"; found the columns: {shortened(found, 1_000) or 'none'}" if source.show_values else ""
    return source.error(
        f"there is no column for {', '.join(missing)}{columns}",
        hint="the first line must name time, open, high, low, close and, if there is one, volume, in any case; or a "
        "time and a column of closes a symbol",
    )
