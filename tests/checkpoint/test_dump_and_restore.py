"""R1 and R2 across `pg_dump`: a dump of any moment goes on to the same result, and knows no claim of a later one."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import pytest
from campaigns import Figures, sized
from checkpoint_samples import REQUEST, head_of, segments_of, state

import ktrdr_async as kt
from ktrdr_async.checkpoint.schemas import CheckpointType
from ktrdr_async.checkpoint.service import CheckpointService
from ktrdr_async.errors import AlreadyClaimedError, OwnershipLostError
from ktrdr_async.operations.lifecycle import Beat, Claim, Owner, Status
from ktrdr_async.operations.service import OperationsService
from ktrdr_async.storage.database import Database
from ktrdr_async.storage.embedded import EmbeddedServer
from ktrdr_async.storage.places import installation

pytestmark = pytest.mark.anyio

EVERY_BLOCK = kt.CheckpointPolicy(100, max_overhead=None)
BARS = kt.Bars.read("synthetic:?bars=3000&seed=7&timeframe=1h")
REQUEST_ = kt.BacktestRequest(commission=0.00002, slippage=0.00005, seed=3)
DIGEST = "cd" * 32


class Gate:
    """Holds a strategy at a bar until it is opened."""

    def __init__(self, bar: int = -1) -> None:
        self.bar, self.reached, self.open = bar, asyncio.Event(), asyncio.Event()


class Count(msgspec.Struct):
    seen: int = 0
    streak: int = 0


class Held(kt.AsyncStrategy):
    """Trades by what it has counted, so that a lost or repeated bar changes the result."""

    resources = ("gate",)

    def __init__(self, gate: Any) -> None:
        self.gate = gate
        self.state = Count()

    async def on_bar(self, bar: kt.Bar) -> None:
        if bar.index == self.gate.bar:
            self.gate.reached.set()
            await self.gate.open.wait()
        self.state.seen += 1
        self.state.streak = self.state.streak + 1 if bar.rng.random() < 0.6 else 0
        if self.state.seen % 7 == 0:
            bar.target_weight(0, 0.9 if self.state.streak > 1 else -0.5, tag=f"s{self.state.streak % 3}")
            bar.record(streak=float(self.state.streak))


async def call(program: str, dsn: str, *arguments: str) -> None:
    """Runs one of PostgreSQL's own programs."""
    process = await asyncio.create_subprocess_exec(
        installation() / "bin" / program, "--dbname", dsn, *arguments, stderr=asyncio.subprocess.PIPE
    )  # fmt: skip
    _, said = await process.communicate()
    assert process.returncode == 0, said.decode()


async def dump(dsn: str, to: Path) -> Path:
    await call("pg_dump", dsn, "--format=custom", f"--file={to}")
    return to


@asynccontextmanager
async def restored(server: EmbeddedServer, file: Path) -> AsyncIterator[str]:
    """Another database, made from a dump; dropped afterwards."""
    where = server.administrator
    name = f"restored_{uuid.uuid4().hex[:12]}"
    admin = await asyncpg.connect(host=where.host, port=where.port, user=where.user, database=where.database, ssl=False)
    try:
        await admin.execute(f'CREATE DATABASE "{name}" OWNER ktrdr_async')
        dsn = f"postgresql://ktrdr_async@/{name}?host={where.host}&port={where.port}"
        await call("pg_restore", dsn, "--exit-on-error", "--single-transaction", str(file))
        yield dsn
        await admin.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
    finally:
        await admin.close()


