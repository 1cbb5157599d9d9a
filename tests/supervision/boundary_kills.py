"""A process that kills itself at a boundary of its talk with PostgreSQL: before sending, after sending, at the answer.

The boundaries are what a hook sees go over the sockets, and a run that nothing kills tells them. A nursery forks the
processes, so that each costs no start of Python.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from supervision_kills import CHECKOUT, HERE, Marked

import ktrdr_async as kt
from ktrdr_async.storage.database import Database
from ktrdr_async.storage.queries import load_queries, sql_directory
from ktrdr_async.supervision.worker import BacktestWorker

BARS, INTERVAL = 1_000, 200  # and bars between two checkpoints: what a kill may cost
BEATS = 2
VICTIM = "victim"  # its connections' application_name
_BAR = re.compile(rb'"bar_index":(\d+)')
_WRITES = re.compile(r"execute (save_\w+|finish_\w+|claim_operation|cancel_abandoned)")


class Standing(msgspec.Struct, frozen=True):
    """What was written of an operation."""

    epoch: int = 0
    bar: int = -1  # of its checkpoint; -1: there is none
    ended: bool = False

    @property
    def run(self) -> tuple[int, bool]:
        """What only rises."""
        return self.epoch, self.ended

    def after(self, query: str, bar: int) -> Standing:
        """What it is once a write has landed."""
        if query == "claim_operation":
            return Standing(self.epoch + 1, self.bar, ended=False)
        return Standing(self.epoch, max(bar, self.bar), self.ended or not query.startswith("save_"))


class Job(msgspec.Struct):
    """What a victim does."""

    dsn: str
    name: str = ""  # the operation
    act: str = "run"  # or `beat`, `ask` (cancels what another runs), `migrate`
    cancel_at: int = -1  # bar in which its task is cancelled
    fail_at: int = -1  # bar in which its strategy raises
    strike: str = ""  # the boundary at which it kills itself; "": none
    stored: Standing = Standing()  # what there is of the operation already
    schema: str = "ktrdr"
    migrations: str = ""  # directory


class Said(msgspec.Struct):
    """What a victim tells at its end."""

    boundaries: list[str]  # that it passed, in order; the last one is where it died
    bar: int  # computed last
    sent: Standing  # as if all that was sent had landed
    acknowledged: Standing
    killed: bool = False


class Hook:
    """Sees what the connections of this process send and hear."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.bar = job.stored.bar
        self.sent = self.acknowledged = job.stored
        self.passed: list[str] = []
        self.counts: Counter[str] = Counter()
        queries = load_queries(sql_directory("queries"), job.schema)
        self.names = {text: name for name, text in queries.items()}

    def reach(self, boundary: str) -> None:
        """Dies here, if it is the one."""
        self.counts[boundary] += 1
        self.passed.append(f"{boundary} {self.counts[boundary]}")
        if self.passed[-1] == self.job.strike:
            self.tell()
            os.kill(os.getpid(), signal.SIGKILL)

    def tell(self) -> None:
        said = Said(self.passed, self.bar, self.sent, self.acknowledged)
        os.write(1, msgspec.json.encode(said) + b"\n")


class Line:
    """A connection's transport."""

    def __init__(self, transport: Any, hook: Hook) -> None:
        self._transport, self._hook = transport, hook
        self._statements: dict[bytes, str] = {}
        self._asked = ""  # what the next answer belongs to
        self._write: Callable[[Standing], Standing] = lambda standing: standing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: Any) -> None:
        hook, data = self._hook, bytes(data)
        self._asked = asked = self._describe(data)
        hook.reach(f"{asked}, before it is sent")
        if match := _WRITES.match(asked):
            found, query = _BAR.search(data), match[1]
            bar = int(found[1]) if found and query != "finish_completed" else -1
            self._write = lambda standing: standing.after(query, bar)
            hook.sent = self._write(hook.sent)
        self._transport.write(data)
        hook.reach(f"{asked}, sent")

    def writelines(self, buffers: Any) -> None:
        self.write(b"".join(bytes(buffer) for buffer in buffers))

    def answered(self) -> None:
        """The first piece of an answer is here; nobody has seen it yet."""
        hook, asked = self._hook, self._asked
        if asked:
            hook.acknowledged = self._write(hook.acknowledged)
            self._asked, self._write = "", lambda standing: standing
            hook.reach(f"{asked}, answered")

    def _describe(self, data: bytes) -> str:
        """What a packet asks for, by its first message (PostgreSQL manual, 54.7: message formats)."""
        kind, body = data[:1], data[5 : 1 + struct.unpack_from("!i", data, 1)[0]]
        if kind == b"P":
            statement, text, _ = body.split(b"\0", 2)
            self._statements[statement] = name = self._name(text)
            return f"parse {name}"
        if kind == b"B":
            name = self._statements[body.split(b"\0", 2)[1]]
            return f"execute {name}"
        if kind == b"Q":
            name = self._name(body[:-1])
            return f"query {name}"
        return {b"X": "goodbye", b"\0": "hello"}.get(kind, kind.decode())

    def _name(self, text: bytes) -> str:
        said = text.decode()
        return self._hook.names.get(said) or " ".join(said.split())[:60]


