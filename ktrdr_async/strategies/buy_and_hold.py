"""The built-in `buy_and_hold`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ktrdr_async.strategies.positions import PositionStrategy, Quantity

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ktrdr_async.market import Bars


class BuyAndHold(PositionStrategy):
    """Buys every symbol once and keeps it.

    At a symbol's first bar its position becomes 1, and stays: a weight of 1/k with k symbols, of the equity at that
    bar, or with `quantity` that many units. Nothing is rebalanced later.

    Args:
        quantity: units a symbol instead of the weight.

    Raises:
        ParameterError: if quantity isn't above 0.
    """

    name = "buy_and_hold"
    version = 1

    def __init__(self, quantity: Quantity | None = None) -> None:
        self.quantity = quantity

    def positions(self, bars: Bars) -> NDArray[np.float64]:
        """float64[n, k]: 1 at each symbol's first bar, else NaN."""
        found = np.full((len(bars), bars.k), np.nan)
        for symbol, first in enumerate(bars.first_bar.tolist()):
            if first < len(bars):
                found[first, symbol] = 1.0
        return found
