"""Storms of cancellations: what stops a save at a chosen moment, and all that then breaks over its caller."""

from __future__ import annotations

import asyncio
import random
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

import anyio
import msgspec
from supervision_runs import EVERY_BLOCK, NEVER, REQUEST, Gate, Held, market, outside, row_held, until

import ktrdr_async as kt
from ktrdr_async.supervision.worker import BacktestWorker

ANSWERED = b"Z\x00\x00\x00\x05"  # ReadyForQuery
Way = Literal["request", "reply"]
MOMENTS = [
    ("before", "on"), ("no connection", "on"), ("request", "on"), ("request", "cut"), ("row", "on"), ("row", "cut"),
    ("reply", "on"), ("reply", "cut"), ("after", "on"),
]  # fmt: skip
MOMENTS += [(moment, "late") for moment in ("request", "row", "reply")]
CASES = [(save, *moment) for save in ("periodic", "final", "completion") for moment in MOMENTS]
OTHERS = ("scope", "timeout", "fail_after", "sibling", "anyio sibling")


def message_types(chunk: bytes) -> set[bytes]:
    """Types of the protocol's messages in what a client wrote at once."""
    found, place = set(), 0
    while place + 5 <= len(chunk):
        found.add(chunk[place : place + 1])
        place += 1 + int.from_bytes(chunk[place + 1 : place + 5], "big")
    return found


def _set(verdict: asyncio.Future[bool], cut: bool) -> None:
    if not verdict.done():
        verdict.set_result(cut)


class Proxy:
    """Between workers and their server, in a thread of its own: stops guarded writes, each until it is told to go on.

    "request": the server doesn't get the statement. "reply": it has answered, and the client doesn't hear of it.
    """

    def __init__(self, target: str) -> None:
        self._target = target
        self._armed: Way | None = None
        self._every = False
        self._holds: list[asyncio.Future[bool]] = []
        self._writers: dict[asyncio.Task[None], tuple[asyncio.StreamWriter, ...]] = {}

    def arm(self, way: Way, *, every: bool = False) -> None:
        """Stops the next guarded write, or every one from now on."""
        self._armed, self._every = way, every

    @property
    def held(self) -> int:
        """How many it holds."""
        return len(self._holds)

    def release(self, *, cut: bool = False) -> None:
        """Lets what is held pass, or cuts its connections; nothing is stopped any more."""
        self._armed = None
        holds, self._holds = self._holds, []
        for verdict in holds:
            verdict.get_loop().call_soon_threadsafe(_set, verdict, cut)

    def _stops(self, way: Way) -> bool:
        if self._armed != way:
            return False
        self._armed = way if self._every else None
        return True

    async def _hold(self) -> bool:
        """Whether it is cut."""
        verdict: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._holds.append(verdict)
        return await verdict

    async def close(self) -> None:
        """Ends every connection."""
        for writers in self._writers.values():
            for writer in writers:
                writer.transport.abort()
        if self._writers:
            await asyncio.wait(set(self._writers))
        await asyncio.sleep(0)  # asyncio tells a transport's end to its protocol in the next turn

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_unix_connection(self._target)
        task = asyncio.current_task()
        assert task is not None
        self._writers[task] = (writer, up_writer)
        task.add_done_callback(self._writers.pop)
        guarded, muted, answered = False, False, asyncio.Event()

        async def down() -> None:
            nonlocal muted
            while chunk := await up_reader.read(1_000_000):
                if muted and ANSWERED in chunk:
                    muted = False
                    if await self._hold():
                        break
                writer.write(chunk)
                if ANSWERED in chunk:
                    answered.set()
            answered.set()
            writer.transport.abort()

        back = asyncio.create_task(down())
        try:
            while chunk := await reader.read(1_000_000):
                late = False
                types = message_types(chunk)
                if b"P" in types:  # between it and its values the driver may ask for types
                    guarded = b"WITH own AS" in chunk
                if guarded and b"B" in types:
                    guarded = False
                    if self._stops("request"):
                        if await self._hold():
                            return
                        late = True
                    elif self._stops("reply"):
                        muted = True
                answered.clear()
                up_writer.write(chunk)
                if late:
                    await answered.wait()  # also where the client has gone meanwhile
            if muted:
                await answered.wait()
        except ConnectionError:
            pass
        finally:
            back.cancel()
            await asyncio.gather(back, return_exceptions=True)
            for one in (writer, up_writer):
                one.transport.abort()


