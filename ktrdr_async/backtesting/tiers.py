"""The two tiers: one source of arithmetic, interpreted over lists or compiled over arrays, equal in every bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from ktrdr_async import compiling
from ktrdr_async.backtesting import execution as ex
from ktrdr_async.errors import ParameterError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    from numpy.typing import NDArray

TierName = Literal["auto", "interpreted", "compiled"]
COMPILING_PAYS = 1_500_000  # symbol-bars that the interpreter computes in the time that a process needs to load numba


class Tier:
    """How columns are held, and which functions compute over them."""

    name: Literal["interpreted", "compiled"]
    kernel: ModuleType | Any  # `execution`, or its compiled double
    piece_values: int  # symbol-bars that are computed between two looks at the turn

    def ints(self, values: Sequence[int]) -> Any:
        """A column of whole numbers."""
        raise NotImplementedError

    def floats(self, values: Sequence[float]) -> Any:
        """A column of floats."""
        raise NotImplementedError

    def int_room(self, size: int) -> Any:
        """A column for so many whole numbers."""
        raise NotImplementedError

    def float_room(self, size: int) -> Any:
        """A column for so many floats."""
        raise NotImplementedError

    def like(self, column: Any) -> Any:
        """A copy of another tier's column."""
        raise NotImplementedError

    def flat(self, rows: NDArray[Any]) -> Any:
        """A column of all values of an array, row by row."""
        raise NotImplementedError


class Interpreted(Tier):
    """Plain Python over lists: no start-up, 1 to 2 million bars a second."""

    name = "interpreted"
    kernel = ex
    piece_values = 256

    def ints(self, values: Sequence[int]) -> list[int]:
        """A list."""
        return list(values)

    def floats(self, values: Sequence[float]) -> list[float]:
        """A list."""
        return list(values)

    def int_room(self, size: int) -> list[int]:
        """A list."""
        return [0] * size

    def float_room(self, size: int) -> list[float]:
        """A list."""
        return [0.0] * size

    def like(self, column: Any) -> list[Any]:
        """A list."""
        return column.tolist() if isinstance(column, np.ndarray) else list(column)

    def flat(self, rows: NDArray[Any]) -> list[Any]:
        """A list of Python numbers: numpy's own cost ten times as much to compute with."""
        return rows.ravel().tolist()


class Compiled(Tier):
    """The same source, compiled: for strategies whose targets are known before the first bar."""

    name = "compiled"
    piece_values = 16_384

    def __init__(self, kernel: ModuleType) -> None:
        self.kernel = kernel

    def ints(self, values: Sequence[int]) -> NDArray[np.int64]:
        """int64[m]."""
        return np.array(values, dtype=np.int64)

    def floats(self, values: Sequence[float]) -> NDArray[np.float64]:
        """float64[m]."""
        return np.array(values, dtype=np.float64)

    def int_room(self, size: int) -> NDArray[np.int64]:
        """int64[size], whose memory is taken when it is used."""
        return np.zeros(size, np.int64)

    def float_room(self, size: int) -> NDArray[np.float64]:
        """float64[size], whose memory is taken when it is used."""
        return np.zeros(size)

    def like(self, column: Any) -> NDArray[Any]:
        """int64[m] or float64[m]."""
        return np.array(column)

    def flat(self, rows: NDArray[Any]) -> NDArray[Any]:
        """The values where they are."""
        return rows.ravel()


INTERPRETED = Interpreted()


def compiled_tier() -> Compiled | None:
    """The compiled tier; None before it is loaded."""
    kernel = compiling.compiled(ex.__name__)
    return None if kernel is None else Compiled(kernel)


def tier_of(name: TierName) -> Tier:
    """The tier of a run: compiled where it is loaded, unless `name` forbids it."""
    return INTERPRETED if name == "interpreted" else compiled_tier() or INTERPRETED


def load_compiled() -> compiling.Loaded:
    """Loads the compiled tier: before a service is ready, as it holds the loop for half a second, or for a long run.

    The first time on a machine, it compiles for some seconds. Without numba it does nothing and says why.
    """
    return compiling.load(_rehearse)


def pays(name: TierName, symbol_bars: int, *, alone: bool) -> bool:
    """Whether the compiled tier should be loaded now, for one run.

    Args:
        name: what was asked for.
        symbol_bars: how long the run is.
        alone: nobody else is on the loop, which stands still meanwhile.
    """
    if name == "interpreted" or compiled_tier() is not None:
        return False
    return name == "compiled" or (alone and symbol_bars >= COMPILING_PAYS and compiling.installed())


def checked_tier(name: str) -> TierName:
    """A tier's name. :raises ParameterError: if there is no such tier."""
    if name not in get_args(TierName):
        raise ParameterError(f"there is no tier {name!r}; there are: {', '.join(get_args(TierName))}")
    return name  # type: ignore[return-value]


def _rehearse() -> None:
    from ktrdr_async.backtesting.engine import BacktestingEngine
    from ktrdr_async.backtesting.request import BacktestRequest
    from ktrdr_async.market.bars import Bars
    from ktrdr_async.strategies import indicators
    from ktrdr_async.strategies.rsi_reversion import RsiReversion
    from ktrdr_async.strategies.sma_cross import SmaCross

    prices = np.array([1.0, 2.0, 1.0, 3.0])
    bars = Bars.from_arrays(np.arange(4) * 60_000_000_000, prices, prices, prices, prices, symbols=("A",))
    for compute in (indicators.sma, indicators.ema, indicators.rsi):
        compute(prices, 2)
    indicators.atr(prices, prices, prices, 2)
    for strategy in (SmaCross(fast=1, slow=2), RsiReversion(period=1)):
        steps = BacktestingEngine(BacktestRequest(), bars, strategy, tier="compiled").run()
        ended = False
        while not ended:
            try:
                steps.__anext__().send(None)  # without turns it never waits: each step ends at once
            except StopIteration:
                continue
            except StopAsyncIteration:
                ended = True
