"""The built-in `sma_cross`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ktrdr_async.errors import ParameterError
from ktrdr_async.strategies.indicators import own_bars, sma
from ktrdr_async.strategies.positions import Period, PositionStrategy, Quantity

if TYPE_CHECKING:
    from types import ModuleType

    from numpy.typing import NDArray

    from ktrdr_async.market import Bars


class SmaCross(PositionStrategy):
    """Long while the mean of the last `fast` closes is above that of the last `slow` ones.

    A symbol's means are compared at its bars from its `slow`-th one on, with one symbol from bar `slow - 1`. Its
    position is 1 when fast > slow; 0, or -1 with `short`, when fast < slow; unchanged when they are equal. It is
    ordered when it differs from the last one that was ordered, 0 before the first: as a weight of 1/k with k symbols,
    or with `quantity` as that many units.

    Args:
        fast: bars, below `slow`.
        slow: bars.
        short: whether to be short instead of flat.
        quantity: units a symbol instead of the weight.

    Raises:
        ParameterError: if a parameter is out of range, or fast isn't below slow.
    """

    name = "sma_cross"
    version = 1

    def __init__(
        self, fast: Period = 10, slow: Period = 30, short: bool = False, quantity: Quantity | None = None
    ) -> None:
        if fast >= slow:
            raise ParameterError(f"sma_cross: fast={fast} is not below slow={slow}")
        self.fast, self.slow, self.short, self.quantity = fast, slow, short, quantity
        self.warmup = slow

    def positions(self, bars: Bars) -> NDArray[np.float64]:
        """float64[n, k]: 1, 0 or -1 where the comparison comes out otherwise than in the row before; else NaN."""
        fast, slow = sma(bars.close, self.fast), sma(bars.close, self.slow)
        with np.errstate(invalid="ignore"):
            side = (fast > slow).view(np.int8) - (fast < slow).view(np.int8)  # 0 where equal, and without a mean or bar
        turns = np.diff(side, axis=0, prepend=np.int8(0)) != 0
        found = np.full(side.shape, np.nan)
        found[turns] = np.array([np.nan, 1.0, -1.0 if self.short else 0.0])[side[turns]]
        return found

    def compiled_targets(self, bars: Bars, kernels: ModuleType) -> tuple[NDArray[np.int64], NDArray[np.float64]] | None:
        """The same in one pass over each symbol's bars: where an order is, and what it is."""
        if type(self) is not SmaCross:  # who inherits may have decided otherwise
            return None
        k = bars.k
        room = kernels.PIECE + self.slow
        scratch = [np.empty(room) for _ in range(4)]
        places: list[NDArray[np.int64]] = []
        sides: list[NDArray[np.int64]] = []
        for j in range(k):
            column, there = own_bars(bars.close[:, j])
            at, side = np.empty(len(column), np.int64), np.empty(len(column), np.int64)
            found = kernels.cross(column, self.fast, self.slow, -1 if self.short else 0, *scratch, at, side)
            rows = at[:found] if there is None else there[at[:found]]
            places.append(rows * k + j)
            sides.append(side[:found].copy())
        place, value = np.concatenate(places), np.concatenate(sides).astype(np.float64)
        if k > 1:
            order = np.argsort(place)
            place, value = place[order], value[order]
        return place, value * (1.0 / k if self.quantity is None else self.quantity)