class Ear:
    """Stands before asyncpg's protocol."""

    def __init__(self, protocol: Any, hook: Hook) -> None:
        self.protocol, self._hook = protocol, hook

    def __getattr__(self, name: str) -> Any:
        return getattr(self.protocol, name)

    def connection_made(self, transport: Any) -> None:
        self.line = Line(transport, self._hook)
        self.protocol.connection_made(self.line)

    def data_received(self, data: bytes) -> None:
        self.line.answered()
        self.protocol.data_received(data)


class Loop(asyncio.SelectorEventLoop):
    """Every connection to PostgreSQL goes through the hook."""

    hook: Hook

    async def create_unix_connection(self, factory: Any, *arguments: Any, **keywords: Any) -> Any:
        _, ear = await super().create_unix_connection(lambda: Ear(factory(), self.hook), *arguments, **keywords)
        return ear.line, ear.protocol


class Striking(Marked):
    """Tells the hook where it is, and does what the job wants."""

    def on_bar(self, bar: kt.Bar) -> None:
        loop = asyncio.get_running_loop()
        if isinstance(loop, Loop):
            hook, job = loop.hook, loop.hook.job
            hook.bar = bar.index
            if bar.index == job.fail_at:
                raise ZeroDivisionError(f"at {bar.index}")
            task = asyncio.current_task()
            if bar.index == job.cancel_at and task is not None:
                task.cancel()
        super().on_bar(bar)


REQUEST = kt.BacktestRequest(
    data=f"synthetic:?bars={BARS}&seed=11&timeframe=1h", strategy="boundary_kills:Striking", commission=0.00002,
    slippage=0.00005, seed=5,
)  # fmt: skip


def policy() -> kt.CheckpointPolicy:
    return kt.CheckpointPolicy(INTERVAL, max_overhead=None)


async def _act(hook: Hook) -> None:
    job = hook.job
    dsn = f"{job.dsn}&application_name={VICTIM}"
    if job.act == "migrate":
        async with Database.open(dsn, schema=job.schema, migrations=Path(job.migrations)):
            return
    async with BacktestWorker.open(dsn, allow=("boundary_kills",)) as worker:
        if job.act == "ask":
            await worker.cancel(job.name)
            return
        handle = worker.start(REQUEST, job.name, policy=policy(), throttle=2_000 if job.act == "beat" else None)
        while job.act == "beat" and hook.counts["execute heartbeat, answered"] < BEATS and not handle.done:
            worker.heart.wake()
            await asyncio.sleep(0.005)
        with contextlib.suppress(kt.CancellationError, ZeroDivisionError):
            await handle.result()


def _live(job: Job) -> None:
    logging.basicConfig(level=logging.CRITICAL)
    with asyncio.Runner(loop_factory=Loop) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, Loop)
        loop.hook = Hook(job)
        runner.run(_act(loop.hook))
        loop.hook.tell()


def main() -> None:
    """What the nursery does: a child a line, and how it ended."""
    asyncio.run(_warm())
    for line in sys.stdin.buffer:
        pid = os.fork()
        if not pid:
            _live(msgspec.json.decode(line, type=Job))
            os._exit(0)
        os.write(1, b"exit %d\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


async def _warm() -> None:
    (await kt.backtest(None, Striking(), request=REQUEST)).audit()


class Nursery:
    """Starts victims, one after the other, and hears what they say."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    async def victim(self, job: Job) -> Said:
        return await asyncio.to_thread(self._victim, job)

    def _victim(self, job: Job) -> Said:
        talk, listen = self._process.stdin, self._process.stdout
        assert talk is not None
        assert listen is not None
        talk.write(msgspec.json.encode(job) + b"\n")
        talk.flush()
        said: Said | None = None
        for line in listen:
            if not line.startswith(b"exit "):
                said = msgspec.json.decode(line, type=Said)
                continue
            code = int(line.split()[1])
            assert said is not None, f"a victim ended with {code}: {job}"
            assert code in (0, -signal.SIGKILL), f"a victim ended with {code}: {job}"
            said.killed = code != 0
            return said
        raise AssertionError("the nursery is gone")


@contextmanager
def nursery() -> Iterator[Nursery]:
    """Ends with its standard input."""
    environment = {**os.environ, "PYTHONPATH": f"{CHECKOUT}:{HERE}"}
    program = "import boundary_kills; boundary_kills.main()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as process:
        yield Nursery(process)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(20) == 0
