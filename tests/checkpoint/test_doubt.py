"""What was sent and not answered: lost commits, deadlines, cancellations, late copies. Real PostgreSQL, a proxy."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from checkpoint_samples import (
    DIGEST,
    claimed,
    cutting_proxy,
    head_of,
    segments_of,
    state,
    until,
    until_idle,
    waiting_on_a_lock,
)

from ktrdr_async.checkpoint.schemas import CheckpointType
from ktrdr_async.checkpoint.service import CheckpointService
from ktrdr_async.errors import (
    CheckpointConflictError,
    InvalidTransitionError,
    OwnershipLostError,
    SaveTimeoutError,
)
from ktrdr_async.operations.lifecycle import Claim, Owner, Status
from ktrdr_async.operations.service import OperationsService
from ktrdr_async.storage.database import Database

pytestmark = pytest.mark.anyio
PERIODIC = CheckpointType.PERIODIC


@asynccontextmanager
async def stopped_backends(database: Database, watcher: Database) -> AsyncIterator[None]:
    """Every server process of this database's own connections stands still (SIGSTOP)."""
    async with database.connection() as connection, watcher.connection() as other:
        mine = {connection.get_server_pid()}
        theirs = {other.get_server_pid()}
    async with watcher.connection() as other:
        rows = await other.fetch("SELECT pid FROM pg_stat_activity WHERE datname = current_database()")
        theirs.add(other.get_server_pid())
    pids = (mine | {row["pid"] for row in rows}) - theirs
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


async def test_a_commit_whose_reply_is_lost_is_found_and_not_repeated(dsn: str) -> None:
    async with cutting_proxy(dsn) as (proxy, database):
        _, _, service = await claimed(database)
        for bar, upto in ((99, 6), (199, 8)):  # the first save's statement and the later ones'
            proxy.armed = "reply"
            receipt = await service.save_checkpoint("op", PERIODIC, state(bar, upto))
            assert proxy.armed is None
            assert receipt.revision == service.acknowledged.revision
            assert await head_of(database) == (receipt.revision, "periodic", bar)
            assert proxy.guarded == receipt.revision  # looked for, and not sent again
        assert await segments_of(database) == [(1, 0, 6), (2, 6, 8)]


async def test_a_statement_that_never_arrived_is_sent_again(dsn: str) -> None:
    async with cutting_proxy(dsn) as (proxy, database):
        _, _, service = await claimed(database)
        for bar, upto in ((99, 6), (199, 8)):
            proxy.armed = "request"
            await service.save_checkpoint("op", PERIODIC, state(bar, upto))
            assert proxy.armed is None
        assert await head_of(database) == (2, "periodic", 199)
        assert await segments_of(database) == [(1, 0, 6), (2, 6, 8)]


async def test_a_late_copy_of_a_save_that_was_sent_again_writes_nothing(dsn: str) -> None:
    async with cutting_proxy(dsn) as (proxy, database):
        _, _, service = await claimed(database)
        for bar, upto in ((99, 6), (199, 8)):
            proxy.armed = "late"
            await service.save_checkpoint("op", PERIODIC, state(bar, upto))
            before = await head_of(database)
            assert proxy.held == 1
            await proxy.release()
            assert await head_of(database) == before == (service.acknowledged.revision, "periodic", bar)
        await service.save_checkpoint("op", PERIODIC, state(299, 9, since=8))
        assert await segments_of(database) == [(1, 0, 6), (2, 6, 8), (3, 8, 9)]


async def test_a_late_copy_that_lands_between_look_and_resend_is_a_success(dsn: str) -> None:
    """The resent bytes meet their own earlier copy: a key conflict, or own = 1 with head = 0. Neither is an error."""
    async with Database.open(dsn) as plain, cutting_proxy(dsn) as (proxy, database):
        _, claim, service = await claimed(database)
        for bar, upto in ((99, 6), (199, 8)):
            proxy.armed = "late"
            # The look of the retry waits for this lock; what it finds then is that nothing has landed.
            async with plain.connection() as holder, holder.transaction(isolation="read_committed"):
                await holder.execute("SELECT 1 FROM ktrdr.operations FOR UPDATE")
                save = asyncio.create_task(service.save_checkpoint("op", PERIODIC, state(bar, upto)))
                async with plain.connection() as watcher:
                    await waiting_on_a_lock(watcher)
                    late = asyncio.create_task(proxy.release())
                    await waiting_on_a_lock(watcher, 2)
            await late
            await save
            assert await head_of(database) == (service.acknowledged.revision, "periodic", bar)
        assert await segments_of(database) == [(1, 0, 6), (2, 6, 8)]
        assert not service.in_doubt
        assert claim.epoch == 1


