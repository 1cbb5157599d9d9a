"""Saving: fences, conflicts, slices, sizes. Real PostgreSQL."""

from __future__ import annotations

import asyncio
import uuid

import asyncpg
import pytest
from checkpoint_samples import REQUEST, claimed, event, head_of, segments_of, state, waiting_on_a_lock

from ktrdr_async.checkpoint import codec as codec_module
from ktrdr_async.checkpoint.codec import PIECE
from ktrdr_async.checkpoint.position import Position
from ktrdr_async.checkpoint.schemas import SEGMENT_LIMIT, CheckpointType, RecordedValue
from ktrdr_async.checkpoint.service import CheckpointService
from ktrdr_async.checkpoint.writing import build_save
from ktrdr_async.errors import (
    CancellationError,
    CheckpointConflictError,
    CheckpointError,
    CheckpointTooLargeError,
    InputError,
    OperationNotFoundError,
    OwnershipLostError,
)
from ktrdr_async.operations import jsonb as jsonb_module
from ktrdr_async.operations.lifecycle import Claim, Owner, Status
from ktrdr_async.operations.service import OperationsService
from ktrdr_async.storage.database import Database

pytestmark = pytest.mark.anyio
PERIODIC = CheckpointType.PERIODIC


async def test_save_and_load_gives_the_whole_state_back(database: Database) -> None:
    _, claim, service = await claimed(database)
    assert await service.load_checkpoint("op") is None
    first = await service.save_checkpoint("op", PERIODIC, state(99, 6))
    second = await service.save_checkpoint("op", PERIODIC, state(199, 10, since=6))
    assert (first.revision, second.revision) == (1, 2)
    assert (first.segments, second.segments) == (1, 1)
    assert await segments_of(database) == [(1, 0, 6), (2, 6, 10)]
    loaded = await CheckpointService(database, claim).load_checkpoint("op")
    expected = state(199, 10)
    assert loaded is not None
    assert len(loaded.trades) == 5
    loaded.trades = []
    assert loaded == expected


async def test_a_claim_on_the_loaded_operation_goes_on_from_there(database: Database) -> None:
    operations, _, service = await claimed(database)
    await service.save_checkpoint("op", PERIODIC, state(99, 6))
    claim = await operations.claim("op", owner=Owner.this_process(), take_over=True)
    following = CheckpointService(database, claim)
    await following.load_checkpoint("op")
    assert following.acknowledged == service.acknowledged
    await following.save_checkpoint("op", PERIODIC, state(199, 8, since=6))
    assert await segments_of(database) == [(1, 0, 6), (2, 6, 8)]


async def test_loading_another_operation_leaves_the_position_alone(database: Database) -> None:
    _, _, service = await claimed(database, "a")
    _, _, other = await claimed(database, "b")
    await other.save_checkpoint("b", PERIODIC, state(99, 6))
    await service.load_checkpoint("b")
    assert service.acknowledged.revision == 0


async def test_a_state_that_begins_before_the_acknowledged_counts_is_sliced(database: Database) -> None:
    _, _, service = await claimed(database)
    await service.save_checkpoint("op", PERIODIC, state(99, 6))
    receipt = await service.save_checkpoint("op", PERIODIC, state(199, 7, since=2))
    assert receipt.segments == 1
    assert await segments_of(database) == [(1, 0, 6), (2, 6, 7)]
    loaded = await service.load_checkpoint("op")
    assert loaded is not None
    assert loaded.ledger == [event(n) for n in range(7)]


async def test_a_state_that_begins_after_the_acknowledged_counts_is_refused(database: Database) -> None:
    _, _, service = await claimed(database)
    await service.save_checkpoint("op", PERIODIC, state(99, 6))
    for wrong in (state(199, 9, since=7), state(199, 5), state(98, 6)):
        with pytest.raises(CheckpointError):
            await service.save_checkpoint("op", PERIODIC, wrong)
    assert await head_of(database) == (1, "periodic", 99)


async def test_a_save_with_nothing_new_writes_a_head_and_no_segment(database: Database) -> None:
    _, _, service = await claimed(database)
    receipt = await service.save_checkpoint("op", PERIODIC, state(99))
    assert receipt.segments == 0
    await service.save_checkpoint("op", CheckpointType.CANCELLATION, state(99))
    assert await head_of(database) == (2, "cancellation", 99)
    assert await segments_of(database) == []


async def test_long_stretches_become_several_segments_of_one_save(database: Database) -> None:
    _, _, service = await claimed(database)
    receipt = await service.save_checkpoint("op", PERIODIC, state(99, 2 * SEGMENT_LIMIT + 1))
    assert receipt.segments == 3
    assert [row[1:] for row in await segments_of(database)] == [(0, 5000), (5000, 10000), (10000, 10001)]
    loaded = await service.load_checkpoint("op")
    assert loaded is not None
    assert loaded.ledger == [event(n) for n in range(10_001)]


