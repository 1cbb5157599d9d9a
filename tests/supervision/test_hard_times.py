"""Servers and clocks that misbehave for a while: a typed error that says what to do, or recovery; nothing is lost."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest
from campaigns import Figures, sized
from supervision_kills import Marked, request_of, running
from supervision_runs import (
    EVERY_BLOCK,
    REQUEST,
    Gate,
    Held,
    held,
    held_digest,
    market,
    nothing_left,
    outside,
    resumed,
    row_held,
    standing,
    stored_request,
    until,
)
from test_pools import pooler

import ktrdr_async as kt
from ktrdr_async.operations.lifecycle import Owner
from ktrdr_async.supervision.worker import BacktestWorker

pytestmark = pytest.mark.anyio
CHECKOUT = Path(kt.__file__).parents[1]
ELSEWHERE = Owner("elsewhere", "boot", None, 7, 1.0)
TABLE = "ktrdr.operations"


@asynccontextmanager
async def database_with(dsn: str, *clauses: str) -> AsyncIterator[Any]:
    """What an administrator may set for a database, for the sessions that begin from now on. Gives one outside."""
    async with outside(dsn) as other:
        for clause in clauses:
            await other.execute(f"ALTER DATABASE {urlsplit(dsn).path[1:]} {clause}")
        yield other


async def cut_all(other: Any) -> None:
    """Ends every session of ours."""
    await other.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name <> 'test'"
    )


async def until_seen(other: Any, column: str, condition: str, times: int) -> None:
    """Waits until our sessions have shown so many different values under a condition."""
    seen: set[Any] = set()

    async def enough() -> bool:
        query = f"SELECT {column} FROM pg_stat_activity WHERE application_name <> 'test' AND {condition}"
        seen.update(row[0] for row in await other.fetch(f"{query} AND datname = current_database()"))
        return len(seen) >= times

    await until(enough, f"{times} of {column} where {condition}")


@pytest.mark.parametrize("limit", ["statement_timeout", "lock_timeout"])
async def test_a_row_that_is_held_for_longer_than_statements_may_take(dsn: str, limit: str) -> None:
    """Saves and the completion are made again; the run doesn't fail for what somebody else holds."""
    async with database_with(dsn, f"SET {limit} = '100ms'") as other, BacktestWorker.open(dsn) as worker:
        before = asyncio.all_tasks()
        handle, gate = await held(worker, policy=EVERY_BLOCK)
        async with row_held(dsn, "op"):
            gate.open.set()
            await until_seen(other, "query_start", "wait_event_type = 'Lock'", 4)
        assert (await handle.result()).digest == await held_digest()
        assert handle.statistics.checkpoints_failed == 0
        await nothing_left(worker, dsn, before)


async def test_sessions_that_are_ended_for_being_idle(dsn: str) -> None:
    idle = [f"SET {name} = '60ms'" for name in ("idle_session_timeout", "idle_in_transaction_session_timeout")]
    async with database_with(dsn, *idle), BacktestWorker.open(dsn) as worker:
        before = asyncio.all_tasks()
        options = {"bars": market(), "policy": EVERY_BLOCK, "throttle": 1_000}
        handles = [worker.start(REQUEST, f"op{n}", strategy=Held(Gate()), **options) for n in range(3)]
        for handle in handles:
            assert (await handle.result()).digest == await held_digest()
            assert handle.statistics.checkpoints_failed == 0
        await nothing_left(worker, dsn, before)


async def test_fewer_connections_than_are_wanted(dsn: str) -> None:
    async with database_with(dsn, "CONNECTION LIMIT 4") as other, BacktestWorker.open(dsn) as worker:
        before = asyncio.all_tasks()
        options = {"bars": market(), "policy": EVERY_BLOCK}
        handles = [worker.start(REQUEST, f"op{n}", strategy=Held(Gate()), **options) for n in range(10)]
        for handle in handles:
            assert (await handle.result()).digest == await held_digest()
        await other.execute(f"ALTER DATABASE {urlsplit(dsn).path[1:]} CONNECTION LIMIT -1")
        await nothing_left(worker, dsn, before)