async def test_a_save_in_doubt_is_resolved_before_the_next_is_built(dsn: str) -> None:
    """The naive "on conflict do nothing" left a head at bar 110 over a segment of bar 100."""
    for what in ("reply", "request"):
        async with cutting_proxy(dsn) as (proxy, database):
            _, _, service = await claimed(database, what)
            await service.save_checkpoint(what, PERIODIC, state(99, 6))
            proxy.armed = what
            saving = asyncio.create_task(service.save_checkpoint(what, PERIODIC, state(100, 8, since=6)))
            await until(lambda: not proxy.armed)
            saving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await saving
            assert service.in_doubt
            assert service.acknowledged.revision == 1
            receipt = await service.save_checkpoint(what, PERIODIC, state(110, 9, since=6))
            assert receipt.revision == 3  # bar 100's own save stands between
            assert await head_of(database, what) == (3, "periodic", 110)
            assert await segments_of(database, what) == [(1, 0, 6), (2, 6, 8), (3, 8, 9)]
            loaded = await CheckpointService(database).load_checkpoint(what)
            assert loaded is not None
            assert len(loaded.ledger) == 9


async def test_the_head_is_read_after_the_wait_for_the_lock(database: Database) -> None:
    """Lock and read in one statement read from before the wait: the save would be taken for lost, and sent again."""
    _, _, service = await claimed(database)
    await service.save_checkpoint("op", PERIODIC, state(99, 6))
    async with database.connection() as watcher, database.connection() as holder:
        # Holds up the server's statement before its end, and so its answer; the fence's lock is already taken then.
        await holder.execute("BEGIN ISOLATION LEVEL READ COMMITTED")
        await holder.execute("SELECT 1 FROM ktrdr.operation_checkpoints FOR UPDATE")
        saving = asyncio.create_task(service.save_checkpoint("op", PERIODIC, state(199, 8, since=6)))
        await waiting_on_a_lock(watcher)
        saving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await saving
        assert service.in_doubt
        assert service._undecided is not None
        async with database.connection() as connection:
            looking = asyncio.create_task(service._undecided.look(connection))
            await waiting_on_a_lock(watcher, 2)
            await holder.execute("ROLLBACK")
            assert await looking is True
    await service.resolve()
    assert service.acknowledged.revision == 2
    assert await head_of(database) == (2, "periodic", 199)
    assert await segments_of(database) == [(1, 0, 6), (2, 6, 8)]


async def test_a_save_in_doubt_whose_owner_changed_says_so(dsn: str) -> None:
    async with cutting_proxy(dsn) as (proxy, database):
        operations, _, service = await claimed(database)
        proxy.armed = "request"
        saving = asyncio.create_task(service.save_checkpoint("op", PERIODIC, state(99, 6)))
        await until(lambda: not proxy.armed)
        saving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await saving
        await operations.claim("op", owner=Owner.this_process(), take_over=True)
        with pytest.raises(OwnershipLostError):
            await service.resolve()
        assert not service.in_doubt
        assert await head_of(database) is None


async def test_a_save_in_doubt_over_another_head_is_a_conflict(dsn: str) -> None:
    async with cutting_proxy(dsn) as (proxy, database):
        _, claim, service = await claimed(database)
        proxy.armed = "request"
        saving = asyncio.create_task(service.save_checkpoint("op", PERIODIC, state(99, 6)))
        await until(lambda: not proxy.armed)
        saving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await saving
        await CheckpointService(database, claim).save_checkpoint("op", PERIODIC, state(50, 3))
        with pytest.raises(CheckpointConflictError):
            await service.resolve()
        assert await head_of(database) == (1, "periodic", 50)


@pytest.mark.parametrize("cut", ["reply", "request", "late"])
@pytest.mark.parametrize("status", [Status.COMPLETED, Status.FAILED, Status.CANCELLED, Status.INTERRUPTED])
async def test_an_ending_whose_answer_is_lost_happens_once(dsn: str, status: Status, cut: str) -> None:
    async with cutting_proxy(dsn) as (proxy, database):
        operations, _, service = await claimed(database)
        await service.save_checkpoint("op", PERIODIC, state(99, 6))
        proxy.armed = cut
        await service.finish(
            status,
            state=state(199, 8, since=6),
            result={"a": 1} if status is Status.COMPLETED else None,
            result_digest=DIGEST if status is Status.COMPLETED else None,
            error={"message": "x"} if status is Status.FAILED else None,
        )
        assert proxy.armed is None
        assert (await operations.get("op")).status is status
        await proxy.release()
        assert (await operations.get("op")).status is status
        assert await segments_of(database) == [(1, 0, 6), (2, 6, 8)]


