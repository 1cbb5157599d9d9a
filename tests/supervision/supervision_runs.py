"""Strategies that can be held at a bar, and what can be seen of a worker from outside; child processes use it too."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

import asyncpg
import msgspec

import ktrdr_async as kt
from ktrdr_async.supervision.jobs import Permissions, resolve
from ktrdr_async.supervision.worker import BacktestWorker, OperationHandle

HERE = Path(__file__).parent
MARKET = "synthetic:?bars=1000&seed=7&timeframe=1h"
REQUEST = kt.BacktestRequest(commission=0.00002, slippage=0.00005, seed=3)
EVERY_BLOCK = kt.CheckpointPolicy(100, max_overhead=None)
NEVER = kt.CheckpointPolicy(10**9, time_interval_seconds=1e9)


class Gate:
    """Holds a strategy at a bar, once, until it is opened."""

    def __init__(self, bar: int = -1) -> None:
        self.bar = bar
        self.reached = asyncio.Event()
        self.open = asyncio.Event()


class Count(msgspec.Struct):
    seen: int = 0
    streak: int = 0


class Held(kt.AsyncStrategy):
    """Trades by what it has counted, so that a lost or repeated bar changes the result."""

    resources = ("gate",)

    def __init__(self, gate: Any = None) -> None:
        self.gate = gate if isinstance(gate, Gate) else Gate()
        self.state = Count()

    async def on_bar(self, bar: kt.Bar) -> None:
        if bar.index == self.gate.bar and not self.gate.open.is_set():
            self.gate.reached.set()
            await self.gate.open.wait()
        self.state.seen += 1
        self.state.streak = self.state.streak + 1 if bar.rng.random() < 0.6 else 0
        if self.state.seen % 7 == 0:
            bar.target_weight(0, 0.9 if self.state.streak > 1 else -0.5, tag=f"s{self.state.streak % 3}")
        if self.state.seen % 50 == 0:
            bar.record(streak=float(self.state.streak))


class Counter(kt.Strategy):
    """As `Held`, without a gate, by itself."""

    def __init__(self, fail_at: int = -1) -> None:
        self.fail_at = fail_at
        self.state = Count()

    def on_bar(self, bar: kt.Bar) -> None:
        if bar.index == self.fail_at:
            raise ZeroDivisionError(f"at {bar.index}")
        self.state.seen += 1
        self.state.streak = self.state.streak + 1 if bar.close[0] > bar.open[0] else 0
        if self.state.seen % 7 == 0:
            bar.target_weight(0, 0.9 if self.state.streak > 1 else -0.5)


@cache
def market(reference: str = MARKET) -> kt.Bars:
    return kt.Bars.read(reference)


_digests: dict[str, str] = {}


async def digest_of(make: Callable[[], Any], key: str, bars: kt.Bars | None = None, **terms: Any) -> str:
    """The digest of a run that nothing interrupts."""
    if key not in _digests:
        results = await kt.backtest(market() if bars is None else bars, make(), request=REQUEST, **terms)
        _digests[key] = results.digest
    return _digests[key]


async def held_digest() -> str:
    return await digest_of(lambda: Held(Gate()), "held")


async def stored_request(strategy: Any) -> dict[str, Any]:
    """The request as it is stored where bars and strategy were handed over."""
    return (await resolve(REQUEST, market(), strategy, Permissions(trusted=True))).request.to_dict()


async def held(
    worker: BacktestWorker, bar: int = 345, policy: kt.CheckpointPolicy = NEVER, name: str = "op"
) -> tuple[OperationHandle, Gate]:
    """An operation that is held inside a block."""
    gate = Gate(bar)
    handle = worker.start(REQUEST, name, bars=market(), strategy=Held(gate), policy=policy)
    await gate.reached.wait()
    return handle, gate


async def resumed(worker: BacktestWorker, name: str = "op") -> kt.BacktestResults:
    """The result of going on, which is that of a run that nothing interrupted."""
    results = await worker.resume(name, bars=market(), strategy=Held(Gate()))
    assert results.digest == await held_digest()
    return results


async def until(condition: Callable[[], Awaitable[object]], what: str, seconds: float = 20.0) -> None:
    """Waits for something that another task or process brings about."""
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        await asyncio.sleep(0.005)


@asynccontextmanager
async def outside(dsn: str) -> AsyncIterator[Any]:
    """A connection that is none of ours."""
    connection = await asyncpg.connect(dsn, server_settings={"application_name": "test"})
    try:
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def row_held(dsn: str, operation_id: str) -> AsyncIterator[Callable[..., Awaitable[None]]]:
    """Holds an operation's row lock from outside; what is given waits until some write of ours waits for it."""
    async with outside(dsn) as holder, outside(dsn) as looker:
        transaction = holder.transaction()
        await transaction.start()
        await holder.execute("SELECT 1 FROM ktrdr.operations WHERE operation_id = $1 FOR UPDATE", operation_id)

        async def until_blocked(writes: int = 1) -> None:
            async def blocked() -> bool:
                waiting = await looker.fetchval(
                    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                    " AND wait_event_type = 'Lock' AND application_name <> 'test'"
                )
                return bool(waiting >= writes)

            await until(blocked, f"{writes} writes of {operation_id} wait for the lock")

        try:
            yield until_blocked
        finally:
            if not holder.is_closed():
                await transaction.rollback()


def whole(worker: BacktestWorker) -> bool:
    """Whether every connection is back in the pool."""
    pool = worker.database._pool
    return bool(pool.get_idle_size() == pool.get_size())


async def nothing_left(worker: BacktestWorker, dsn: str, before: set[asyncio.Task[Any]]) -> None:
    """No task, no transaction, no connection out, no claim of an operation, no debt."""

    async def gone() -> bool:
        return {task for task in asyncio.all_tasks() if not task.done()} <= before and whole(worker)

    await until(gone, "every task is over but the heart's, whose beat may be going on just now")
    assert not worker._running
    assert not worker._actors
    assert not worker.debts
    turns = worker._turns
    assert turns._holder is None
    assert not turns._queue
    async with outside(dsn) as looker:

        async def idle() -> bool:
            return not await looker.fetch(
                "SELECT pid, state, query FROM pg_stat_activity WHERE datname = current_database()"
                " AND application_name <> 'test' AND (xact_start IS NOT NULL OR state = 'active')"
            )

        await until(idle, "every transaction is over")  # the heart's own may be going on, and ends


def standing(row: kt.Operation) -> tuple[str, str | None, int | None]:
    """An operation's status and its checkpoint's type and bar."""
    return row.status.value, row.checkpoint_type, row.checkpoint_bar
