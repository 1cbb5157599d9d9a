"""How time and memory of a run grow: from 10 k to 10 M bars of one symbol, and from 1 to 500 symbols.

    python benchmarks/scale.py [--bars N] [--repeat R] [--json]

Each run is a fresh process on one core that imports, loads the compiled tier, runs once over 1,000 bars, makes its bars
in memory (random walks in ticks of 1/64) and then runs the job, which is timed: `kt.backtest` on a loop with its turns.
SMA 10/30, one unit a symbol, as `weights` and as `on_bar`. Three ways to grow:

- `bars`: one symbol, 10 k to 10 M bars;
- `symbols`: 1 to 500 symbols, 20,000 bars each: the work grows with them;
- `wider`: 1 to 500 symbols at one number of symbol-bars (10 M, `on_bar` 1 M): the same work in another shape.

Memory is the largest resident size from the moment at which the bars are there, less the size before they were made,
over bars times symbols. (Linux: what making them left free is given back, and the high-water mark set back; elsewhere
making them counts too.) So the bars are in it (40 bytes, and 8 a timestamp), the equity curve (8 a bar), indicators,
ledger. Budget: 80 bytes, judged from 1 M symbol-bars on; below, what libraries hold weighs as much.

`exponent`, at each series' last row, is the slope of log(seconds) over the log of what grows, by least squares: 1 where
time grows in proportion; for `wider` 0 where the shape makes no difference. `memory_exponent`: the same of the bytes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import gc
import json
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import psutil
from common import Column, Row, fresh, parser, pin, report

import ktrdr_async as kt

BARS = (10_000, 100_000, 1_000_000, 10_000_000)
SYMBOLS = (1, 5, 20, 100, 500)
FIXED_BARS = 20_000
FIXED_WORK = {"weights": 10_000_000, "on_bar": 1_000_000}  # symbol-bars
BUDGET, JUDGED_FROM = 80.0, 1_000_000  # bytes; symbol-bars
WARM = 1_000  # bars of the first run
COLUMNS = (
    Column("engine", "engine"),
    Column("job", "job"),
    Column("variant", "what grows"),
    Column("bars", "bars", ","),
    Column("symbols", "symbols", ","),
    Column("fills", "fills", ","),
    Column("seconds", "seconds", ".4f"),
    Column("symbol_bars_per_second", "symbol-bars/s", ",.0f"),
    Column("exponent", "exponent", ".2f"),
    Column("bytes_per_symbol_bar", "bytes a bar and symbol", ".1f"),
    Column("budget", "at most", ".0f"),
    Column("memory_exponent", "exponent", ".2f"),
)
JOBS = ("weights", "on_bar")
TERMS = {"initial_capital": 1e9, "commission": 0.001, "slippage": 0.0, "force_close": False}  # nothing is ever cut


class Size(NamedTuple):
    """Bars a symbol, and symbols."""

    bars: int
    symbols: int


class Held(msgspec.Struct):
    """Units of each symbol that were ordered last."""

    units: list[float] = []


class Cross(kt.Strategy):
    """`cross.Cross`, for any number of symbols."""

    warmup = 30

    def __init__(self) -> None:
        self.state = Held()

    def prepare(self, bars: kt.Bars) -> dict[str, Any]:
        self.state.units = [0.0] * bars.k
        return {"fast": kt.indicators.sma(bars.close, 10), "slow": kt.indicators.sma(bars.close, 30)}

    def on_bar(self, bar: kt.Bar) -> None:
        units = self.state.units
        for j, (fast, slow) in enumerate(zip(bar.feature("fast"), bar.feature("slow"), strict=True)):
            if fast > slow and not units[j]:
                bar.target_quantity(j, 1.0)
                units[j] = 1.0
            elif fast < slow and units[j]:
                bar.flatten(j)
                units[j] = 0.0


def bars_of(count: int, symbols: int) -> kt.Bars:
    """Random walks from 25 upwards in ticks of 1/64."""
    rng = np.random.default_rng(7)
    columns = [np.empty((count, symbols)) for _ in range(4)]
    for j in range(symbols):
        steps = rng.integers(-40, 41, count, dtype=np.int16)
        close = (1600 + np.abs(np.cumsum(steps, dtype=np.int64))) / 64
        columns[3][:, j] = close
        columns[0][0, j], columns[0][1:, j] = close[0], close[:-1]
        np.maximum(columns[0][:, j], close, out=columns[1][:, j])
        np.minimum(columns[0][:, j], close, out=columns[2][:, j])
    timestamps = np.arange(count, dtype=np.int64) * 60_000_000_000
    return kt.Bars.from_arrays(timestamps, *columns, symbols=[f"S{j}" for j in range(symbols)])


def strategy_of(job: str) -> Any:
    return kt.SmaCross(10, 30, quantity=1.0) if job == "weights" else Cross()


def peak() -> int:
    """Largest resident size so far, bytes."""
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def forget_peak() -> None:
    """Linux: gives free memory back, and the largest size so far is the size of now (proc(5), clear_refs)."""
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):  # AttributeError: not glibc
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


async def run_here(job: str, count: int, symbols: int) -> dict[str, float]:
    """One run in this process, and what it took."""
    await kt.backtest(bars_of(WARM, symbols), strategy_of(job), **TERMS)
    gc.collect()
    forget_peak()
    before = psutil.Process().memory_info().rss
    bars = bars_of(count, symbols)
    forget_peak()
    started = time.perf_counter()
    results = await kt.backtest(bars, strategy_of(job), **TERMS)
    seconds = time.perf_counter() - started
    largest = peak()
    return {"seconds": seconds, "bytes": largest - before, "fills": len(results.ledger)}


def series(job: str, bars: int | None) -> dict[str, list[Size]]:
    """The sizes of each way to grow."""
    per_symbol, work = min(bars or FIXED_BARS, FIXED_BARS), bars or FIXED_WORK[job]
    return {
        "bars": [Size(bars, 1)] if bars else [Size(count, 1) for count in BARS],
        "symbols": [Size(per_symbol, symbols) for symbols in SYMBOLS],
        "wider": [Size(max(work // symbols, 100), symbols) for symbols in SYMBOLS],
    }


def measure(job: str, variant: str, sizes: Sequence[Size], repeat: int) -> list[Row]:
    """The rows of one series; sizes are interleaved, so that a slow minute hits all."""
    runs: dict[Size, list[dict[str, float]]] = {size: [] for size in sizes}
    for _ in range(repeat):
        for size in sizes:
            runs[size].append(json.loads(fresh(__file__, "--run", job, str(size.bars), str(size.symbols)).stdout))
    rows: list[Row] = []
    for size, found in runs.items():
        seconds, held = (statistics.median(run[key] for run in found) for key in ("seconds", "bytes"))
        values = size.bars * size.symbols
        row: Row = {"engine": "ktrdr_async", "job": job, "variant": variant, "bars": size.bars, "symbols": size.symbols}
        row |= {"fills": int(found[0]["fills"]), "seconds": seconds, "ratio": 1.0, "bytes": held}
        row |= {"symbol_bars_per_second": values / seconds, "bytes_per_symbol_bar": held / values}
        rows.append(row | ({"budget": BUDGET} if values >= JUDGED_FROM else {}))
    grows = [row["bars" if variant == "bars" else "symbols"] for row in rows]
    if len(rows) > 1:
        rows[-1]["exponent"] = slope(grows, [row["seconds"] for row in rows])
        rows[-1]["memory_exponent"] = slope(grows, [row["bytes"] for row in rows])
    return rows


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of log y over log x, by least squares."""
    return float(np.polyfit(np.log(x), np.log(np.maximum(y, 1e-9)), 1)[0])


def main() -> None:
    made = parser(__doc__, repeat=3, bars="10 k to 10 M; the series over symbols shrink with it")
    made.add_argument("--job", action="append", choices=JOBS, help="one job instead of both")
    made.add_argument("--run", nargs=3, help=argparse.SUPPRESS)  # a fresh process's part
    options = made.parse_args()
    if options.run:
        kt.load_compiled()
        job, bars, symbols = options.run
        print(json.dumps(asyncio.run(run_here(job, int(bars), int(symbols)))))
        return
    pin()
    rows = []
    for job in options.job or JOBS:
        for variant, sizes in series(job, options.bars).items():
            rows += measure(job, variant, sizes, options.repeat)
    report(rows, COLUMNS, as_json=options.json, packages=["ktrdr_async", "numpy", "numba"])


if __name__ == "__main__":
    main()