@contextmanager
def proxied(dsn: str) -> Iterator[tuple[Proxy, str]]:
    """A proxy before a database, and the DSN through it."""
    query = parse_qs(urlsplit(dsn).query)
    host, port = query["host"][0], query["port"][0]
    place = Path(tempfile.mkdtemp(prefix="hold-", dir="/tmp"))
    proxy = Proxy(f"{host}/.s.PGSQL.{port}")
    ready = threading.Event()
    loop = asyncio.new_event_loop()
    over = asyncio.Event()

    async def serve() -> None:
        server = await asyncio.start_unix_server(proxy.serve, place / f".s.PGSQL.{port}")
        ready.set()
        await over.wait()
        server.close()
        await proxy.close()

    def run() -> None:
        loop.run_until_complete(serve())
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert ready.wait(20)
        yield proxy, dsn.replace(host, str(place))
    finally:
        proxy.release()
        loop.call_soon_threadsafe(over.set)
        thread.join(20)
        assert not thread.is_alive()
        shutil.rmtree(place)


class Storm(msgspec.Struct, frozen=True):
    """Which save, how far it has come, how it goes on, and what breaks over it."""

    seed: str
    save: str  # periodic, final (which the first act begins), completion
    moment: str
    release: str  # on; cut: the connection breaks; late: only when the deadline has passed
    acts: tuple[tuple[str, int], ...]  # with the loop's turns after each
    layers: tuple[str, ...]  # what stands around the run, from outside


def drawn(seed: int, number: int) -> Storm:
    chance = random.Random(f"{seed}-{number}")
    acts = ["native"] * chance.randrange(6) + [kind for kind in OTHERS if chance.random() < 0.25]
    acts = acts or [chance.choice(OTHERS)]
    chance.shuffle(acts)
    turns = [chance.choice((0, 0, 1, 2, 5, 20)) for _ in acts]
    layers = chance.sample(OTHERS, len(OTHERS))
    case = CASES[number % len(CASES)]
    return Storm(f"{seed}-{number}", *case, tuple(zip(acts, turns, strict=True)), tuple(layers))


class Caller:
    """Awaits a run inside everything that can cancel it."""

    def __init__(self, work: Coroutine[Any, Any, kt.BacktestResults], layers: tuple[str, ...]) -> None:
        self.seen: BaseException | None = None  # what the run raised
        self.cancelling = 0  # that were pending when it was over
        self.acts: dict[str, Callable[[], object]] = {"native": lambda: self.task.cancel()}
        self._quiet = asyncio.Event()
        self.task = asyncio.create_task(self._run(work, layers), name="the caller")
        self.task.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _run(self, work: Coroutine[Any, Any, kt.BacktestResults], layers: tuple[str, ...]) -> None:
        try:
            async with AsyncExitStack() as stack:
                for layer in layers:
                    await self._enter(stack, layer)
                try:
                    await work
                except BaseException as error:
                    self.seen = error
                    raise
                finally:
                    self._quiet.set()
        finally:
            task = asyncio.current_task()
            self.cancelling = 0 if task is None else task.cancelling()

    async def _enter(self, stack: AsyncExitStack, layer: str) -> None:
        now = asyncio.get_running_loop().time
        if layer == "scope":
            self.acts[layer] = stack.enter_context(anyio.CancelScope()).cancel
        elif layer == "fail_after":
            within = stack.enter_context(anyio.fail_after(None))
            self.acts[layer] = lambda: setattr(within, "deadline", now())
        elif layer == "timeout":
            timeout = await stack.enter_async_context(asyncio.timeout(None))
            self.acts[layer] = lambda: timeout.expired() or timeout.reschedule(now())
        else:
            failed = asyncio.Event()
            self.acts[layer] = failed.set
            if layer == "sibling":
                group = await stack.enter_async_context(asyncio.TaskGroup())
                group.create_task(self._sibling(failed))
            else:
                (await stack.enter_async_context(anyio.create_task_group())).start_soon(self._sibling, failed)

    async def _sibling(self, failed: asyncio.Event) -> None:
        waiting = [asyncio.create_task(event.wait()) for event in (failed, self._quiet)]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()
        if failed.is_set() and not self._quiet.is_set():
            raise ArithmeticError("beside")

    async def suffer(self, acts: tuple[tuple[str, int], ...]) -> None:
        for act, turns in acts:
            if not self.task.done():
                self.acts[act]()
            for _ in range(turns):
                await asyncio.sleep(0)


