"""The built-in `momentum_rotation`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ktrdr_async.strategies.base import WeightStrategy
from ktrdr_async.strategies.indicators import lag
from ktrdr_async.strategies.positions import Period

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ktrdr_async.market import Bars


class MomentumRotation(WeightStrategy):
    """Holds the symbols that have risen most, and ranks them anew every so many bars.

    At bars `lookback`, `lookback + every`, `lookback + 2 * every`, ... each symbol that has a bar there is given its
    close by its close of `lookback` of its own bars before, if it has that many. Of those above 1 the `top` largest,
    of equal ones the earlier symbol, get a weight of 1 / min(top, k) each, every other symbol that has had a bar 0.
    All of them are orders to rebalance, also where the choice stays; what isn't used stays cash. Jegadeesh and
    Titman, Returns to Buying Winners and Selling Losers, Journal of Finance 48 (1993), is where the idea was
    measured.

    Args:
        lookback: bars.
        top: how many symbols are held at most.
        every: bars between two rankings.

    Raises:
        ParameterError: if a parameter is below 1.
    """

    name = "momentum_rotation"
    version = 1

    def __init__(self, lookback: Period = 120, top: Period = 1, every: Period = 20) -> None:
        self.lookback, self.top, self.every = lookback, top, every
        self.warmup = lookback + 1

    def target_weights(self, bars: Bars) -> NDArray[np.float64]:
        """float64[n, k]: weights in the rows of a ranking, else NaN."""
        n, k = len(bars), bars.k
        weights = np.full((n, k), np.nan)
        rows = np.arange(self.lookback, n, self.every)
        growth = bars.close[rows] / lag(bars.close, self.lookback)[rows]
        with np.errstate(invalid="ignore"):
            score = np.where(growth > 1.0, growth, 0.0)
        best = np.argsort(-score, axis=1, kind="stable")[:, : self.top]
        chosen = np.zeros((len(rows), k))
        np.put_along_axis(chosen, best, 1.0 / min(self.top, k), axis=1)
        chosen[score == 0.0] = 0.0
        chosen[rows[:, None] < np.asarray(bars.first_bar)[None, :]] = np.nan
        weights[rows] = chosen
        return weights