async def test_p2_bytes_of_the_hundredth_save_equal_the_firsts(database: Database) -> None:
    _, _, service = await claimed(database)
    receipts = [
        await service.save_checkpoint("op", PERIODIC, state(100_000 + n, 50 * (n + 1), since=50 * n))
        for n in range(100)
    ]
    assert receipts[99].bytes == receipts[0].bytes
    async with database.connection() as connection:
        sizes = await connection.fetch("SELECT length(records::text) AS n FROM ktrdr.ledger_segments ORDER BY sequence")
        stored = await connection.fetchval("SELECT state_size_bytes FROM ktrdr.operation_checkpoints")
        text = await connection.fetchval("SELECT records::text FROM ktrdr.ledger_segments WHERE sequence = 100")
    assert len({row["n"] for row in sizes}) == 1
    assert receipts[0].bytes == stored + len(text.replace(", ", ",").replace(": ", ":"))


async def test_a_save_renews_the_lease(database: Database) -> None:
    _, _, service = await claimed(database)
    async with database.connection() as connection:
        await connection.execute("UPDATE ktrdr.operations SET heartbeat_at = heartbeat_at - interval '1 hour'")
        for bar in (99, 199):
            await service.save_checkpoint("op", PERIODIC, state(bar))
            age = "SELECT clock_timestamp() - heartbeat_at < interval '1 minute' FROM ktrdr.operations"
            assert await connection.fetchval(age)
            await connection.execute("UPDATE ktrdr.operations SET heartbeat_at = heartbeat_at - interval '1 hour'")


async def test_r2_a_zombie_that_waits_for_the_row_writes_nothing_after_the_new_claim(database: Database) -> None:
    _, _, zombie = await claimed(database)
    await zombie.save_checkpoint("op", PERIODIC, state(99, 6))
    async with database.connection() as holder, holder.transaction(isolation="read_committed"):
        # The new claim, not yet committed: the zombie's statement begins under the old epoch and waits.
        await holder.execute(
            "UPDATE ktrdr.operations SET epoch = epoch + 1, attempts = attempts + 1, owner_token = $1", uuid.uuid4()
        )
        save = asyncio.create_task(zombie.save_checkpoint("op", PERIODIC, state(199, 8, since=6)))
        async with database.connection() as watcher:
            await waiting_on_a_lock(watcher)
    with pytest.raises(OwnershipLostError, match="epoch is 2, ours was 1"):
        await save
    assert await head_of(database) == (1, "periodic", 99)
    assert await segments_of(database) == [(1, 0, 6)]
    assert not zombie.in_doubt


async def test_r2_a_claim_waits_for_a_save_that_waits_for_the_head(database: Database) -> None:
    """The form with EXISTS let the claim pass first and the zombie's save land after it."""
    operations, _, service = await claimed(database)
    await service.save_checkpoint("op", PERIODIC, state(99, 6))
    async with database.connection() as watcher:
        async with database.connection() as holder, holder.transaction(isolation="read_committed"):
            await holder.execute("SELECT 1 FROM ktrdr.operation_checkpoints FOR UPDATE")
            save = asyncio.create_task(service.save_checkpoint("op", PERIODIC, state(199, 8, since=6)))
            await waiting_on_a_lock(watcher)
            taking = operations.claim("op", owner=Owner.this_process(), take_over=True)
            claim = asyncio.create_task(taking)
            await waiting_on_a_lock(watcher, 2)
            assert not claim.done()
        assert (await save).revision == 2
        assert (await claim).epoch == 2
    with pytest.raises(OwnershipLostError):
        await service.save_checkpoint("op", PERIODIC, state(299, 8, since=8))
    assert await head_of(database) == (2, "periodic", 199)


async def test_an_epoch_that_was_issued_twice_is_told_apart_by_the_token(database: Database) -> None:
    _, claim, service = await claimed(database)
    twin = CheckpointService(database, Claim("op", claim.epoch, uuid.uuid4()))
    with pytest.raises(OwnershipLostError):
        await twin.save_checkpoint("op", PERIODIC, state(99))
    assert await head_of(database) is None
    await service.save_checkpoint("op", PERIODIC, state(99))


async def test_only_the_claimed_operation_is_written(database: Database) -> None:
    _, _, service = await claimed(database)
    await claimed(database, "other")
    for wrong in (service.save_checkpoint("other", PERIODIC, state(99)),
                  CheckpointService(database, None).save_checkpoint("op", PERIODIC, state(99))):  # fmt: skip
        with pytest.raises(OwnershipLostError):
            await wrong
    with pytest.raises(OwnershipLostError):
        await CheckpointService(database).finish(Status.CANCELLED, state=None)
    assert await head_of(database, "other") is None


