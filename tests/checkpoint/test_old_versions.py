"""Rolling deploys: what any version has stored is loaded for ever; what isn't known is handed back, by name.

`golden/version_N.json` holds the rows of two operations as the code of schema version N stored them: `run`, a
cancelled one that can be resumed, and `every`, with something in every field. Never write such a file anew: a new
version adds one.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from checkpoint_samples import claimed, head_of, state
from numpy.typing import NDArray

import ktrdr_async as kt
from ktrdr_async.backtesting import checkpoint_builder
from ktrdr_async.checkpoint import schemas
from ktrdr_async.checkpoint.schemas import SCHEMA_VERSION, BacktestCheckpointState, CheckpointType
from ktrdr_async.checkpoint.service import CheckpointService
from ktrdr_async.errors import SchemaVersionError
from ktrdr_async.operations.jsonb import to_json
from ktrdr_async.operations.lifecycle import Status
from ktrdr_async.storage.database import Database
from ktrdr_async.strategies.state import decode_state, encode_state

pytestmark = pytest.mark.anyio

GOLDEN = Path(__file__).parent / "golden"
VERSIONS = range(1, SCHEMA_VERSION + 1)
TABLES = ("operations", "operation_checkpoints", "ledger_segments")
REQUEST = kt.BacktestRequest(
    data="synthetic:?bars=600&seed=11&symbols=A,B&timeframe=1h", strategy="rsi_reversion", parameters={"period": 5},
    commission=0.00002, slippage=0.00005, seed=7,
)  # fmt: skip


class Kept(msgspec.Struct):
    """The strategy's state in `every`."""

    number: float
    by_name: dict[str, float]
    texts: list[str | None]
    columns: NDArray[np.float64]  # stands column by column
    days: NDArray[np.datetime64]
    flags: NDArray[np.bool_]
    raw: bytes


def golden(version: int) -> dict[str, Any]:
    return dict(json.loads((GOLDEN / f"version_{version}.json").read_text()))


async def stored(database: Database, version: int) -> dict[str, Any]:
    """Puts a version's rows into a database, as they were."""
    found = golden(version)
    async with database.connection() as connection:
        for table in TABLES:
            rows = found["rows"][table]
            columns = ", ".join(rows[0])
            assert re.fullmatch(r"[a-z_, ]+", columns)
            await connection.execute(f"ALTER TABLE ktrdr.{table} DISABLE TRIGGER USER")
            await connection.execute(
                f"INSERT INTO ktrdr.{table} ({columns}) SELECT {columns}"
                f" FROM jsonb_populate_recordset(NULL::ktrdr.{table}, $1::text::jsonb)", json.dumps(rows),
            )  # fmt: skip
            await connection.execute(f"ALTER TABLE ktrdr.{table} ENABLE TRIGGER USER")
    return found


async def with_version(database: Database, version: object, name: str = "run") -> None:
    """The stored head says that it is of another version, and has a field that nobody knows."""
    async with database.connection() as connection:
        await connection.execute("ALTER TABLE ktrdr.operation_checkpoints DISABLE TRIGGER USER")
        await connection.execute(
            "UPDATE ktrdr.operation_checkpoints SET state = state || $2::text::jsonb WHERE operation_id = $1", name,
            json.dumps({"schema_version": version, "unknown": [1]}),
        )  # fmt: skip
        await connection.execute("ALTER TABLE ktrdr.operation_checkpoints ENABLE TRIGGER USER")


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_stored_checkpoint_loads_with_its_digest(database: Database, version: int) -> None:
    """Loading refuses whatever doesn't fit the digests of head and segments; here every field is looked at too."""
    found = await stored(database, version)
    for name in ("run", "every"):
        loaded = await CheckpointService(database).load_checkpoint(name)
        assert loaded is not None
        tree = json.loads(to_json(loaded.to_dict()))
        assert {field: tree[field] for field in found["states"][name]} == found["states"][name]
        assert loaded.schema_version == version
    kept = decode_state(loaded.strategy_state, Kept)
    assert encode_state(kept) == loaded.strategy_state
    assert kept.columns.flags.f_contiguous
    assert not kept.columns.flags.c_contiguous
    assert (kept.columns.tolist(), str(kept.days[0])) == ([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], "2026-01-01")


async def test_every_field_of_a_state_has_something_in_the_newest_file() -> None:
    empty = BacktestCheckpointState(bar_index=0, current_date="", cash=0.0)
    stored_state = golden(SCHEMA_VERSION)["states"]["every"]
    plain = json.loads(to_json(empty.to_dict()))
    beginnings = {
        "operation_type",
        "schema_version",
        "ledger_from",
        "samples_from",
        "recorded_from",
    }  # of a whole state
    assert {name for name in plain if stored_state[name] == plain[name]} == beginnings


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_stored_checkpoint_is_resumed_to_its_result(dsn: str, version: int) -> None:
    async with kt.BacktestWorker.open(dsn) as worker:
        found = await stored(worker.database, version)
        results = await worker.resume("run")
        assert results.digest == found["digest"]
        assert results.run.resumed_from == [found["states"]["run"]["bar_index"]]
    assert (await kt.backtest(None, "rsi_reversion", request=REQUEST)).digest == found["digest"]


