"""Seconds of the same job in this engine and in others: SMA 10/30, one unit a trade, fills at the next open.

    python benchmarks/peers.py [--bars N] [--repeat R] [--engine NAME ...] [--no-cold] [--json]

Two jobs: `weights` (what to hold is computed over whole columns) and `on_bar` (a Python class is asked at each bar).
Fair or void:

- All get the same arrays in memory, in the container that each of them reads (Bars, Series, DataFrame, feed, list of
  bar objects): making that is timed for nobody, except in the variant `cold`. Prices are a synthetic market's in ticks
  of 1/64, so that every way of summing a window comes to the same mean, and no engine decides a near tie by rounding.
- Indicators (each engine's own), the record of every fill as the engine keeps it (columns or objects), and an equity
  at each close are counted for all. Metrics are out for all: ours and vectorbt's are computed when asked for;
  backtesting.py's `compute_stats` and bt's `calc_perf_stats`, which their `run` always calls, are replaced by ones that
  keep trades and equity; nautilus_trader's `run_analysis` is off.
- One rule from bar 29 on: hold one unit while the fast mean is above the slow one, none while it is below, as before
  while they are equal. Commission 0.001, no slippage, nothing closed at the end. Each engine is used in the fastest
  way that we know: vectorbt on bare arrays, backtesting.py without `self.I`, backtrader without its PandasData, which
  takes longer than all the rest, nautilus_trader without logs and risk checks; what is held is known to each strategy.
- Before anything is timed, each engine's fills (bar, signed units, price) must be ours, one by one, and its equity
  after the last bar too. One that differs is shown as not comparable, without a ratio.
- bt fills at the price that it also decides at. It is given opens as prices and the decisions of the bar before, so
  its fills are ours; its equity is at opens. nautilus_trader would fill at the close that was decided at: it is given
  each open as a quote after the bar before, and a latency of 1 ns.
- One core; repetitions interleaved; medians. Peers are run up to 1 M bars, nautilus_trader up to 100 k: more would take
  minutes a run.

Variants: `warm`, in a process that has run the job before (ours with its turns on an asyncio loop, the compiled tier
loaded; vectorbt compiled); `cold`, a fresh process from start to exit that loads the arrays, imports the engine and
runs once (ours picks its tier by itself); `checkpoints`, ours alone, warm: `BacktestWorker.run` with an embedded
PostgreSQL at the default policy, on the other cores where there are any; here metrics and the stored result count.
"""

from __future__ import annotations

import asyncio
import gc
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import peer_engines
from common import Column, Row, fresh_seconds, medians, parser, pin, private_server, report, version_of
from peer_engines import ENGINES, TERMS, US, Engine, Market, Outcome, our_bars, our_strategy

import ktrdr_async as kt
from ktrdr_async.backtesting import tiers

SIZES = (10_000, 100_000, 1_000_000, 10_000_000)
JOBS = {
    "weights": (US, "vectorbt", "bt"),
    "on_bar": (US, "backtesting.py", "backtrader", "nautilus_trader"),
}
MOST = {US: 10_000_000, "nautilus_trader": 100_000}  # bars; the others: 1 M
PACKAGES = {"backtesting.py": "backtesting"}  # where the name isn't the package's
BUDGETS = {("weights", "vectorbt"): 5.0, ("on_bar", "backtesting.py"): 8.0, ("on_bar", "backtrader"): 50.0}
COLUMNS = (
    Column("job", "job"),
    Column("variant", "variant"),
    Column("bars", "bars", ","),
    Column("engine", "engine"),
    Column("fills", "fills", ","),
    Column("seconds", "seconds", ".4f"),
    Column("bars_per_second", "bars/s", ",.0f"),
    Column("ratio", "theirs/ours", ".2f"),
    Column("budget", "budget", ".0f"),
    Column("reason", "not comparable because"),
)


def market_of(bars: int) -> Market:
    step = "1h" if bars <= 1_000_000 else "1m"  # hours would end after the year 2262
    made = kt.Bars.read(f"synthetic:?bars={bars}&seed=7&timeframe={step}")
    prices = [np.round(getattr(made, name)[:, 0] * 64) / 64 for name in ("open", "high", "low", "close")]
    return Market(made.timestamps, *prices, made.volume[:, 0].copy())


def difference(ours: Outcome, theirs: Outcome) -> str | None:
    """Why an engine can't be compared; None: it did the same."""
    if ours.fills != theirs.fills:
        pairs = zip(ours.fills, theirs.fills, strict=False)
        first = next((f"{a} here, {b} there" for a, b in pairs if a != b), "one has more")
        return f"{len(ours.fills):,} fills here, {len(theirs.fills):,} there; first difference: {first}"
    if ours.equities != theirs.equities or abs(ours.equity - theirs.equity) > 1e-9 * ours.equity:
        return f"equity {ours.equity!r} here, {theirs.equity!r} there"
    return None


