"""The schema refuses by itself what can't be: each CHECK, key and trigger, tried with plain SQL."""

from __future__ import annotations

import asyncpg
import pytest

from ktrdr_async.operations.lifecycle import ENDINGS, TRANSITIONS, Status
from ktrdr_async.storage.database import Database

pytestmark = pytest.mark.anyio

CREATE = "INSERT INTO ktrdr.operations (operation_id, type, request) VALUES ('{}', 'backtesting', '{{}}');"
OWNER = (
    "owner_token = gen_random_uuid(), owner_host = 'h', owner_boot_id = 'b', owner_pid = 1, owner_started = 1,"
    " heartbeat_at = now(), started_at = now()"
)
CLAIM = (
    f"UPDATE ktrdr.operations SET status = 'running', epoch = epoch + 1, attempts = attempts + 1, finished_at = NULL,"
    f" error = NULL, {OWNER} WHERE operation_id = 'a';"
)
SET = "UPDATE ktrdr.operations SET {} WHERE operation_id = 'a'"
Z, ONE, TWO = "repeat('0', 64)", "repeat('1', 64)", "repeat('2', 64)"
RECORDS = '{{"ledger": [{}], "equity_samples": [], "recorded": []}}'
SEGMENT = (
    "INSERT INTO ktrdr.ledger_segments VALUES"
    " ('a', {sequence}, {start}, {stop}, 0, 0, 0, 0, '{records}', {prev}, {digest});"
)  # fmt: skip
HEAD = (
    "INSERT INTO ktrdr.operation_checkpoints VALUES"
    " ('a', '{kind}', now(), '{state}', {size}, {revision}, {last}, {count}, 0, 0, {digest});"
)
COMPLETE = (
    "status = 'completed', result = '{}', result_digest = "
    + Z
    + ", final_segment = 0, final_digest = '', finished_at = now()"
)


def segment(
    sequence: int = 1, start: int = 0, stop: int = 1, records: str | None = None, prev: str = Z, digest: str = ONE
) -> str:
    records = RECORDS.format(",".join("1" for _ in range(stop - start))) if records is None else records
    return SEGMENT.format(sequence=sequence, start=start, stop=stop, records=records, prev=prev, digest=digest)


def head(
    kind: str = "periodic", state: str = '{"bar_index": 1}', size: int = 9, revision: int = 1, last: int = 0,
    count: int = 0,
    digest: str = ONE,
) -> str:  # fmt: skip
    return HEAD.format(kind=kind, state=state, size=size, revision=revision, last=last, count=count, digest=digest)


