"""Loading: exact, or refused with what failed. Real PostgreSQL."""

from __future__ import annotations

import math
import random
import struct
from typing import Any

import anyio
import anyio.lowlevel
import msgspec
import pytest
from checkpoint_samples import DIGEST, claimed, event, state

from ktrdr_async.checkpoint import codec, reading
from ktrdr_async.checkpoint.manifest import Manifest
from ktrdr_async.checkpoint.schemas import (
    BacktestCheckpointState,
    CheckpointType,
    Counters,
    EquitySample,
    PositionState,
    RecordedValue,
    WaitingOrder,
)
from ktrdr_async.checkpoint.service import CheckpointService
from ktrdr_async.errors import CheckpointCorruptedError, OperationNotFoundError, SchemaVersionError
from ktrdr_async.operations.lifecycle import Status
from ktrdr_async.operations.service import OperationsService
from ktrdr_async.storage.database import Database

pytestmark = pytest.mark.anyio
PERIODIC = CheckpointType.PERIODIC
HARD = [
    1e16, 1e16 + 2, 1e15, 9007199254740993.0, 1e17, 1e21, 1e22, 1e300, -1e300, 1.7976931348623157e308, 5e-324, -5e-324,
    2.2250738585072014e-308, 0.0, -0.0, 0.1, 1 / 3, -1e-7, 123456789.125, 100.0,
]  # fmt: skip


def bits(value: Any) -> Any:
    """Floats as their bits: -0.0 differs from 0.0, and NaN equals itself."""
    if isinstance(value, float):
        return struct.pack("<d", value)
    if isinstance(value, list | tuple):
        return [bits(item) for item in value]
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if hasattr(value, "__struct_fields__"):
        return [bits(getattr(value, name)) for name in value.__struct_fields__]
    return value


async def round_trip(database: Database, given: BacktestCheckpointState) -> BacktestCheckpointState:
    _, claim, service = await claimed(database)
    await service.save_checkpoint("op", PERIODIC, given)
    loaded = await CheckpointService(database, claim).load_checkpoint("op")
    assert loaded is not None
    loaded.trades = []
    return loaded


async def test_r1_floats_come_back_equal_in_every_bit(database: Database) -> None:
    generator = random.Random(7)
    numbers = [n for n in (struct.unpack("<d", generator.randbytes(8))[0] for _ in range(6_000)) if math.isfinite(n)]
    numbers = HARD + numbers[:5_000]
    given = state(
        99,
        cash=-0.0,
        ledger=[event(n, price=x, fee=-x, cash_after=x / 3) for n, x in enumerate(numbers)],
        equity_samples=[EquitySample(n, n, x) for n, x in enumerate(numbers)],
        recorded=[RecordedValue(n, "x", x) for n, x in enumerate(numbers)],
    )
    assert bits(await round_trip(database, given)) == bits(given)


async def test_r1_the_heads_floats_come_back_equal_in_every_bit(database: Database) -> None:
    tree = {f"n{n}": x for n, x in enumerate(HARD)} | {"deep": [{"a": [1, 1.0, True, None, "x", 10**18, -(2**63)]}]}
    given = state(
        99,
        cash=1e300,
        original_request=tree | {"lot_size": 0.5},
        positions=[PositionState("A", -3, 1, x, -x, x, math.nan) for x in HARD],
        waiting=[WaitingOrder(0, -5, "order", None), WaitingOrder(1, 5, "order", "täg \" ' \\ \u2028")],
        counters=Counters(zero_lots=[1, 2], zero_lots_first=[(-0.0, 1e16), None]),
        manifest=Manifest({"a": -0.0}, "b", "s", {"builtin": "1"}, "d", 1, None, {"python": "3"}),
        strategy_state=bytes(range(256)),
        state_digest="ab",
    )
    assert bits(await round_trip(database, given)) == bits(given)


async def test_recorded_values_that_json_cant_hold_come_back(database: Database) -> None:
    values: list[float | str] = [math.nan, math.inf, -math.inf, -0.0, "nan", "inf", "-inf", "-0.0", '{"$float":"nan"}']
    given = state(99, recorded=[RecordedValue(n, "$float", x) for n, x in enumerate(values)])
    assert bits(await round_trip(database, given)) == bits(given)