async def test_file_artifacts_are_refused(database: Database) -> None:
    _, _, service = await claimed(database)
    with pytest.raises(InputError, match="artifacts"):
        await service.save_checkpoint("op", PERIODIC, state(99), {"model.bin": b"x"})
    await service.save_checkpoint("op", PERIODIC, state(99), {})


async def test_a_missing_head_is_a_conflict_and_not_made_again(database: Database) -> None:
    """A plain UPDATE would report success, a plain upsert would re-create it: own = 1 with head = 0."""
    _, _, service = await claimed(database)
    await service.save_checkpoint("op", PERIODIC, state(99))
    async with database.connection() as connection:
        await connection.execute(
            "ALTER TABLE ktrdr.operation_checkpoints DISABLE TRIGGER checkpoints_whole;"
            "DELETE FROM ktrdr.operation_checkpoints;"
            "ALTER TABLE ktrdr.operation_checkpoints ENABLE TRIGGER checkpoints_whole"
        )
    with pytest.raises(CheckpointConflictError):
        await service.save_checkpoint("op", PERIODIC, state(199))
    assert await head_of(database) is None
    assert not service.in_doubt


async def test_a_head_that_another_wrote_is_a_conflict(database: Database) -> None:
    _, claim, service = await claimed(database)
    await service.save_checkpoint("op", PERIODIC, state(99, 6))
    twin = CheckpointService(database, claim)
    await twin.load_checkpoint("op")
    await twin.save_checkpoint("op", PERIODIC, state(199, 8, since=6))
    with pytest.raises(CheckpointConflictError):
        await service.save_checkpoint("op", PERIODIC, state(209, 9, since=6))
    assert await head_of(database) == (2, "periodic", 199)
    assert await segments_of(database) == [(1, 0, 6), (2, 6, 8)]


async def test_a_head_of_the_same_revision_and_another_digest_is_a_conflict(database: Database) -> None:
    """A restored dump can hold another save under the same number."""
    _, _, service = await claimed(database)
    await service.save_checkpoint("op", PERIODIC, state(99, 6))
    async with database.connection() as connection:
        await connection.execute(
            "ALTER TABLE ktrdr.operation_checkpoints DISABLE TRIGGER USER;"
            "UPDATE ktrdr.operation_checkpoints SET digest = repeat('1', 64);"
            "ALTER TABLE ktrdr.operation_checkpoints ENABLE TRIGGER USER"
        )
    for write in (
        service.save_checkpoint("op", PERIODIC, state(199, 8, since=6)),
        service.finish(Status.CANCELLED, state=state(199, 8, since=6)),
        service.finish(Status.COMPLETED, state=state(199, 8, since=6), result={}, result_digest="ab" * 32),
    ):
        with pytest.raises(CheckpointConflictError):
            await write
    assert await head_of(database) == (1, "periodic", 99)
    assert await segments_of(database) == [(1, 0, 6)]


async def test_a_first_save_over_a_head_that_was_never_loaded_is_a_conflict(database: Database) -> None:
    _, claim, service = await claimed(database)
    await service.save_checkpoint("op", PERIODIC, state(110, 6))
    unaware = CheckpointService(database, claim)
    with pytest.raises(CheckpointConflictError):
        await unaware.save_checkpoint("op", PERIODIC, state(99, 5))
    assert await head_of(database) == (1, "periodic", 110)
    assert await segments_of(database) == [(1, 0, 6)]


async def test_first_and_later_saves_are_two_named_statements(database: Database) -> None:
    assert "INSERT INTO ktrdr.operation_checkpoints" in database.sql("save_first_checkpoint")
    assert "ON CONFLICT" not in database.sql("save_first_checkpoint")
    assert "INSERT INTO ktrdr.operation_checkpoints" not in database.sql("save_checkpoint")


async def test_a_deleted_operation_is_not_found(database: Database) -> None:
    _, _, service = await claimed(database)
    async with database.connection() as connection:
        await connection.execute("DELETE FROM ktrdr.operations")
    with pytest.raises(OperationNotFoundError):
        await service.save_checkpoint("op", PERIODIC, state(99))


async def test_a_save_hears_that_the_operation_was_ended_as_cancelled(database: Database) -> None:
    _, _, service = await claimed(database)
    async with database.connection() as connection:
        await connection.execute("UPDATE ktrdr.operations SET status = 'cancelled', finished_at = now()")
    with pytest.raises(CancellationError):
        await service.save_checkpoint("op", PERIODIC, state(99))


