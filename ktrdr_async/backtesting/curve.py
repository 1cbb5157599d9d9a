"""The equity curve, rebuilt from ledger and closes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ktrdr_async.backtesting.ledger import LedgerEvent


def last_closes(closes: NDArray[np.float64]) -> list[float]:
    """Each symbol's last close in float64[m, k] that isn't missing; NaN where it has none."""
    found: list[float] = []
    for j in range(closes.shape[1]):
        present = np.flatnonzero(~np.isnan(closes[:, j]))
        found.append(float(closes[present[-1], j]) if present.size else float("nan"))
    return found


def equity_curve(
    events: Sequence[LedgerEvent], closes: NDArray[np.float64], initial_capital: float, lot_size: float
) -> NDArray[np.float64]:
    """Equity at each close, float64[m], from ledger and float64[m, k] closes alone.

    The additions are those of `execution.mark_close`, in the same order, a whole column at a time: cash, then the
    symbols that are held, in symbol order. Forced closes belong to the closing step and count at the last bar.
    """
    m = len(closes)
    cash: NDArray[np.float64] = _forward(
        [e.bar for e in events], [e.cash_after for e in events], initial_capital, m, np.float64
    )
    steps: dict[int, tuple[list[int], list[int]]] = {}
    for event in events:
        bars, held = steps.setdefault(event.symbol, ([], [0]))
        bars.append(event.bar)
        held.append(held[-1] + event.lots)
    for j in sorted(steps):
        bars, held = steps[j]
        lots = _forward(bars, held[1:], 0, m, np.int64)
        marks = _filled(closes[:, j])
        open_ = lots != 0
        cash[open_] += lots[open_] * lot_size * marks[open_]
    return cash


def _forward(bars: list[int], values: list[Any], first: Any, m: int, dtype: Any) -> Any:
    """The last value at or before each bar; of several at one bar the last."""
    index = np.searchsorted(np.asarray(bars, dtype=np.int64), np.arange(m), side="right")
    return np.concatenate([np.asarray([first], dtype), np.asarray(values, dtype)])[index]


def _filled(column: NDArray[np.float64]) -> NDArray[np.float64]:
    """A column whose gaps repeat the value before them."""
    present = ~np.isnan(column)
    if present.all():
        return column
    last = np.maximum.accumulate(np.where(present, np.arange(len(column)), 0))
    return column[last]
