"""What a process of another environment does: digests of runs, checkpoints made and resumed, bits of functions.

Other Pythons run it, which have the package and its dependencies alone: nothing of pytest here.
"""

from __future__ import annotations

import asyncio
import functools
import json
import math
import sys
import uuid
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd

import ktrdr_async as kt
from ktrdr_async.checkpoint.manifest import environment
from ktrdr_async.checkpoint.schemas import CheckpointType
from ktrdr_async.market.synthetic import synthetic
from ktrdr_async.operations.lifecycle import Owner
from ktrdr_async.operations.service import OperationsService
from ktrdr_async.storage.database import Database
from ktrdr_async.strategies import AnyStrategy, registry

BARS = 600
LEFT_AT = 299  # the bar of a yield
REQUEST = kt.BacktestRequest(initial_capital=50_000.0, seed=3)
PARAMETERS: dict[str, dict[str, Any]] = {
    "sma_cross": {"fast": 5, "slow": 20, "short": True},
    "buy_and_hold": {},
    "rsi_reversion": {"period": 7, "short": True},
    "donchian_breakout": {"entry": 10, "exit": 5, "short": True},
    "momentum_rotation": {"lookback": 30, "top": 2, "every": 5},
    "signals": {},  # and its file
    "async_reversion": {"period": 10, "entry": 1.0},
}


@functools.cache
def market() -> kt.Bars:
    """Three symbols; one starts late, has gaps and stops early."""
    made = synthetic(BARS, seed=4, symbols=("A", "B", "C"))
    fields = [np.array(getattr(made, name)) for name in ("open", "high", "low", "close", "volume")]
    gone = np.zeros(BARS, dtype=np.bool_)
    gone[:40] = gone[200:230] = gone[BARS - 20 :] = gone[::17] = True
    for values in fields:
        values[gone, 1] = np.nan
    return kt.Bars.from_arrays(made.timestamps, *fields, symbols=made.symbols)


def write_signals(path: Path) -> None:
    """Weights for the market above, longs and shorts, a row every third bar."""
    times = [str(np.datetime64(int(t), "ns").astype("datetime64[s]")) for t in market().timestamps]
    lines = [f"{times[at]},{(at % 7 - 3) / 10},{(at % 5 - 2) / 10},{(at % 3 - 1) / 10}" for at in range(60, BARS, 3)]
    path.write_text("\n".join(["time,A,B,C", *lines]) + "\n", encoding="utf-8")


class Level(msgspec.Struct):
    level: float = 0.0


class Numeric(kt.Strategy):
    """A user's: what it decides hangs on the last bit of functions that differ between environments."""

    resources = ("wide",)

    def __init__(self) -> None:
        self.state = Level()
        self.wide = np.sin(np.arange(1500 * 500, dtype=np.float64) / 7.0).reshape(1500, 500)

    def on_bar(self, bar: kt.Bar) -> None:
        if bar.index < 64 or bar.index % 5:
            return
        last = bar.past.close[-64:, 0]
        moves = np.diff(np.log(last))
        pairs = np.stack([moves[:-1], moves[1:]], axis=1)
        found = {
            "exp": float(np.exp(moves).max() + np.tanh(moves).min() + np.power(last, 1.7).max()),
            "dot": float(moves @ last[1:] + (pairs.T @ pairs)[0, 1] + np.corrcoef(pairs.T)[0, 1]),
            "sum": sum(last.tolist()) + math.exp(last[-1] / 100.0) + math.pow(last[-1], 1.3) + math.sin(last[0]),
            "pandas": float(pd.Series(moves).skew() + pd.Series(moves).rolling(20).skew().iloc[-1]),
            "threads": float((self.wide.T @ self.wide)[3, 5]) if bar.index % 100 == 0 else 0.0,
        }
        bar.record(**found)
        bits = sum(int(np.float64(value).view(np.int64)) % 1009 for value in found.values())
        self.state.level = bits % 1009 / 1009
        bar.target_weight(0, self.state.level - 0.5)


def make(name: str, signals: str) -> AnyStrategy:
    """A fresh strategy: a built-in by its name, or the user's."""
    if name == "numeric":
        return Numeric()
    return registry.make(name, PARAMETERS[name] | ({"file": signals} if name == "signals" else {}))


def engine_of(name: str, signals: str, block_bars: int = 100) -> kt.BacktestingEngine:
    return kt.BacktestingEngine(REQUEST, market(), make(name, signals), block_bars=block_bars)


async def left(engine: kt.BacktestingEngine) -> kt.BacktestCheckpointState:
    """The checkpoint of an engine that is left at `LEFT_AT`."""
    async with aclosing(engine.run()) as blocks:
        async for block in blocks:
            if block.bar_index == LEFT_AT:
                break
    return kt.build_backtest_checkpoint_state(engine, LEFT_AT, int(engine.bars.timestamps[LEFT_AT]))


