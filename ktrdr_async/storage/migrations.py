"""Applies the numbered migrations, each once and whole, however many processes start at the same moment."""

from __future__ import annotations

import logging
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from typing import TYPE_CHECKING

from ktrdr_async.errors import SchemaVersionError
from ktrdr_async.storage.queries import with_schema

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

_FILE = re.compile(r"(\d{4})_([a-z0-9_]+)\.sql")
_MINIMUM = re.compile(r"^-- min_code_version: *(\d+) *$", re.MULTILINE)
_TABLE = """
CREATE TABLE IF NOT EXISTS ktrdr.migrations (
    version integer PRIMARY KEY,
    name text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    min_code_version integer NOT NULL
)
"""
_APPLIED = "SELECT version, name, min_code_version FROM ktrdr.migrations ORDER BY version"
_RECORD = "INSERT INTO ktrdr.migrations (version, name, min_code_version) VALUES ($1, $2, $3)"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Migration:
    """One numbered file."""

    version: int  # counts from 1, without gaps
    name: str
    text: str
    min_code_version: int  # newest migration that code must know to work on the result; 0: any code


def load_migrations(directory: Traversable) -> list[Migration]:
    """The migrations of a directory in order.

    A line `-- min_code_version: N` says that only code whose newest migration is at least N works on the result;
    without it, older code goes on working beside the newer (a migration only adds).

    Raises:
        ValueError: if a file's name isn't `0001_name.sql`, or the numbers have a gap.
    """
    found: list[Migration] = []
    names = (
        sorted(entry.name for entry in directory.iterdir() if entry.name.endswith(".sql")) if directory.is_dir() else []
    )
    for number, name in enumerate(names, start=1):
        match = _FILE.fullmatch(name)
        if match is None or int(match[1]) != number:
            raise ValueError(f"the migration file {name!r} should be named {number:04d}_something.sql")
        text = (directory / name).read_text(encoding="utf-8")
        minimum = _MINIMUM.search(text)
        found.append(Migration(number, match[2], text, int(minimum[1]) if minimum else 0))
    return found


async def migrate(
    connection: PoolConnectionProxy, migrations: Sequence[Migration], *, schema: str, label: str, permitted: bool
) -> int:
    """Apply what is missing, each migration in a transaction of its own, under a transaction-level advisory lock.

    Args:
        connection: an open connection, outside any transaction.
        migrations: all that this code knows.
        schema: validated name of the schema, made if it isn't there.
        label: the database's name for messages.
        permitted: whether anything may be changed.

    Returns:
        How many were applied here.

    Raises:
        SchemaVersionError: if the database needs newer code, has a migration of another name under one of our numbers,
            or misses one while nothing may be changed.
    """
    applied = await _missing(connection, migrations, schema, label)
    if applied is not None and not applied:
        return 0  # the usual case takes no lock and needs no right to create anything
    if not permitted:
        wanted = migrations[-1].version if migrations else 0
        raise SchemaVersionError(
            f"the schema {schema} of {label} isn't migrated to version {wanted}",
            hint="open it once with migrations permitted",
        )
    # One lock for all schemas of a database, and the same in every version of this code.
    key = zlib.crc32(b"ktrdr_async migrations")
    count = 0
    while True:
        async with connection.transaction(isolation="read_committed"):
            await connection.execute("SELECT pg_advisory_xact_lock($1)", key)
            # Looked up again under the lock, in a statement of its own: another process may just have finished.
            missing = await _missing(connection, migrations, schema, label)
            if missing is None:
                if not await connection.fetchval("SELECT to_regnamespace($1) IS NOT NULL", f'"{schema}"'):
                    await connection.execute(f'CREATE SCHEMA "{schema}"')
                await connection.execute(with_schema(_TABLE, schema))
                continue
            if not missing:
                return count
            following = missing[0]
            await connection.execute(with_schema(following.text, schema))
            await connection.execute(
                with_schema(_RECORD, schema), following.version, following.name, following.min_code_version
            )
        count += 1
        log.info("%s: applied migration %d (%s)", label, following.version, following.name)


async def _missing(
    connection: PoolConnectionProxy, migrations: Sequence[Migration], schema: str, label: str
) -> list[Migration] | None:
    """The migrations that aren't applied; None if there isn't even their table."""
    if not await connection.fetchval("SELECT to_regclass($1) IS NOT NULL", f'"{schema}".migrations'):
        return None
    known = {migration.version: migration for migration in migrations}
    newest = max(known, default=0)
    done: set[int] = set()
    for row in await connection.fetch(with_schema(_APPLIED, schema)):
        version, minimum = row["version"], row["min_code_version"]
        if minimum > newest:
            raise SchemaVersionError(
                f"{label} was migrated by newer code: it needs code that knows migration {minimum}, "
                f"this code knows {newest}",
                hint="upgrade ktrdr_async",
            )
        if version in known and known[version].name != row["name"]:
            raise SchemaVersionError(
                f"{label} has migration {version} as {row['name']!r}, this code has it as {known[version].name!r}",
                hint="the schema was made by other code; use another schema or database",
            )
        done.add(version)
    return [migration for migration in migrations if migration.version not in done]
