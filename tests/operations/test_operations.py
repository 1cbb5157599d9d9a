"""Creating, claiming, heartbeats, cancelling, finding, cleaning. Real PostgreSQL."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import uuid
from typing import Any

import asyncpg
import msgspec
import pytest

from ktrdr_async.checkpoint.schemas import BacktestCheckpointState, CheckpointType, RecordedValue
from ktrdr_async.checkpoint.service import CheckpointService
from ktrdr_async.errors import (
    AlreadyClaimedError,
    DatabaseError,
    InputError,
    InvalidTransitionError,
    OperationConflictError,
    OperationNotFoundError,
)
from ktrdr_async.operations import service as service_module
from ktrdr_async.operations.lifecycle import CHANNEL, Beat, Claim, Owner, Parent, Status, is_alive
from ktrdr_async.operations.service import OperationsService
from ktrdr_async.storage.database import Database

pytestmark = pytest.mark.anyio
ME = Owner.this_process()
ELSEWHERE = Owner("elsewhere", "boot", None, 7, 1.0)
DEAD = msgspec.structs.replace(ME, started=ME.started - 1)  # this pid, reused
COMPLETED: dict[str, Any] = {"state": None, "result": {}, "result_digest": "ab" * 32}
TYPES = {Status.FAILED: "failure", Status.CANCELLED: "cancellation", Status.INTERRUPTED: "shutdown"}
SAVE = BacktestCheckpointState(bar_index=9, current_date="2026-01-01", cash=1.0)


@pytest.fixture
def operations(database: Database) -> OperationsService:
    return OperationsService(database)


async def run(database: Database, statement: str, *arguments: Any) -> None:
    async with database.connection() as connection:
        await connection.execute(statement, *arguments)


async def age(database: Database, seconds: float, operation_id: str = "a") -> None:
    """Moves an operation into the past by the server's clock."""
    async with database.connection() as connection:
        await connection.execute("ALTER TABLE ktrdr.operations DISABLE TRIGGER operations_fixed")
        await connection.execute(
            "UPDATE ktrdr.operations SET heartbeat_at = heartbeat_at - make_interval(secs => $2),"
            " finished_at = finished_at - make_interval(secs => $2), "
            "created_at = created_at - make_interval(secs => $2) WHERE operation_id = $1",
            operation_id,
            seconds,
        )
        await connection.execute("ALTER TABLE ktrdr.operations ENABLE TRIGGER operations_fixed")


async def beat(operations: OperationsService, database: Database, *beats: Beat) -> list[tuple[str, str, bool, bool]]:
    async with database.connection() as connection:
        answers = await operations.heartbeat(connection, beats)
    return [(a.operation_id, a.kind, a.cancel, a.paused) for a in answers]


async def sessions(database: Database, condition: str, count: int) -> bool:
    """Whether as many other sessions of this database are in a state."""
    async with database.connection() as connection:
        found = await connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            f" AND {condition}"
        )
    return bool(found == count)


async def waiting_on_a_lock(database: Database, count: int = 1) -> None:
    for _ in range(1000):
        if await sessions(database, "wait_event_type = 'Lock'", count):
            return
        await asyncio.sleep(0.01)
    raise AssertionError("nobody waits")


# creating


async def test_create_is_idempotent_by_a_canonical_comparison(operations: OperationsService) -> None:
    first = await operations.create("a", {"x": 1, "y": [1e16, -0.0, 0.1]}, parent=Parent("p", 7, "ab"))
    assert (first.status, first.epoch, first.attempts, first.type) == (Status.PENDING, 0, 0, "backtesting")
    assert first.parent == Parent("p", 7, "ab")
    assert repr(first.request["y"]) == "[1e+16, -0.0, 0.1]"
    assert await operations.create("a", {"y": (10**16, -0.0, 1e-1), "x": 1.0}) == first
    for other in ({"x": 2, "y": [1e16, -0.0, 0.1]}, {"x": 1}, {}):
        with pytest.raises(OperationConflictError, match=r"x: stored 1|y: stored"):
            await operations.create("a", other)
    with pytest.raises(OperationConflictError):
        await operations.create("a", {"x": 1, "y": [1e16, -0.0, 0.1]}, type="training")


async def test_without_an_id_a_random_one_is_made(operations: OperationsService) -> None:
    made = {(await operations.create(None, {})).operation_id for _ in range(3)}
    assert len(made) == 3
    assert all(len(name) == 32 for name in made)


