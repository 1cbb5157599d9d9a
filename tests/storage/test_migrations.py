"""Migrations and named queries: applied once and whole, refused where they don't fit, one substitution only."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from pathlib import Path

import asyncpg
import pytest
from storage_processes import OPEN_DATABASE, child

from ktrdr_async.errors import DatabaseError, InputError, SchemaVersionError
from ktrdr_async.storage.database import Database
from ktrdr_async.storage.migrations import load_migrations
from ktrdr_async.storage.queries import load_queries, parse_queries, sql_directory, with_schema

pytestmark = pytest.mark.anyio


@pytest.fixture
def steps(tmp_path: Path) -> Path:
    """Two migrations that would fail if they were applied twice."""
    (tmp_path / "0001_first.sql").write_text("CREATE TABLE ktrdr.first (n int); INSERT INTO ktrdr.first VALUES (1);")
    (tmp_path / "0002_second.sql").write_text("ALTER TABLE ktrdr.first ADD COLUMN m int;")
    return tmp_path


async def rows(database: Database) -> list[tuple[int, str, int]]:
    async with database.connection() as connection:
        found = await connection.fetch(
            f'SELECT version, name, min_code_version FROM "{database.schema}".migrations ORDER BY version'
        )
        return [tuple(row) for row in found]


async def test_migrations_are_applied_in_order_and_once(dsn: str, steps: Path) -> None:
    for _ in range(2):
        async with Database.open(dsn, migrations=steps) as database:
            assert await rows(database) == [(1, "first", 0), (2, "second", 0)]
            async with database.connection() as connection:
                assert [tuple(row) for row in await connection.fetch("SELECT n, m FROM ktrdr.first")] == [(1, None)]
    (steps / "0003_third.sql").write_text("-- min_code_version: 3\nCREATE VIEW ktrdr.third AS SELECT 1 AS n;")
    async with Database.open(dsn, migrations=steps) as database:
        assert (await rows(database))[2:] == [(3, "third", 3)]


async def test_two_processes_migrate_at_the_same_moment(dsn: str, steps: Path) -> None:
    (steps / "0003_slow.sql").write_text("SELECT pg_sleep(0.3); CREATE TABLE ktrdr.slow (n int);")
    with ExitStack() as stack:
        children = [stack.enter_context(child(dsn, steps, program=OPEN_DATABASE)) for _ in range(3)]
        for one in children:
            assert one.process.stdout is not None
            assert one.process.stdout.readline() == "ready\n"
        printed = await asyncio.gather(*(asyncio.to_thread(one.go_on) for one in children))
        assert [one.process.returncode for one in children] == [0, 0, 0], printed
    async with Database.open(dsn, migrations=steps, migrate=False) as database:
        assert len(await rows(database)) == 3


async def test_a_failing_migration_leaves_nothing_of_itself(dsn: str, steps: Path) -> None:
    (steps / "0003_bad.sql").write_text("CREATE TABLE ktrdr.half (n int); SELECT 1/0;")
    with pytest.raises(DatabaseError, match="division by zero"):
        await Database.open(dsn, migrations=steps).__aenter__()
    (steps / "0003_bad.sql").unlink()
    async with Database.open(dsn, migrations=steps) as database, database.connection() as connection:
        assert [row[0] for row in await rows(database)] == [1, 2]
        assert await connection.fetchval("SELECT to_regclass('ktrdr.half')") is None


async def test_a_database_that_needs_newer_code_is_refused(dsn: str, steps: Path) -> None:
    (steps / "0003_third.sql").write_text("SELECT 1;")
    (steps / "0004_breaking.sql").write_text("-- min_code_version: 4\nSELECT 1;")
    async with Database.open(dsn, migrations=steps):
        pass
    (steps / "0004_breaking.sql").unlink()
    with pytest.raises(SchemaVersionError, match="needs code that knows migration 4, this code knows 3") as caught:
        await Database.open(dsn, migrations=steps).__aenter__()
    assert caught.value.hint == "upgrade ktrdr_async"


async def test_newer_migrations_that_only_add_do_not_stop_older_code(dsn: str, steps: Path) -> None:
    async with Database.open(dsn, migrations=steps):
        pass
    (steps / "0002_second.sql").unlink()
    async with Database.open(dsn, migrations=steps) as database:
        assert [row[0] for row in await rows(database)] == [1, 2]


async def test_another_migration_under_the_same_number_is_refused(dsn: str, steps: Path) -> None:
    async with Database.open(dsn, migrations=steps):
        pass
    (steps / "0002_second.sql").rename(steps / "0002_other.sql")
    with pytest.raises(SchemaVersionError, match="migration 2 as 'second', this code has it as 'other'"):
        await Database.open(dsn, migrations=steps).__aenter__()


async def test_nothing_is_changed_without_permission(dsn: str, steps: Path) -> None:
    with pytest.raises(SchemaVersionError, match="isn't migrated to version 2"):
        await Database.open(dsn, migrations=steps, migrate=False).__aenter__()
    connection = await asyncpg.connect(dsn)
    assert await connection.fetchval("SELECT to_regnamespace('ktrdr')") is None
    await connection.close()
    async with Database.open(dsn, migrations=steps):
        pass
    async with Database.open(dsn, migrations=steps, migrate=False):
        pass


async def test_a_migrated_database_needs_no_right_to_create(dsn: str, steps: Path) -> None:
    async with Database.open(dsn, migrations=steps), asyncpg.create_pool(dsn, min_size=1, max_size=1) as pool:
        name = await pool.fetchval("SELECT current_database()")
        await pool.execute(f'REVOKE CREATE ON DATABASE "{name}" FROM ktrdr_async')
        await pool.execute("REVOKE CREATE ON SCHEMA ktrdr FROM ktrdr_async")
    async with Database.open(dsn, migrations=steps) as database:
        assert len(await rows(database)) == 2


@pytest.mark.parametrize("schema", ["other", "user", "_x9"])
async def test_another_schema_holds_everything(dsn: str, schema: str) -> None:
    async with Database.open(dsn, schema=schema) as database, database.connection() as connection:
        assert await rows(database)
        assert await connection.fetchval("SELECT to_regnamespace('ktrdr')") is None
        assert await connection.fetchval("SELECT to_regclass($1)", f'"{schema}".operations') is not None
    async with Database.open(dsn) as database, database.connection() as connection:  # two in one database
        assert await connection.fetchval("SELECT to_regclass('ktrdr.operations')") is not None


@pytest.mark.parametrize("schema", ["", "Upper", "9x", "a-b", 'a"b', "a;drop", "pg_x", "x" * 64, "ktrdr.x", "é", "a\n"])
async def test_a_schema_name_that_is_no_plain_identifier_is_refused(schema: str) -> None:
    with pytest.raises(InputError, match="can't be used"):
        await Database.open("postgresql://nowhere.invalid/x", schema=schema).__aenter__()


async def test_only_the_schemas_qualifier_is_substituted() -> None:
    text = (
        "SELECT ktrdr.f(x) FROM ktrdr.t AS myktrdr; NOTIFY ktrdr_async; SELECT 'ktrdr', xktrdr.y, 'ktrdr.t'::regclass"
    )
    assert with_schema(text, "ktrdr") == text
    assert with_schema(text, "user") == (
        'SELECT "user".f(x) FROM "user".t AS myktrdr; NOTIFY ktrdr_async; '
        "SELECT 'ktrdr', xktrdr.y, '\"user\".t'::regclass"
    )


async def test_queries_are_found_by_name_without_their_comments() -> None:
    text = "-- about the file\n\n-- name: one\n-- why\nSELECT 1 -- inside\nFROM t;\n\n-- name: two\nSELECT 2;\n"
    assert parse_queries(text) == {"one": "SELECT 1 -- inside\nFROM t", "two": "SELECT 2"}
    for bad in (
        "SELECT 1;\n-- name: one\nSELECT 1",
        "-- name: one\n-- only a comment\n",
        "-- name: a\nX\n-- name: a\nY",
    ):
        with pytest.raises(ValueError, match=r"query|SQL text"):
            parse_queries(bad)


async def test_a_query_name_belongs_to_one_file(tmp_path: Path) -> None:
    (tmp_path / "a.sql").write_text("-- name: one\nSELECT 1")
    assert load_queries(tmp_path, "ktrdr") == {"one": "SELECT 1"}
    (tmp_path / "b.sql").write_text("-- name: one\nSELECT 1")
    with pytest.raises(ValueError, match=r"'one' comes twice, again in b\.sql"):
        load_queries(tmp_path, "ktrdr")


@pytest.mark.parametrize(
    "names", [["0002_second.sql"], ["0001_a.sql", "0003_b.sql"], ["1_a.sql"], ["0001_a.sql", "0001_b.sql"]]
)
async def test_migration_files_are_numbered_without_gaps(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).write_text("SELECT 1")
    with pytest.raises(ValueError, match="should be named"):
        load_migrations(tmp_path)


async def test_every_query_of_the_package_can_be_prepared(database: Database) -> None:
    names = load_queries(sql_directory("queries"), "ktrdr")
    async with database.connection() as connection:
        for name in names:
            await connection.prepare(database.sql(name))
    with pytest.raises(KeyError):
        database.sql("no_such_query")
