"""What the built-in strategies share: a position of -1, 0 or 1 a symbol, ordered once at each change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray

from ktrdr_async.strategies.base import WeightStrategy
from ktrdr_async.strategies.changes import on_change

if TYPE_CHECKING:
    from ktrdr_async.market import Bars
    from ktrdr_async.strategies.bar import Bar

Period = Annotated[int, msgspec.Meta(ge=1)]  # bars
Quantity = Annotated[float, msgspec.Meta(gt=0)]  # units


def held(events: NDArray[np.float64]) -> NDArray[np.float64]:
    """Fills the NaN of float64[n, k] with the last value before them in their column, 0 before the first."""
    at = np.where(np.isnan(events), 0, np.arange(1, len(events) + 1)[:, None])
    padded = np.vstack([np.zeros((1, events.shape[1])), events])
    return np.take_along_axis(padded, np.maximum.accumulate(at, axis=0), axis=0)


class PositionStrategy(WeightStrategy):
    """A strategy that is long, flat or short in each symbol: weight 1/k of equity each, or `quantity` units each."""

    quantity: float | None = None

    def positions(self, bars: Bars) -> NDArray[np.float64]:
        """float64[n, k]: -1, 0 or 1; NaN where nothing changes. Row i uses bars 0..i only."""
        raise NotImplementedError

    @property
    def by_weight(self) -> bool:
        """Whether it gives weights."""
        return self.quantity is None

    def target_weights(self, bars: Bars) -> NDArray[np.float64]:
        """float64[n, k], each position at its change."""
        changes = on_change(self.positions(bars))
        changes *= 1.0 / bars.k
        return changes

    def target_quantities(self, bars: Bars) -> NDArray[np.float64]:
        """float64[n, k], each position at its change, in units."""
        changes = on_change(self.positions(bars))
        changes *= self.quantity or 0.0
        return changes


class Held(msgspec.Struct):
    """The state of a built-in that decides bar by bar."""

    positions: list[int] = []  # -1, 0 or 1, one a symbol


def go_to(bar: Bar, state: Held, symbol: int, position: int, quantity: float | None) -> None:
    """Orders a symbol's position unless it was the last one ordered: weight 1/k, or `quantity` units."""
    if position == state.positions[symbol]:
        return
    state.positions[symbol] = position
    if quantity is None:
        bar.target_weight(symbol, position * (1.0 / len(state.positions)))
    else:
        bar.target_quantity(symbol, position * quantity)