@pytest.mark.parametrize("wrong", ["", "a b", "a/b", "é", "a\n", "a" * 129, "a;DROP TABLE x", "\x00", "\ud800"])
async def test_ids_are_validated(operations: OperationsService, wrong: str) -> None:
    with pytest.raises(InputError, match="can't be an operation's id"):
        await operations.create(wrong, {})
    with pytest.raises(InputError):
        await operations.find(wrong)


async def test_the_widest_ids_are_taken(operations: OperationsService) -> None:
    for name in ("a" * 128, "-._", "AZaz09"):
        assert (await operations.create(name, {})).operation_id == name


async def test_a_request_that_cant_be_stored_is_refused(operations: OperationsService) -> None:
    for wrong in ({"a": object()}, {"a": "\x00"}):
        with pytest.raises(InputError):
            await operations.create("a", wrong)
    assert await operations.list() == []


async def test_concurrent_creations_of_one_id_find_one_row(operations: OperationsService) -> None:
    found = await asyncio.gather(*(operations.create("a", {"x": 1}) for _ in range(12)))
    assert len({operation.created_at for operation in found}) == 1


# claiming


async def test_a_claim_raises_the_epoch_and_gives_a_new_token(operations: OperationsService) -> None:
    await operations.create("a", {})
    first = await operations.claim("a", owner=ME)
    second = await operations.claim("a", owner=ELSEWHERE, take_over=True)
    assert (first.epoch, second.epoch) == (1, 2)
    assert first.token != second.token
    found = await operations.get("a")
    assert (found.status, found.owner, found.attempts) == (Status.RUNNING, ELSEWHERE, 2)


async def test_of_concurrent_claims_one_wins(operations: OperationsService) -> None:
    await operations.create("a", {})
    found = await asyncio.gather(*(operations.claim("a", owner=ME) for _ in range(12)), return_exceptions=True)
    assert sum(isinstance(item, Claim) for item in found) == 1
    assert sum(isinstance(item, AlreadyClaimedError) for item in found) == 11
    assert (await operations.get("a")).epoch == 1


@pytest.mark.parametrize("decided", [False, True])
async def test_two_takeovers_that_read_the_same_epoch_dont_both_win(
    operations: OperationsService, database: Database, decided: bool
) -> None:
    await operations.create("a", {})
    await operations.claim("a", owner=ELSEWHERE)
    await age(database, 60)
    async with database.connection() as holder, holder.transaction(isolation="read_committed"):
        await holder.execute("SELECT 1 FROM ktrdr.operations FOR UPDATE")
        claims = [asyncio.create_task(operations.claim("a", owner=ELSEWHERE, take_over=decided)) for _ in range(2)]
        await waiting_on_a_lock(database, 2)  # both have read epoch 1
    found = await asyncio.gather(*claims, return_exceptions=True)
    assert {type(item) for item in found} == {Claim, AlreadyClaimedError}
    assert (await operations.get("a")).epoch == 2


async def test_of_concurrent_claims_one_wins_on_a_pool_with_another_isolation_level(dsn: str) -> None:
    settings = {"default_transaction_isolation": "serializable"}
    async with asyncpg.create_pool(dsn, server_settings=settings) as pool, Database.open(pool=pool) as database:
        operations = OperationsService(database)
        found = await asyncio.gather(*(operations.create("a", {"x": 1}) for _ in range(8)))
        assert len({operation.created_at for operation in found}) == 1
        claims = await asyncio.gather(*(operations.claim("a", owner=ME) for _ in range(8)), return_exceptions=True)
        assert sorted(type(item).__name__ for item in claims) == ["AlreadyClaimedError"] * 7 + ["Claim"]


async def test_completed_and_missing_ones_cant_be_claimed(operations: OperationsService, database: Database) -> None:
    with pytest.raises(OperationNotFoundError):
        await operations.claim("a", owner=ME)
    await operations.create("a", {})
    await CheckpointService(database, await operations.claim("a", owner=ME)).finish(Status.COMPLETED, **COMPLETED)
    with pytest.raises(InvalidTransitionError):
        await operations.claim("a", owner=ME, take_over=True)


