"""How the original design ran and saved, with our engine and our statements, so that only the design differs.

The engine ran in a thread with a loop of its own. A save went from there to the service's loop (`thread`), or was made
in a new thread with a new loop and a new connection (`thread_new_loop`); or it rewrote one growing row.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import asyncpg

import ktrdr_async as kt
from ktrdr_async.backtesting.checkpoint_builder import Since, build_backtest_checkpoint_state
from ktrdr_async.backtesting.engine import BacktestingEngine
from ktrdr_async.checkpoint.schemas import BacktestCheckpointState, CheckpointType
from ktrdr_async.checkpoint.writing import Delivery, build_save
from ktrdr_async.operations.lifecycle import Claim
from ktrdr_async.storage.database import Database

Save = Callable[[BacktestCheckpointState], None]


def since_of(service: kt.CheckpointService) -> Since:
    """How much of each growing field is saved."""
    at = service.acknowledged
    return Since(at.ledger, at.samples, at.recorded)


def state_of(engine: BacktestingEngine, service: kt.CheckpointService) -> BacktestCheckpointState:
    """The state at the engine's boundary, its growing fields from what the service has saved on."""
    at = engine.boundary.bar_index
    return build_backtest_checkpoint_state(engine, at, int(engine.bars.timestamps[at]), since=since_of(service))


class NewLoop:
    """Saves in a new thread, on a new loop, through a new connection."""

    def __init__(self, database: Database, service: kt.CheckpointService, claim: Claim, where: dict[str, Any]) -> None:
        self._database, self._service, self._claim, self._where = database, service, claim, where

    def __call__(self, state: BacktestCheckpointState) -> None:
        """Returns when it is durable."""
        failed: list[BaseException] = []

        def run() -> None:
            try:
                asyncio.run(self._save(state))
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        if failed:
            raise failed[0]

    async def _save(self, state: BacktestCheckpointState) -> None:
        connection = await asyncpg.connect(**self._where)
        try:
            write = await build_save(self._claim, self._service.acknowledged, state, CheckpointType.PERIODIC)
            await Delivery(self._database, self._claim, write).deliver(connection)
            self._service.acknowledged = write.after
        finally:
            await connection.close()


class ToLoop:
    """Saves on the service's loop, through its pool, while the engine's thread waits."""

    def __init__(self, service: kt.CheckpointService, claim: Claim, loop: asyncio.AbstractEventLoop) -> None:
        self._service, self._claim, self._loop = service, claim, loop

    def __call__(self, state: BacktestCheckpointState) -> None:
        """Returns when it is durable."""
        saving = self._service.save_checkpoint(self._claim.operation_id, CheckpointType.PERIODIC, state)
        asyncio.run_coroutine_threadsafe(saving, self._loop).result()


def run_in_thread(
    engine: BacktestingEngine,
    service: kt.CheckpointService,
    policy: kt.CheckpointPolicy,
    save: Save,
    stop: asyncio.Event,
) -> kt.BacktestResults | None:
    """The whole run, called in a thread: its own loop, and a save where the policy finds one due. None: stopped."""

    async def run() -> kt.BacktestResults | None:
        clock = asyncio.get_running_loop().time
        policy.start()
        async with aclosing(engine.run()) as blocks:
            async for block in blocks:
                if stop.is_set():
                    return None
                if policy.should_checkpoint(block.bar_index):
                    started = clock()
                    save(state_of(engine, service))
                    policy.record_checkpoint(block.bar_index, clock() - started)
        results = engine.results()
        _ = results.digest, results.metrics
        return results

    return asyncio.run(run())
