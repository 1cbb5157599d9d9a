"""A process that runs one operation until it is done or killed, and what its killer sees of it."""

from __future__ import annotations

import asyncio
import logging
import mmap
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

import ktrdr_async as kt
from ktrdr_async.storage.embedded import EmbeddedServer
from ktrdr_async.supervision.worker import BacktestWorker

MARK_VARIABLE = "SUPERVISION_KILLS_MARK"
INTERVAL = 500  # bars between two checkpoints: what a kill may cost
HERE = Path(__file__).parent
CHECKOUT = Path(kt.__file__).parents[1]


class Level(msgspec.Struct):
    seen: int = 0
    level: float = 0.0


class Marked(kt.Strategy):
    """Trades by what it counted, and writes each bar down where a `kill -9` doesn't reach it."""

    resources = ("mark",)

    def __init__(self) -> None:
        self.state = Level()
        name = os.environ.get(MARK_VARIABLE)
        self.mark = mmap.mmap(os.open(name, os.O_RDWR), 16) if name else bytearray(16)

    def on_bar(self, bar: kt.Bar) -> None:
        struct.pack_into("<q", self.mark, 0, bar.index)
        self.state.seen += 1
        self.state.level = 0.9 * self.state.level + 0.1 * (bar.close[0] - bar.open[0]) + 1e-9 * bar.rng.random()
        if self.state.seen % 5 == 0:
            bar.target_weight(0, 0.8 if self.state.level > 0 else -0.4)
        if self.state.seen % 100 == 0:
            bar.record(level=self.state.level)


def request_of(bars: int) -> kt.BacktestRequest:
    return kt.BacktestRequest(
        data=f"synthetic:?bars={bars}&seed=11&timeframe=1h", strategy="supervision_kills:Marked", commission=0.00002,
        slippage=0.00005, seed=5,
    )  # fmt: skip


async def _run(dsn: str | None, bars: int, throttle: float) -> None:
    async with BacktestWorker.open(dsn or None, allow=("supervision_kills",)) as worker:
        results = await worker.run(
            request_of(bars), "op", policy=kt.CheckpointPolicy(INTERVAL, max_overhead=None), throttle=throttle
        )
        print(results.digest, flush=True)


def main() -> None:
    """What the child does."""
    logging.basicConfig(level=logging.ERROR)
    asyncio.run(_run(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))


class Runner:
    """The child, as its killer has it."""

    def __init__(self, process: subprocess.Popen[str], mark: mmap.mmap) -> None:
        self.process, self._mark = process, mark

    @property
    def bar(self) -> int:
        """The bar that it computes, or computed last."""
        return int(struct.unpack_from("<q", self._mark, 0)[0])

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def until(self, condition: Callable[[], bool], seconds: float = 60.0) -> bool:
        """Waits until the condition holds, or the child has ended; whether it holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            if not self.running:
                return False
            assert time.monotonic() < deadline, f"at bar {self.bar} for {seconds} s"
            time.sleep(0.0002)
        return True

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(20)

    def digest(self) -> str:
        """The digest that it printed at its end."""
        said, _ = self.process.communicate(timeout=100)
        assert self.process.returncode == 0, f"it exited with {self.process.returncode}"
        return said.strip()


@contextmanager
def running(
    dsn: str, bars: int, throttle: float, mark: Path, home: Path | None = None, *, before: str = ""
) -> Iterator[Runner]:
    """A child that runs the operation, or goes on with it; killed at the end if it still runs.

    `before`: a program that it runs first.
    """
    mark.write_bytes(struct.pack("<qq", -1, 0))
    environment = {**os.environ, "PYTHONPATH": f"{CHECKOUT}:{HERE}", MARK_VARIABLE: str(mark)}
    if home is not None:
        environment["KTRDR_ASYNC_HOME"] = str(home)
    program = f"{before}\nimport supervision_kills\nsupervision_kills.main()"
    with (
        mark.open("r+b") as file,
        mmap.mmap(file.fileno(), 16) as mapped,
        subprocess.Popen(
            [sys.executable, "-c", program, dsn, str(bars), str(throttle)],
            stdout=subprocess.PIPE, text=True, env=environment,
        ) as process,
    ):  # fmt: skip
        try:
            yield Runner(process, mapped)
        finally:
            if process.poll() is None:
                process.kill()


def postmaster(home: Path) -> int | None:
    """The pid of the home's server, if it runs."""
    try:
        pid = int((EmbeddedServer(home).root / "data" / "postmaster.pid").read_text().splitlines()[0])
        os.kill(pid, 0)
    except (OSError, ValueError, IndexError):
        return None
    return pid


def kill_server(home: Path) -> bool:
    """`kill -9` of the server; whether there was one."""
    pid = postmaster(home)
    if pid is None:
        return False
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True
