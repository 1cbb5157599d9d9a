"""The one door to PostgreSQL: a pool, a reserved connection, named queries, and retries of what passes by itself.

Nothing here knows of operations or checkpoints. What was in doubt stays in doubt: a retry is only for work that may be
done twice, or that finds out by itself whether it was done.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib.resources.abc import Traversable
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import anyio.lowlevel
import anyio.to_thread
import asyncpg

from ktrdr_async.errors import DatabaseError, InputError, KtrdrError
from ktrdr_async.storage.connect import CONNECT_TIMEOUT, SESSION, Connector, label_of
from ktrdr_async.storage.embedded import EmbeddedServer
from ktrdr_async.storage.migrations import Migration, load_migrations, migrate
from ktrdr_async.storage.queries import SCHEMA, load_queries, sql_directory, validated_schema
from ktrdr_async.storage.transient import is_transient

if TYPE_CHECKING:
    from ktrdr_async.storage.connect import Connection, Pool, Proxy

DATABASE_VARIABLE = "KTRDR_ASYNC_DATABASE"
POOL_MIN, POOL_MAX = 1, 8
RELEASE_TIMEOUT = 2.0  # seconds for a connection to be reset; then it is terminated
CLOSE_TIMEOUT = 3.0  # seconds for the pool to close; then it is terminated
OPEN_PATIENCE = 10.0  # seconds for a server that says that it is just starting, or full
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 2.0  # seconds between two tries, before jitter
REVIVAL = 10.0  # seconds that one try waits for the embedded server to come back

T = TypeVar("T")
log = logging.getLogger(__name__)

__all__ = ["DATABASE_VARIABLE", "Database", "Reserved", "is_transient", "label_of"]


class Database:
    """An open database, for one event loop. Made by `Database.open`.

    Attributes:
        label: the database's name for messages and printed commands, without credentials.
        schema: where our tables are.
    """

    def __init__(
        self, pool: Pool, connector: Connector | None, server: EmbeddedServer | None, *, label: str, schema: str
    ) -> None:
        self.label = label
        self.schema = schema
        self._pool = pool
        self._connector = connector  # None: the pool is the caller's
        self._server = server
        self._queries: dict[str, str] = {}
        self._on_acquire = ""  # SQL for a connection whose session has other defaults than ours
        self._reserved: list[Reserved] = []

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        dsn: str | None = None,
        *,
        pool: Pool | None = None,
        schema: str = SCHEMA,
        migrate: bool = True,
        migrations: Traversable | None = None,
    ) -> AsyncIterator[Database]:
        """Open a database: the given pool's, else the DSN's, else `KTRDR_ASYNC_DATABASE`'s, else the embedded one.

        Args:
            dsn: `postgresql://...`.
            pool: a pool of the caller, used as it is and never closed.
            schema: where our tables are; made if it isn't there.
            migrate: whether missing migrations may be applied.
            migrations: directory of the migrations; None is the package's own.

        Raises:
            DatabaseError: if it can't be reached or used; the message has no credentials.
            InputError: if both a DSN and a pool are given, or the DSN or the schema's name isn't one.
        """
        validated_schema(schema)
        if pool is not None and dsn is not None:
            raise InputError("give a DSN or a pool, not both")
        queries, steps = await anyio.to_thread.run_sync(_read_files, schema, migrations or sql_directory("migrations"))
        source = (
            _given(pool, schema) if pool is not None else _own(dsn or os.environ.get(DATABASE_VARIABLE) or None, schema)
        )
        async with source as database:
            database._queries = queries
            try:
                await database._prepare(steps, migrate)
                yield database
            finally:
                for reserved in list(database._reserved):
                    await reserved.close()

    @property
    def embedded(self) -> bool:
        """Whether this is the user's own embedded server."""
        return self._server is not None

    def sql(self, name: str) -> str:
        """Text of a named query, with the schema's name in it.

        Raises:
            KeyError: if there is no such query.
        """
        return self._queries[name]

    @asynccontextmanager
    async def connection(self, *, timeout: float | None = None) -> AsyncIterator[Proxy]:
        """A connection of the pool; `timeout` bounds the wait for it, in seconds.

        Raises:
            TimeoutError: if none was to be had in time.
        """
        connection = await self._acquire(timeout)
        try:
            yield connection
        finally:
            await self._give_back(connection)

    @asynccontextmanager
    async def reserved(self) -> AsyncIterator[Reserved]:
        """A connection outside the pool (of a caller's pool: one that is held), for heartbeats and final saves.

        A server that is shutting down smartly takes no new connections, and goes on serving this one.
        """
        reserved = Reserved(self)
        self._reserved.append(reserved)
        try:
            await reserved.retrying(_nothing, seconds=CONNECT_TIMEOUT)
            yield reserved
        finally:
            self._reserved.remove(reserved)
            await reserved.close()

    async def retrying(self, work: Callable[[Proxy], Awaitable[T]], *, seconds: float) -> T:
        """Do `work` on a connection of the pool, and again on another one while the error is transient.

        Args:
            work: may be called several times, and may have succeeded without our hearing of it.
            seconds: for everything, waiting for a connection included; then a running statement's connection is cut.

        Raises:
            Exception: the last error; also `TimeoutError` if no connection was to be had.
        """
        return await self._retry(lambda timeout: self.connection(timeout=timeout), work, seconds)

    async def ensure_running(self, patience: float = REVIVAL) -> None:
        """Bring the embedded server back if it is gone; nothing to do for any other database.

        Raises:
            EmbeddedServerError: if it doesn't answer within `patience` seconds.
        """
        if self._server is not None:
            # Left behind when cancelled: the thread ends by itself at its deadline.
            await anyio.to_thread.run_sync(self._server.ensure_running, patience, abandon_on_cancel=True)

    async def terminate(self) -> None:
        """Cut every connection at once, the reserved ones too; what they were doing is undecided.

        A caller's pool is left alone.
        """
        for reserved in self._reserved:
            reserved.terminate()
        if self._connector is not None:
            self._pool.terminate()
        await anyio.lowlevel.cancel_shielded_checkpoint()

    async def _retry(
        self,
        source: Callable[[float], AbstractAsyncContextManager[Any]],
        work: Callable[[Any], Awaitable[T]],
        seconds: float,
    ) -> T:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        pause = FIRST_PAUSE
        reason: Exception | None = None
        while True:
            working = False
            try:
                async with source(max(deadline - loop.time(), 0.001)) as connection:
                    # Cancelling a statement on a server that hangs doesn't end; cutting its connection does.
                    cut = loop.call_at(deadline, connection.terminate)
                    working = True
                    try:
                        return await work(connection)
                    except AttributeError as error:
                        # Cut between two steps of the driver's own: the connection has lost its protocol meanwhile.
                        if not connection.is_closed():
                            raise
                        lost = "connection was closed in the middle of operation"
                        raise asyncpg.ConnectionDoesNotExistError(lost) from error
                    except asyncpg.ReadOnlySQLTransactionError:
                        connection.terminate()  # it stays a standby's, or read-only, when others can write again
                        raise
                    finally:
                        cut.cancel()
            except Exception as error:
                # A timeout inside the work is the work's own; the one of waiting for a connection is ours.
                passing = is_transient(error) and not (working and isinstance(error, TimeoutError))
                left = deadline - loop.time()
                if not passing or left <= 0:
                    ours = left <= 0 if working else isinstance(error, TimeoutError)
                    if passing and ours and reason is not None:
                        raise reason from error  # what went wrong before the time was over says more than that it is
                    raise
                reason = reason if isinstance(error, TimeoutError) else error
                log.warning("%s: %s; trying again for %.1f s", self.label, short(error), left)
                if not isinstance(error, asyncpg.PostgresError) or isinstance(error, asyncpg.AdminShutdownError):
                    await self._revive(min(left, REVIVAL))  # else a server is there, and says so itself
            await anyio.sleep(min(pause * random.uniform(0.5, 1.0), max(deadline - loop.time(), 0.0)))  # noqa: S311
            pause = min(pause * 2, LONGEST_PAUSE)

    async def _revive(self, patience: float) -> None:
        try:
            await self.ensure_running(patience)
        except DatabaseError as error:
            log.warning("%s", error)

    async def _acquire(self, timeout: float | None) -> Proxy:
        connection = await self._pool.acquire(timeout=timeout)
        if self._on_acquire:
            try:
                await connection.execute(self._on_acquire, timeout=timeout)
            except BaseException:
                await self._give_back(connection)
                raise
        return connection

    async def _give_back(self, connection: Proxy) -> None:
        # Not `async with pool.acquire()`: that one's release waits without a limit on a server that hangs. Waited for
        # however often we are cancelled: else asyncpg's own task is left behind, and its failure told to the loop.
        release = asyncio.create_task(self._pool.release(connection, timeout=RELEASE_TIMEOUT))
        cancelled: asyncio.CancelledError | None = None
        with anyio.CancelScope(shield=True):
            while not release.done():
                try:
                    await asyncio.wait({release})
                except asyncio.CancelledError as error:
                    cancelled = error
        if not release.cancelled() and (failed := release.exception()) is not None:
            log.warning("%s: a connection was dropped: %s", self.label, short(failed))
        if cancelled is not None:
            raise cancelled

    async def _prepare(self, steps: list[Migration], permitted: bool) -> None:
        try:
            async with self.connection(timeout=CONNECT_TIMEOUT) as connection:
                found = await connection.fetchrow(
                    "SELECT current_setting('synchronous_commit'), current_setting('default_transaction_isolation'), "
                    "current_setting('fsync'), current_database()::text"
                )
                assert found is not None  # noqa: S101 - a SELECT without FROM has one row
                commit, isolation, fsync, name = found
                if self._connector is None:
                    self.label = f"the caller's pool on database {name}"
                if fsync == "off":
                    log.warning(
                        "%s runs with fsync=off: a crash of its machine can lose or destroy checkpoints", self.label
                    )
                if commit not in ("on", "remote_apply") or isolation != SESSION["default_transaction_isolation"]:
                    # A caller's pool, or a pooler that refused our settings; in its transaction mode this may miss.
                    log.info(
                        "%s: synchronous_commit is %s and isolation %s; set for each use", self.label, commit, isolation
                    )
                    self._on_acquire = ";".join(f"SET {setting} = '{value}'" for setting, value in SESSION.items())
                await migrate(connection, steps, schema=self.schema, label=self.label, permitted=permitted)
        except KtrdrError:
            raise
        except Exception as error:
            if is_transient(error) or isinstance(error, asyncpg.PostgresError):
                raise DatabaseError(f"{self.label} couldn't be made ready: {short(error)}") from error
            raise


