"""The built-in `donchian_breakout`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ktrdr_async.errors import ParameterError
from ktrdr_async.strategies.indicators import lag, rolling_max, rolling_min
from ktrdr_async.strategies.positions import Period, PositionStrategy, Quantity, held

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ktrdr_async.market import Bars


class DonchianBreakout(PositionStrategy):
    """Long after a close above the highest high of the bars before, until one below their lowest low.

    The channel of R. Donchian, with the entries and exits of C. Faith, The Original Turtle Trading Rules, 2003. A
    symbol that is flat becomes long at a close above the highest high of its `entry` bars before, and flat again at a
    close below the lowest low of its `exit` bars before. With `short` the mirror image holds too, and a close beyond
    the other side's entry channel turns the position. A position is ordered when it changes: as a weight of 1/k with
    k symbols, or with `quantity` as that many units. The bar itself is never part of a channel; the first decision is
    at a symbol's (`entry` + 1)-th bar.

    Args:
        entry: bars.
        exit: bars, not above `entry`.
        short: whether to be short as well.
        quantity: units a symbol instead of the weight.

    Raises:
        ParameterError: if a parameter is out of range, or exit is above entry.
    """

    name = "donchian_breakout"
    version = 1

    def __init__(
        self, entry: Period = 20, exit: Period = 10, short: bool = False, quantity: Quantity | None = None
    ) -> None:
        if exit > entry:
            raise ParameterError(f"donchian_breakout: exit={exit} is above entry={entry}")
        self.entry, self.exit, self.short, self.quantity = entry, exit, short, quantity
        self.warmup = entry + 1

    def positions(self, bars: Bars) -> NDArray[np.float64]:
        """float64[n, k]: what is held at each bar."""
        # With exit <= entry an entry on one side is an exit on the other, so the two legs are never held together.
        close = bars.close
        upper, lower = lag(rolling_max(bars.high, self.entry)), lag(rolling_min(bars.low, self.entry))
        with np.errstate(invalid="ignore"):
            up, down = close > upper, close < lower
            found = _leg(up, close < lag(rolling_min(bars.low, self.exit)))
            if self.short:
                found -= _leg(down, close > lag(rolling_max(bars.high, self.exit)))
        return found


def _leg(enters: NDArray[np.bool_], leaves: NDArray[np.bool_]) -> NDArray[np.float64]:
    events = np.full(enters.shape, np.nan)
    events[leaves] = 0.0
    events[enters] = 1.0
    return held(events)
