"""What the tests of strategies share: markets as bars, a run through the engine, and comparisons in every bit."""

from __future__ import annotations

from typing import Any

import numpy as np
from markets import random_market

from ktrdr_async.backtesting.engine import BacktestingEngine
from ktrdr_async.backtesting.request import BacktestRequest
from ktrdr_async.backtesting.results import BacktestResults
from ktrdr_async.market import Bars
from ktrdr_async.strategies import AnyStrategy

HOUR = 3_600_000_000_000
START = 1_577_836_800_000_000_000  # 2020-01-01T00:00:00Z


def random_bars(seed: int, *, bars: int = 150, symbols: int | None = None) -> Bars:
    """Bars with late starts, early ends and gaps."""
    market = random_market(np.random.default_rng(seed), bars=bars, symbols=symbols, wild=0.0)
    names = [f"S{at}" for at in range(market.close.shape[1])]
    return Bars.from_arrays(
        market.timestamps, market.open, market.high, market.low, market.close, symbols=names, timeframe="1h"
    )


def bars_of(closes: Any, *, symbols: tuple[str, ...] = ()) -> Bars:
    """Hourly bars whose open, high and low are the close."""
    values = np.asarray(closes, dtype=np.float64)
    values = values[:, None] if values.ndim == 1 else values
    times = START + HOUR * np.arange(len(values), dtype=np.int64)
    names = symbols or tuple(f"S{at}" for at in range(values.shape[1]))
    return Bars.from_arrays(times, values, values, values, values, symbols=names, timeframe="1h")


async def run(strategy: AnyStrategy, bars: Bars, **terms: Any) -> BacktestResults:
    """Runs to the end."""
    engine = BacktestingEngine(BacktestRequest(**terms), bars, strategy)
    async for _ in engine.run():
        pass
    return engine.results()


def bits(values: Any) -> bytes:
    """The bytes of an array, whatever its layout."""
    return np.ascontiguousarray(values, dtype=np.float64).tobytes()


def same(one: BacktestResults, other: BacktestResults) -> bool:
    """Whether two runs have the same fills and equity in every bit."""
    return one.ledger == other.ledger and bits(one.equity) == bits(other.equity)