async def test_integers_given_as_floats_dont_break_the_digest(database: Database) -> None:
    given = state(99, cash=100_000, ledger=[event(0, price=5, fee=0)], original_request={"lot_size": 1, "t": (1, 2)})
    loaded = await round_trip(database, given)
    assert type(loaded.cash) is float
    assert type(loaded.ledger[0].price) is float


async def test_trades_use_the_requests_lot_size(database: Database) -> None:
    _, _, service = await claimed(database)
    await service.save_checkpoint("op", PERIODIC, state(99, 2, original_request={"lot_size": 0.25}))
    loaded = await service.load_checkpoint("op")
    assert loaded is not None
    assert [trade.net_pnl for trade in loaded.trades] == [-0.25]
    assert loaded.ledger_from == loaded.samples_from == loaded.recorded_from == 0


async def test_nothing_to_load(database: Database) -> None:
    await OperationsService(database).create("op", {})
    assert await CheckpointService(database).load_checkpoint("op") is None
    loaded = await CheckpointService(database).load_ledger("op")
    assert loaded.ledger == []
    for call in (CheckpointService(database).load_checkpoint("no"), CheckpointService(database).load_ledger("no")):
        with pytest.raises(OperationNotFoundError):
            await call


SEGMENT = "UPDATE ktrdr.ledger_segments SET "
RECORD = SEGMENT + "records = jsonb_set(records, "
HEAD = "UPDATE ktrdr.operation_checkpoints SET "
CORRUPTIONS = {
    "price": (RECORD + "'{ledger,0,4}', '7.5') WHERE sequence = 2", "segment 2 fails"),
    "sample": (RECORD + "'{equity_samples,0,2}', '7') WHERE sequence = 1", "segment 1 fails"),
    "recorded": (RECORD + "'{recorded,0,1}', '\"y\"') WHERE sequence = 3", "segment 3 fails"),
    "type": (RECORD + "'{ledger,0,4}', '\"x\"') WHERE sequence = 2", "segment 2 can't be read"),
    "kind": (SEGMENT + "records = records || '{\"more\": []}' WHERE sequence = 2", "segment 2 can't be read"),
    "digest": (SEGMENT + "digest = repeat('1', 64) WHERE sequence = 1", "segment 1 fails its digest"),
    "prev": (SEGMENT + "prev_digest = repeat('1', 64) WHERE sequence = 2", "segment 2 doesn't continue"),
    "first missing": ("DELETE FROM ktrdr.ledger_segments WHERE sequence = 1", "segment 1 is missing"),
    "middle missing": ("DELETE FROM ktrdr.ledger_segments WHERE sequence = 2", "segment 2 is missing"),
    "last missing": ("DELETE FROM ktrdr.ledger_segments WHERE sequence = 3", "segment 3 of 3 is missing"),
    "extra": (
        "INSERT INTO ktrdr.ledger_segments"
        " SELECT operation_id, 4, ledger_to, ledger_to + 2, samples_to, samples_to + 2,"
        " recorded_to, recorded_to + 2, records, digest, repeat('2', 64) FROM ktrdr.ledger_segments WHERE sequence = 3",
        "there are 4 segments, the checkpoint's last one is segment 3",
    ),
    "reordered": (
        SEGMENT + "sequence = -sequence; "
        + SEGMENT + "sequence = CASE sequence WHEN -1 THEN 2 WHEN -2 THEN 1 ELSE 3 END",
        "segment 1 begins at",
    ),
    "counts": (
        SEGMENT + "ledger_from = ledger_from + 1, ledger_to = ledger_to + 1 WHERE sequence = 3", "segment 3 begins at",
    ),
    "length": (SEGMENT + "ledger_to = ledger_to + 1 WHERE sequence = 3", "segment 3 says that it ends at"),
    "head's counts": (HEAD + "samples_count = samples_count + 1", "the checkpoint stands at"),
    "head's cash": (HEAD + "state = jsonb_set(state, '{cash}', '1')", "the head of revision 3 fails its digest"),
    "head's request": (HEAD + "state = jsonb_set(state, '{original_request,seed}', '1')", "fails its digest"),
    "head's type": (HEAD + "checkpoint_type = 'failure'", "fails its digest"),
    "head's revision": (HEAD + "revision = 9", "fails its digest"),
    "head's field": (HEAD + "state = state - 'cash'", "the head can't be read"),
    "head's text": (HEAD + "state = jsonb_set(state, '{cash}', '\"much\"')", "the head can't be read"),
    "head missing": ("DELETE FROM ktrdr.operation_checkpoints", "there are 3 segments of a ledger and no checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("what", CORRUPTIONS)
async def test_r1_a_corrupted_checkpoint_is_refused_with_what_failed(dsn: str, what: str) -> None:
    statement, message = CORRUPTIONS[what]
    async with Database.open(dsn) as database:
        _, _, service = await claimed(database)
        for n in range(3):
            await service.save_checkpoint("op", PERIODIC, state(n, 2 * n + 2, since=2 * n))
        assert await service.load_checkpoint("op") is not None
        async with database.connection() as connection:
            for table, checks in (
                ("ledger_segments", ("segments_records", "segments_sequence", "segments_counts")),
                ("operation_checkpoints", ("checkpoints_counts",)),
            ):
                await connection.execute(f"ALTER TABLE ktrdr.{table} DISABLE TRIGGER USER")
                for check in checks:
                    await connection.execute(f"ALTER TABLE ktrdr.{table} DROP CONSTRAINT {check}")
            await connection.execute(statement)
        with pytest.raises(CheckpointCorruptedError) as caught:
            await service.load_checkpoint("op")
        assert message in str(caught.value)


async def test_a_truncated_ledger_of_a_completed_operation_is_refused(database: Database) -> None:
    _, _, service = await claimed(database)
    await service.save_checkpoint("op", PERIODIC, state(1, 2))
    await service.finish(Status.COMPLETED, state=state(2, 4, since=2), result={}, result_digest=DIGEST)
    async with database.connection() as connection:
        await connection.execute("DELETE FROM ktrdr.ledger_segments WHERE sequence = 2")
    with pytest.raises(CheckpointCorruptedError, match="segment 2 of 2 is missing"):
        await service.load_ledger("op")


async def test_r1_a_load_sees_one_snapshot(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its statements the checkpoint is deleted: what is loaded is whole all the same."""
    operations, _, service = await claimed(database)
    for n in range(3):
        await service.save_checkpoint("op", PERIODIC, state(n, 2 * n + 2, since=2 * n))
    await service.finish(Status.CANCELLED, state=None)
    read = reading._read_chain

    async def later(*arguments: Any) -> Any:
        await operations.delete_checkpoint("op")
        return await read(*arguments)

    monkeypatch.setattr(reading, "_read_chain", later)
    loaded = await CheckpointService(database).load_checkpoint("op")
    assert loaded is not None
    assert loaded.ledger == [event(n) for n in range(6)]
    assert await CheckpointService(database).load_checkpoint("op") is None


async def test_a_checkpoint_of_another_operation_doesnt_pass_for_this_ones(database: Database) -> None:
    _, _, first = await claimed(database, "a")
    _, _, second = await claimed(database, "b")
    await first.save_checkpoint("a", PERIODIC, state(99))
    await second.save_checkpoint("b", PERIODIC, state(99, cash=1.0))
    async with database.connection() as connection:
        await connection.execute(
            "ALTER TABLE ktrdr.operation_checkpoints DISABLE TRIGGER USER;"
            "UPDATE ktrdr.operation_checkpoints b SET state = a.state, digest = a.digest"
            " FROM ktrdr.operation_checkpoints a WHERE a.operation_id = 'a' AND b.operation_id = 'b'"
        )
    with pytest.raises(CheckpointCorruptedError, match="fails its digest"):
        await second.load_checkpoint("b")


async def test_a_newer_schema_is_handed_back_and_not_called_corrupted(database: Database) -> None:
    _, _, service = await claimed(database)
    await service.save_checkpoint("op", PERIODIC, state(99))
    async with database.connection() as connection:
        await connection.execute(
            "ALTER TABLE ktrdr.operation_checkpoints DISABLE TRIGGER USER;"
            'UPDATE ktrdr.operation_checkpoints SET state = state || \'{"schema_version": 2, "unknown": 1}\''
        )
    with pytest.raises(SchemaVersionError, match="version 2"):
        await service.load_checkpoint("op")


VERSION_1_SEGMENT = (
    '{"ledger":[[0,0,100,100,{"$float":"-0.0"},0.125,90000.5,"open","order","dip"]],'
    '"equity_samples":[[0,1000000000000000000,1e16]],"recorded":[[0,"x","nan"]]}'
)
VERSION_1_HEAD = (
    '{"bar_index":7,"current_date":"2026-01-01T00:00:00+00:00","cash":90000.5,"operation_type":"backtesting",'
    '"positions":[],"original_request":{"lot_size":1.0},"schema_version":1,"waiting":[],"strategy_state":"AAE=",'
    '"counters":{"cut":0,"cut_to_zero":0,"zero_lots":[],"zero_lots_first":[],"refused_after_ruin":0,'
    '"ordered_rows":1,"ruined_at":-1},"manifest":null,"state_digest":"ab"}'
)


async def test_a_stored_checkpoint_of_schema_version_1_still_loads(database: Database) -> None:
    """Written once by version 1, with the digests that it had. Never regenerate: a new version gets another one."""
    _, _, service = await claimed(database, "old")
    segment_digest = "f6db5a9bef31a74c7e9c17448958a3e2963ad13918ebdd5a34dcaecce00241c7"
    head_digest = "aab0fbdf48d9394c4a0a93cad9fba6626c43d88368d68c663921f36a0e897ecb"
    async with database.connection() as connection, connection.transaction(isolation="read_committed"):
        await connection.execute(
            "INSERT INTO ktrdr.ledger_segments"
            " VALUES ('old', 1, 0, 1, 0, 1, 0, 1, $1::text::jsonb, repeat('0', 64), $2)",
            VERSION_1_SEGMENT,
            segment_digest,
        )
        await connection.execute(
            "INSERT INTO ktrdr.operation_checkpoints VALUES"
            " ('old', 'periodic', now(), $1::text::jsonb, 400, 1, 1, 1, 1, 1, $2)",
            VERSION_1_HEAD,
            head_digest,
        )
    loaded = await service.load_checkpoint("old")
    assert loaded is not None
    assert loaded.counters == Counters(ordered_rows=1)
    assert bits(loaded.ledger) == bits([event(0, bar=0, price=-0.0, tag="dip")])
    assert loaded.recorded == [RecordedValue(0, "x", "nan")]


async def test_a_field_that_a_later_version_adds_doesnt_change_the_digest_of_an_old_head() -> None:
    class Later(BacktestCheckpointState, kw_only=True):
        regime: str = "none"
        levels: list[float] = []

    old = state(99)
    later = Later(**{name: getattr(old, name) for name in old.__struct_fields__})
    assert codec.canonical_head(later) == codec.canonical_head(old)
    assert codec.canonical_head(msgspec.structs.replace(later, regime="high")) != codec.canonical_head(old)
    assert codec.canonical_head(state(99, cash=-0.0)) != codec.canonical_head(state(99, cash=0.0))


async def test_everything_decoded_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    deep = "[" * 100_000
    with pytest.raises(ValueError, match="deeper"):
        codec.decode_head('{"original_request": {"a": ' + deep)
    nested = '{"a":' * 70 + "1" + "}" * 70
    with pytest.raises(ValueError, match="deeper"):
        codec.decode_head('{"original_request": ' + nested + "}")
    work = codec.SegmentWork("op", 1, codec.Counts(), codec.GENESIS)
    too_many = ",".join(["[0,1,1.0]"] * 5_001)
    with pytest.raises(ValueError, match="5001 records"):
        list(work.decode('{"ledger":[],"recorded":[],"equity_samples":[' + too_many + "]}"))
    monkeypatch.setattr(codec, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="101 bytes"):
        codec.decode_head(" " * 101)
    monkeypatch.setattr(codec, "MAX_SEGMENT_BYTES", 100)
    with pytest.raises(ValueError, match="101 bytes"):
        list(work.decode(" " * 101))


async def test_encoding_and_decoding_give_turns(database: Database) -> None:
    """No piece of a large save or load holds the loop: turns come at least once for each thousand records."""
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await anyio.lowlevel.checkpoint()
            turns += 1

    pieces = list(
        codec.SegmentWork("op", 1, codec.Counts(), codec.GENESIS).encode([event(n) for n in range(5_000)], [], [])
    )
    assert len(pieces) == 6
    _, _, service = await claimed(database)
    async with anyio.create_task_group() as group:
        group.start_soon(count)
        before = turns
        await service.save_checkpoint("op", PERIODIC, state(99, 5_000))
        assert turns - before >= 15
        group.cancel_scope.cancel()