def opened(gate: Gate, again: int) -> None:
    """Opens a gate, which holds again at a later bar."""
    was, gate.open, gate.bar = gate.open, asyncio.Event(), again
    was.set()


@asynccontextmanager
async def held_up(
    storm: Storm, worker: BacktestWorker | None, dsn: str, proxy: Proxy, name: str
) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Holds the next save at the storm's moment, to the end of the block; what is given waits until it is there."""
    async with AsyncExitStack() as stack:
        looker = await stack.enter_async_context(outside(dsn))
        if storm.moment == "row":
            reached: Callable[[], Awaitable[None]] = await stack.enter_async_context(row_held(dsn, name))
        elif storm.moment == "no connection":
            assert worker is not None
            pool = worker.database._pool
            for _ in range(pool.get_max_size()):
                stack.push_async_callback(pool.release, await pool.acquire())

            async def waits() -> bool:
                return bool(pool._queue._getters)

            reached = lambda: until(waits, "the save waits for a connection")  # noqa: E731
        elif storm.moment in ("request", "reply"):
            proxy.arm("request" if storm.moment == "request" else "reply", every=storm.release == "late")
            stack.callback(lambda: proxy.release(cut=storm.release == "cut"))

            async def holds() -> bool:
                return proxy.held > 0

            reached = lambda: until(holds, f"the proxy holds the {storm}")  # noqa: E731
        else:

            async def durable() -> bool:
                return storm.moment == "before" or await looker.fetchval(
                    "SELECT o.status <> 'running' OR COALESCE((c.state->>'bar_index')::int, 0) > 299"
                    " FROM ktrdr.operations o LEFT JOIN ktrdr.operation_checkpoints c USING (operation_id)"
                    " WHERE operation_id = $1", name,
                )  # fmt: skip

            reached = lambda: until(durable, "the save is durable")  # noqa: E731
        yield reached
        if storm.moment == "row" and storm.release == "cut":
            await looker.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
                " AND wait_event_type = 'Lock' AND application_name <> 'test'"
            )


async def begun(worker: BacktestWorker, storm: Storm, name: str) -> tuple[Caller, Gate]:
    """A run that is held right before the save in question."""
    gate = Gate(950 if storm.save == "completion" else 345)
    policy = EVERY_BLOCK if storm.save == "periodic" else NEVER
    caller = Caller(worker.run(REQUEST, name, bars=market(), strategy=Held(gate), policy=policy), storm.layers)
    arrival = asyncio.create_task(gate.reached.wait())
    await asyncio.wait({caller.task, arrival}, return_when=asyncio.FIRST_COMPLETED)
    assert arrival.done(), caller.task
    return caller, gate


async def broken_over(storm: Storm, caller: Caller, gate: Gate, reached: Callable[[], Awaitable[None]]) -> None:
    """Begins the save, and lets the storm break over it at its moment."""
    acts = storm.acts
    if storm.save == "final":
        await caller.suffer(acts[:1])
        acts = acts[1:]
    else:
        opened(gate, 450)
    await reached()
    await caller.suffer(acts)