PENDING = CREATE.format("a")
RUNNING = PENDING + CLAIM
SAVED = RUNNING + segment() + head(last=1, count=1)
REFUSED = {
    "an id with a space": ("", CREATE.format("a b"), "operations_id"),
    "an empty id": ("", CREATE.format(""), "operations_id"),
    "an id that is too long": ("", CREATE.format("a" * 129), "operations_id"),
    "an id with a letter of another alphabet": ("", CREATE.format("\u00e9"), "operations_id"),
    "an id with a line end": ("", CREATE.format("a\n"), "operations_id"),
    "a request that is no object": ("", CREATE.format("a").replace("'{}'", "'[]'"), "operations_request"),
    "an empty type": ("", CREATE.format("a").replace("'backtesting'", "''"), "operations_type"),
    "a status that there isn't": (PENDING, SET.format("status = 'paused'"), "operations_transition"),
    "beginning as running": (
        "", "INSERT INTO ktrdr.operations (operation_id, type, request, status) VALUES ('a', 'b', '{}', 'running')",
        "operations_begin",
    ),
    "an epoch that goes back": (RUNNING + CLAIM, SET.format("epoch = 1"), "operations_epoch_order"),
    "an epoch that skips one": (
        RUNNING, CLAIM.replace("epoch + 1", "epoch + 2").rstrip(";"), "operations_epoch_order",
    ),
    "a claim with the old token": (
        RUNNING, SET.format("epoch = 2, attempts = 2"), "operations_claim",
    ),
    "a claim that isn't counted": (RUNNING, CLAIM.replace("attempts = attempts + 1,", ""), "operations_claim"),
    "a claim that doesn't run": (
        RUNNING, SET.format("epoch = 2, attempts = 2, owner_token = gen_random_uuid(), status = 'cancelled'"),
        "operations_claim",
    ),
    "running without a claim": (PENDING, SET.format("status = 'running'"), "operations_transition"),
    "running again without a claim": (
        RUNNING + SET.format("status = 'cancelled', finished_at = now()") + ";",
        SET.format("status = 'running', finished_at = NULL"), "operations_transition",
    ),
    "another token in the same epoch": (
        RUNNING, SET.format("owner_token = gen_random_uuid()"), "operations_owner_fixed",
    ),
    "no token while running": (RUNNING, SET.format("owner_token = NULL"), "operations_owner_fixed"),
    "a claim without a token": (
        PENDING, CLAIM.replace("owner_token = gen_random_uuid()", "owner_token = NULL"), "operations_claim",
    ),
    "a claim without a host": (PENDING, CLAIM.replace("owner_host = 'h'", "owner_host = NULL"), "operations_owner"),
    "a claim without a heartbeat": (
        PENDING, CLAIM.replace("heartbeat_at = now()", "heartbeat_at = NULL"), "operations_owner",
    ),
    "an owner without a claim": (PENDING, SET.format("heartbeat_at = now()"), "operations_owner"),
    "cancelling an epoch that wasn't yet": (RUNNING, SET.format("cancel_epoch = 2"), "operations_epoch"),
    "completed without a result": (
        RUNNING, SET.format("status = 'completed', finished_at = now()"), "operations_completed",
    ),
    "a result while running": (RUNNING, SET.format("result = '{}'"), "operations_completed"),
    "a result that is no object": (RUNNING, SET.format(COMPLETE.replace("'{}'", "'1'")), "operations_result"),
    "a result digest that is none": (
        RUNNING, SET.format(COMPLETE.replace(Z, "'abc'")), "operations_result_digest",
    ),
    "failed without an error": (RUNNING, SET.format("status = 'failed', finished_at = now()"), "operations_failed"),
    "an error while running": (RUNNING, SET.format("error = '{}'"), "operations_failed"),
    "an error that is no object": (
        RUNNING, SET.format("status = 'failed', error = '1', finished_at = now()"), "operations_error",
    ),
    "progress that is no object": (RUNNING, SET.format("progress = '[]'"), "operations_progress"),
    "ended at no time": (RUNNING, SET.format("status = 'cancelled'"), "operations_finished"),
    "ended while running": (RUNNING, SET.format("finished_at = now()"), "operations_finished"),
    "completed over a head": (SAVED, SET.format(COMPLETE), "operations_no_checkpoint"),
    "completed at another segment": (
        RUNNING, SET.format(COMPLETE.replace("final_segment = 0", "final_segment = 1")), "operations_whole_ledger",
    ),
    "completed short of the ledger": (RUNNING + segment(), SET.format(COMPLETE), "operations_whole_ledger"),
    "completed with another digest": (
        RUNNING + segment(),
        SET.format(COMPLETE.replace("final_segment = 0, final_digest = ''", "final_segment = 1, final_digest = " + Z)),
        "operations_whole_ledger",
    ),
    "a changed result": (
        RUNNING + SET.format(COMPLETE) + ";", SET.format("result = '{\"a\": 1}'"), "operations_result_fixed",
    ),
    "a claim of what is completed": (RUNNING + SET.format(COMPLETE) + ";", CLAIM, "operations_claim"),
    "a changed request": (PENDING, SET.format("request = '{\"a\": 1}'"), "operations_fixed"),
    "a changed id": (PENDING, SET.format("operation_id = 'b'"), "operations_fixed"),
    "a parent's bar below 0": (
        "", "INSERT INTO ktrdr.operations (operation_id, type, request, parent_bar) VALUES ('a', 'b', '{}', -1)",
        "operations_parent_bar",
    ),
    "a checkpoint of a type that there isn't": (RUNNING, head(kind="manual"), "checkpoints_type"),
    "a state that is no object": (RUNNING, head(state="[]"), "checkpoints_state"),
    "a state without its bar": (RUNNING, head(state="{}"), "checkpoints_state"),
    "a state of no size": (RUNNING, head(size=0), "checkpoints_size"),
    "a first revision of 2": (RUNNING, head(revision=2), "checkpoints_first"),
    "a head's digest that is none": (RUNNING, head(digest="'abc'"), "checkpoints_digest"),
    "counts without a segment": (RUNNING, head(count=1), "checkpoints_counts"),
    "a segment without counts": (RUNNING + segment(), head(last=1), "checkpoints_counts"),
    "a head over a missing segment": (RUNNING, head(last=1, count=1), "checkpoints_whole_ledger"),
    "a head over another end": (RUNNING + segment(), head(last=1, count=2), "checkpoints_whole_ledger"),
    "a checkpoint of what is pending": (PENDING, head(), "checkpoints_status"),
    "a checkpoint of what is completed": (RUNNING + SET.format(COMPLETE) + ";", head(), "checkpoints_status"),
    "a revision twice": (
        SAVED, "UPDATE ktrdr.operation_checkpoints SET state = '{\"bar_index\": 2}'", "checkpoints_forward",
    ),
    "a revision that skips one": (
        SAVED, "UPDATE ktrdr.operation_checkpoints SET revision = 3", "checkpoints_forward",
    ),
    "a ledger that shrinks": (
        SAVED, "UPDATE ktrdr.operation_checkpoints SET revision = 2, last_segment = 0, ledger_count = 0",
        "checkpoints_forward",
    ),
    "deleting the head under an owner that runs": (
        SAVED, "DELETE FROM ktrdr.operation_checkpoints", "checkpoints_running",
    ),
    "a segment 0": (RUNNING, segment(sequence=0), "segments_sequence"),
    "a first segment that begins later": (RUNNING, segment(start=1, stop=2), "segments_chain"),
    "a first segment with a digest before it": (RUNNING, segment(prev=ONE), "segments_chain"),
    "a segment after a gap": (
        RUNNING + segment(), segment(sequence=3, start=1, stop=2, prev=ONE, digest=TWO), "segments_chain",
    ),
    "a segment that skips an event": (
        RUNNING + segment(), segment(sequence=2, start=2, stop=3, prev=ONE, digest=TWO), "segments_chain",
    ),
    "a segment over another digest": (
        RUNNING + segment(), segment(sequence=2, start=1, stop=2, prev=TWO, digest=TWO), "segments_chain",
    ),
    "a segment that changes": (
        RUNNING + segment(), "UPDATE ktrdr.ledger_segments SET digest = " + TWO, "segments_append_only",
    ),
    "an empty segment": (RUNNING, segment(stop=0), "segments_counts"),
    "a segment that is too long": (RUNNING, segment(stop=5001), "segments_counts"),
    "records that aren't as many": (RUNNING, segment(records=RECORDS.format("1, 2")), "segments_records"),
    "records without a list": (RUNNING, segment(records='{"ledger": [1], "recorded": []}'), "segments_records"),
    "a segment's digest that is none": (RUNNING, segment(digest="'x'"), "segments_digest"),
    "a segment's previous digest that is none": (RUNNING, segment(prev="'x'"), "segments_prev_digest"),
}  # fmt: skip


