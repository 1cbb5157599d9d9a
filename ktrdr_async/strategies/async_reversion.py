"""The built-in `async_reversion`: how a strategy awaits a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import msgspec

from ktrdr_async.errors import ParameterError
from ktrdr_async.strategies.base import AsyncStrategy
from ktrdr_async.strategies.indicators import rolling_std, sma
from ktrdr_async.strategies.positions import Held, Quantity, go_to

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ktrdr_async.market import Bars
    from ktrdr_async.strategies.bar import Bar

Row = tuple[float, float, float]  # close, mean, standard deviation


class ReversionModel:
    """Stands for a model server: it answers after a delay, and what it answers follows from what it was sent alone.

    Args:
        latency: seconds until an answer.
    """

    def __init__(self, latency: float) -> None:
        self.latency = latency

    async def score(self, rows: list[Row]) -> list[float]:
        """How many standard deviations each close lies below its mean; 0 where there is no deviation."""
        import anyio  # by need: a process that runs no async strategy doesn't pay for it

        await anyio.sleep(self.latency)
        return [(mean - close) / deviation if deviation > 0.0 else 0.0 for close, mean, deviation in rows]


class AsyncReversion(AsyncStrategy):
    """Long far below the mean of the last closes, by a model that is awaited at every bar.

    From a symbol's `period`-th bar on the model is sent its close, and mean and standard deviation of its last
    `period` closes (`indicators.sma`, `rolling_std`), all symbols of a bar in one call. It answers (mean - close) /
    deviation. The position becomes 1 when the score is above `entry`, and 0 when it is below `exit`. It is ordered
    when it differs from the last one that was ordered, 0 before the first: as a weight of 1/k with k symbols, or with
    `quantity` as that many units.

    Args:
        period: bars, at least 2.
        entry: standard deviations.
        exit: standard deviations, not above `entry`.
        latency_ms: how long the model takes to answer, in milliseconds; it has no effect on the result.
        quantity: units a symbol instead of the weight.

    Raises:
        ParameterError: if a parameter is out of range, or exit is above entry.
    """

    name = "async_reversion"
    version = 1
    resources = ("model",)

    def __init__(
        self,
        period: Annotated[int, msgspec.Meta(ge=2)] = 20,
        entry: float = 1.5,
        exit: float = 0.0,
        latency_ms: Annotated[float, msgspec.Meta(ge=0, le=60_000)] = 0.0,
        quantity: Quantity | None = None,
    ) -> None:
        if not exit <= entry:
            raise ParameterError(f"async_reversion: exit={exit} is above entry={entry}")
        self.period, self.entry, self.exit, self.quantity = period, entry, exit, quantity
        self.warmup = period
        self.model = ReversionModel(latency_ms / 1000.0)
        self.state = Held()

    async def prepare(self, bars: Bars) -> dict[str, NDArray[np.float64]]:
        """Means and standard deviations, float64[n, k], made in a thread: numpy gives the loop its time there."""
        import anyio.to_thread

        self.state.positions = [0] * bars.k
        return {
            "async_reversion.mean": await anyio.to_thread.run_sync(sma, bars.close, self.period),
            "async_reversion.deviation": await anyio.to_thread.run_sync(rolling_std, bars.close, self.period),
        }

    async def on_bar(self, bar: Bar) -> None:
        """Asks the model for every symbol that has a full window at this bar."""
        rows = list(
            zip(bar.close, bar.feature("async_reversion.mean"), bar.feature("async_reversion.deviation"), strict=True)
        )
        there = [symbol for symbol, row in enumerate(rows) if row[2] == row[2]]  # NaN without a full window
        for symbol, score in zip(there, await self.model.score([rows[symbol] for symbol in there]), strict=True):
            if score > self.entry:
                go_to(bar, self.state, symbol, 1, self.quantity)
            elif score < self.exit:
                go_to(bar, self.state, symbol, 0, self.quantity)
