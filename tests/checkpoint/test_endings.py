"""Endings: one statement each; cancel against completion; what is left. Real PostgreSQL."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
from checkpoint_samples import DIGEST, claimed, event, head_of, segments_of, state, waiting_on_a_lock

from ktrdr_async.checkpoint.schemas import CheckpointType
from ktrdr_async.checkpoint.service import CheckpointService
from ktrdr_async.errors import (
    CancellationError,
    CheckpointConflictError,
    CheckpointError,
    InputError,
    InvalidTransitionError,
    OperationNotFoundError,
    OwnershipLostError,
)
from ktrdr_async.operations.lifecycle import Owner, Status
from ktrdr_async.storage.database import Database

pytestmark = pytest.mark.anyio
PERIODIC = CheckpointType.PERIODIC
RESULT: dict[str, Any] = {"result": {"sharpe": math.nan, "final": 1e16}, "result_digest": DIGEST}


async def test_completion_appends_deletes_the_head_and_stores_the_result(database: Database) -> None:
    operations, _, service = await claimed(database)
    await service.save_checkpoint("op", PERIODIC, state(99, 6))
    assert await service.finish(Status.COMPLETED, state=state(199, 8, since=6), **RESULT) is Status.COMPLETED
    found = await operations.get("op")
    assert found.status is Status.COMPLETED
    assert found.result_digest == DIGEST
    assert found.result is not None
    assert math.isnan(found.result["sharpe"])
    assert repr(found.result["final"]) == "1e+16"
    assert found.checkpoint_bar is None
    assert found.finished_at is not None
    assert await head_of(database) is None
    assert await segments_of(database) == [(1, 0, 6), (2, 6, 8)]
    assert (await CheckpointService(database).load_ledger("op")).ledger == [event(n) for n in range(8)]
    assert await CheckpointService(database).load_checkpoint("op") is None


async def test_completion_is_one_statement_whole_or_not_at_all(database: Database) -> None:
    operations, _, service = await claimed(database)
    await service.save_checkpoint("op", PERIODIC, state(99, 6))
    async with database.connection() as connection:
        await connection.execute(
            "CREATE TABLE counted (xid text); CREATE FUNCTION count_it() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN INSERT INTO counted VALUES (pg_current_xact_id()::text); RETURN NULL; END $$"
        )
        for table in ("operations", "operation_checkpoints", "ledger_segments"):
            await connection.execute(
                f"CREATE TRIGGER zz_count AFTER INSERT OR UPDATE OR DELETE ON ktrdr.{table}"
                " FOR EACH STATEMENT EXECUTE FUNCTION count_it()"
            )
        # The last of its writes fails: nothing of it may be left.
        await connection.execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = 'disk_full'; END $$;"
            "CREATE TRIGGER zzz_refuse AFTER UPDATE OF status ON ktrdr.operations"
            " FOR EACH ROW EXECUTE FUNCTION refuse()"
        )
        with pytest.raises(CheckpointError, match="DiskFullError: no"):
            await service.finish(Status.COMPLETED, state=state(199, 8, since=6), **RESULT)
        assert await head_of(database) == (1, "periodic", 99)
        assert await segments_of(database) == [(1, 0, 6)]
        await connection.execute("DROP TRIGGER zzz_refuse ON ktrdr.operations")
        await service.finish(Status.COMPLETED, state=state(199, 8, since=6), **RESULT)
        assert await connection.fetchval("SELECT count(DISTINCT xid) FROM counted") == 1
    assert (await operations.get("op")).status is Status.COMPLETED


async def test_completion_without_any_checkpoint_or_record(database: Database) -> None:
    _, _, service = await claimed(database)
    await service.finish(Status.COMPLETED, state=None, **RESULT)
    loaded = await service.load_ledger("op")
    assert (loaded.ledger, loaded.recorded, loaded.equity_samples) == ([], [], [])


async def test_completion_over_a_head_that_was_never_loaded_is_a_conflict(database: Database) -> None:
    operations, claim, service = await claimed(database)
    await service.save_checkpoint("op", PERIODIC, state(99, 6))
    unaware = CheckpointService(database, claim)
    with pytest.raises(CheckpointConflictError):
        await unaware.finish(Status.COMPLETED, state=state(99), **RESULT)
    assert (await operations.get("op")).status is Status.RUNNING
    assert await head_of(database) == (1, "periodic", 99)


async def test_p2_completion_writes_only_what_is_new(database: Database) -> None:
    _, _, service = await claimed(database)
    for n in range(5):
        await service.save_checkpoint("op", PERIODIC, state(n, 100 * (n + 1), since=100 * n))
    await service.finish(Status.COMPLETED, state=state(9, 501, since=500), **RESULT)
    assert (await segments_of(database))[-1] == (6, 500, 501)


@pytest.mark.parametrize(
    ("status", "kind"),
    [(Status.CANCELLED, "cancellation"), (Status.FAILED, "failure"), (Status.INTERRUPTED, "shutdown")],
)
@pytest.mark.parametrize("saved", [False, True])
async def test_other_endings_write_the_head(database: Database, status: Status, kind: str, saved: bool) -> None:
    operations, _, service = await claimed(database)
    if saved:
        await service.save_checkpoint("op", PERIODIC, state(99, 6))
    error = {"message": "bar 7: \x00 \ud800"} if status is Status.FAILED else None
    await service.finish(status, state=state(199, 8), error=error)
    found = await operations.get("op")
    assert (found.status, found.checkpoint_type, found.checkpoint_bar) == (status, kind, 199)
    assert found.error == (None if error is None else {"message": "bar 7: \ufffd \ufffd"})
    assert (await segments_of(database))[-1][2] == 8
    claim = await operations.claim("op", owner=Owner.this_process())
    again = CheckpointService(database, claim)
    loaded = await again.load_checkpoint("op")
    assert loaded is not None
    assert len(loaded.ledger) == 8
    await again.finish(Status.COMPLETED, state=state(299, 9, since=8), **RESULT)
    assert len((await again.load_ledger("op")).ledger) == 9


@pytest.mark.parametrize("saved", [False, True])
async def test_an_ending_without_a_state_keeps_the_checkpoint(database: Database, saved: bool) -> None:
    operations, claim, service = await claimed(database)
    if saved:
        await service.save_checkpoint("op", PERIODIC, state(99, 6))
    # Also by a service that never loaded it: the checkpoint may be the very thing that couldn't be loaded.
    await CheckpointService(database, claim).finish(Status.FAILED, state=None, error={"message": "x"})
    assert (await operations.get("op")).status is Status.FAILED
    assert await head_of(database) == ((1, "periodic", 99) if saved else None)


async def test_a_cancel_that_committed_first_wins_against_completion(database: Database) -> None:
    operations, _, service = await claimed(database)
    await service.save_checkpoint("op", PERIODIC, state(99, 6))
    await operations.cancel("op")
    with pytest.raises(CancellationError):
        await service.finish(Status.COMPLETED, state=state(199, 8, since=6), **RESULT)
    assert await segments_of(database) == [(1, 0, 6)]
    await service.finish(Status.CANCELLED, state=state(199, 8, since=6))
    assert (await operations.get("op")).status is Status.CANCELLED


async def test_a_completion_that_committed_first_wins_against_a_cancel(database: Database) -> None:
    operations, _, service = await claimed(database)
    await service.finish(Status.COMPLETED, state=None, **RESULT)
    with pytest.raises(InvalidTransitionError, match="completed"):
        await operations.cancel("op")


async def test_the_row_lock_decides_between_cancel_and_completion(database: Database) -> None:
    operations, _, service = await claimed(database)
    async with database.connection() as watcher:
        async with database.connection() as holder, holder.transaction(isolation="read_committed"):
            await holder.execute("UPDATE ktrdr.operations SET cancel_epoch = epoch")  # a cancel, not yet committed
            ending = service.finish(Status.COMPLETED, state=None, **RESULT)
            completing = asyncio.create_task(ending)
            await waiting_on_a_lock(watcher)
        with pytest.raises(CancellationError):
            await completing
        async with database.connection() as holder, holder.transaction(isolation="read_committed"):
            await holder.execute(
                "UPDATE ktrdr.operations SET status = 'completed', result = '{}', result_digest = repeat('0', 64),"
                " final_segment = 0, final_digest = '', finished_at = now()"
            )
            cancelling = asyncio.create_task(operations.cancel("op"))
            await waiting_on_a_lock(watcher)
        with pytest.raises(InvalidTransitionError):
            await cancelling


async def test_a_cancel_of_an_older_epoch_doesnt_stop_a_completion(database: Database) -> None:
    operations, _, _ = await claimed(database)
    await operations.cancel("op")
    claim = await operations.claim("op", owner=Owner.this_process(), take_over=True)
    await CheckpointService(database, claim).finish(Status.COMPLETED, state=None, **RESULT)
    assert (await operations.get("op")).status is Status.COMPLETED


async def test_an_interruption_under_a_pending_cancel_is_a_cancellation(database: Database) -> None:
    """Else a worker that leaves would undo the cancel: the next one takes up what is interrupted."""
    operations, _, service = await claimed(database)
    await operations.cancel("op")
    assert await service.finish(Status.INTERRUPTED, state=state(99, 6)) is Status.CANCELLED
    assert await operations.orphans() == []
    assert await head_of(database) == (1, "shutdown", 99)


async def test_a_second_ending_of_the_same_kind_is_success_another_is_refused(database: Database) -> None:
    _, _, service = await claimed(database)
    await service.finish(Status.CANCELLED, state=state(99, 6))
    assert await service.finish(Status.CANCELLED, state=state(99, 6)) is Status.CANCELLED
    assert await service.finish(Status.INTERRUPTED, state=state(99, 6)) is Status.CANCELLED
    assert await head_of(database) == (1, "cancellation", 99)
    with pytest.raises(CancellationError):
        await service.finish(Status.COMPLETED, state=None, **RESULT)
    with pytest.raises(CancellationError):
        await service.save_checkpoint("op", PERIODIC, state(199, 6))


async def test_a_zombies_ending_writes_nothing(database: Database) -> None:
    operations, _, zombie = await claimed(database)
    await zombie.save_checkpoint("op", PERIODIC, state(99, 6))
    await operations.claim("op", owner=Owner.this_process(), take_over=True)
    for ending in (
        zombie.finish(Status.COMPLETED, state=state(199, 8, since=6), **RESULT),
        zombie.finish(Status.CANCELLED, state=state(199, 8, since=6)),
        zombie.finish(Status.INTERRUPTED, state=None),
    ):
        with pytest.raises(OwnershipLostError):
            await ending
    assert (await operations.get("op")).status is Status.RUNNING
    assert await segments_of(database) == [(1, 0, 6)]


async def test_a_deleted_operation_cant_end(database: Database) -> None:
    _, _, service = await claimed(database)
    async with database.connection() as connection:
        await connection.execute("DELETE FROM ktrdr.operations")
    with pytest.raises(OperationNotFoundError):
        await service.finish(Status.CANCELLED, state=None)


async def test_what_a_status_needs_is_asked_for(database: Database) -> None:
    _, _, service = await claimed(database)
    for wrong in (
        service.finish(Status.COMPLETED, state=None),
        service.finish(Status.COMPLETED, state=None, result={"a": 1}),
        service.finish(Status.COMPLETED, state=None, error={"a": 1}, **RESULT),
        service.finish(Status.FAILED, state=None),
        service.finish(Status.CANCELLED, state=None, **RESULT),
        service.finish(Status.RUNNING, state=None),
        service.finish(Status.COMPLETED, state=None, result={"a": object()}, result_digest=DIGEST),
    ):
        with pytest.raises(InputError):
            await wrong


async def test_a_reserved_connection_ends_runs_too(database: Database) -> None:
    operations, _, service = await claimed(database)
    async with database.reserved() as reserved:
        held = [await database._pool.acquire() for _ in range(8)]
        await service.finish(Status.INTERRUPTED, state=state(99, 6), through=reserved)
        for connection in held:
            await database._pool.release(connection)
    assert (await operations.get("op")).status is Status.INTERRUPTED
