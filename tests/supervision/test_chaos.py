"""Everything at once: cancels of every kind, cut connections, held rows, pauses, other workers; seeded.

The campaign: pytest -m campaign tests/supervision/test_chaos.py -s
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from supervision_runs import EVERY_BLOCK, REQUEST, Counter, digest_of, market, nothing_left, outside, whole

import ktrdr_async as kt
from ktrdr_async.supervision.worker import BacktestWorker

pytestmark = pytest.mark.anyio
PASSING = (kt.CancellationError, kt.AlreadyClaimedError, kt.DatabaseError, kt.SaveTimeoutError, kt.OwnershipLostError)


class Chaos:
    """Operations that are gone on with until they are completed, and somebody who does all he can against it."""

    def __init__(self, workers: list[BacktestWorker], dsn: str, seed: int, operations: int, bars: kt.Bars) -> None:
        self.workers, self.dsn, self.bars = workers, dsn, bars
        self.chance = random.Random(seed)
        self.names = [f"op{number}" for number in range(operations)]
        self.callers: dict[str, asyncio.Task[Any]] = {}
        self.digests: dict[str, str] = {}
        self.counts: dict[str, int] = {}

    async def complete(self, name: str) -> None:
        """Runs an operation, as often as it takes."""
        while name not in self.digests:
            worker = self.chance.choice(self.workers)
            run = worker.run(REQUEST, name, bars=self.bars, strategy=Counter(), policy=EVERY_BLOCK, throttle=3_000)
            caller = self.callers[name] = asyncio.create_task(run)
            await asyncio.wait({caller})
            if caller.cancelled():
                self._count("cancelled")
            elif (error := caller.exception()) is None:
                self.digests[name] = caller.result().digest
            else:
                assert isinstance(error, PASSING), error
                self._count(type(error).__name__)
                await asyncio.sleep(0.02)

    def _count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    async def disturb(self, seconds: float) -> None:
        """Does something bad every few milliseconds; what was halted goes on at the end."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        async with outside(self.dsn) as other:
            while loop.time() < end and len(self.digests) < len(self.names):
                name, worker = self.chance.choice(self.names), self.chance.choice(self.workers)
                act = self.chance.choice([self._cancel, self._cut, self._hold, self._ask, self._halt, self._checkpoint])
                await act(other, name, worker)
                await asyncio.sleep(self.chance.random() * 0.02)
            await other.execute("UPDATE ktrdr.operations SET paused = false WHERE status <> 'completed'")

    async def _cancel(self, other: Any, name: str, worker: BacktestWorker) -> None:
        if (caller := self.callers.get(name)) is not None:
            for _ in range(self.chance.randrange(1, 4)):
                caller.cancel()
                for _ in range(self.chance.randrange(3)):
                    await asyncio.sleep(0)

    async def _cut(self, other: Any, name: str, worker: BacktestWorker) -> None:
        await other.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
            " AND backend_type = 'client backend' AND application_name <> 'test'"
            " ORDER BY md5(pid::text || $1) LIMIT 1",
            str(self.chance.random()),
        )

    async def _hold(self, other: Any, name: str, worker: BacktestWorker) -> None:
        async with other.transaction():
            await other.execute("SELECT 1 FROM ktrdr.operations WHERE operation_id = $1 FOR UPDATE", name)
            await asyncio.sleep(self.chance.random() * 0.05)

    async def _ask(self, other: Any, name: str, worker: BacktestWorker) -> None:
        try:
            await worker.operations.cancel(name)
        except (kt.OperationError, kt.DatabaseError):
            self._count("a cancel that came too late")

    async def _halt(self, other: Any, name: str, worker: BacktestWorker) -> None:
        if (handle := worker.handle(name)) is not None:
            handle.pause()
            await asyncio.sleep(self.chance.random() * 0.02)
            handle.go_on()

    async def _checkpoint(self, other: Any, name: str, worker: BacktestWorker) -> None:
        if (handle := worker.handle(name)) is not None:
            try:
                await asyncio.wait_for(handle.checkpoint(), 0.05)
            except (TimeoutError, kt.KtrdrError):
                self._count("a checkpoint that wasn't")


async def survived(dsn: str, seed: int, operations: int, seconds: float, length: int) -> dict[str, int]:
    """All of it completes with the digest of a run that nothing disturbed, and leaves nothing behind."""
    bars = market(f"synthetic:?bars={length}&seed=7&timeframe=1h")
    clean = await digest_of(Counter, f"counter{length}", bars)
    async with BacktestWorker.open(dsn) as worker, BacktestWorker.open(dsn) as second:
        before = asyncio.all_tasks()
        chaos = Chaos([worker, second], dsn, seed, operations, bars)
        running = [asyncio.create_task(chaos.complete(name)) for name in chaos.names]
        await chaos.disturb(seconds)
        await asyncio.gather(*running)
        assert set(chaos.digests.values()) == {clean}
        await nothing_left(worker, dsn, before)
        await nothing_left(second, dsn, before)
    async with BacktestWorker.open(dsn) as looker:
        for name in chaos.names:
            results = await looker.results(name, bars=bars)
            assert results.digest == clean
        assert whole(looker)
    return chaos.counts


async def test_nothing_of_what_people_and_servers_do_changes_a_result(dsn: str) -> None:
    await survived(dsn, seed=1, operations=8, seconds=5.0, length=5_000)


@pytest.mark.campaign
@pytest.mark.timeout(1_800)
@pytest.mark.parametrize("seed", range(10, 30))
async def test_campaign_of_chaos(dsn: str, seed: int) -> None:
    counts = await survived(dsn, seed, operations=15, seconds=20.0, length=30_000)
    print(f"seed {seed}: {counts}")
