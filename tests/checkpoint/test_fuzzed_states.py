"""Stored states that were changed: refused, or equal in meaning; another result never comes of one silently."""

from __future__ import annotations

import copy
import json
from contextlib import aclosing
from random import Random
from typing import Any

import asyncpg
import msgspec
import pytest
from campaigns import Figures, sized
from checkpoint_samples import claimed
from fuzzing import STRINGS, Tried, any_value, mutated_tree, near

import ktrdr_async as kt
from ktrdr_async.backtesting.checkpoint_builder import Since, build_backtest_checkpoint_state
from ktrdr_async.backtesting.engine import BacktestingEngine
from ktrdr_async.checkpoint import reading
from ktrdr_async.checkpoint.schemas import BacktestCheckpointState, CheckpointType
from ktrdr_async.checkpoint.service import CheckpointService
from ktrdr_async.errors import CheckpointError, KtrdrError, SchemaVersionError
from ktrdr_async.storage.database import Database

pytestmark = pytest.mark.anyio
REQUEST = kt.BacktestRequest(data="synthetic:?bars=600&seed=11&symbols=A,B&timeframe=1h", strategy="fuzzed", seed=3)
BARS = kt.Bars.read(str(REQUEST.data))
HEAD, SEGMENTS = "operation_checkpoints", "ledger_segments"


class Seen(msgspec.Struct):
    bars: int = 0
    last: dict[str, float] = {}


class Wandering(kt.Strategy):
    """Orders by its own state and by chance, and records."""

    def __init__(self) -> None:
        self.state = Seen()

    def on_bar(self, bar: kt.Bar) -> None:
        self.state.bars += 1
        symbol = self.state.bars % 2
        if bar.rng.random() < 0.3:
            bar.target_weight(symbol, round(bar.rng.uniform(-0.4, 0.4), 2), tag="go")
            self.state.last[str(symbol)] = bar.close[symbol]
        if self.state.bars % 7 == 0:
            bar.record(seen=self.state.bars / 3)


async def finished(state: BacktestCheckpointState | None = None) -> str:
    """The digest of a run from a state to its end."""
    engine = BacktestingEngine(REQUEST, BARS, Wandering())
    async with aclosing(engine.run(state)) as blocks:
        async for _ in blocks:
            pass
    return engine.results().digest


@pytest.fixture
async def stored(database: Database) -> tuple[Database, BacktestCheckpointState]:
    """A database whose operation `op` has a head and four segments, and no rule of the schema left on them."""
    _, _, service = await claimed(database)
    engine = BacktestingEngine(REQUEST, BARS, Wandering())
    async with aclosing(engine.run()) as blocks:
        async for block in blocks:
            position = service.acknowledged
            since = Since(position.ledger, position.samples, position.recorded)
            state = build_backtest_checkpoint_state(engine, block.bar_index, block.timestamp, since=since)
            await service.save_checkpoint("op", CheckpointType.PERIODIC, state)
            if block.bar_index == 399:
                break
    loaded = await CheckpointService(database, None).load_checkpoint("op")
    assert loaded is not None
    assert len(loaded.ledger) > 50
    assert loaded.waiting
    async with database.connection() as connection:
        await connection.execute(
            "DO $$ DECLARE rule record; BEGIN"
            " FOR rule IN SELECT conrelid::regclass AS place, conname FROM pg_constraint"
            " WHERE contype IN ('c', 'p', 'f')"
            f" AND conrelid IN ('ktrdr.{HEAD}'::regclass, 'ktrdr.{SEGMENTS}'::regclass)"
            " LOOP EXECUTE format('ALTER TABLE %s DROP CONSTRAINT %I', rule.place, rule.conname); END LOOP; END $$;"
        )
        for table in (HEAD, SEGMENTS):
            await connection.execute(f"ALTER TABLE ktrdr.{table} DISABLE TRIGGER USER")
    return database, loaded


Row = dict[str, Any]


async def rows_of(connection: Any, table: str) -> list[Row]:
    found = await connection.fetch(f"SELECT to_jsonb(t)::text FROM ktrdr.{table} t ORDER BY to_jsonb(t) ->> 'sequence'")
    return [json.loads(row[0]) for row in found]


async def write(connection: Any, table: str, rows: list[Row]) -> None:
    await connection.execute(f"DELETE FROM ktrdr.{table}")
    await connection.execute(
        f"INSERT INTO ktrdr.{table} SELECT * FROM jsonb_populate_recordset(NULL::ktrdr.{table}, $1::text::jsonb)",
        json.dumps(rows),
    )