@sized("dumps", ci=2, whole=25, minutes=15)
async def test_a_dump_of_a_running_operation_goes_on_to_the_same_result(
    dsn: str, embedded_server: EmbeddedServer, tmp_path: Path, campaign_seed: int, figures: Figures, dumps: int
) -> None:
    """The run saves at every block while it is dumped, and isn't disturbed by it."""
    clean = await kt.backtest(BARS, Held(Gate()), request=REQUEST_)
    chance = random.Random(campaign_seed)
    bars: list[int] = []
    for number in range(dumps):
        gate, name = Gate(chance.randrange(150, 2_900)), f"op-{number}"
        where = f"--seed {campaign_seed}, dump {number}"
        async with kt.BacktestWorker.open(dsn) as worker:
            going = worker.start(REQUEST_, name, bars=BARS, strategy=Held(gate), policy=EVERY_BLOCK, throttle=20_000)
            if number % 2 == 0:  # between two saves; else while it goes on saving
                await gate.reached.wait()
                file = await dump(dsn, tmp_path / f"{number}.dump")
                gate.open.set()
            else:
                gate.open.set()
                async for progress in going.progress():
                    if progress.checkpoint_bar is not None:
                        break
                file = await dump(dsn, tmp_path / f"{number}.dump")
            assert (await going.result()).digest == clean.digest, where
        async with restored(embedded_server, file) as other, kt.BacktestWorker.open(other) as worker:
            row = await worker.operations.get(name)
            if row.status is not Status.COMPLETED:
                assert row.status is Status.RUNNING, where
                assert row.checkpoint_bar is not None, where
                bars.append(row.checkpoint_bar)
            results = await worker.resume(name, bars=BARS, strategy=Held(Gate()), take_over=True)
            assert results.digest == clean.digest, where
            if row.checkpoint_bar is not None:
                assert results.run.resumed_from == [row.checkpoint_bar], where
            assert (await worker.operations.get(name)).status is Status.COMPLETED
        file.unlink()
    assert len(bars) > dumps // 3
    figures.add(
        "dumps of a running operation", f"{dumps}, {len(bars)} resumed where they were restored, 0 other results"
    )


async def test_an_epoch_that_is_issued_twice_is_told_apart_by_its_token(
    dsn: str, embedded_server: EmbeddedServer, tmp_path: Path
) -> None:
    """The database is restored from before a claim, and the operation claimed again: the epochs are the same."""
    me = Owner.this_process()
    async with Database.open(dsn) as database:
        operations = OperationsService(database)
        await operations.create("op", REQUEST)
        first = await operations.claim("op", owner=me)
        await CheckpointService(database, first).save_checkpoint("op", CheckpointType.PERIODIC, state(99, 5))
        file = await dump(dsn, tmp_path / "dump")
        late = await operations.claim("op", owner=me, take_over=True)
        assert late.epoch == 2
        service = CheckpointService(database, late)
        assert (await service.load_checkpoint("op")) is not None
        await service.save_checkpoint("op", CheckpointType.PERIODIC, state(199, 9, 5))

    async with restored(embedded_server, file) as other, Database.open(other) as database:
        operations = OperationsService(database)
        with pytest.raises(AlreadyClaimedError):  # the dump tells of an owner, who lives
            await operations.claim("op", owner=me)
        await nobody_writes(database, first, late, before_the_claim=True)
        mine = await operations.claim("op", owner=me, take_over=True)
        assert (mine.epoch, mine.token != late.token) == (late.epoch, True)
        await nobody_writes(database, first, late)
        service = CheckpointService(database, mine)
        found = await service.load_checkpoint("op")
        assert found is not None
        assert (found.bar_index, len(found.ledger)) == (99, 5)
        await service.save_checkpoint("op", CheckpointType.PERIODIC, state(149, 7, 5))
        await nobody_writes(database, first, late)
        assert await segments_of(database) == [(1, 0, 5), (2, 5, 7)]


async def nobody_writes(database: Database, first: Claim, late: Claim, *, before_the_claim: bool = False) -> None:
    """What its owners in the other database try here. The first one's claim is in the dump, and holds till the next."""
    before = await head_of(database), await segments_of(database)
    for claim in [late] if before_the_claim else [first, late]:
        for load in (False, True):
            service: Any = CheckpointService(database, claim)
            if load:
                await service.load_checkpoint("op")
            at = service.acknowledged.ledger
            with pytest.raises(OwnershipLostError):
                await service.save_checkpoint("op", CheckpointType.PERIODIC, state(900, at + 2, at))
            with pytest.raises(OwnershipLostError):
                await service.finish(Status.COMPLETED, state=state(900, at, at), result={}, result_digest=DIGEST)
            with pytest.raises(OwnershipLostError):
                await service.finish(Status.CANCELLED, state=None)
        async with database.connection() as connection:
            (answer,) = await OperationsService(database).heartbeat(connection, [Beat(claim)])
        assert answer.kind == "lost"
    assert (await head_of(database), await segments_of(database)) == before
    assert (await OperationsService(database).get("op")).status is Status.RUNNING
