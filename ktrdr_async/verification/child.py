"""What runs in a child process: one leg, told by a file and telling in files. It may be told to kill itself."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ktrdr_async.backtesting.engine import BacktestingEngine
from ktrdr_async.backtesting.request import BacktestRequest
from ktrdr_async.checkpoint.schemas import BacktestCheckpointState
from ktrdr_async.market import Bars
from ktrdr_async.strategies.registry import make
from ktrdr_async.verification.legs import Ending, Leg, Snapshot, checkpoint_of, from_text, run_leg, to_text
from ktrdr_async.verification.strikes import Strike

FIELDS = ("open", "high", "low", "close", "volume")


class ChildJob(msgspec.Struct, kw_only=True):
    """One leg, in values that travel."""

    request: BacktestRequest
    strategy: str
    parameters: dict[str, Any]
    bars: str  # .npz
    symbols: tuple[str, ...]
    timeframe: int
    out: str  # what it tells: msgpack of `Told`
    block_bars: int
    state: str | None = None  # file of the checkpoint to go on from
    last: int | None = None  # stop at the first boundary there or later
    first: int = 0  # snapshots from this bar on are told
    kill_at: int | None = None  # `kill -9` of itself inside this bar
    checkpoint: str | None = None  # file for the checkpoint of the last boundary before that


class Told(msgspec.Struct):
    """What a child that came to an end tells."""

    snapshots: list[Snapshot]
    columns: dict[str, tuple[list[int], bytes]]  # shape, float64
    ending: Ending | None
    error: str
    error_bar: int


def main(job_file: str) -> None:
    """Does the job in a file."""
    job = msgspec.msgpack.decode(Path(job_file).read_bytes(), type=ChildJob)
    state = None if job.state is None else from_text(Path(job.state).read_text())
    told = asyncio.run(_run(job, state))
    Path(job.out).write_bytes(msgspec.msgpack.encode(told))


async def _run(job: ChildJob, state: BacktestCheckpointState | None) -> Told:
    with np.load(job.bars, allow_pickle=False) as stored:
        features = {name[2:]: stored[name] for name in stored.files if name.startswith("f:")}
        fields = [stored[name] for name in FIELDS]
        times = stored["timestamps"]
    bars = Bars(times, fields, symbols=job.symbols, timeframe=job.timeframe, features=features)
    snapshots: list[Snapshot] = []

    def keep(snapshot: Snapshot) -> bool:
        if snapshot.bar >= job.first:
            snapshots.append(snapshot)
        return False

    strategy = make(job.strategy, job.parameters, trusted=True)
    leg = Leg(request=job.request, bars=bars, block_bars=job.block_bars, state=state, last=job.last)
    if job.kill_at is not None:
        leg = msgspec.structs.replace(leg, strike=Strike(job.kill_at, "kill"))

    def save(engine: BacktestingEngine) -> None:
        # Only the last one before the end: what a kill leaves is the last checkpoint, whatever came before it.
        if job.kill_at is None or job.checkpoint is None:
            return
        if (engine.boundary.bar_index + 1) // job.block_bars == job.kill_at // job.block_bars:
            state = checkpoint_of(engine)
            if state is not None:
                Path(job.checkpoint).write_text(to_text(state))

    ran = await run_leg(leg, strategy, keep, at_boundary=save)
    columns = {name: (list(rows.shape), rows.astype("<f8").tobytes()) for name, rows in ran.columns.items()}
    return Told(snapshots, columns, ran.ending, ran.error, ran.error_bar)


def boot() -> str:
    """The Python that a child process begins with: the parent's modules are its own, and nothing else is looked at."""
    return f"import sys; sys.path[:] = sys.argv[2:]; from {__name__} import main; main(sys.argv[1])"


def path() -> list[str]:
    """Where this process looks for modules, in absolute terms."""
    return list(dict.fromkeys(os.path.abspath(entry) for entry in sys.path))