@pytest.mark.parametrize(("version", "says"), [
    (SCHEMA_VERSION + 1, "upgrade"), (10**6, "upgrade"), (0, "no release wrote"), (-1, "no release wrote"),
])  # fmt: skip
async def test_an_unknown_version_is_refused_by_name_and_handed_back(dsn: str, version: int, says: str) -> None:
    """Whatever its status was: never failed, its checkpoint untouched, and the next worker that knows it resumes it."""
    async with kt.BacktestWorker.open(dsn) as worker:
        found = await stored(worker.database, SCHEMA_VERSION)
        original = next(row for row in found["rows"]["operation_checkpoints"] if row["operation_id"] == "run")["state"]
        await with_version(worker.database, version)
        before = await head_of(worker.database, "run")
        for attempt in range(2):
            with pytest.raises(SchemaVersionError, match=f"schema version {version}, this code knows") as caught:
                await worker.resume("run")
            assert says in caught.value.hint
            row = await worker.operations.get("run")
            assert (row.status, row.error, row.epoch) == (Status.CANCELLED, None, 2 + attempt)
            assert await head_of(worker.database, "run") == before
        async with worker.database.connection() as connection:
            await connection.execute("ALTER TABLE ktrdr.operation_checkpoints DISABLE TRIGGER USER")
            await connection.execute(
                "UPDATE ktrdr.operation_checkpoints SET state = $1::text::jsonb WHERE operation_id = 'run'",
                json.dumps(original),
            )  # fmt: skip
        assert (await worker.resume("run")).digest == found["digest"]


async def test_an_orphan_of_an_unknown_version_is_interrupted_and_not_failed(dsn: str) -> None:
    async with kt.BacktestWorker.open(dsn) as worker:
        found = await stored(worker.database, SCHEMA_VERSION)
        await with_version(worker.database, SCHEMA_VERSION + 1, "every")
        with pytest.raises(SchemaVersionError):
            await worker.resume("every", bars=kt.Bars.read(str(REQUEST.data)), strategy=kt.SmaCross(), take_over=True)
        row = await worker.operations.get("every")
        assert (row.status, row.error) == (Status.INTERRUPTED, None)
        assert row.checkpoint_bar == found["states"]["every"]["bar_index"]


async def test_an_extension_of_what_newer_code_completed_is_handed_back(dsn: str) -> None:
    """Its parent's kept state is in the result, not in a head."""
    short = "synthetic:?bars=300&seed=11&symbols=A,B&timeframe=1h"
    async with kt.BacktestWorker.open(dsn) as worker:
        await worker.run(msgspec.structs.replace(REQUEST, data=short), "parent", keep_state=True)
        async with worker.database.connection() as connection:
            await connection.execute("ALTER TABLE ktrdr.operations DISABLE TRIGGER USER")
            await connection.execute(
                "UPDATE ktrdr.operations SET result = jsonb_set(result, '{final_state,schema_version}', $1::jsonb)",
                str(SCHEMA_VERSION + 1),
            )  # fmt: skip
            await connection.execute("ALTER TABLE ktrdr.operations ENABLE TRIGGER USER")
        with pytest.raises(SchemaVersionError):
            await worker.extend("parent", "child", changes={"data": REQUEST.data})
        assert (await worker.operations.get("child")).status is Status.INTERRUPTED


async def test_the_next_version_goes_on_with_what_this_one_stored(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deploy, and the way back: newer code loads old heads and writes its own, which older code then hands back."""
    async with kt.BacktestWorker.open(dsn) as worker:
        found = await stored(worker.database, SCHEMA_VERSION)
        monkeypatch.setattr(schemas, "SCHEMA_VERSION", SCHEMA_VERSION + 1)
        monkeypatch.setattr(checkpoint_builder, "SCHEMA_VERSION", SCHEMA_VERSION + 1)
        for name in ("run", "every"):
            loaded = await CheckpointService(worker.database).load_checkpoint(name)
            assert loaded is not None
            assert loaded.schema_version == SCHEMA_VERSION
        _, _, service = await claimed(worker.database, "newer")
        await service.save_checkpoint("newer", CheckpointType.PERIODIC, state(9, schema_version=SCHEMA_VERSION + 1))
        newer = await service.load_checkpoint("newer")
        assert newer is not None
        assert newer.schema_version == SCHEMA_VERSION + 1
        assert (await worker.resume("run")).digest == found["digest"]
        monkeypatch.undo()
        with pytest.raises(SchemaVersionError):
            await service.load_checkpoint("newer")


async def test_a_database_that_needs_newer_code_is_refused_and_one_that_doesnt_isnt(dsn: str) -> None:
    async with kt.BacktestWorker.open(dsn) as worker:
        found = await stored(worker.database, SCHEMA_VERSION)
        async with worker.database.connection() as connection:
            add = "INSERT INTO ktrdr.migrations (version, name, min_code_version) VALUES ($1, $2, $3)"
            await connection.execute(add, 9_998, "that_only_adds", 1)
            await connection.execute("ALTER TABLE ktrdr.operations ADD COLUMN regime text NOT NULL DEFAULT 'none'")
    async with kt.BacktestWorker.open(dsn) as worker:  # older code works beside the newer
        assert (await worker.resume("run")).digest == found["digest"]
        async with worker.database.connection() as connection:
            await connection.execute(add, 9_999, "that_changes", 9_999)
    for migrate in (True, False):
        with pytest.raises(SchemaVersionError, match="needs code that knows migration 9999") as caught:
            async with kt.BacktestWorker.open(dsn, migrate=migrate, resume_orphans=True):
                pass
        assert caught.value.hint == "upgrade ktrdr_async"
