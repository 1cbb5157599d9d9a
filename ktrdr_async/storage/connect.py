"""How a connection is made: what a DSN may look like, what is said of it, and what every connection of ours has set."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import asyncpg

from ktrdr_async.errors import InputError
from ktrdr_async.storage.embedded import EmbeddedServer

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

    Connection = asyncpg.Connection[asyncpg.Record]
    Proxy = PoolConnectionProxy[asyncpg.Record]
    Pool = asyncpg.Pool[asyncpg.Record]

CONNECT_TIMEOUT = 10.0  # seconds
# A single statement's isolation is the session's default, which a server or a role may have set to something else.
SESSION = {"synchronous_commit": "on", "default_transaction_isolation": "read committed"}
_HOST = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._%-]*)(:\d+)?")

log = logging.getLogger(__name__)


class Connector:
    """Makes connections to one DSN or embedded server; no part of the DSN is in its `repr`."""

    def __init__(self, dsn: str | None, server: EmbeddedServer | None) -> None:
        self._dsn = dsn
        self._server = server
        self._settings: dict[str, str] = dict(SESSION)
        if dsn is None or "application_name=" not in dsn:
            self._settings["application_name"] = "ktrdr_async"

    async def __call__(self, *_: Any, **keywords: Any) -> Connection:
        """One connection, made within `CONNECT_TIMEOUT`; the pool passes what it would pass to `asyncpg.connect`."""
        if self._server is not None:
            # Asked for each time: a server that came back may be in another place.
            where = self._server.arguments
            keywords |= {
                "host": where.host,
                "port": where.port,
                "user": where.user,
                "database": where.database,
                "ssl": False,
            }
        else:
            # There may be a transaction pooler in between, which mixes up prepared statements: each is sent whole.
            keywords |= {"dsn": self._dsn, "statement_cache_size": 0}
        keywords["timeout"] = CONNECT_TIMEOUT
        try:
            return await self._open(keywords)
        except asyncpg.ProtocolViolationError as error:
            if "startup parameter" not in str(error) or not self._settings.keys() & SESSION.keys():
                raise
            # A pooler of the usual configuration does. What the server's own defaults are is looked at on opening.
            log.info("a pooler refuses session settings: %s", error)
            self._settings = {name: value for name, value in self._settings.items() if name not in SESSION}
            return await self._open(keywords)

    async def _open(self, keywords: dict[str, Any]) -> Connection:
        connection: Connection = await asyncpg.connect(server_settings=dict(self._settings), **keywords)
        return connection


def label_of(dsn: str) -> str:
    """A DSN for messages: scheme, host, port and database, never the user, the password or an option.

    Raises:
        InputError: if it isn't a DSN that has only one reading. The text isn't repeated: it may hold a password.
    """
    try:
        parts = urlsplit(dsn)
        options = parse_qs(parts.query, strict_parsing=bool(parts.query))
    except ValueError:
        raise _not_a_dsn() from None
    host = parts.netloc.rpartition("@")[2]
    # A `/`, `?`, `#` or `@` that isn't percent-encoded in a password would make a piece of it the host or the database.
    stray = parts.netloc.count("@") > 1 or parts.fragment or re.search(r"[/@:]", parts.path[1:]) or "@" in parts.query
    named = all(_HOST.fullmatch(one) for one in host.split(","))
    if parts.scheme not in ("postgresql", "postgres") or stray or not named:
        raise _not_a_dsn()
    host = host or ",".join(options.get("host", []))
    name = parts.path[1:] or ",".join(options.get("dbname", options.get("database", [])))
    return f"postgresql://{host}/{name}"


def _not_a_dsn() -> InputError:
    return InputError(
        "the database isn't named by a DSN that can be read",
        hint="postgresql://user:password@host:port/database, with special characters percent-encoded "
        "(what was given isn't shown: it may hold a password)",
    )