class Reserved:
    """One connection for what must not wait behind the pool; one user of it at a time, made again when it is lost."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = anyio.Lock()
        self._held: Connection | Proxy | None = None

    @asynccontextmanager
    async def connection(self, *, timeout: float | None = None) -> AsyncIterator[Connection | Proxy]:
        """The connection; `timeout` bounds the wait for its other user and for making it again, in seconds.

        Raises:
            TimeoutError: if it wasn't to be had in time.
        """
        with anyio.fail_after(timeout):
            await self._lock.acquire()
        try:
            held = self._held
            if held is None or held.is_closed():
                with anyio.fail_after(timeout):
                    held = await self._make()
            try:
                yield held
            finally:
                if not held.is_closed() and held.is_in_transaction():
                    held.terminate()  # left by a transaction that wasn't ended: never handed to the next user
        finally:
            self._lock.release()

    async def retrying(self, work: Callable[[Connection | Proxy], Awaitable[T]], *, seconds: float) -> T:
        """As `Database.retrying`, on this connection."""
        return await self._database._retry(lambda timeout: self.connection(timeout=timeout), work, seconds)

    def terminate(self) -> None:
        """Cut the connection; whoever is using it gets an error that is transient, and the next user a new one."""
        if self._held is not None and not self._held.is_closed():
            self._held.terminate()

    async def close(self) -> None:
        """Close the connection, or give it back to the caller's pool."""
        held, self._held = self._held, None
        if held is None:
            return
        if self._database._connector is None:
            await self._database._give_back(held)  # type: ignore[arg-type]
            return
        with anyio.CancelScope(shield=True):
            try:
                await held.close(timeout=RELEASE_TIMEOUT)
            except Exception:
                held.terminate()
            await anyio.lowlevel.checkpoint()

    async def _make(self) -> Connection | Proxy:
        await self.close()
        connector = self._database._connector
        if connector is None:
            self._held = await self._database._acquire(None)
            return self._held
        self._held = made = await connector()
        if self._database._on_acquire:  # nobody resets this connection, so once is enough
            await made.execute(self._database._on_acquire, timeout=CONNECT_TIMEOUT)
        return made