async def test_an_ending_in_doubt_that_landed_is_success_to_the_same_and_refused_to_another(dsn: str) -> None:
    async with cutting_proxy(dsn) as (proxy, database):
        _, _, service = await claimed(database)
        proxy.armed = "reply"
        ending = {"state": state(99, 6), "result": {"a": 1}, "result_digest": DIGEST}
        finishing = asyncio.create_task(service.finish(Status.COMPLETED, **ending))
        await until(lambda: not proxy.armed)
        finishing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await finishing
        await until_idle(database)
        assert service.in_doubt
        await service.finish(Status.COMPLETED, **ending)
        with pytest.raises(InvalidTransitionError):
            await service.finish(Status.COMPLETED, **(ending | {"result_digest": "cd" * 32}))
        with pytest.raises(InvalidTransitionError):
            await service.finish(Status.FAILED, state=None, error={"message": "x"})


async def test_deadline_on_a_stopped_server(dsn: str) -> None:
    async with Database.open(dsn) as watcher, Database.open(dsn) as database:
        _, _, service = await claimed(database)
        await service.save_checkpoint("op", PERIODIC, state(99, 6))
        started = time.monotonic()
        async with stopped_backends(database, watcher):
            with pytest.raises(SaveTimeoutError, match="revision 2"):
                await service.save_checkpoint("op", PERIODIC, state(199, 8, since=6), deadline=0.5)
            assert time.monotonic() - started < 5
            assert service.in_doubt
            # The stopped process still has the statement in its socket; the same bytes go through another one first.
            await service.resolve()
            assert service.acknowledged.revision == 2
        await until_idle(watcher)
        assert await head_of(database) == (2, "periodic", 199)
        await service.save_checkpoint("op", PERIODIC, state(299, 9, since=8))
        assert await segments_of(database) == [(1, 0, 6), (2, 6, 8), (3, 8, 9)]


async def test_deadline_of_an_ending_on_a_stopped_server(dsn: str) -> None:
    async with Database.open(dsn) as watcher, Database.open(dsn) as database:
        _, _, service = await claimed(database)
        async with stopped_backends(database, watcher):
            started = time.monotonic()
            with pytest.raises(SaveTimeoutError):
                await service.finish(Status.CANCELLED, state=state(99, 6), deadline=0.3)
            assert time.monotonic() - started < 5
        await service.finish(Status.CANCELLED, state=state(99, 6))
        assert await head_of(database) == (1, "cancellation", 99)


async def test_a_cancelled_save_on_a_stopped_server_ends_at_once_and_raises_the_cancellation(dsn: str) -> None:
    async with Database.open(dsn) as watcher, Database.open(dsn) as database:
        _, _, service = await claimed(database)
        async with stopped_backends(database, watcher):
            saving = asyncio.create_task(service.save_checkpoint("op", PERIODIC, state(99, 6)))
            await until(lambda: service.in_doubt)
            await asyncio.sleep(0.05)
            started = time.monotonic()
            for _ in range(3):
                saving.cancel()
                await asyncio.sleep(0)
            with pytest.raises(asyncio.CancelledError):
                await saving
            assert time.monotonic() - started < 3
            assert service.in_doubt
        await service.resolve()
        assert await head_of(database) == (1, "periodic", 99)


async def test_deadline_includes_the_wait_for_a_connection(dsn: str) -> None:
    async with Database.open(dsn) as database:
        _, _, service = await claimed(database)
        held = [await database._pool.acquire() for _ in range(8)]
        try:
            started = time.monotonic()
            with pytest.raises(SaveTimeoutError):
                await service.save_checkpoint("op", PERIODIC, state(99, 6), deadline=0.3)
            assert time.monotonic() - started < 3
            assert not service.in_doubt  # nothing was sent
        finally:
            for connection in held:
                await database._pool.release(connection)
        await service.save_checkpoint("op", PERIODIC, state(99, 6))


async def test_terminated_backends_are_a_delay(database: Database) -> None:
    _, claim, service = await claimed(database)
    for bar in range(3):
        async with database.connection() as connection:
            await connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        await service.save_checkpoint("op", PERIODIC, state(bar, bar + 1))
    assert await head_of(database) == (3, "periodic", 2)
    assert await OperationsService(database).get("op")
    assert claim == Claim("op", 1, claim.token)


async def test_resolve_without_doubt_does_nothing(database: Database) -> None:
    _, _, service = await claimed(database)
    await service.resolve()
    assert service.acknowledged.revision == 0
