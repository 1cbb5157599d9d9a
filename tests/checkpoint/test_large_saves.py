"""Saves of several segments: a statement for each, in one transaction, that lands whole or not at all."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from typing import Any

import asyncpg
import pytest
from checkpoint_samples import DIGEST, claimed, event, head_of, segments_of, state, until, waiting_on_a_lock

from ktrdr_async.checkpoint.position import Position
from ktrdr_async.checkpoint.schemas import SEGMENT_LIMIT, CheckpointType
from ktrdr_async.checkpoint.writing import build_completion, build_ending, build_save
from ktrdr_async.errors import CheckpointConflictError, OwnershipLostError
from ktrdr_async.operations.lifecycle import Claim, Status
from ktrdr_async.storage.database import Database

pytestmark = pytest.mark.anyio
PERIODIC = CheckpointType.PERIODIC
MANY = 3 * SEGMENT_LIMIT + 7
LARGE = [(2, 6, 6 + SEGMENT_LIMIT), (3, 5006, 10_006), (4, 10_006, 15_006), (5, 15_006, MANY)]


async def test_no_statement_has_more_than_one_segment() -> None:
    claim, given, sequence = Claim("op", 1, uuid.uuid4()), state(99, MANY), 3  # of the parameters after the claim's
    for write in (
        await build_save(claim, Position(), given, PERIODIC),
        await build_completion(claim, Position(), given, {}, DIGEST),
        await build_ending(claim, Position(), given, CheckpointType.CANCELLATION, Status.CANCELLED, None),
    ):
        assert write.segments == 4
        assert [columns[0] for columns in write.before_it] == [[1], [2], [3]]
        assert all(len(column) == 1 for columns in write.before_it for column in columns)
        assert [4] in write.arguments[sequence:]
    small = await build_save(claim, Position(), state(99, SEGMENT_LIMIT), PERIODIC)
    assert small.segments == 1
    assert small.before_it == ()


@pytest.mark.parametrize("after", range(1, 9))
async def test_it_lands_whole_wherever_its_connection_is_cut(dsn: str, after: int) -> None:
    """After each of its statements, BEGIN and COMMIT among them, and of the ones that look for it then."""
    left: int | None = None

    async def init(connection: Any) -> None:
        def ran(_query: object) -> None:
            nonlocal left
            if left is not None:
                left -= 1
                if left == 0:
                    connection.terminate()

        connection.add_query_logger(ran)

    async with (
        asyncpg.create_pool(dsn, min_size=1, max_size=3, init=init) as pool,
        Database.open(pool=pool) as database,
    ):
        _, _, service = await claimed(database)
        await service.save_checkpoint("op", PERIODIC, state(99, 6))
        left = after
        await service.save_checkpoint("op", PERIODIC, state(199, MANY, since=6))
        assert left <= 0
        left = None
        assert await head_of(database) == (2, "periodic", 199)
        assert await segments_of(database) == [(1, 0, 6), *LARGE]
        loaded = await service.load_checkpoint("op")
        assert loaded is not None
        assert loaded.ledger == [event(n) for n in range(MANY)]


@pytest.mark.parametrize("turns", [1, 5, 20, 60, 150])
async def test_a_cancelled_one_is_there_or_isnt(database: Database, turns: int) -> None:
    _, _, service = await claimed(database)
    await service.save_checkpoint("op", PERIODIC, state(99, 6))
    save = asyncio.create_task(service.save_checkpoint("op", PERIODIC, state(199, MANY, since=6)))
    await until(lambda: service.in_doubt or save.done())
    for _ in range(turns):
        await asyncio.sleep(0)
    save.cancel()
    await asyncio.wait({save})
    await service.resolve()
    landed = service.acknowledged.revision == 2
    assert await segments_of(database) == [(1, 0, 6), *(LARGE if landed else [])]
    await service.save_checkpoint("op", PERIODIC, state(299, MANY + 1, since=MANY if landed else 6))
    loaded = await service.load_checkpoint("op")
    assert loaded is not None
    assert loaded.ledger == [event(n) for n in range(MANY + 1)]


async def _lose(connection: Any) -> None:
    await connection.execute(
        "UPDATE ktrdr.operations SET epoch = epoch + 1, attempts = attempts + 1, owner_token = $1", uuid.uuid4()
    )


async def _behead(connection: Any) -> None:
    await connection.execute("ALTER TABLE ktrdr.operation_checkpoints DISABLE TRIGGER USER")
    await connection.execute("DELETE FROM ktrdr.operation_checkpoints")


@pytest.mark.parametrize(
    ("change", "error"), [(_lose, OwnershipLostError), (_behead, CheckpointConflictError)], ids=["lost", "beheaded"]
)
async def test_one_that_finds_nothing_to_write_to_leaves_no_segment(
    database: Database, change: Callable[[Any], Any], error: type[Exception]
) -> None:
    """R2: also where the row is taken over while its first statement waits for it."""
    _, _, service = await claimed(database)
    await service.save_checkpoint("op", PERIODIC, state(99, 6))
    async with database.connection() as holder, holder.transaction(isolation="read_committed"):
        await holder.execute("SELECT 1 FROM ktrdr.operations FOR UPDATE")
        await change(holder)
        save = asyncio.create_task(service.save_checkpoint("op", PERIODIC, state(199, MANY, since=6)))
        async with database.connection() as watcher:
            await waiting_on_a_lock(watcher)
    with pytest.raises(error):
        await save
    assert await segments_of(database) == [(1, 0, 6)]
    assert not service.in_doubt


async def test_an_owner_that_stops_in_it_holds_the_row_for_some_seconds_only(database: Database) -> None:
    async with database.connection() as connection, connection.transaction(isolation="read_committed"):
        await connection.execute(database.sql("bound_idleness"))
        assert await connection.fetchval("SHOW idle_in_transaction_session_timeout") == "10s"
    async with database.connection() as connection:
        assert await connection.fetchval("SHOW idle_in_transaction_session_timeout") != "10s"
