"""The two tiers: one source of arithmetic, interpreted over lists or compiled over arrays, equal in every bit."""

from __future__ import annotations

from typing import Any, Literal, get_args

import msgspec
import numpy as np

from ktrdr_async import compiling
from ktrdr_async.backtesting import packed
from ktrdr_async.errors import ParameterError

TierName = Literal["auto", "interpreted", "compiled"]
COMPILING_PAYS = 1_500_000  # symbol-bars that the interpreter computes in the time that a process needs to load numba


class Tier(msgspec.Struct, frozen=True):
    """Which functions compute: of plain Python over lists, or compiled ones over arrays."""

    name: Literal["interpreted", "compiled"]
    piece_values: int  # symbol-bars that are computed between two looks at the turn
    kernel: Any = None  # the compiled double of `packed`


INTERPRETED = Tier("interpreted", 256)


def compiled_tier() -> Tier | None:
    """The compiled tier; None before it is loaded."""
    kernel = compiling.compiled(packed.__name__)
    return None if kernel is None else Tier("compiled", 16_384, kernel)


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
        engine = BacktestingEngine(BacktestRequest(), bars, strategy, tier="compiled")
        engine.portfolio.settle(-1)
        steps = engine.run()
        ended = False
        while not ended:
            try:
                steps.__anext__().send(None)  # without turns it never waits: each step ends at once
            except StopIteration:
                continue
            except StopAsyncIteration:
                ended = True
