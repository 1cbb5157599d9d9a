"""Reads the .sql files: named queries, and the one substitution that there is, the schema's name."""

from __future__ import annotations

import re
from importlib.resources import files
from importlib.resources.abc import Traversable

from ktrdr_async.errors import InputError

SCHEMA = "ktrdr"
_SCHEMA_RULE = re.compile(r"[a-z_][a-z0-9_]{0,62}")
_QUALIFIER = re.compile(rf"\b{SCHEMA}\.(?=[a-z_])")
_NAME = re.compile(r"^-- name: *([a-z][a-z0-9_]*) *$", re.MULTILINE)


def sql_directory(name: str) -> Traversable:
    """A directory of the package's SQL files: `migrations` or `queries`."""
    return files("ktrdr_async.storage") / "sql" / name


def validated_schema(schema: str) -> str:
    """The schema's name, which goes into SQL text.

    Raises:
        InputError: if it isn't a plain lower-case identifier, or one that PostgreSQL keeps for itself.
    """
    if not _SCHEMA_RULE.fullmatch(schema) or schema.startswith("pg_") or schema == "information_schema":
        raise InputError(
            f"the schema name {schema[:80]!r} can't be used",
            hint="1 to 63 of a-z, 0-9 and _, not beginning with a digit or pg_",
        )
    return schema


def with_schema(text: str, schema: str) -> str:
    """SQL text whose `ktrdr.` is another schema's; quoted, because a name like `user` is a word of SQL."""
    return text if schema == SCHEMA else _QUALIFIER.sub(f'"{schema}".', text)


def parse_queries(text: str) -> dict[str, str]:
    """The statements of one file by name, without the comments above them.

    Raises:
        ValueError: if something stands before the first name, a name comes twice, or a statement has no text.
    """
    head, *parts = _NAME.split(text)
    if any(line.strip() and not line.lstrip().startswith("--") for line in head.splitlines()):
        raise ValueError("SQL text before the first '-- name:' line")
    found: dict[str, str] = {}
    for name, body in zip(parts[::2], parts[1::2], strict=True):
        lines = body.strip().splitlines()
        while lines and (not lines[0].strip() or lines[0].lstrip().startswith("--")):
            del lines[0]
        statement = "\n".join(lines).strip().removesuffix(";")
        if not statement or name in found:
            raise ValueError(f"the query {name!r} {'comes twice' if name in found else 'has no text'}")
        found[name] = statement
    return found


def load_queries(directory: Traversable, schema: str) -> dict[str, str]:
    """Every named query of the .sql files in a directory. A name belongs to one file only."""
    found: dict[str, str] = {}
    if not directory.is_dir():
        return found
    for file in sorted(directory.iterdir(), key=lambda entry: entry.name):
        if file.name.endswith(".sql"):
            for name, statement in parse_queries(file.read_text(encoding="utf-8")).items():
                if name in found:
                    raise ValueError(f"the query {name!r} comes twice, again in {file.name}")
                found[name] = with_schema(statement, schema)
    return found
