"""Bars a second of the three kinds of strategy beside backtesting.py on the same job: SMA 10/30, one unit a trade.

    python benchmarks/engine.py [--bars N] [--repeat R] [--json]

Fair or void: both get the same arrays in memory; indicators, ledger, equity curve and metrics are counted for both;
fills at the next open, commission 0.001, no slippage, one decision rule from the first bar at which both means exist.
Before anything is timed the fills of both must be equal, bar by bar. Runs are interleaved, on one core, and medians are
shown; `ratio` is their time over ours.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pandas as pd

import ktrdr_async as kt

FAST, SLOW = 10, 30
TERMS = {"commission": 0.001, "slippage": 0.0, "initial_capital": 1_000_000.0, "force_close": False}


class Held(msgspec.Struct):
    """Units that were asked for last."""

    units: float = 0.0


def means(bars: kt.Bars) -> dict[str, np.ndarray]:
    return {"fast": kt.indicators.sma(bars.close, FAST), "slow": kt.indicators.sma(bars.close, SLOW)}


class OnBar(kt.Strategy):
    warmup = SLOW

    def __init__(self) -> None:
        self.state = Held()

    def prepare(self, bars: kt.Bars) -> dict[str, np.ndarray]:
        return means(bars)

    def on_bar(self, bar: kt.Bar) -> None:
        fast, slow, state = bar.feature("fast")[0], bar.feature("slow")[0], self.state
        wanted = 1.0 if fast > slow else 0.0 if fast < slow else state.units
        if wanted != state.units:
            bar.target_quantity(0, wanted)
            state.units = wanted


class OnBarAsync(kt.AsyncStrategy):
    warmup = SLOW

    def __init__(self) -> None:
        self.state = Held()

    async def prepare(self, bars: kt.Bars) -> dict[str, np.ndarray]:
        return means(bars)

    async def on_bar(self, bar: kt.Bar) -> None:
        fast, slow, state = bar.feature("fast")[0], bar.feature("slow")[0], self.state
        wanted = 1.0 if fast > slow else 0.0 if fast < slow else state.units
        if wanted != state.units:
            bar.target_quantity(0, wanted)
            state.units = wanted


Fills = list[tuple[int, float, float]]  # bar, signed units, price


def ours(bars: kt.Bars, make: Callable[[], Any]) -> tuple[float, Fills]:
    async def run() -> tuple[float, kt.BacktestResults]:
        await asyncio.sleep(0)
        started = time.perf_counter()
        results = await kt.backtest(bars, make(), **TERMS)
        _ = results.metrics
        return time.perf_counter() - started, results

    seconds, results = asyncio.run(run())
    return seconds, [(e.bar, float(e.lots), e.price) for e in results.ledger]


def theirs(frame: pd.DataFrame) -> tuple[float, Fills]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import backtesting

        class Cross(backtesting.Strategy):  # type: ignore[misc]
            def init(self) -> None:
                # Not `self.I`: leading NaNs would put the first decision one bar later than ours. And the same means as
                # ours: a rolling sum's rounding would decide ties in another way.
                close = np.asarray(self.data.Close)
                self.fast, self.slow = kt.indicators.sma(close, FAST), kt.indicators.sma(close, SLOW)

            def next(self) -> None:
                at = len(self.data) - 1
                if self.fast[at] > self.slow[at] and not self.position:
                    self.buy(size=1)
                elif self.fast[at] < self.slow[at] and self.position:
                    self.position.close()

        started = time.perf_counter()
        stats = backtesting.Backtest(frame, Cross, cash=TERMS["initial_capital"], commission=TERMS["commission"]).run()
        seconds = time.perf_counter() - started
    fills: Fills = []
    for trade in stats["_trades"].itertuples():
        fills.append((trade.EntryBar, float(trade.Size), trade.EntryPrice))
        fills.append((trade.ExitBar, -float(trade.Size), trade.ExitPrice))
    for trade in stats["_strategy"].trades:
        fills.append((trade.entry_bar, float(trade.size), trade.entry_price))
    return seconds, sorted(fills)


def measure(count: int, repeat: int) -> list[dict[str, Any]]:
    bars = kt.Bars.read(f"synthetic:?bars={count}&seed=7&timeframe=1h")
    columns = {name.capitalize(): getattr(bars, name)[:, 0] for name in ("open", "high", "low", "close", "volume")}
    frame = pd.DataFrame(columns, index=pd.DatetimeIndex(bars.timestamps))
    kinds: dict[str, Callable[[], Any]] = {
        "weights": lambda: kt.SmaCross(fast=FAST, slow=SLOW, quantity=1.0),
        "on_bar": OnBar,
        "async": OnBarAsync,
    }
    _, expected = theirs(frame)
    for job, make in kinds.items():
        _, found = ours(bars, make)
        if found != expected:
            sys.exit(f"{job}, {count} bars: the fills differ ({len(found)} and {len(expected)}); nothing to compare")
    times: dict[str, list[float]] = {name: [] for name in (*kinds, "backtesting.py")}
    for _ in range(repeat):
        for job, make in kinds.items():
            gc.collect()
            times[job].append(ours(bars, make)[0])
        gc.collect()
        times["backtesting.py"].append(theirs(frame)[0])
    peer = statistics.median(times["backtesting.py"])
    rows = []
    for job in kinds:
        seconds = statistics.median(times[job])
        common = {"job": job, "bars": count, "variant": "warm", "fills": len(expected)}
        rows.append({"engine": "ktrdr_async", **common, "seconds": seconds, "ratio": 1.0})
        rows.append({"engine": "backtesting.py", **common, "seconds": peer, "ratio": peer / seconds})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--bars", type=int, help="one size instead of 10 k, 100 k and 1 M")
    parser.add_argument("--repeat", type=int, default=3, help="interleaved repetitions (default 3)")
    parser.add_argument("--json", action="store_true", help="rows as one JSON list")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    sizes = [options.bars] if options.bars else [10_000, 100_000, 1_000_000]
    rows = [row for size in sizes for row in measure(size, options.repeat)]
    if options.json:
        print(json.dumps(rows))
        return
    versions = {name: importlib.metadata.version(name) for name in ("backtesting", "numpy", "pandas")}
    print(f"Python {platform.python_version()}, {', '.join(f'{k} {v}' for k, v in versions.items())}; one core")
    print("fills of both are equal at every size\n")
    print(f"{'engine':<16}{'job':<10}{'bars':>10}{'fills':>9}{'seconds':>10}{'bars/s':>13}{'theirs/ours':>13}")
    for row in rows:
        print(
            f"{row['engine']:<16}{row['job']:<10}{row['bars']:>10,}{row['fills']:>9,}{row['seconds']:>10.3f}"
            f"{row['bars'] / row['seconds']:>13,.0f}{row['ratio']:>13.2f}"
        )


if __name__ == "__main__":
    main()