async def test_an_owner_on_this_host_is_looked_at_exactly(operations: OperationsService, database: Database) -> None:
    """After kill -9 a resume takes over at once; a live owner that sent no heartbeat for long isn't robbed."""
    await operations.create("a", {})
    await operations.claim("a", owner=DEAD)
    assert (await operations.claim("a", owner=ME)).epoch == 2
    await age(database, 3600)
    with pytest.raises(AlreadyClaimedError, match=str(os.getpid())):
        await operations.claim("a", owner=ME)
    assert (await operations.claim("a", owner=ME, take_over=True)).epoch == 3


async def test_an_owner_elsewhere_has_its_lease_by_the_servers_clock(
    operations: OperationsService, database: Database
) -> None:
    await operations.create("a", {})
    await operations.claim("a", owner=ELSEWHERE)
    await age(database, 25)
    with pytest.raises(AlreadyClaimedError):
        await operations.claim("a", owner=ME)
    assert (await operations.claim("a", owner=ELSEWHERE, lease_seconds=20)).epoch == 2
    await age(database, 31)
    assert (await operations.claim("a", owner=ME)).epoch == 3


async def test_a_heartbeat_that_commits_while_a_claim_waits_keeps_the_lease(
    operations: OperationsService, database: Database
) -> None:
    """The claim's UPDATE repeats the condition: what was read before the wait isn't true any more."""
    await operations.create("a", {})
    await operations.claim("a", owner=ELSEWHERE)
    await age(database, 60)
    async with database.connection() as holder, holder.transaction(isolation="read_committed"):
        await holder.execute("UPDATE ktrdr.operations SET heartbeat_at = clock_timestamp()")
        claiming = asyncio.create_task(operations.claim("a", owner=ME))
        await waiting_on_a_lock(database)
    with pytest.raises(AlreadyClaimedError):
        await claiming
    assert (await operations.get("a")).epoch == 1


async def test_failed_cancelled_and_interrupted_ones_are_claimed_again(
    operations: OperationsService, database: Database
) -> None:
    for status in (Status.FAILED, Status.CANCELLED, Status.INTERRUPTED):
        await operations.create(status.value, {})
        claim = await operations.claim(status.value, owner=ME)
        error = {"message": "x"} if status is Status.FAILED else None
        await CheckpointService(database, claim).finish(status, state=SAVE, error=error)
        assert (await operations.get(status.value)).error == error
        assert (await operations.claim(status.value, owner=ME)).epoch == 2
        found = await operations.get(status.value)
        assert (found.status, found.error, found.finished_at) == (Status.RUNNING, None, None)
        assert (found.checkpoint_bar, found.checkpoint_type) == (9, TYPES[status])


# owners


def test_liveness_of_owners() -> None:
    assert is_alive(ME) is True
    assert is_alive(DEAD) is False
    assert is_alive(ELSEWHERE) is None
    for field in ("host", "boot_id", "pid_namespace"):
        assert is_alive(msgspec.structs.replace(ME, **{field: "other"})) is None
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        from ktrdr_async.operations.lifecycle import _started

        started = _started(child.pid)
        assert started is not None
        owner = msgspec.structs.replace(ME, pid=child.pid, started=started)
        assert is_alive(owner) is True
        child.kill()
        while is_alive(owner):  # it is a zombie now: nobody has waited for it
            pass
        assert is_alive(owner) is False
    finally:
        child.kill()
        child.communicate()
    assert is_alive(owner) is False


# heartbeats


async def test_a_heartbeat_renews_tells_and_stores_progress(operations: OperationsService, database: Database) -> None:
    claims = {}
    for name in ("a", "b", "c", "d"):
        await operations.create(name, {})
        claims[name] = await operations.claim(name, owner=ME)
        await age(database, 60, name)
    before = (await operations.get("a")).heartbeat_at
    assert before is not None
    await operations.cancel("b")
    await operations.pause("c", True)
    await operations.claim("d", owner=ME, take_over=True)
    beats = [Beat(claims["a"], {"bar": 3, "x": float("nan"), "s": "\x00"}), Beat(claims["b"]), Beat(claims["c"]),
             Beat(claims["d"], {"bar": 9}), Beat(Claim("no", 1, uuid.uuid4())),
             Beat(Claim("a", 1, uuid.uuid4()))]  # fmt: skip
    assert sorted(await beat(operations, database, *beats[:5])) == [
        ("a", "ours", False, False),
        ("b", "ours", True, False),
        ("c", "ours", False, True),
        ("d", "lost", False, False),
        ("no", "lost", False, False),
    ]
    assert await beat(operations, database, beats[5]) == [("a", "lost", False, False)]
    found = await operations.get("a")
    assert found.progress is not None
    assert found.progress["bar"] == 3
    assert found.heartbeat_at is not None
    assert (found.heartbeat_at - before).total_seconds() > 59
    await beat(operations, database, Beat(claims["a"]))
    assert (await operations.get("a")).progress is not None  # None leaves what is stored
    assert (await operations.get("d")).progress is None
    assert await beat(operations, database) == []


