"""DataFrames as people have them, and bars as a DataFrame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ktrdr_async.market.bars import Bars, Stamp
from ktrdr_async.market.join import joined, validated
from ktrdr_async.market.layout import PRICES, layout_of, symbol_bars
from ktrdr_async.market.times import TimeReader, localized, nanoseconds
from ktrdr_async.market.validation import (
    FIELDS,
    Floats,
    Integers,
    Source,
    SymbolBars,
    check_size,
    check_symbols,
    unknown_symbol,
)

if TYPE_CHECKING:
    from pandas import DataFrame

DEFAULT_SYMBOL = "ASSET"


def bars_of(
    data: DataFrame | Mapping[str, DataFrame],
    *,
    symbols: Sequence[str] = (),
    timeframe: str | None = None,
    tz: str | None = None,
    timestamps: Stamp = "open",
    features: Sequence[str] = (),
) -> Bars:
    """Does what `Bars.from_pandas` says."""
    wanted = check_symbols(symbols, Source("symbols")) if symbols else ()
    if isinstance(data, pd.DataFrame):
        source = Source("frame")
        items = frame_items(data, source, symbols=wanted, tz=tz, features=features, default_symbol=DEFAULT_SYMBOL)
        return joined(items, source, timeframe=timeframe, timestamps=timestamps)
    source = Source("frames")
    if not isinstance(data, Mapping) or not data:
        raise source.error("bars are made of a DataFrame, or of a mapping from symbols to them", value=type(data))
    items = []
    for name in wanted or tuple(data):
        if name not in data:
            raise unknown_symbol(name, list(map(str, data)), source)
        own = Source(f"frame of {name}")
        if not isinstance(data[name], pd.DataFrame):
            raise own.error("bars are made of a DataFrame", value=type(data[name]))
        items += frame_items(data[name], own, symbols=(name,), tz=tz, features=features, default_symbol=name)
    return joined(items, source, timeframe=timeframe, timestamps=timestamps)


def frame_items(
    frame: DataFrame,
    source: Source,
    *,
    symbols: tuple[str, ...],
    tz: str | None,
    features: Sequence[str],
    default_symbol: str,
    date_format: str | None = None,
) -> list[SymbolBars]:
    """Reads one frame as a record a symbol.

    Raises:
        DataError: if a column is missing, or a cell is no number or no time.
    """
    check_size(len(frame), 1, source)
    if frame.columns.nlevels == 2:
        return _two_levels(frame, source, symbols=symbols, tz=tz, features=features)
    if frame.columns.nlevels > 2:
        raise source.error("columns have one level, or two as yfinance gives them", value=frame.columns.nlevels)
    names = [str(name) for name in frame.columns]
    indexed = isinstance(frame.index, pd.DatetimeIndex | pd.PeriodIndex)
    if frame.index.nlevels > 1:
        levels = [str(name) for name in frame.index.names]
        if None in frame.index.names or len({*levels, *names}) < len(levels) + len(names):
            raise source.error("each level of an index needs a name of its own", value=", ".join(levels))
        frame = frame.reset_index()
        names = [str(name) for name in frame.columns]
    elif not indexed and frame.index.name is not None and str(frame.index.name) not in names:
        frame = frame.reset_index()
        names = [str(name) for name in frame.columns]
    elif not indexed and not isinstance(frame.index, pd.RangeIndex) and not _has_time(names):
        frame = frame.rename_axis("time").reset_index()
        names = [str(name) for name in frame.columns]
    layout = layout_of(
        names,
        source,
        symbols=symbols,
        features=features,
        default_symbol=default_symbol,
        indexed=indexed,
    )
    times = _times(frame, layout.time, names, source, tz, date_format)
    numbers = {at: _numbers(frame.iloc[:, at], names[at], source) for at in layout.numeric}
    keys = None if layout.key is None else [str(value).strip() for value in frame.iloc[:, layout.key]]
    return validated(symbol_bars(layout, names, times, numbers, keys, source))


def _has_time(names: Sequence[str]) -> bool:
    return any(name.strip().lower() in ("date", "datetime", "timestamp", "time") for name in names)


def _two_levels(
    frame: DataFrame, source: Source, *, symbols: tuple[str, ...], tz: str | None, features: Sequence[str]
) -> list[SymbolBars]:
    """Takes columns of (field, symbol) or (symbol, field) apart into a frame a symbol, which share their times."""
    levels = [[str(name) for name in frame.columns.get_level_values(level)] for level in (0, 1)]
    field_level = next((level for level in (0, 1) if set(PRICES) <= {name.lower() for name in levels[level]}), None)
    if field_level is None:
        found = ", ".join(f"({a}, {b})" for a, b in list(zip(*levels, strict=True))[:20])
        raise source.error("neither level of the columns has open, high, low and close", value=found)
    fields, tickers = levels[field_level], levels[1 - field_level]
    # A former index is ("Date", ""): a column of all symbols, whichever level the symbols are in.
    known = list(dict.fromkeys(ticker for ticker, field in zip(tickers, fields, strict=True) if ticker and field))
    for name in symbols:
        if name not in known:
            raise unknown_symbol(name, known, source)
    items = []
    for name in symbols or tuple(known):
        at = [position for position, ticker in enumerate(tickers) if ticker in (name, "") or not fields[position]]
        own = frame.iloc[:, at]
        own.columns = pd.Index([fields[position] or tickers[position] for position in at])
        items += frame_items(own, source, symbols=(name,), tz=tz, features=features, default_symbol=name)
    return items


def _times(
    frame: DataFrame, columns: tuple[int, ...], names: Sequence[str], source: Source, tz: str | None, form: str | None
) -> Integers:
    name = "index" if not columns else names[columns[0]]
    values: Any = frame.index if not columns else pd.Index(frame.iloc[:, columns[0]])
    if len(columns) == 2:
        values = pd.Index([f"{a} {b}" for a, b in zip(values, frame.iloc[:, columns[1]], strict=True)], dtype=object)
    reader = TimeReader(source, name, tz, form)
    if isinstance(values, pd.PeriodIndex):
        values = values.to_timestamp()
    if isinstance(values, pd.DatetimeIndex):
        missing = np.asarray(values.isna())
        if missing.any():
            raise source.error("a time is missing", row=int(np.argmax(missing)), column=name)
        try:
            times = nanoseconds(values)
        except ValueError:
            raise source.error("a time must lie in the years 1678 to 2261", column=name) from None
        return times if values.tz is not None or reader.zone is None else localized(times, reader.zone, source, name)
    if pd.api.types.is_numeric_dtype(values.dtype) and not pd.api.types.is_bool_dtype(values.dtype):
        whole = pd.api.types.is_integer_dtype(values.dtype) and not values.hasnans
        reader.feed_numbers(
            values.to_numpy(dtype=np.int64) if whole else values.to_numpy(dtype=np.float64, na_value=np.nan)
        )
    else:
        reader.feed(["" if value is None or value is pd.NaT else str(value) for value in values])
    return reader.finish()


def _numbers(column: Any, name: str, source: Source) -> Floats:
    if not (pd.api.types.is_bool_dtype(column.dtype) or pd.api.types.is_datetime64_any_dtype(column.dtype)):
        try:
            return np.array(column.to_numpy(dtype=np.float64, na_value=np.nan))  # a copy: frames can change
        except (TypeError, ValueError):
            pass
    for row, value in enumerate(column):
        if value is None or value is pd.NA:
            continue
        try:
            if isinstance(value, bool | np.bool_) or "_" in str(value):
                raise TypeError
            float(value)
        except (TypeError, ValueError):
            raise source.error("every value must be a number", row=row, column=name, value=str(value)) from None
    return np.array([np.nan if value is None or value is pd.NA else float(value) for value in column], dtype=np.float64)


def frame_of(bars: Bars) -> DataFrame:
    """Does what `Bars.to_pandas` says."""
    columns: dict[tuple[str, str], Floats] = {}
    for at, symbol in enumerate(bars.symbols):
        columns |= {(symbol, field): getattr(bars, field)[:, at] for field in FIELDS}
        columns |= {(symbol, name): values[:, at] for name, values in bars.features.items() if values.ndim == 2}
    columns |= {("", name): values for name, values in bars.features.items() if values.ndim == 1}
    index = pd.DatetimeIndex(bars.timestamps.view("datetime64[ns]"), name="timestamp").as_unit("ns").tz_localize("UTC")
    frame = pd.DataFrame(np.column_stack(list(columns.values())), index=index)
    frame.columns = pd.MultiIndex.from_tuples(list(columns), names=("symbol", "field"))
    return frame
