"""The door to PostgreSQL on a real server: what every connection has set, what is retried, what survives."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import asyncpg
import pytest
from homes import seed
from storage_processes import kill_server, postmasters

from ktrdr_async.errors import DatabaseError, InputError
from ktrdr_async.storage.database import DATABASE_VARIABLE, Database, is_transient, label_of
from ktrdr_async.storage.embedded import EmbeddedServer
from ktrdr_async.storage.places import HOME_VARIABLE

pytestmark = pytest.mark.anyio


@pytest.fixture
def own_server(home: Path, initialized: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EmbeddedServer]:
    """What `Database.open()` uses in this test, free to be killed."""
    seed(home, initialized)
    monkeypatch.setenv(HOME_VARIABLE, str(home))
    made = EmbeddedServer()
    yield made
    made.release()


async def error_of(awaitable: Any) -> BaseException:
    try:
        await awaitable
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


async def until(condition: Callable[[], object]) -> None:
    with anyio.fail_after(20):
        while not condition():  # noqa: ASYNC110 - what is waited for is in other processes
            await anyio.sleep(0.01)


# Opening


async def test_a_database_is_opened_used_and_closed(database: Database) -> None:
    assert not database.embedded
    async with database.connection() as connection:
        assert await connection.fetchval("SHOW synchronous_commit") == "on"
        assert await connection.fetchval("SHOW default_transaction_isolation") == "read committed"
        assert await connection.fetchval("SELECT to_regclass('ktrdr.migrations') IS NOT NULL")


async def test_without_a_dsn_the_embedded_server_is_used_and_left(own_server: EmbeddedServer) -> None:
    async with Database.open() as database:
        assert database.embedded
        assert database.label == f"embedded PostgreSQL in {own_server.home}"
        async with database.connection() as connection:
            assert await connection.fetchval("SELECT current_user::text") == "ktrdr_async"
    assert own_server.wait_until_stopped(20)


async def test_only_our_own_variable_names_a_database(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://a-services-own/one")
    monkeypatch.setenv(DATABASE_VARIABLE, dsn)
    async with Database.open() as database, database.connection() as connection:
        assert dsn.split("/")[3].split("?")[0] == await connection.fetchval("SELECT current_database()::text")


@pytest.mark.parametrize(
    ("dsn", "label"),
    [
        ("postgresql://u:secret@db.example/app", "postgresql://db.example/app"),
        ("postgres://u:secret@db.example:6432/app?sslmode=require&password=secret", "postgresql://db.example:6432/app"),
        ("postgresql://u:se%40cr%2Fet@[::1]:5432/app", "postgresql://[::1]:5432/app"),
        ("postgresql://u:secret@a:1,b:2/app", "postgresql://a:1,b:2/app"),
        ("postgresql://u@/app?host=/run/pg&password=secret", "postgresql:///run/pg/app"),
        ("postgresql:///app?user=secret", "postgresql:///app"),
    ],
)
async def test_a_label_has_no_credentials(dsn: str, label: str) -> None:
    assert label_of(dsn) == label


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://u:sec/ret@db/app",
        "postgresql://u:sec?ret@db/app",
        "postgresql://u:12?ret@db/app",
        "postgresql://u:sec#ret@db/app",
        "postgresql://u:sec@ret@db/app",
        "postgresql://u:12/ret@db/app",
        "host=db password=secret-ret",
        "u:secret-ret@db/app",
        "mysql://u:ret@db/app",
    ],
)
async def test_a_dsn_with_a_second_reading_is_refused_and_not_repeated(dsn: str) -> None:
    error = await error_of(Database.open(dsn).__aenter__())
    assert isinstance(error, InputError)
    assert "ret" not in str(error)
    assert "12" not in str(error)


async def test_an_unreachable_database_is_named_without_credentials(unused_tcp_port: int) -> None:
    error = await error_of(Database.open(f"postgresql://u:secret@127.0.0.1:{unused_tcp_port}/app").__aenter__())
    assert isinstance(error, DatabaseError)
    assert f"postgresql://127.0.0.1:{unused_tcp_port}/app can't be reached" in str(error)
    assert "secret" not in str(error)


async def test_a_dsn_that_asyncpg_can_not_parse_is_not_repeated(unused_tcp_port: int) -> None:
    error = await error_of(Database.open("postgresql://u:secret@db/app?sslmode=secret").__aenter__())
    assert isinstance(error, DatabaseError)
    assert "secret" not in str(error)


@pytest.fixture
def unused_tcp_port() -> int:
    import socket

    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port: int = bound.getsockname()[1]
        return port


async def test_fsync_off_is_warned_about(own_server: EmbeddedServer, caplog: pytest.LogCaptureFixture) -> None:
    async with Database.open():
        assert "fsync" not in caplog.text
    assert own_server.wait_until_stopped(20)
    with (own_server.root / "data" / "postgresql.conf").open("a") as file:
        file.write("fsync = off\n")
    async with Database.open():
        assert "fsync=off" in caplog.text


async def test_settings_of_the_role_do_not_make_commits_unsafe(dsn: str) -> None:
    connection = await asyncpg.connect(dsn)
    name = await connection.fetchval("SELECT current_database()")
    for setting in ("synchronous_commit = off", "default_transaction_isolation = 'repeatable read'"):
        await connection.execute(f'ALTER ROLE ktrdr_async IN DATABASE "{name}" SET {setting}')
    try:
        async with Database.open(dsn) as database:
            for _ in range(2):  # also after the pool's reset
                async with (
                    database.connection() as used,
                    database.reserved() as reserved,
                    reserved.connection() as kept,
                ):
                    for one in (used, kept):
                        assert await one.fetchval("SHOW synchronous_commit") == "on"
                        assert await one.fetchval("SHOW transaction_isolation") == "read committed"
        async with asyncpg.create_pool(dsn, min_size=1, max_size=2) as pool:
            async with (
                Database.open(pool=pool) as database,
                database.reserved() as reserved,
                database.connection() as used,
                reserved.connection() as kept,
            ):
                for one in (used, kept):
                    assert await one.fetchval("SHOW synchronous_commit") == "on"
                    assert await one.fetchval("SHOW transaction_isolation") == "read committed"
            assert await pool.fetchval("SHOW synchronous_commit") == "off"  # the service's own again
    finally:
        await connection.close()


async def test_a_services_pool_is_used_as_it_is_and_not_closed(dsn: str) -> None:
    async with asyncpg.create_pool(dsn, min_size=2, max_size=3) as pool:
        async with Database.open(pool=pool) as database:
            assert "caller's pool" in database.label
            async with database.reserved() as reserved:
                async with reserved.connection() as connection:
                    assert await connection.fetchval("SELECT 1") == 1
                assert pool.get_size() - pool.get_idle_size() == 1  # one of the pool's is held
            await database.terminate()
        assert pool.get_size() == pool.get_idle_size()
        assert await pool.fetchval("SELECT 1") == 1
        with pytest.raises(InputError):
            await Database.open(dsn, pool=pool).__aenter__()


async def test_the_pool_has_at_most_eight_and_waiting_is_bounded(database: Database) -> None:
    async with anyio.create_task_group() as tasks:
        release = anyio.Event()
        held = []

        async def hold() -> None:
            async with database.connection() as connection:
                held.append(connection)
                await release.wait()

        for _ in range(8):
            tasks.start_soon(hold)
        await until(lambda: len(held) == 8)
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            async with database.connection(timeout=0.2):
                pass
        assert time.monotonic() - began < 2
        release.set()


async def test_a_cancelled_use_gives_its_connection_back(database: Database) -> None:
    async def use() -> None:
        async with database.connection() as connection:
            await connection.execute("SELECT pg_sleep(60)")

    for _ in range(9):  # one more than the pool has
        task = asyncio.create_task(use())
        await anyio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    async with database.connection(timeout=5) as connection:
        assert (
            await connection.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(60)%' AND state = 'active'"
            )
            == 1
        )


# What is transient


async def test_errors_of_a_killed_server_are_transient(own_server: EmbeddedServer) -> None:
    async with Database.open() as database:
        async with database.connection() as connection:
            running = asyncio.create_task(error_of(connection.fetchval("SELECT pg_sleep(60)")))
            await anyio.sleep(0.05)
            (process,) = postmasters(own_server.root)
            for one in [process, *process.children()]:  # the keeper stays, so nobody starts it again
                one.kill()
            errors = [await running]
            with pytest.raises(asyncpg.InterfaceError) as caught:
                await connection.fetchval("SELECT 1")
            errors.append(caught.value)
        where = database._server.arguments  # type: ignore[union-attr]
        errors.append(
            await error_of(asyncpg.connect(host=where.host, user=where.user, database=where.database, ssl=False))
        )
        shutil.rmtree(where.host)
        errors.append(
            await error_of(asyncpg.connect(host=where.host, user=where.user, database=where.database, ssl=False))
        )
        assert [error for error in errors if not is_transient(error)] == []
        await database.ensure_running()  # else the killed server's shared memory would be left on this machine


async def test_what_a_server_says_of_itself_is_transient(database: Database, dsn: str) -> None:
    async with database.connection() as connection, database.connection() as other:
        running = asyncio.create_task(error_of(connection.fetchval("SELECT pg_sleep(60)")))
        pid = connection.get_server_pid()
        active = "SELECT count(*) FROM pg_stat_activity WHERE pid = $1 AND state = 'active'"
        with anyio.fail_after(10):
            while await other.fetchval(active, pid) == 0:  # noqa: ASYNC110 - the server doesn't tell
                await anyio.sleep(0.01)
        await other.fetchval("SELECT pg_terminate_backend($1)", pid)
        assert is_transient(await running)
        async with other.transaction(readonly=True):
            assert is_transient(await error_of(other.execute("CREATE TABLE no (n int)")))
    async with database.connection() as connection:
        name = await connection.fetchval("SELECT current_database()")
        await connection.execute(f'ALTER DATABASE "{name}" CONNECTION LIMIT 1')
        try:
            error = await error_of(asyncpg.connect(dsn))
            assert isinstance(error, asyncpg.TooManyConnectionsError)
            assert is_transient(error)
        finally:
            await connection.execute(f'ALTER DATABASE "{name}" CONNECTION LIMIT -1')


async def test_errors_of_the_work_are_not_transient(database: Database, tmp_path: Path) -> None:
    async with database.connection() as connection:
        await connection.execute("CREATE TABLE one (n int PRIMARY KEY)")
        for statement in ("SELEC 1", "SELECT 1/0", "INSERT INTO one VALUES (1), (1)", "SELECT * FROM nowhere"):
            assert not is_transient(await error_of(connection.execute(statement)))
        busy = asyncio.create_task(connection.fetchval("SELECT pg_sleep(0.3)"))
        await anyio.sleep(0.05)
        assert not is_transient(await error_of(connection.fetchval("SELECT 1")))  # two at once: a mistake of ours
        await busy
    with pytest.raises(FileNotFoundError) as caught:
        (tmp_path / "nothing").read_text()
    assert not is_transient(caught.value)
    assert not is_transient(ValueError())
    assert is_transient(asyncpg.InternalClientError("what asyncpg makes of a server that is killed in an answer"))
    assert not is_transient(asyncio.CancelledError())


# Retrying


async def test_a_retry_brings_the_killed_embedded_server_back(own_server: EmbeddedServer) -> None:
    async with Database.open() as database:
        await database.retrying(lambda c: c.execute("CREATE TABLE kept AS SELECT 7 AS n"), seconds=10)
        kill_server(own_server.root)
        assert await database.retrying(lambda c: c.fetchval("SELECT n FROM kept"), seconds=20) == 7
        kill_server(own_server.root)
        async with database.reserved() as reserved:
            assert await reserved.retrying(lambda c: c.fetchval("SELECT n FROM kept"), seconds=20) == 7


async def test_a_statement_is_tried_again_on_another_connection(database: Database) -> None:
    seen: list[int] = []

    async def work(connection: Any) -> int:
        seen.append(connection.get_server_pid())
        if len(seen) < 3:
            await connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        return len(seen)

    assert await database.retrying(work, seconds=20) == 3
    assert len(set(seen)) == 3


async def test_an_error_of_the_work_is_raised_at_once(database: Database) -> None:
    calls = []

    async def work(connection: Any) -> None:
        calls.append(1)
        raise TimeoutError("of the work itself")

    with pytest.raises(TimeoutError, match="of the work itself"):
        await database.retrying(work, seconds=20)
    assert calls == [1]


async def test_a_retry_ends_within_its_time(database: Database) -> None:
    async def work(connection: Any) -> None:
        await connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")

    began = time.monotonic()
    with pytest.raises(Exception) as caught:  # noqa: PT011 - any of the transient ones
        await database.retrying(work, seconds=1)
    assert is_transient(caught.value)
    assert 0.5 < time.monotonic() - began < 3


async def test_a_stopped_server_holds_nobody_past_the_deadline(own_server: EmbeddedServer) -> None:
    async with Database.open() as database, database.reserved() as reserved:
        (process,) = postmasters(own_server.root)
        stopped = [process, *process.children()]
        for one in stopped:
            one.suspend()
        try:
            began = time.monotonic()
            for source in (database, reserved):
                with pytest.raises((asyncpg.PostgresConnectionError, TimeoutError)):
                    await source.retrying(lambda c: c.fetchval("SELECT 1"), seconds=0.5)
            assert time.monotonic() - began < 4
            with anyio.move_on_after(0.3):  # also from outside: cancelling an asyncpg query here wouldn't end by itself
                async with database.connection() as connection:
                    await connection.fetchval("SELECT 1")
            assert time.monotonic() - began < 8
        finally:
            for one in stopped:
                one.resume()
        assert await database.retrying(lambda c: c.fetchval("SELECT 1"), seconds=20) == 1


async def test_closing_ends_on_a_stopped_server(own_server: EmbeddedServer) -> None:
    stopped = []
    async with Database.open() as database:
        async with database.connection() as connection:
            assert await connection.fetchval("SELECT 1") == 1
        (process,) = postmasters(own_server.root)
        stopped = [process, *process.children()]
        for one in stopped:
            one.suspend()
        began = time.monotonic()
    try:
        assert time.monotonic() - began < 8
    finally:
        for one in stopped:
            one.resume()


# The reserved connection


async def test_the_reserved_connection_survives_a_smart_shutdown(own_server: EmbeddedServer) -> None:
    async with Database.open() as database, database.reserved() as reserved:
        where = database._server.arguments  # type: ignore[union-attr]
        (process,) = postmasters(own_server.root)
        process.send_signal(signal.SIGTERM)
        with anyio.fail_after(20):
            while True:  # until the server takes no new connections
                try:
                    await (
                        await asyncpg.connect(host=where.host, user=where.user, database=where.database, ssl=False)
                    ).close()
                except asyncpg.CannotConnectNowError:
                    break
        await reserved.retrying(lambda c: c.execute("CREATE TABLE late AS SELECT 7 AS n"), seconds=5)
        async with reserved.connection() as connection:
            assert await connection.fetchval("SELECT n FROM late") == 7
    assert own_server.wait_until_stopped(20)
    assert not (own_server.root / "data" / "postmaster.pid").exists()


async def test_the_reserved_connection_is_made_again_when_it_is_lost(database: Database) -> None:
    async with database.reserved() as reserved:
        async with reserved.connection() as connection:
            first = connection.get_server_pid()
        async with database.connection() as other:
            await other.fetchval("SELECT pg_terminate_backend($1, 5000)", first)
        assert await reserved.retrying(lambda c: c.fetchval("SELECT pg_backend_pid()"), seconds=10) != first
        reserved.terminate()
        async with reserved.connection(timeout=5) as connection:
            assert await connection.fetchval("SELECT 1") == 1


async def test_the_reserved_connection_serves_one_at_a_time(database: Database) -> None:
    async with database.reserved() as reserved:
        async with reserved.connection():
            waiting = asyncio.create_task(reserved.connection(timeout=0.1).__aenter__())
            assert isinstance(await error_of(waiting), TimeoutError)
        results = await asyncio.gather(
            *(reserved.retrying(lambda c, n=n: c.fetchval("SELECT $1::int", n), seconds=10) for n in range(20))  # type: ignore[misc]
        )
        assert results == list(range(20))


async def test_a_transaction_left_open_is_not_handed_to_the_next_user(database: Database) -> None:
    async with database.reserved() as reserved:
        async with reserved.connection() as connection:
            await connection.execute("BEGIN; CREATE TABLE half (n int)")
        async with reserved.connection() as connection:
            assert await connection.fetchval("SELECT to_regclass('half')") is None


async def test_a_reserved_connection_whose_query_was_cancelled_is_usable(database: Database) -> None:
    async with database.reserved() as reserved:
        async with reserved.connection() as connection:
            first = connection.get_server_pid()
            with anyio.move_on_after(0.1):
                await connection.fetchval("SELECT pg_sleep(60)")
        async with reserved.connection() as connection:
            assert await connection.fetchval("SELECT pg_backend_pid()") == first


async def test_terminate_cuts_everything(database: Database) -> None:
    async with database.reserved() as reserved, reserved.connection() as kept, database.connection() as connection:
        running = [asyncio.create_task(error_of(one.fetchval("SELECT pg_sleep(60)"))) for one in (kept, connection)]
        await anyio.sleep(0.05)
        await database.terminate()
        with anyio.fail_after(5):
            assert all([is_transient(await task) for task in running])


# Behind a transaction pooler


@pytest.fixture
def pooled(dsn: str, home: Path) -> Iterator[str]:
    """The same database through PgBouncer in transaction mode, with fewer connections than clients."""
    if (program := shutil.which("pgbouncer")) is None:
        pytest.skip("no pgbouncer here")
    name, port = dsn.split("/")[3].split("?")[0], 6543
    where = dict(pair.split("=") for pair in dsn.partition("?")[2].split("&"))
    sockets = home / "pooler"
    sockets.mkdir(mode=0o700)
    user: dict[str, Any] = {}
    if os.geteuid() == 0:
        user = {"user": "postgres"}
        shutil.chown(sockets, "postgres")
    (home / "pgbouncer.ini").write_text(
        f"[databases]\n{name} = host={where['host']} port={where['port']} user=ktrdr_async\n"
        f"[pgbouncer]\nlisten_addr =\nlisten_port = {port}\nunix_socket_dir = {sockets}\nauth_type = any\n"
        "pool_mode = transaction\ndefault_pool_size = 3\n"
    )
    with subprocess.Popen([program, "-q", str(home / "pgbouncer.ini")], stderr=subprocess.DEVNULL, **user) as process:
        deadline = time.monotonic() + 20
        while not (sockets / f".s.PGSQL.{port}").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield f"postgresql://ktrdr_async@/{name}?host={sockets}&port={port}"
        process.kill()


async def test_it_works_behind_a_transaction_pooler(pooled: str) -> None:
    async def work(connection: Any) -> int:
        for n in range(20):
            assert await connection.fetchval("SELECT $1::int + $2::int", n, 1) == n + 1
            assert await connection.fetchval("SELECT $1::text || 'x'", str(n)) == f"{n}x"
        async with connection.transaction(isolation="repeatable_read"):
            value: int = await connection.fetchval("SELECT $1::int", 5)
        return value

    async with Database.open(pooled) as database, database.reserved() as reserved:
        sources = [database] * 7 + [reserved]
        assert await asyncio.gather(*(source.retrying(work, seconds=30) for source in sources)) == [5] * 8


async def test_the_loop_is_not_held_while_the_server_starts(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(home))  # a cold start, initdb included
    late = 0.0

    async def tick() -> None:
        nonlocal late
        while True:
            began = time.perf_counter()
            await anyio.sleep(0.001)
            late = max(late, time.perf_counter() - began)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(tick)
        async with Database.open():
            pass
        tasks.cancel_scope.cancel()
    assert late < 0.25  # a cold start takes longer than that on any machine