async def test_a_row_that_a_save_holds_is_busy_and_starves_no_other(
    operations: OperationsService, database: Database
) -> None:
    claims = []
    for name in ("a", "b"):
        await operations.create(name, {})
        claims.append(await operations.claim(name, owner=ME))
    async with database.connection() as holder, holder.transaction(isolation="read_committed"):
        await holder.execute("SELECT 1 FROM ktrdr.operations WHERE operation_id = 'a' FOR NO KEY UPDATE")
        answers = await asyncio.wait_for(beat(operations, database, *map(Beat, claims)), 10)
        assert sorted(answers) == [("a", "busy", False, False), ("b", "ours", False, False)]
    assert sorted(await beat(operations, database, *map(Beat, claims)))[0] == ("a", "ours", False, False)


# cancelling and pausing


async def test_what_nobody_runs_is_cancelled_at_once(operations: OperationsService, database: Database) -> None:
    await operations.create("a", {})
    assert (await operations.cancel("a")).status is Status.CANCELLED
    assert (await operations.cancel("a")).status is Status.CANCELLED  # again is no error
    claim = await operations.claim("a", owner=ME)
    assert not (await operations.get("a")).cancel_requested
    await CheckpointService(database, claim).finish(Status.INTERRUPTED, state=SAVE)
    assert (await operations.cancel("a")).status is Status.CANCELLED
    assert (await operations.get("a")).checkpoint_bar == 9


async def test_a_cancel_names_its_epoch_and_a_claim_voids_it(operations: OperationsService, database: Database) -> None:
    await operations.create("a", {})
    await operations.claim("a", owner=ME)
    found = await operations.cancel("a")
    assert (found.status, found.cancel_epoch, found.cancel_requested) == (Status.RUNNING, 1, True)
    claim = await operations.claim("a", owner=ME, take_over=True)
    assert not (await operations.get("a")).cancel_requested
    assert await beat(operations, database, Beat(claim)) == [("a", "ours", False, False)]
    with pytest.raises(InvalidTransitionError, match="epoch 2, not 1"):
        await operations.cancel("a", epoch=1)
    assert not (await operations.get("a")).cancel_requested
    assert (await operations.cancel("a", epoch=2)).cancel_requested


async def test_a_cancel_whose_owner_is_gone_ends_the_operation(
    operations: OperationsService, database: Database
) -> None:
    for name, owner in (("dead", DEAD), ("old", ELSEWHERE), ("fresh", ELSEWHERE)):
        await operations.create(name, {})
        await operations.claim(name, owner=owner)
    await age(database, 60, "old")
    assert (await operations.cancel("dead")).status is Status.CANCELLED
    assert (await operations.cancel("old")).status is Status.CANCELLED
    assert (await operations.cancel("fresh")).status is Status.RUNNING


async def test_ended_and_missing_ones_cant_be_cancelled_or_paused(
    operations: OperationsService, database: Database
) -> None:
    for call in (
        operations.cancel("a"),
        operations.pause("a", True),
        operations.get("a"),
        operations.delete_checkpoint("a"),
    ):
        with pytest.raises(OperationNotFoundError):
            await call
    await operations.create("a", {})
    claim = await operations.claim("a", owner=ME)
    await CheckpointService(database, claim).finish(Status.FAILED, state=None, error={"m": "x"})
    with pytest.raises(InvalidTransitionError, match="failed"):
        await operations.cancel("a")
    claim = await operations.claim("a", owner=ME)
    await CheckpointService(database, claim).finish(Status.COMPLETED, **COMPLETED)
    for call in (operations.cancel("a"), operations.pause("a", True)):
        with pytest.raises(InvalidTransitionError, match="completed"):
            await call


