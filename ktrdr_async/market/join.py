"""Joins one record a symbol into bars, on the union of their timestamps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ktrdr_async.market.bars import Bars, Stamp, assemble
from ktrdr_async.market.timeframes import parse_timeframe
from ktrdr_async.market.validation import (
    FIELDS,
    Floats,
    Integers,
    Source,
    SymbolBars,
    check_prices,
    check_size,
    check_symbols,
    check_timestamps,
)


def validated(items: list[SymbolBars]) -> list[SymbolBars]:
    """Checks what one source gave, while its rows can still be named, and returns it.

    Raises:
        DataError: if a rule is broken, with source, row, column, value and rule.
    """
    checked: set[int] = set()  # a table with a column of closes a symbol has one array of times for all
    for item in items:
        if id(item.timestamps) not in checked:
            check_timestamps(item.timestamps, item.source, item.rows, item.symbol)
            checked.add(id(item.timestamps))
        check_prices(item)
    return items


def joined(
    items: Sequence[SymbolBars],
    source: Source,
    *,
    timeframe: str | None,
    timestamps: Stamp,
    reference: str | None = None,
) -> Bars:
    """Joins symbols whose bars are valid; one without a bar at a timestamp has NaN there.

    Raises:
        DataError: if a symbol comes twice, no bar is left, or the bars are too many.
    """
    if timestamps not in ("open", "close"):
        raise source.error("timestamps are of a bar's open or close", value=str(timestamps))
    length = None if timeframe is None else parse_timeframe(timeframe)
    symbols = check_symbols([item.symbol for item in items], source)
    times = items[0].timestamps
    if not all(item.timestamps is times or np.array_equal(item.timestamps, times) for item in items):
        times = np.unique(np.concatenate([item.timestamps for item in items]))
    check_size(len(times), len(symbols), source)
    features = list(items[0].features)
    return assemble(
        times,
        [_column(times, items, [item.fields[field] for item in items]) for field in FIELDS],
        symbols=symbols,
        timeframe=length,
        features={name: _column(times, items, [item.features[name] for item in items]) for name in features},
        source=source,
        reference=reference,
        stamps=timestamps,
    )


def _column(times: Integers, items: Sequence[SymbolBars], parts: Sequence[Floats]) -> Floats:
    if len(parts) == 1 and not np.isnan(parts[0]).any():
        return parts[0].reshape(len(times), 1)
    column = np.full((len(times), len(items)), np.nan)
    for at, (item, values) in enumerate(zip(items, parts, strict=True)):
        known = ~np.isnan(values)  # every NaN gets the same bits, so that fingerprints are equal
        if len(values) == len(times):
            np.copyto(column[:, at], values, where=known)
        else:
            rows = np.searchsorted(times, item.timestamps[known])
            column[rows, at] = values[known]
    return column