async def test_too_large_states_are_refused_with_their_size(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, service = await claimed(database)
    monkeypatch.setattr(jsonb_module, "MAX_BYTES", 10_000)
    with pytest.raises(CheckpointTooLargeError, match=r"1[34]\d{3} bytes"):
        await service.save_checkpoint("op", PERIODIC, state(99, strategy_state=bytes(10_000)))
    monkeypatch.setattr(codec_module, "MAX_SEGMENT_BYTES", 1_000)
    with pytest.raises(CheckpointTooLargeError, match=r"\d{4} bytes"):
        await service.save_checkpoint("op", PERIODIC, state(99, 20))
    assert await head_of(database) is None
    assert not service.in_doubt


@pytest.mark.parametrize(
    ("condition", "kind"), [("program_limit_exceeded", CheckpointTooLargeError), ("disk_full", CheckpointError)]
)
async def test_what_postgresql_refuses_says_why_and_how_large(
    database: Database, condition: str, kind: type[CheckpointError]
) -> None:
    _, _, service = await claimed(database)
    await service.save_checkpoint("op", PERIODIC, state(99, 6))
    async with database.connection() as connection:
        await connection.execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
            f" $$ BEGIN RAISE EXCEPTION 'no room' USING ERRCODE = '{condition}'; END $$;"
            "CREATE TRIGGER refuse BEFORE INSERT ON ktrdr.ledger_segments FOR EACH ROW EXECUTE FUNCTION refuse()"
        )
        with pytest.raises(kind, match=r"a checkpoint of \d{3} bytes.*no room") as caught:
            await service.save_checkpoint("op", PERIODIC, state(199, 7, since=6))
        assert type(caught.value) is kind
        assert not service.in_doubt
        assert await head_of(database) == (1, "periodic", 99)  # the last good one
        await connection.execute("DROP TRIGGER refuse ON ktrdr.ledger_segments")
    await service.save_checkpoint("op", PERIODIC, state(299, 8, since=6))
    assert await segments_of(database) == [(1, 0, 6), (2, 6, 8)]


async def test_text_that_postgresql_cant_hold_is_refused(database: Database) -> None:
    _, _, service = await claimed(database)
    for wrong in (
        state(99, ledger=[event(0, tag="a\x00b")]),
        state(99, recorded=[RecordedValue(1, "\x00", 1.0)]),
        state(99, original_request={"a": "\x00"}),
        state(99, ledger=[event(0, tag="\ud800")]),
    ):
        with pytest.raises(CheckpointError, match=r"NUL|surrogate"):
            await service.save_checkpoint("op", PERIODIC, wrong)
    assert await head_of(database) is None
    await service.save_checkpoint("op", PERIODIC, state(99, 1, ledger=[event(0, tag="\\u0000 is no NUL")]))
    loaded = await service.load_checkpoint("op")
    assert loaded is not None
    assert loaded.ledger[0].tag == "\\u0000 is no NUL"


async def test_a_record_of_another_type_is_refused(database: Database) -> None:
    _, _, service = await claimed(database)
    with pytest.raises(CheckpointError, match="another type"):
        await service.save_checkpoint("op", PERIODIC, state(99, 1, ledger=[event(0, price="high")]))
    assert await head_of(database) is None


async def test_a_pool_with_json_codecs_and_another_isolation_level_works(dsn: str) -> None:
    import json

    async def codecs(connection: asyncpg.Connection) -> None:
        await connection.set_type_codec("jsonb", encoder=json.dumps, decoder=json.loads, schema="pg_catalog")

    async with (
        asyncpg.create_pool(
            dsn, init=codecs, statement_cache_size=0, server_settings={"default_transaction_isolation": "serializable"}
        ) as pool,
        Database.open(pool=pool) as database,
    ):
        operations, _, service = await claimed(database)
        await service.save_checkpoint("op", PERIODIC, state(99, 6))
        await service.save_checkpoint("op", PERIODIC, state(199, 8, since=6))
        assert (await operations.get("op")).request == REQUEST
        loaded = await service.load_checkpoint("op")
        assert loaded is not None
        assert len(loaded.ledger) == 8


async def test_another_schema_works(dsn: str) -> None:
    async with Database.open(dsn, schema="other") as database:
        operations, _, service = await claimed(database)
        await service.save_checkpoint("op", PERIODIC, state(99, 6))
        await service.finish(Status.COMPLETED, state=state(199, 8, since=6), result={"a": 1}, result_digest="ab" * 32)
        assert (await OperationsService(database).get("op")).status is Status.COMPLETED
        assert len((await service.load_ledger("op")).ledger) == 8
        assert await operations.list() == [await operations.get("op")]


async def test_many_saves_at_once_are_encoded_a_piece_a_turn() -> None:
    turns, saves = 0, 20

    async def count() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    counting = asyncio.create_task(count())
    made = [
        build_save(Claim(f"op{n}", 1, uuid.uuid4()), Position(), state(99, 3 * PIECE), PERIODIC) for n in range(saves)
    ]
    await asyncio.gather(*made)
    counting.cancel()
    pieces = 3 * 3 + 1  # of ledger, samples and recorded values, and the head
    assert turns >= pieces * saves