async def test_each_invariant_refuses(database: Database) -> None:
    held = set()
    for what, (before, statement, constraint) in REFUSED.items():
        async with database.connection() as connection:
            transaction = connection.transaction(isolation="read_committed")
            await transaction.start()
            try:
                await connection.execute(before + "SELECT 1")
                with pytest.raises(asyncpg.CheckViolationError) as caught:
                    await connection.execute(statement)
                assert caught.value.constraint_name == constraint, what
                held.add(constraint)
            finally:
                await transaction.rollback()
    async with database.connection() as connection:
        rows = await connection.fetch(
            "SELECT conname FROM pg_constraint WHERE connamespace = 'ktrdr'::regnamespace AND contype = 'c'"
            " AND conrelid <> 'ktrdr.migrations'::regclass"
        )
    # status: the transitions' trigger comes first. claimed, revision: other rules stop whatever would break them alone.
    behind = {"operations_status", "operations_claimed", "checkpoints_revision", "checkpoints_segment"}
    assert {row["conname"] for row in rows} - held == behind


async def test_the_checks_behind_the_triggers_refuse_too(database: Database) -> None:
    async with database.connection() as connection:
        await connection.execute(SAVED)
        for table in ("operations", "operation_checkpoints"):
            await connection.execute(f"ALTER TABLE ktrdr.{table} DISABLE TRIGGER USER")
        for statement, constraint in (
            (SET.format("status = 'paused', finished_at = now()"), "operations_status"),
            (SET.format("status = 'pending'"), "operations_claimed"),
            ("UPDATE ktrdr.operation_checkpoints SET revision = 0", "checkpoints_revision"),
            ("UPDATE ktrdr.operation_checkpoints SET last_segment = -1", "checkpoints_segment"),
        ):
            with pytest.raises(asyncpg.CheckViolationError) as caught:
                await connection.execute(statement)
            assert caught.value.constraint_name == constraint


async def test_keys(database: Database) -> None:
    async with database.connection() as connection:
        await connection.execute(SAVED)
        for statement in (PENDING, head(), segment()):
            with pytest.raises(asyncpg.UniqueViolationError):
                await connection.execute(statement)
        for statement in (head(), segment()):
            with pytest.raises(asyncpg.ForeignKeyViolationError):
                await connection.execute(statement.replace("('a'", "('b'"))
        await connection.execute("DELETE FROM ktrdr.operations")
        assert await connection.fetchval("SELECT count(*) FROM ktrdr.ledger_segments") == 0
        assert await connection.fetchval("SELECT count(*) FROM ktrdr.operation_checkpoints") == 0


def columns_of(status: Status) -> str:
    if status is Status.COMPLETED:
        return COMPLETE
    ended = "now()" if status in ENDINGS else "NULL"
    error = "'{}'" if status is Status.FAILED else "NULL"
    return f"status = '{status}', finished_at = {ended}, error = {error}"


@pytest.mark.parametrize("first", list(Status))
async def test_the_trigger_permits_what_the_life_cycle_permits(database: Database, first: Status) -> None:
    async with database.connection() as connection:
        await connection.execute(PENDING)
        if first is not Status.PENDING:
            await connection.execute(CLAIM)
        if first in ENDINGS:
            await connection.execute(SET.format(columns_of(first)))
        permitted = set()
        for second in Status:
            if second is first and second is not Status.RUNNING:
                continue  # an update that leaves the status alone is no transition
            transaction = connection.transaction(isolation="read_committed")
            await transaction.start()
            try:
                await connection.execute(CLAIM if second is Status.RUNNING else SET.format(columns_of(second)))
                permitted.add(second)
            except asyncpg.CheckViolationError:
                pass
            finally:
                await transaction.rollback()
    assert permitted == TRANSITIONS[first]