@asynccontextmanager
async def _given(pool: Pool, schema: str) -> AsyncIterator[Database]:
    yield Database(pool, None, None, label="the caller's pool", schema=schema)


@asynccontextmanager
async def _own(dsn: str | None, schema: str) -> AsyncIterator[Database]:
    server = None if dsn else EmbeddedServer()
    label = server.label if server else label_of(dsn or "")
    try:
        if server is not None:
            await anyio.to_thread.run_sync(server.start)
        connector = Connector(dsn, server)
        pool = await _open_pool(connector, label)
        try:
            yield Database(pool, connector, server, label=label, schema=schema)
        finally:
            await _close_pool(pool, label)
    finally:
        if server is not None:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(server.release)


async def _open_pool(connector: Connector, label: str) -> Pool:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + OPEN_PATIENCE
    while True:
        try:
            return await asyncpg.create_pool(min_size=POOL_MIN, max_size=POOL_MAX, connect=connector)
        except ValueError:
            # A DSN that asyncpg can't parse. The error's text quotes a piece of it, which may be one of a password.
            raise DatabaseError(f"{label} can't be reached: its DSN can't be parsed") from None
        except (asyncpg.CannotConnectNowError, asyncpg.TooManyConnectionsError) as error:
            if loop.time() >= deadline:
                raise DatabaseError(f"{label} can't be reached: {short(error)}") from error
            await anyio.sleep(0.1)
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
            raise DatabaseError(f"{label} can't be reached: {short(error)}") from error


async def _close_pool(pool: Pool, label: str) -> None:
    with anyio.move_on_after(CLOSE_TIMEOUT, shield=True):
        try:
            await pool.close()
        except Exception as error:
            log.warning("%s: the pool didn't close: %s", label, short(error))
    pool.terminate()
    # asyncio tells a transport's end to its protocol in the next turn; without it they'd be collected while open.
    await anyio.lowlevel.cancel_shielded_checkpoint()


async def _nothing(connection: Connection | Proxy) -> None:
    """Work for a connection that only has to be made."""


def _read_files(schema: str, migrations: Traversable) -> tuple[dict[str, str], list[Migration]]:
    return load_queries(sql_directory("queries"), schema), load_migrations(migrations)


def short(error: BaseException) -> str:
    """An error's kind and the beginning of its text, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(": ")
