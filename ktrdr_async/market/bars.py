"""Bars: the immutable columns that everything else reads, for one and many symbols.

What is read, parsed or made lives in `sources`, `frames` and `synthetic`; the rules that bars keep in `validation`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ktrdr_async.errors import DataError
from ktrdr_async.market.fingerprint import PrefixHash
from ktrdr_async.market.timeframes import format_time, format_timeframe, infer_timeframe, parse_timeframe, period_of
from ktrdr_async.market.validation import (
    FIELDS,
    Floats,
    Integers,
    Source,
    SymbolBars,
    as_numbers,
    as_times,
    check_prices,
    check_size,
    check_symbols,
    check_timestamps,
    doubtful,
    unknown_symbol,
)

if TYPE_CHECKING:
    from pandas import DataFrame

Stamp = Literal["open", "close"]


class Bars:
    """OHLCV rows of k symbols at n timestamps. Nothing in it can be changed.

    Make it with `read`, `from_pandas` or `from_arrays`, which validate; all that it offers is in plain arrays.
    """

    __slots__ = (
        "_hash",
        "close",
        "features",
        "first_bar",
        "high",
        "low",
        "open",
        "reference",
        "symbols",
        "timeframe",
        "timestamps",
        "volume",
        "warnings",
    )  # fmt: skip

    timestamps: Integers  # int64[n]: a bar's opening time, ns since the epoch, UTC, strictly increasing
    open: Floats  # float64[n, k], > 0; like the next three NaN where the symbol has no bar
    high: Floats  # float64[n, k]
    low: Floats  # float64[n, k]
    close: Floats  # float64[n, k]
    volume: Floats  # float64[n, k], >= 0; 0 where the data have none, NaN where the symbol has no bar
    symbols: tuple[str, ...]  # k names, each once
    timeframe: int  # ns; a bar's length, the most common step where none was given
    features: Mapping[str, Floats]  # float64[n, k], or float64[n] for all symbols together; NaN where there is none
    warnings: tuple[str, ...]  # what is permitted but seldom meant, a sentence each, once a symbol
    first_bar: Integers  # int64[k]: index of each symbol's first bar, n where it has none
    reference: str | None  # the plain string that it was read from as a whole; None where it was made in memory

    def __init__(
        self,
        timestamps: Integers,
        fields: Sequence[Floats],
        *,
        symbols: tuple[str, ...],
        timeframe: int,
        features: Mapping[str, Floats],
        reference: str | None = None,
    ) -> None:
        present = ~np.isnan(fields[3])
        first = np.where(present.any(axis=0), present.argmax(axis=0), len(timestamps)).astype(np.int64)
        values: dict[str, Any] = dict(zip(FIELDS, map(_frozen, fields), strict=True))
        values["timestamps"] = _frozen(timestamps)
        values["symbols"] = symbols
        values["timeframe"] = timeframe
        values["features"] = MappingProxyType({name: _frozen(column) for name, column in features.items()})
        values["warnings"] = doubtful(timestamps, fields[3], symbols, timeframe)
        values["first_bar"] = _frozen(first)
        values["reference"] = reference
        header = {
            "symbols": list(symbols),
            "timeframe": timeframe,
            "features": [[name, column.ndim] for name, column in features.items()],
        }
        values["_hash"] = PrefixHash(timestamps, [*fields, *features.values()], header)
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"bars can't be changed: {name!r} stays as it is")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"bars can't be changed: {name!r} stays as it is")

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (
            self.timestamps,
            [getattr(self, name) for name in FIELDS],
            self.symbols,
            self.timeframe,
            dict(self.features),
            self.reference,
        )

    def __len__(self) -> int:
        return len(self.timestamps)

    def __repr__(self) -> str:
        names = ", ".join(self.symbols[:5]) + (f" and {self.k - 5} more" if self.k > 5 else "")
        start, end = format_time(int(self.timestamps[0])), format_time(int(self.timestamps[-1]))
        return f"<Bars: {len(self):,} of {format_timeframe(self.timeframe)}, {names}, {start} to {end}>"

    @property
    def k(self) -> int:
        """The number of symbols."""
        return len(self.symbols)

    def fingerprint(self, upto: int | None = None) -> str:
        """Returns the SHA-256 of rows 0 to `upto` inclusive, the symbols, the timeframe and the features' names.

        It doesn't depend on later rows, and asking for a growing `upto` costs only the new ones.

        Args:
            upto: index of the last row that is hashed; None for all.

        Raises:
            IndexError: if there is no such row.
        """
        rows = len(self) if upto is None else upto + 1
        if not 1 <= rows <= len(self):
            raise IndexError(f"there is no bar {upto}: the bars are 0 to {len(self) - 1}")
        return self._hash.hexdigest(rows)  # type: ignore[attr-defined, no-any-return]

    def head(self, n: int) -> Bars:
        """Returns the first `n` rows, or all where there are fewer.

        Raises:
            DataError: if n is below 1.
        """
        if n < 1:
            raise DataError(f"bars have at least one row, head({n}) has none", where="bars")
        return self._rows(slice(0, n))

    def between(self, start: str | None = None, end: str | None = None) -> Bars:
        """Returns the rows from `start` to `end`, both inclusive, as a label slice of pandas does.

        Args:
            start: ISO 8601, UTC, such as `2020`, `2020-03`, `2020-03-02` or `2020-03-02 14:30`; None for the first row.
            end: as `start`; a year, month, day, hour or minute stands for all of it.

        Raises:
            DataError: if a time can't be read, or no row is left.
        """
        return self._rows(self._span(start, end))

    def select(self, symbols: Sequence[str]) -> Bars:
        """Returns the bars of these symbols alone, in this order, without the rows in which none of them has a bar.

        Raises:
            DataError: if a symbol is unknown or named twice, or none of them has a bar.
        """
        source = Source("bars")
        names = check_symbols(symbols, source)
        for name in names:
            if name not in self.symbols:
                raise unknown_symbol(name, self.symbols, source)
        at = [self.symbols.index(name) for name in names]
        fields = [np.ascontiguousarray(getattr(self, name)[:, at]) for name in FIELDS]
        features = {
            name: column if column.ndim == 1 else np.ascontiguousarray(column[:, at])
            for name, column in self.features.items()
        }
        return assemble(
            self.timestamps, fields, symbols=names, timeframe=self.timeframe, features=features, source=source
        )

    def to_pandas(self) -> DataFrame:
        """Returns a new frame: UTC times in nanoseconds as index, columns (symbol, field) and (symbol, feature).

        A feature that belongs to all symbols has the empty string in the symbol's place.
        """
        from ktrdr_async.market.frames import frame_of

        return frame_of(self)

    @classmethod
    def from_pandas(
        cls,
        data: DataFrame | Mapping[str, DataFrame],
        *,
        symbols: Sequence[str] = (),
        timeframe: str | None = None,
        tz: str | None = None,
        timestamps: Stamp = "open",
        features: Sequence[str] = (),
    ) -> Bars:
        """Takes bars over from a DataFrame, or from one a symbol.

        Understood are OHLCV columns in any case, with times as the index or in a column; both orders of yfinance's
        columns of two levels; a `symbol` column; and a column of closes a symbol.

        Args:
            data: the frame, or symbol -> frame.
            symbols: the name of the one symbol, else which of the symbols to take, in this order; empty for all.
            timeframe: a bar's length, such as `1h`; the most common step where None.
            tz: zone of times that carry none, such as `Europe/Berlin`; UTC where None.
            timestamps: `close` for times at a bar's end.
            features: further columns that travel with the bars.

        Raises:
            DataError: if a rule of the data is broken, with frame, row, column, value and rule.
        """
        from ktrdr_async.market.frames import bars_of

        return bars_of(data, symbols=symbols, timeframe=timeframe, tz=tz, timestamps=timestamps, features=features)

    @classmethod
    def read(
        cls,
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
        """Reads what a data reference names.

        Args:
            reference: the path of a CSV or Parquet file, or of a directory with one a symbol; `SYM=path,SYM2=path2`;
                or `synthetic:?bars=35000&seed=7&timeframe=1h&symbols=A,B&start=2020-01-01`.
            symbols: as for `from_pandas`.
            timeframe: as for `from_pandas`.
            tz: as for `from_pandas`.
            timestamps: as for `from_pandas`.
            date_format: how a CSV writes its times, as for `strptime`, or the unit of an epoch (s, ms, us, ns).
            features: as for `from_pandas`.
            start: the first time that is kept, as for `between`.
            end: the last one.
            roots: directories that the files must lie in, links resolved, for references from where not everyone is
                trusted; errors then don't quote what a file holds. None permits every file.

        Raises:
            DataError: if a file can't be read or a rule is broken, with file, row, column, value and rule.
            DataNotAllowedError: if a file lies outside the roots.
        """
        from ktrdr_async.market.sources import read

        return read(
            reference,
            symbols=symbols,
            timeframe=timeframe,
            tz=tz,
            timestamps=timestamps,
            date_format=date_format,
            features=features,
            start=start,
            end=end,
            roots=roots,
        )

    @classmethod
    def from_arrays(
        cls,
        timestamps: ArrayLike,
        open: ArrayLike,
        high: ArrayLike,
        low: ArrayLike,
        close: ArrayLike,
        volume: ArrayLike | None = None,
        *,
        symbols: Sequence[str],
        timeframe: str | int | None = None,
        features: Mapping[str, ArrayLike] | None = None,
    ) -> Bars:
        """Copies arrays into bars; errors count rows from 0.

        Args:
            timestamps: int64[n], ns since the epoch, UTC, or datetime64[n].
            open: float64[n, k], or float64[n] for one symbol; NaN where a symbol has no bar.
            high: as open.
            low: as open.
            close: as open.
            volume: as open; None for 0 everywhere.
            symbols: k names.
            timeframe: a bar's length as text or ns; the most common step where None.
            features: name -> float64[n] or float64[n, k].

        Raises:
            DataError: if shapes don't fit or a rule is broken, with row, column, value and rule.
        """
        source = Source("arrays")
        names = check_symbols(symbols, source)
        times = as_times(timestamps, source)
        check_size(len(times), len(names), source)
        given = {"open": open, "high": high, "low": low, "close": close}
        fields = {name: as_numbers(value, name, len(times), len(names), source) for name, value in given.items()}
        if volume is None:
            fields["volume"] = np.zeros_like(fields["close"])
        else:
            fields["volume"] = as_numbers(volume, "volume", len(times), len(names), source)
        extra = {
            name: as_numbers(value, name, len(times), len(names), source, shared=True)
            for name, value in (features or {}).items()
        }
        check_timestamps(times, source)
        for at, symbol in enumerate(names):
            columns = {name: values[:, at] for name, values in fields.items()}
            own = {name: values if values.ndim == 1 else values[:, at] for name, values in extra.items()}
            check_prices(SymbolBars(symbol, times, columns, own, source))
        length = parse_timeframe(timeframe) if isinstance(timeframe, str) else timeframe
        if length is not None and length < 1:
            raise source.error("a timeframe is a positive number of nanoseconds", value=length)
        return assemble(
            times, [fields[name] for name in FIELDS], symbols=names, timeframe=length, features=extra, source=source
        )

    def _span(self, start: str | None, end: str | None) -> slice:
        first = 0 if start is None else int(np.searchsorted(self.timestamps, period_of(start, "start")[0], "left"))
        stop = len(self) if end is None else int(np.searchsorted(self.timestamps, period_of(end, "end")[1], "left"))
        if first >= stop:
            raise DataError(
                f"no bar lies between {start or 'the first'} and {end or 'the last'}",
                where="bars",
                hint=f"the bars go from {format_time(int(self.timestamps[0]))} to "
                f"{format_time(int(self.timestamps[-1]))}",
            )
        return slice(first, stop)

    def _rows(self, rows: slice, reference: str | None = None) -> Bars:
        return Bars(
            self.timestamps[rows],
            [getattr(self, name)[rows] for name in FIELDS],
            symbols=self.symbols,
            timeframe=self.timeframe,
            features={name: column[rows] for name, column in self.features.items()},
            reference=reference,
        )


def assemble(
    timestamps: Integers,
    fields: list[Floats],
    *,
    symbols: tuple[str, ...],
    timeframe: int | None,
    features: Mapping[str, Floats],
    source: Source,
    reference: str | None = None,
    stamps: Stamp = "open",
) -> Bars:
    """Makes bars of validated columns: leaves out rows without any bar, fills volumes, infers the timeframe.

    Raises:
        DataError: if no row has a bar.
    """
    absent = np.isnan(fields[3])
    if absent.any():
        kept = ~absent.all(axis=1)
        if not kept.all():
            timestamps, absent = timestamps[kept], absent[kept]
            fields = [values[kept] for values in fields]
            features = {name: values[kept] for name, values in features.items()}
    check_size(len(timestamps), len(symbols), source)
    unsaid = np.isnan(fields[4]) ^ absent
    if unsaid.any():
        fields[4] = np.where(absent, np.nan, np.where(unsaid, 0.0, fields[4]))
    if timeframe is None:
        timeframe = infer_timeframe(timestamps)
    if stamps == "close":
        timestamps = timestamps - timeframe
    return Bars(
        timestamps,
        fields,
        symbols=symbols,
        timeframe=timeframe,
        features=features,
        reference=reference,
    )


def _frozen(values: NDArray[Any]) -> NDArray[Any]:
    values = np.ascontiguousarray(values)
    if values.flags.writeable:
        values = values.view()
        values.flags.writeable = False
    return values


def _rebuild(
    timestamps: Integers,
    fields: list[Floats],
    symbols: tuple[str, ...],
    timeframe: int,
    features: dict[str, Floats],
    reference: str | None,
) -> Bars:
    return Bars(
        timestamps, fields, symbols=symbols, timeframe=timeframe, features=features, reference=reference
    )  # fmt: skip