async def test_no_connection_to_be_had(
    dsn: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing can begin, and what runs goes on when there are connections again."""
    monkeypatch.setattr("ktrdr_async.storage.database.OPEN_PATIENCE", 0.2)
    monkeypatch.setattr("ktrdr_async.operations.service.CALL_SECONDS", 2.0)
    async with outside(dsn) as other, BacktestWorker.open(dsn) as worker:
        before = asyncio.all_tasks()
        handle, gate = await held(worker, policy=EVERY_BLOCK)
        async with database_with(dsn, "CONNECTION LIMIT 1"):
            await cut_all(other)
            with pytest.raises(kt.DatabaseError, match="too many connections"):
                await BacktestWorker.open(dsn).__aenter__()
            with pytest.raises(kt.DatabaseError, match="too many connections"):
                await worker.run(REQUEST, "late", bars=market(), strategy=Held(Gate()))
            gate.open.set()

            async def refused() -> bool:
                return sum("too many connections" in line for line in caplog.messages) > 10

            await until(refused, "refused several times")
        await other.execute(f"ALTER DATABASE {urlsplit(dsn).path[1:]} CONNECTION LIMIT -1")
        assert (await handle.result()).digest == await held_digest()
        assert handle.statistics.checkpoints_failed == 0
        await worker.run(REQUEST, "late", bars=market(), strategy=Held(Gate()))
        await nothing_left(worker, dsn, before)


async def test_a_server_that_is_read_only_for_a_while(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a failover; sessions that began on what was the primary stay read-only, so others are made."""
    monkeypatch.setattr("ktrdr_async.operations.service.CALL_SECONDS", 2.0)
    async with outside(dsn) as other, BacktestWorker.open(dsn) as worker:
        before = asyncio.all_tasks()
        handle, gate = await held(worker, policy=EVERY_BLOCK)
        async with database_with(dsn, "SET default_transaction_read_only = on"):
            await cut_all(other)
            with pytest.raises(kt.DatabaseError, match="read-only transaction"):
                await worker.run(REQUEST, "late", bars=market(), strategy=Held(Gate()))
            assert standing(await worker.operations.get("op")) == ("running", "periodic", 299)
            gate.open.set()
            await until_seen(other, "pid", "query LIKE '%ktrdr%'", 5)
        await other.execute(f"ALTER DATABASE {urlsplit(dsn).path[1:]} RESET default_transaction_read_only")
        assert (await handle.result()).digest == await held_digest()
        assert handle.statistics.checkpoints_failed == 0
        await nothing_left(worker, dsn, before)


async def test_a_claim_that_lands_after_its_worker_has_given_up(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row says that this process runs it, and it doesn't; whoever asks here again goes on with it."""
    monkeypatch.setattr("ktrdr_async.operations.service.CALL_SECONDS", 0.5)
    async with BacktestWorker.open(dsn) as worker:
        before = asyncio.all_tasks()
        await worker.operations.create("op", await stored_request(Held(Gate())))
        async with row_held(dsn, "op") as until_blocked:
            run = asyncio.create_task(worker.run(REQUEST, "op", bars=market(), strategy=Held(Gate())))
            await until_blocked()
            with pytest.raises(kt.DatabaseError, match="didn't answer within"):
                await run

        async def landed() -> bool:
            return (await worker.operations.get("op")).status is kt.Status.RUNNING

        await until(landed, "the claim that was given up lands")
        await resumed(worker)
        await nothing_left(worker, dsn, before)


async def test_a_server_whose_clock_is_set_forward(dsn: str) -> None:
    """Its clock is only ever compared with times that it wrote: an hour on is the same as all of them an hour older.

    A living owner elsewhere seems to have lost its lease, and is taken over; it writes nothing any more.
    """
    async with BacktestWorker.open(dsn) as there, BacktestWorker.open(dsn) as here, outside(dsn) as other:
        before = asyncio.all_tasks()
        there.owner = ELSEWHERE
        handle, gate = await held(there, policy=EVERY_BLOCK)
        with pytest.raises(kt.AlreadyClaimedError, match="elsewhere"):
            await here.resume("op", bars=market(), strategy=Held(Gate()))

        async def taken_over() -> bool:
            await other.execute(f"UPDATE {TABLE} SET heartbeat_at = heartbeat_at - interval '1 hour'")
            try:
                await resumed(here)
            except kt.AlreadyClaimedError:  # it told of itself in between
                return False
            return True

        await until(taken_over, "its lease is over")
        gate.open.set()
        with pytest.raises(kt.OwnershipLostError):
            await handle.result()
        assert (await here.results("op", bars=market())).digest == await held_digest()
        await nothing_left(here, dsn, before)
        await nothing_left(there, dsn, before)


async def test_a_server_whose_clock_is_set_back(dsn: str) -> None:
    """The lease of an owner that is gone lasts until the clock has caught up, or a person decides."""
    async with BacktestWorker.open(dsn) as first:
        await held(first)
    async with BacktestWorker.open(dsn) as worker, outside(dsn) as other:
        before = asyncio.all_tasks()
        await worker.operations.claim("op", owner=ELSEWHERE)
        later = f"UPDATE {TABLE} SET heartbeat_at = heartbeat_at + interval '1 hour' WHERE operation_id = $1"
        await other.execute(later, "op")
        with pytest.raises(kt.AlreadyClaimedError, match="elsewhere"):
            await worker.resume("op", bars=market(), strategy=Held(Gate()))
        results = await worker.resume("op", bars=market(), strategy=Held(Gate()), take_over=True)
        assert results.digest == await held_digest()
        handle, gate = await held(worker, name="alive")
        await other.execute(later, "alive")
        assert worker.heart is not None

        async def renewed() -> bool:
            worker.heart.wake()  # type: ignore[union-attr]
            return bool(await other.fetchval(f"SELECT max(heartbeat_at) <= clock_timestamp() FROM {TABLE}"))

        await until(renewed, "its owner writes by the clock as it is now")
        gate.open.set()
        assert (await handle.result()).digest == await held_digest()
        await nothing_left(worker, dsn, before)


# Before a child's program: each look at the wall clock finds it ten years before or after where it was.
JUMPING = """
import time
real, ahead = time.time, [1]
def jumping():
    ahead[0] = -ahead[0]
    return real() + ahead[0] * 315_360_000
time.time = jumping
time.time_ns = lambda: int(jumping() * 1e9)
"""


@sized("kills", ci=1, whole=10, minutes=20)
async def test_a_wall_clock_that_jumps(
    dsn: str, tmp_path: Path, kills: int, campaign_seed: int, figures: Figures
) -> None:
    bars = 20_000
    chance = random.Random(campaign_seed)
    mark = tmp_path / "mark"
    for at in sorted(chance.randrange(500, bars) for _ in range(kills)):
        with running(dsn, bars, 40_000, mark, before=JUMPING) as child:
            await asyncio.to_thread(child.until, lambda child=child, at=at: child.bar >= at)
            child.kill()
    with running(dsn, bars, 40_000, mark, before=JUMPING) as child:
        assert await asyncio.to_thread(child.digest) == await marked_digest(bars)
    figures.add("kills of processes whose wall clock jumps by ten years at each look", f"{kills}; the same digest")


async def marked_digest(bars: int) -> str:
    return (await kt.backtest(None, Marked(), request=request_of(bars))).digest


# A transaction pooler.


@pytest.mark.campaign
@pytest.mark.timeout(1_200)
@pytest.mark.parametrize("kills", [10])
async def test_kills_behind_a_transaction_pooler(
    dsn: str, tmp_path: Path, kills: int, campaign_seed: int, figures: Figures
) -> None:
    bars = 20_000
    chance = random.Random(campaign_seed + 1)
    with pooler(dsn, tmp_path) as pooled:
        for at in sorted(chance.randrange(500, bars) for _ in range(kills)):
            with running(pooled, bars, 40_000, tmp_path / "mark") as child:
                await asyncio.to_thread(child.until, lambda child=child, at=at: child.bar >= at)
                child.kill()
        async with BacktestWorker.open(pooled, allow=("supervision_kills",), data_roots=()) as worker:
            results = await worker.resume("op")
            assert results.digest == await marked_digest(bars)
            assert 0 < len(results.run.resumed_from) <= kills
    figures.add("kill -9 behind a transaction pooler", f"{kills}, each gone on with; the same digest")


@sized("times", ci=1, whole=20, minutes=20)
async def test_a_transaction_pooler_that_drops_everybody(
    dsn: str, tmp_path: Path, times: int, campaign_seed: int, figures: Figures
) -> None:
    """In turn: the sessions behind it end; its `KILL` ends them and every client, and holds new ones until `RESUME`."""
    chance = random.Random(campaign_seed + 2)
    with pooler(dsn, tmp_path) as pooled:
        name = urlsplit(pooled).path[1:]
        async with BacktestWorker.open(pooled) as worker, outside(dsn) as other:
            before = asyncio.all_tasks()
            console = await asyncpg.connect(pooled.replace(f"/{name}", "/pgbouncer"), statement_cache_size=0)
            options = {"bars": market(), "policy": EVERY_BLOCK, "throttle": 2_000}
            for number in range(times):
                handle = worker.start(REQUEST, f"op{number}", strategy=Held(Gate()), **options)
                await handle.until_claimed()
                await asyncio.sleep(chance.random() / 2)
                if number % 2:
                    await console.execute(f"KILL {name}")
                    await console.execute(f"RESUME {name}")
                else:
                    await cut_all(other)
                assert (await handle.result()).digest == await held_digest()
                assert handle.statistics.checkpoints_failed == 0
            await console.close()
            await nothing_left(worker, dsn, before)
    figures.add("a transaction pooler that drops its sessions, or every client too", f"{times} times; the same digest")
