"""An owner in a process of its own: it is told what to do a line at a time, and tells what came of it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal

import msgspec
from supervision_runs import HERE, REQUEST, Gate, Held, market, until

import ktrdr_async as kt
from ktrdr_async.supervision.worker import BacktestWorker

CHECKOUT = HERE.parents[1]


def every(bars: int) -> kt.CheckpointPolicy:
    return kt.CheckpointPolicy(bars, max_overhead=None)


class Opening(asyncio.Event):
    """How a gate opens: as it is, or with the strategy failing."""

    fails = False

    async def wait(self) -> Literal[True]:
        await super().wait()
        if self.fails:
            raise KeyError("told to fail")
        return True


def described(task: asyncio.Future[kt.BacktestResults]) -> dict[str, Any]:
    """What came of a run, to be printed."""
    try:
        return {"digest": task.result().digest}
    except BaseException as error:
        return {"error": type(error).__name__, "notes": getattr(error, "__notes__", [])}


async def _obey(dsn: str, host: str) -> None:
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    openings: dict[str, Opening] = {}
    callers: dict[str, asyncio.Task[kt.BacktestResults]] = {}
    others: set[asyncio.Task[None]] = set()

    def tell(name: str, **what: Any) -> None:
        print(json.dumps({"name": name, **what}), flush=True)

    async def reach(name: str, gate: Gate) -> None:
        await gate.reached.wait()
        tell(name, reached=gate.bar)

    async def ask_cancel(name: str) -> None:
        try:
            tell(name, cancel=(await worker.operations.cancel(name)).status.value)
        except kt.KtrdrError as error:
            tell(name, cancel=type(error).__name__)

    async with BacktestWorker.open(dsn) as worker:
        if host:
            worker.owner = msgspec.structs.replace(worker.owner, host=host)
        tell("", ready=os.getpid())
        while line := await lines.readline():
            told = json.loads(line)
            name, what = told["name"], told["what"]
            if what == "run":
                gate = Gate(told["bar"])
                gate.open = openings[name] = Opening()
                options: Any = {"bars": market(), "strategy": Held(gate), "policy": every(told["every"])}
                run = worker.resume(name, **options) if told.get("resume") else worker.run(REQUEST, name, **options)
                caller = callers[name] = asyncio.create_task(run)
                reaching = asyncio.create_task(reach(name, gate))
                others.add(reaching)

                def ended(task: asyncio.Task[Any], name: str = name, reaching: Any = reaching) -> None:
                    reaching.cancel()
                    tell(name, **described(task))

                caller.add_done_callback(ended)
            elif what in ("open", "fail"):
                openings[name].fails = what == "fail"
                openings[name].set()
            elif what == "cancel":
                callers[name].cancel()
            elif what == "ask-cancel":
                others.add(asyncio.create_task(ask_cancel(name)))
        for task in others:
            task.cancel()


def main() -> None:
    """What the child does."""
    asyncio.run(_obey(sys.argv[1], sys.argv[2]))


class OtherOwner:
    """A worker in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._said: dict[str, list[dict[str, Any]]] = {}
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            said = json.loads(line)
            self._said.setdefault(said["name"], []).append(said)

    def tell(self, name: str, what: str, **more: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"name": name, "what": what, **more}).encode() + b"\n")

    async def heard(self, name: str, *keys: str) -> dict[str, Any]:
        """What it said, or says, of an operation with one of the keys."""
        found: dict[str, Any] = {}

        async def said() -> bool:
            assert self._process.returncode is None, "it has ended"
            found.update(next((one for one in self._said.get(name, []) if one.keys() & set(keys)), {}))
            return bool(found)

        await until(said, f"{keys} of {name}; it said {self._said.get(name)}", 30)
        return found

    def signal(self, number: signal.Signals) -> None:
        os.kill(self._process.pid, number)

    async def end(self) -> None:
        self.signal(signal.SIGCONT)
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), 20)
        finally:
            if self._process.returncode is None:
                self._process.kill()
                await self._process.wait()
            await self._reader


@asynccontextmanager
async def other_owner(dsn: str, host: str = "") -> AsyncIterator[OtherOwner]:
    """A worker in a process of its own; with `host`, whose liveness can't be seen from here, only its lease."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "import other_owners; other_owners.main()", dsn, host,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": f"{CHECKOUT}:{HERE}"},
    )  # fmt: skip
    owner = OtherOwner(process)
    try:
        await owner.heard("", "ready")
        yield owner
    finally:
        await owner.end()