async def test_cancel_and_pause_notify(operations: OperationsService, database: Database, dsn: str) -> None:
    heard: list[str] = []
    listener = await asyncpg.connect(dsn)
    try:
        await listener.add_listener(CHANNEL, lambda *arguments: heard.append(arguments[-1]))
        await operations.create("a", {})
        await operations.claim("a", owner=ME)
        assert (await operations.pause("a", True)).paused
        await operations.cancel("a")
        for _ in range(1000):
            if len(heard) == 2:
                break
            await asyncio.sleep(0.01)
        assert heard == ["a", "a"]
        assert not (await operations.pause("a", False)).paused
    finally:
        await listener.close()


# finding


async def test_find_by_prefix(operations: OperationsService) -> None:
    for name in ("run-1", "run-10", "run-2", "r_x", "ryx"):
        await operations.create(name, {})
    assert (await operations.find("run-2")).operation_id == "run-2"
    assert (await operations.find("run-1")).operation_id == "run-1"  # exact wins
    assert (await operations.find("r_")).operation_id == "r_x"  # no pattern
    with pytest.raises(InputError, match="run-1, run-10, run-2"):
        await operations.find("run")
    with pytest.raises(OperationNotFoundError):
        await operations.find("no")
    for n in range(12):
        await operations.create(f"many-{n}", {})
    with pytest.raises(InputError, match=r"\.\.\."):
        await operations.find("many")


async def test_latest_and_list(operations: OperationsService, database: Database) -> None:
    with pytest.raises(OperationNotFoundError):
        await operations.latest()
    for name in ("a", "b", "c"):
        await operations.create(name, {})
    for name in ("b", "c"):
        claim = await operations.claim(name, owner=ME)
        await CheckpointService(database, claim).finish(Status.COMPLETED, **COMPLETED)
    assert (await operations.latest()).operation_id == "a"  # older, but not completed
    assert [o.operation_id for o in await operations.list()] == ["c", "b", "a"]
    assert [o.operation_id for o in await operations.list(limit=1)] == ["c"]
    assert [o.operation_id for o in await operations.list(statuses=[Status.PENDING])] == ["a"]
    await CheckpointService(database, await operations.claim("a", owner=ME)).finish(Status.COMPLETED, **COMPLETED)
    assert (await operations.latest()).operation_id == "a"


async def test_orphans(operations: OperationsService, database: Database) -> None:
    owners = {"alive": ME, "dead": DEAD, "elsewhere": ELSEWHERE, "lost": ELSEWHERE, "left": ME, "given up": ME}
    for name, owner in owners.items():
        await operations.create(name.replace(" ", "-"), {})
        claim = await operations.claim(name.replace(" ", "-"), owner=owner)
        if name == "left":
            await CheckpointService(database, claim).finish(Status.INTERRUPTED, state=None)
        if name == "given up":
            await CheckpointService(database, claim).finish(Status.CANCELLED, state=None)
    await operations.create("pending", {})
    await age(database, 60, "lost")
    await age(database, 60, "alive")
    assert sorted(o.operation_id for o in await operations.orphans()) == ["dead", "left", "lost"]


async def test_cancelled_orphans_end_and_arent_taken_up(operations: OperationsService, database: Database) -> None:
    await operations.create("a", {})
    await operations.claim("a", owner=ELSEWHERE)
    await operations.cancel("a")
    assert await operations.orphans() == []
    assert (await operations.get("a")).status is Status.RUNNING
    await age(database, 60)  # it died before it heard of it
    assert await operations.orphans() == []
    assert (await operations.get("a")).status is Status.CANCELLED


# cleaning


async def test_clean_deletes_what_is_old_and_refuses_what_runs(
    operations: OperationsService, database: Database
) -> None:
    day = 86_400
    for name, owner in (("done", ME), ("stale", DEAD), ("lives", ME), ("far", ELSEWHERE)):
        await operations.create(name, {})
        claim = await operations.claim(name, owner=owner)
        await CheckpointService(database, claim).save_checkpoint(name, CheckpointType.PERIODIC, SAVE)
        if name == "done":
            await CheckpointService(database, claim).finish(Status.INTERRUPTED, state=None)
    await operations.create("pending", {})
    await operations.create("new", {})
    for name in ("done", "stale", "lives", "far", "pending"):
        await age(database, 31 * day, name)
    expected = ["done", "far", "pending", "stale"]
    assert sorted(await operations.clean(dry_run=True)) == expected
    assert len(await operations.list()) == 6
    assert await operations.clean(older_than_days=32) == []
    assert sorted(await operations.clean()) == expected
    assert sorted(o.operation_id for o in await operations.list()) == ["lives", "new"]
    with pytest.raises(InputError):
        await operations.clean(older_than_days=-1)
    assert await operations.clean(older_than_days=0) == ["new"]  # never what runs
    async with database.connection() as connection:
        assert await connection.fetchval("SELECT count(*) FROM ktrdr.operation_checkpoints") == 1


