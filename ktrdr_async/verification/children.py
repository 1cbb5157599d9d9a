"""Legs in fresh processes: with another order of hashes, with nothing that an earlier run left, or killed.

A child runs the engine alone and keeps its checkpoint in a file, not in a database: what a kill must not take away is
what the strategy knows, and that is the same in both. So no server is needed, the kill comes inside a chosen bar, and
the same seed kills in the same place.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from ktrdr_async.backtesting.provenance import identity_of
from ktrdr_async.checkpoint.schemas import BacktestCheckpointState
from ktrdr_async.errors import InputError
from ktrdr_async.strategies.registry import resolve
from ktrdr_async.supervision.shielding import finish, in_thread, until_done
from ktrdr_async.verification.certificate import VerificationError
from ktrdr_async.verification.child import FIELDS, ChildJob, Told, boot, path
from ktrdr_async.verification.legs import Leg, Ran, Snapshot, from_text, to_text

if TYPE_CHECKING:
    from ktrdr_async.market import Bars
    from ktrdr_async.strategies.base import AnyStrategy


def unmakeable(strategy: AnyStrategy) -> str | None:
    """Why another process can't make this strategy; None where it can."""
    kind, identity = type(strategy), identity_of(strategy)
    try:
        there = kind.__module__ != "__main__" and resolve(identity.name, trusted=True) is kind
    except InputError:
        there = False
    if not there:
        return f"{identity.name} can't be imported by another process; put the class at the top level of a module"
    try:
        msgspec.json.encode(dict(strategy._parameters))
    except TypeError as error:
        return f"a parameter of {identity.name} doesn't travel to another process: {error}"
    return None


class Children:
    """Starts child processes, one a leg, and ends them whatever happens.

    Args:
        directory: for files; the caller removes it.
        strategy: what they run is made as this one was.
        bars: what they run over.
    """

    def __init__(self, directory: str, strategy: AnyStrategy, bars: Bars) -> None:
        self._directory = Path(directory)
        self._strategy = strategy
        self._bars = bars
        self._count = 0
        self._stored: Path | None = None

    async def run(self, leg: Leg, *, hash_seed: int, first: int = 0) -> tuple[Ran, list[Snapshot]]:
        """A leg to its end. Returns how it ended, and the states of its boundaries from bar `first` on.

        Raises:
            VerificationError: if the process broke.
            CancelledError: if the caller was cancelled; the process is gone.
        """
        job = await self._job(leg, first)
        code, words = await self._process(job, hash_seed)
        if code != 0:
            raise VerificationError(f"a child process ended with {code}: {words}")
        data = await in_thread(Path(job.out).read_bytes)
        told = msgspec.msgpack.decode(data, type=Told)
        columns = {name: np.frombuffer(rows, "<f8").reshape(shape) for name, (shape, rows) in told.columns.items()}
        ran = Ran(columns=columns, ending=told.ending, error=told.error, error_bar=told.error_bar)
        return ran, told.snapshots

    async def kill(self, leg: Leg, *, hash_seed: int) -> BacktestCheckpointState | None:
        """A leg that ends by `kill -9` inside the bar that it is struck at. Returns the checkpoint that is left.

        Raises:
            VerificationError: if the process ended in another way.
            CancelledError: if the caller was cancelled; the process is gone.
        """
        job = await self._job(leg, 0)
        code, words = await self._process(job, hash_seed)
        if code != -signal.SIGKILL:
            raise VerificationError(f"a child process that was to be killed ended with {code}: {words}")
        text = await in_thread(lambda: _text_of(job.checkpoint))
        return leg.state if text is None else from_text(text)

    async def _job(self, leg: Leg, first: int) -> ChildJob:
        if self._stored is None:
            self._stored = await in_thread(self._store)
        self._count += 1
        place = self._directory / f"child-{self._count}"
        identity = identity_of(self._strategy)
        state = None
        if leg.state is not None:
            text, state = to_text(leg.state), f"{place}.state"
            await in_thread(lambda: Path(f"{place}.state").write_text(text))
        return ChildJob(
            request=leg.request,
            strategy=identity.name,
            parameters=identity.parameters,
            bars=str(self._stored),
            symbols=self._bars.symbols,
            timeframe=self._bars.timeframe,
            out=f"{place}.out",
            block_bars=leg.block_bars,
            state=state,
            last=leg.last,
            first=first,
            kill_at=None if leg.strike is None else leg.strike.bar,
            checkpoint=None if leg.strike is None else f"{place}.checkpoint",
        )

    def _store(self) -> Path:
        file = self._directory / "bars.npz"
        columns: dict[str, Any] = {name: getattr(self._bars, name) for name in ("timestamps", *FIELDS)}
        columns |= {f"f:{name}": column for name, column in self._bars.features.items()}
        np.savez(file, **columns)
        return file

    async def _process(self, job: ChildJob, hash_seed: int) -> tuple[int, str]:
        file = Path(f"{job.out}.job")
        data = msgspec.msgpack.encode(job)
        await in_thread(lambda: file.write_bytes(data))
        # However often this is cancelled, a process that was started is known, ended, and reaped.
        started = await finish(
            lambda: asyncio.create_subprocess_exec(
                sys.executable,
                *("-P", "-c", boot(), str(file), *path()),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                env=dict(os.environ) | {"PYTHONHASHSEED": str(hash_seed)},
                start_new_session=True,  # a Ctrl-C at the terminal is the parent's
            )
        )
        process = started.result
        if process is None:
            raise started.cancelled or VerificationError(f"a child process can't be started: {started.error}")
        try:
            if started.cancelled is not None:
                raise started.cancelled
            _, words = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await until_done(asyncio.ensure_future(process.wait()))
        lines = words.decode(errors="replace").strip().splitlines()
        return process.returncode or 0, " | ".join(lines[-3:])


def _text_of(file: str | None) -> str | None:
    return Path(file).read_text() if file is not None and os.path.exists(file) else None
