"""The built-in `signals`: decisions that were made elsewhere, read from a file."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from ktrdr_async.strategies.base import WeightStrategy

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ktrdr_async.market import Bars
    from ktrdr_async.market.validation import Source, SymbolBars


class Signals(WeightStrategy):
    """Does what a CSV or Parquet file says: a row a time, a column a symbol.

    A number in the row of a bar's time is the symbol's target there, an order to go to it, once; an empty cell or NaN
    keeps what is. A row knows the bar of its time, and fills at the next one. Every symbol needs its column, others
    aren't looked at; with one symbol and one column the column may have any name. Times increase, and each of them is
    a bar's.

    Args:
        file: path of the file.
        unit: whether numbers are weights, -1..1, or quantities in signed units.
        tz: zone of times that carry none; UTC where None.
        timestamps: whether times name a bar's opening or its end.
        date_format: how a CSV writes its times, as for `strptime`, or the unit of an epoch (s, ms, us, ns).
        clip: whether rows before the first bar and after the last are left out, instead of being errors.

    Raises:
        ParameterError: if a parameter is of another type.
        DataError: by the methods, if the file can't be read, a symbol has no column, or a time is no bar's.
    """

    name = "signals"
    version = 1
    file_parameters: ClassVar[tuple[str, ...]] = ("file",)
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
        from ktrdr_async.market.sources import _file_items, _opened
        from ktrdr_async.market.validation import Source, check_timestamps

        source = Source(self.file, show_values=self.roots is None)
        with _opened(self.file, source, self.roots) as stream:
            items = _file_items(
                stream, self.file, source, symbols=(), tz=self.tz, features=(), date_format=self.date_format
            )
            columns = _columns_of(items, bars, source)
            times = columns[0].timestamps
            check_timestamps(times, source)
            rows, at = self._matched(times, bars, source)
        targets = np.full((len(bars), bars.k), np.nan)
        for symbol, column in enumerate(columns):
            targets[at, symbol] = column.fields["close"][rows]
        return targets

    def _matched(
        self, times: NDArray[np.int64], bars: Bars, source: Source
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
                column="time",
                value=format_time(int(times[row])),
                hint=f"the bars go from {format_time(first)} to {format_time(last)}"
                + ("; clip=true leaves out what is before and after them" if outside else "")
                + "; times without a zone are UTC unless `tz` says otherwise, and name a bar's opening",
            )
        return rows, at


def _columns_of(items: list[SymbolBars], bars: Bars, source: Source) -> list[SymbolBars]:
    for item in items:
        if len({item.columns[name] for name in ("open", "high", "low", "close")}) > 1 or item.rows is not None:
            raise source.error("this is a file of bars, not of signals: it needs a time and a column a symbol")
    if bars.k == 1 and len(items) == 1:
        return items
    named = {item.symbol: item for item in items}
    for symbol in bars.symbols:
        if symbol not in named:
            raise source.error(
                f"there is no column for {symbol}",
                hint=f"there are: {', '.join(list(named)[:20])}" if source.show_values else "",
            )
    return [named[symbol] for symbol in bars.symbols]