async def test_clean_looks_again_under_the_rows_lock(operations: OperationsService, database: Database) -> None:
    await operations.create("a", {})
    await age(database, 40 * 86_400)
    async with database.connection() as holder, holder.transaction(isolation="read_committed"):
        await holder.execute(
            "UPDATE ktrdr.operations SET status = 'running', epoch = 1, attempts = 1, owner_token = gen_random_uuid(),"
            " owner_host = 'h', owner_boot_id = 'b', owner_pid = 1, owner_started = 1, heartbeat_at = now(),"
            " started_at = now()"
        )
        cleaning = asyncio.create_task(operations.clean())
        await waiting_on_a_lock(database)
    assert await cleaning == []
    assert (await operations.get("a")).status is Status.RUNNING


async def test_deleting_a_checkpoint_deletes_its_segments_too(
    operations: OperationsService, database: Database
) -> None:
    await operations.create("a", {})
    claim = await operations.claim("a", owner=ME)
    service = CheckpointService(database, claim)
    samples = BacktestCheckpointState(bar_index=9, current_date="x", cash=1.0, recorded=[RecordedValue(1, "x", 2.0)])
    await service.save_checkpoint("a", CheckpointType.PERIODIC, samples)
    with pytest.raises(InvalidTransitionError, match="running"):
        await operations.delete_checkpoint("a")
    await service.finish(Status.CANCELLED, state=None)
    await operations.delete_checkpoint("a")
    await operations.delete_checkpoint("a")  # again is no error
    async with database.connection() as connection:
        assert await connection.fetchval("SELECT count(*) FROM ktrdr.ledger_segments") == 0
    claim = await operations.claim("a", owner=ME)
    service = CheckpointService(database, claim)
    assert await service.load_checkpoint("a") is None
    await service.save_checkpoint("a", CheckpointType.PERIODIC, samples)
    await service.finish(Status.COMPLETED, **COMPLETED)
    with pytest.raises(InvalidTransitionError, match="completed"):
        await operations.delete_checkpoint("a")
    assert len((await service.load_ledger("a")).recorded) == 1


# deadlines


async def test_a_call_ends_at_its_deadline(
    operations: OperationsService, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await operations.create("a", {})
    monkeypatch.setattr(service_module, "CALL_SECONDS", 0.3)
    async with database.connection() as holder, holder.transaction(isolation="read_committed"):
        await holder.execute("SELECT 1 FROM ktrdr.operations FOR UPDATE")
        with pytest.raises(DatabaseError, match="didn't answer"):
            await operations.claim("a", owner=ME)
    for _ in range(1000):
        if await sessions(database, "state = 'active'", 0):
            break
        await asyncio.sleep(0.01)
    # The statement landed after all, under a token that nobody has: it must not stand in the way as a live owner's.
    assert (await operations.get("a")).epoch == 1
    monkeypatch.undo()
    claim = await operations.claim("a", owner=ME)
    assert claim.epoch == 2
    await CheckpointService(database, claim).save_checkpoint("a", CheckpointType.PERIODIC, SAVE)
    with pytest.raises(AlreadyClaimedError):
        await operations.claim("a", owner=ME)


async def test_a_cancelled_call_raises_the_cancellation_and_leaves_no_task(
    operations: OperationsService, database: Database
) -> None:
    await operations.create("a", {})
    before = asyncio.all_tasks()
    async with database.connection() as holder, holder.transaction(isolation="read_committed"):
        await holder.execute("SELECT 1 FROM ktrdr.operations FOR UPDATE")
        claiming = asyncio.create_task(operations.claim("a", owner=ME))
        await waiting_on_a_lock(database)
        for _ in range(3):
            claiming.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await claiming
        assert asyncio.all_tasks() == before