def rows_of(job: str, bars: int, variant: str, seconds: dict[str, float], reasons: dict[str, str | None]) -> list[Row]:
    rows = []
    for engine, took in seconds.items():
        ratio = took / seconds[US] if US in seconds and not reasons.get(engine) else None
        rows.append({"engine": engine, "job": job, "bars": bars, "variant": variant, "seconds": took, "ratio": ratio})
        rows[-1] |= {"bars_per_second": bars / took}
        if (job, engine) in BUDGETS and variant == "warm" and bars == 1_000_000:
            rows[-1] |= {"budget": BUDGETS[job, engine]}
        if reason := reasons.get(engine):
            rows[-1] |= {"reason": reason}
    return rows


def measure(job: str, market: Market, engines: Sequence[str], repeat: int, *, cold: bool) -> list[Row]:
    """The rows of all variants of one job at one size."""
    bars = len(market.close)
    made: dict[str, Engine] = {name: ENGINES[name](market, job) for name in engines}
    expected = made[US].outcome(made[US].timed()[1])
    reasons = {name: difference(expected, each.outcome(each.timed()[1])) for name, each in made.items()}
    gc.collect()
    gc.freeze()  # what other engines have imported isn't looked through in anybody's run
    rows = rows_of(job, bars, "warm", medians({name: seconds_of(each) for name, each in made.items()}, repeat), reasons)
    gc.unfreeze()
    made.clear()
    if cold:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "arrays.npz"
            np.savez(path, **market._asdict())
            script = str(Path(peer_engines.__file__))
            runs = {name: once(script, name, job, str(path)) for name in engines}
            rows += rows_of(job, bars, "cold", medians(runs, repeat), reasons)
    saved = asyncio.run(with_checkpoints(job, market, repeat))
    rows += rows_of(job, bars, "checkpoints", {US: saved}, {})
    for row in rows:
        row["fills"] = len(expected.fills)
    return rows


def seconds_of(engine: Engine) -> Callable[[], float]:
    return lambda: engine.timed()[0]


def once(*arguments: str) -> Callable[[], float]:
    return lambda: fresh_seconds(*arguments)


async def with_checkpoints(job: str, market: Market, repeat: int) -> float:
    """Median seconds of `BacktestWorker.run`, from the call to the result, all saves and the stored result included."""
    bars, request, times = our_bars(market), kt.BacktestRequest(**TERMS), []
    async with kt.BacktestWorker.open() as worker:
        for _ in range(1 + repeat):
            gc.collect()
            started = time.perf_counter()
            await worker.run(request, bars=bars, strategy=our_strategy(job))
            times.append(time.perf_counter() - started)
    return float(np.median(times[1:]))


def main() -> None:
    made = parser(__doc__, repeat=3, bars="10 k, 100 k, 1 M and 10 M")
    made.add_argument("--job", action="append", choices=[*JOBS], help="one job instead of both")
    made.add_argument("--engine", action="append", choices=[*ENGINES], help="one peer instead of all; may be repeated")
    made.add_argument("--no-cold", action="store_true", help="without the fresh processes")
    options = made.parse_args()
    pin()
    os.environ["TQDM_DISABLE"] = "1"
    warnings.simplefilter("ignore")
    notes = []
    loaded = tiers.load_compiled()
    if loaded.why_not is not None:
        notes.append(f"ktrdr_async ran interpreted: {loaded.why_not}")
    rows = []
    with private_server():
        for bars in [options.bars] if options.bars else SIZES:
            market = market_of(bars)
            for job, known in JOBS.items():
                if job not in (options.job or JOBS):
                    continue
                engines = [US]
                for name in known[1:]:
                    if options.engine and name not in options.engine:
                        continue
                    if version_of(PACKAGES.get(name, name)) is None:
                        notes.append(f"{name} isn't installed and left out")
                    elif bars > (most := MOST.get(name, 1_000_000)):
                        notes.append(f"{name} is run up to {most:,} bars")
                    else:
                        engines.append(name)
                rows += measure(job, market, engines, options.repeat, cold=not options.no_cold)
    packages = [US, "numpy", "pandas", "numba", *(PACKAGES.get(name, name) for name in ENGINES if name != US)]
    report(rows, COLUMNS, as_json=options.json, packages=packages, notes=dict.fromkeys(notes))


if __name__ == "__main__":
    main()
