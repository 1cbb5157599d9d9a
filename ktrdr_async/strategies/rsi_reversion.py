"""The built-in `rsi_reversion`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import msgspec

from ktrdr_async.errors import ParameterError
from ktrdr_async.strategies.base import Strategy
from ktrdr_async.strategies.indicators import rsi
from ktrdr_async.strategies.positions import Held, Period, Quantity, go_to

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ktrdr_async.market import Bars
    from ktrdr_async.strategies.bar import Bar

Level = Annotated[float, msgspec.Meta(ge=0, le=100)]


class RsiReversion(Strategy):
    """Long when the Relative Strength Index says oversold, flat or short when it says overbought.

    At a symbol's bars from its (`period` + 1)-th one on, `indicators.rsi` of its closes is looked at: below `low` the
    position becomes 1, above `high` it becomes 0, or -1 with `short`; else it is unchanged. It is ordered when it
    differs from the last one that was ordered, 0 before the first: as a weight of 1/k with k symbols, or with
    `quantity` as that many units.

    Args:
        period: changes of the close.
        low: index, below `high`.
        high: index.
        short: whether to be short instead of flat.
        quantity: units a symbol instead of the weight.

    Raises:
        ParameterError: if a parameter is out of range, or low isn't below high.
    """

    name = "rsi_reversion"
    version = 1

    def __init__(
        self,
        period: Period = 14,
        low: Level = 30.0,
        high: Level = 70.0,
        short: bool = False,
        quantity: Quantity | None = None,
    ) -> None:
        if not low < high:
            raise ParameterError(f"rsi_reversion: low={low} is not below high={high}")
        self.period, self.low, self.high, self.quantity = period, low, high, quantity
        self.overbought = -1 if short else 0
        self.warmup = period + 1
        self.state = Held()

    def prepare(self, bars: Bars) -> dict[str, NDArray[np.float64]]:
        """The index, float64[n, k]."""
        self.state.positions = [0] * bars.k
        return {"rsi_reversion.rsi": rsi(bars.close, self.period)}

    def on_bar(self, bar: Bar) -> None:
        """Compares each symbol's index; NaN, without a bar, is neither below nor above."""
        for symbol, index in enumerate(bar.feature("rsi_reversion.rsi")):
            if index < self.low:
                go_to(bar, self.state, symbol, 1, self.quantity)
            elif index > self.high:
                go_to(bar, self.state, symbol, self.overbought, self.quantity)