def changed_column(rng: Random, row: Row) -> None:
    """Another number, digest or word in a column that isn't JSON."""
    name = rng.choice([name for name in row if name not in ("state", "records", "created_at")])
    value = row[name]
    if isinstance(value, int):
        row[name] = rng.choice((value + 1, value - 1, 0, -1, 2**62, 5000, value * 2))
    elif "digest" in name:
        row[name] = rng.choice((value[::-1], "0" * 64, value[:-1], value.upper(), "", value[:-1] + "0"))
    else:
        row[name] = rng.choice((*(text for text in STRINGS if "\0" not in text and "\ud800" not in text), "failure"))


def mutation(rng: Random, head: list[Row], segments: list[Row]) -> str:
    """Changes the rows in one way, and names it."""
    kind = rng.choice(("head's json", "head's json", "records", "records", "columns", "segments", "texts"))
    if kind == "head's json":
        head[0]["state"] = mutated_tree(rng, head[0]["state"])
    elif kind == "records":
        row = rng.choice(segments)
        row["records"] = mutated_tree(rng, row["records"])
    elif kind == "columns":
        for _ in range(rng.choice((1, 1, 2))):
            changed_column(rng, rng.choice([*head, *segments]))
    elif kind == "texts":
        row, name = rng.choice(((head[0], "state"), (rng.choice(segments), "records")))
        row[name] = any_value(rng)
    else:
        at, other = rng.sample(range(len(segments)), 2)
        what = rng.randrange(5)
        if what == 0:
            segments[at]["sequence"], segments[other]["sequence"] = other + 1, at + 1
        elif what == 1:
            segments[at]["records"], segments[other]["records"] = segments[other]["records"], segments[at]["records"]
        elif what == 2:
            segments.append(copy.deepcopy(segments[at]) | {"sequence": rng.choice((at + 1, len(segments) + 1))})
        elif what == 3:
            del segments[at]
        else:
            del segments[min(at, other) :]
    return kind


def bits(value: Any) -> bytes:
    """Everything of a state, with -0.0 told from 0.0."""
    return msgspec.msgpack.encode(value)


@sized("trials", ci=120, whole=8_000, minutes=20)
async def test_a_changed_row_is_refused_or_means_the_same(
    stored: tuple[Database, BacktestCheckpointState], trials: int, campaign_seed: int, figures: Figures
) -> None:
    database, whole = stored
    expected, tried = bits(whole), Tried()
    async with database.connection() as connection:
        before = [await rows_of(connection, table) for table in (HEAD, SEGMENTS)]
        for number in range(trials):
            rng = Random(f"rows {campaign_seed} {number}")
            head, segments = copy.deepcopy(before)
            kind = mutation(rng, head, segments)
            try:
                transaction = connection.transaction(isolation="repeatable_read")
                await transaction.start()
                try:
                    await write(connection, HEAD, head)
                    await write(connection, SEGMENTS, segments)
                    error = await loaded_as(database, connection, expected)
                except (asyncpg.DataError, asyncpg.NotNullViolationError, asyncpg.ProgramLimitExceededError):
                    continue  # no row of this database can be like that
                finally:
                    await transaction.rollback()
                tried.note(kind, error)
            except BaseException as failure:
                failure.add_note(f"input {number}, {kind}")
                raise
        assert [await rows_of(connection, table) for table in (HEAD, SEGMENTS)] == before
    assert tried.total > trials // 2
    assert tried.refused["checkpoint_corrupted"] > trials // 3
    assert await finished(await CheckpointService(database, None).load_checkpoint("op")) == await finished()
    figures.add("changed rows of checkpoints", str(tried))


def any_of(rng: Random, _: Any) -> Any:
    return any_value(rng)


async def loaded_as(database: Database, connection: Any, expected: bytes) -> KtrdrError | None:
    try:
        found = await reading.read_checkpoint(database, connection, "op")
    except (CheckpointError, SchemaVersionError) as error:
        return error
    assert found is not None
    assert bits(found[0]) == expected, "it was loaded as another state"
    return None