async def finish(engine: kt.BacktestingEngine, state: kt.BacktestCheckpointState | None = None) -> str:
    async with aclosing(engine.run(state)) as blocks:
        async for _ in blocks:
            pass
    results = engine.results()
    assert results.audit().ok
    assert results.ledger
    return results.digest


async def with_checkpoints(database: Database, name: str, signals: str, block_bars: int) -> str:
    """A run that is saved about ten times, left at its middle, and goes on from what PostgreSQL gives back."""
    operation = uuid.uuid4().hex
    operations = OperationsService(database)
    await operations.create(operation, REQUEST.to_dict())
    service = kt.CheckpointService(database, await operations.claim(operation, owner=Owner.this_process()))
    every = max(1, BARS // block_bars // 10)
    engine, saved = engine_of(name, signals, block_bars), 0
    async with aclosing(engine.run()) as blocks:
        async for block in blocks:
            if block.bar_index // block_bars % every:
                continue
            state = kt.build_backtest_checkpoint_state(engine, block.bar_index, block.timestamp)
            await service.save_checkpoint(operation, CheckpointType.PERIODIC, state)
            saved += 1
            if block.bar_index > BARS // 2:
                break
    assert saved
    return await finish(engine_of(name, signals, block_bars), await service.load_checkpoint(operation))


async def digests(signals: str, blocks: list[int], dsn: str | None) -> dict[str, list[str]]:
    """Every digest that each built-in comes to: with each size of blocks, without checkpoints and with them."""
    found: dict[str, set[str]] = {name: set() for name in PARAMETERS}
    for name, of_name in found.items():
        for size in blocks:
            of_name.add(await finish(engine_of(name, signals, size)))
    if dsn is not None:
        async with Database.open(dsn) as database:
            for name, of_name in found.items():
                for size in blocks:
                    of_name.add(await with_checkpoints(database, name, signals, size))
    return {name: sorted(of_name) for name, of_name in found.items()}


class CancelAt(kt.CheckpointPolicy):
    """Cancels the operation's task at a yield, and has it saved there: the save is where the cancellation is heard."""

    def __init__(self, bar: int) -> None:
        super().__init__(10**9, time_interval_seconds=1e9)
        self.bar = bar

    def should_checkpoint(self, bar_index: int, force: bool = False) -> bool:
        task = asyncio.current_task()
        if bar_index != self.bar or task is None:
            return False
        task.cancel()
        return True


def write(path: Path, state: kt.BacktestCheckpointState) -> None:
    path.write_text(json.dumps(state.to_dict(), allow_nan=False), encoding="utf-8")


def read(path: Path) -> kt.BacktestCheckpointState:
    return kt.BacktestCheckpointState.from_dict(json.loads(path.read_text(encoding="utf-8")))


async def leave(names: list[str], signals: str, folder: str, dsn: str | None, key: str) -> dict[str, str]:
    """Leaves each run at `LEFT_AT`, in a file and in PostgreSQL. Returns what they come to uninterrupted."""
    for name in names:
        write(Path(folder, f"{key}-{name}.json"), await left(engine_of(name, signals)))
    if dsn is not None:
        async with kt.BacktestWorker.open(dsn) as worker:
            for name in names:
                run = worker.run(
                    REQUEST, f"{key}-{name}", bars=market(), strategy=make(name, signals), policy=CancelAt(LEFT_AT)
                )
                (ended,) = await asyncio.gather(run, return_exceptions=True)
                assert isinstance(ended, kt.CancellationError), ended
    return {name: await finish(engine_of(name, signals)) for name in names}


async def resume(names: list[str], signals: str, folder: str, dsn: str | None, key: str) -> dict[str, list[Any]]:
    """Goes on with what another environment has left; a digest each, or the names of the differences it stumbled at."""
    found: dict[str, list[Any]] = {name: [] for name in names}
    for name in names:
        try:
            found[name].append(await finish(engine_of(name, signals), read(Path(folder, f"{key}-{name}.json"))))
        except kt.CheckpointMismatchError as error:
            found[name].append(sorted(error.differences))
    if dsn is not None:
        async with kt.BacktestWorker.open(dsn) as worker:
            for name in names:
                try:
                    results = await worker.resume(f"{key}-{name}", bars=market(), strategy=make(name, signals))
                    assert results.run.resumed_from == [LEFT_AT], (name, results.run)
                    found[name].append(results.digest)
                except kt.CheckpointMismatchError as error:
                    found[name].append(sorted(error.differences))
    return found


VERBS: dict[str, Callable[..., Any]] = {"digests": digests, "leave": leave, "resume": resume}


def main() -> None:
    """What the process does: the verbs of a job, one after the other; prints what came out as JSON."""
    found: dict[str, Any] = {verb: asyncio.run(VERBS[verb](**given)) for verb, given in json.loads(sys.argv[1]).items()}
    print(json.dumps(found | {"environment": dict(environment()), "package": kt.__file__}))