@sized("trials", ci=200, whole=4_000, minutes=20)
async def test_a_changed_state_under_digests_that_fit_gives_no_other_result(
    stored: tuple[Database, BacktestCheckpointState], trials: int, campaign_seed: int, figures: Figures
) -> None:
    """What loading can't see, because the digests of rows were made anew, the engine sees by its own."""
    _, whole = stored
    clean, tried = await finished(), Tried()
    tree = json.loads(msgspec.json.encode(whole))
    for number in range(trials):
        rng = Random(f"states {campaign_seed} {number}")
        field = rng.choice([name for name in tree if name not in ("original_request", "operation_type")])
        inside = isinstance(tree[field], list | dict) and rng.random() < 0.9
        changed = tree | {
            field: mutated_tree(rng, tree[field]) if inside else rng.choice((near, any_of))(rng, tree[field])
        }
        try:
            try:
                state = BacktestCheckpointState.from_dict(changed)
            except (ValueError, RecursionError):
                continue  # it isn't loaded at all
            try:
                digest, error = await finished(state), None
            except KtrdrError as refused:
                digest, error = clean, refused
            tried.note(field, error)
            assert digest == clean, "another result"
        except BaseException as failure:
            failure.add_note(f"input {number}: {field} {json.dumps(changed[field])[:500]}")
            raise
    assert tried.refused.total() > trials // 4
    figures.add("changed states under digests that fit", str(tried))


COLUMNS = ("request", "progress", "result", "error")
LONGER = {"data": "synthetic:?bars=700&seed=1"}


@sized("trials", ci=25, whole=3_000, minutes=20)
async def test_a_changed_operation_is_refused_or_has_the_same_result(
    dsn: str, trials: int, campaign_seed: int, figures: Figures
) -> None:
    """One that is completed, one that was interrupted, and one that failed, each read in every way."""
    tried, request = Tried(), kt.BacktestRequest(data="synthetic:?bars=600&seed=1", strategy="donchian_breakout")
    async with kt.BacktestWorker.open(dsn) as worker:
        digest = (await worker.run(request, "done", keep_state=True)).digest
        clean = (
            digest,
            (await kt.backtest(None, "donchian_breakout", request=msgspec.structs.replace(request, **LONGER))).digest,
        )
        with pytest.raises(ZeroDivisionError):
            await worker.run(msgspec.structs.replace(request, strategy=None), "failed", strategy=Failing())
        database = worker.database
        async with database.connection() as connection:
            await connection.execute("ALTER TABLE ktrdr.operations DISABLE TRIGGER USER")
            for check in ("request", "progress", "result", "error", "completed", "failed"):
                await connection.execute(f"ALTER TABLE ktrdr.operations DROP CONSTRAINT IF EXISTS operations_{check}")
        for number in range(trials):
            rng = Random(f"operations {campaign_seed} {number}")
            name, column = rng.choice(("done", "failed")), rng.choice(COLUMNS)
            async with database.connection() as connection:
                stored = await connection.fetchval(
                    f"SELECT {column}::text FROM ktrdr.operations WHERE operation_id = $1", name
                )
                tree = json.loads(stored or "null")
                changed = json.dumps(mutated_tree(rng, tree) if tree and rng.random() < 0.8 else any_value(rng))
                update = f"UPDATE ktrdr.operations SET {column} = $2::text::jsonb WHERE operation_id = $1"
                try:
                    await connection.execute(update, name, changed)
                except asyncpg.DataError:
                    continue
            try:
                error = await looked_at(worker, name, clean)
                tried.note(column, error)
            except BaseException as failure:
                failure.add_note(f"input {number}: {name}, {column} {changed[:600]}")
                raise
            async with database.connection() as connection:
                await connection.execute(update, name, stored)
        assert (await worker.results("done")).digest == clean[0]
    assert tried.refused.total() > trials // 5
    figures.add("changed rows of operations", str(tried))


async def looked_at(worker: kt.BacktestWorker, name: str, clean: tuple[str, str]) -> KtrdrError | None:
    """Reads an operation in every way; the first refusal, if there is one."""
    first: KtrdrError | None = None

    async def progress() -> None:
        async with aclosing(worker.progress(name)) as seen:
            await anext(seen)

    async def extended() -> None:
        try:
            assert (await worker.extend(name, "further", changes=LONGER)).digest == clean[1], "another extension"
        finally:
            async with worker.database.connection() as connection:
                await connection.execute("DELETE FROM ktrdr.operations WHERE operation_id = 'further'")

    async def result() -> None:
        assert (await worker.results(name)).digest == clean[0], "another result"

    for look in (worker.operations.list, progress, result, extended):
        try:
            await look()
        except KtrdrError as error:
            first = first or error
    return first


class Failing(kt.Strategy):
    """Breaks at its 300th bar."""

    def on_bar(self, bar: kt.Bar) -> None:
        bar.record(x=1 / (300 - bar.index))
