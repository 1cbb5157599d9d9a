"""Fixtures for all tests: an embedded PostgreSQL for the session, a fresh database for each test that asks."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import pytest

from ktrdr_async.storage.database import DATABASE_VARIABLE, Database
from ktrdr_async.storage.embedded import EmbeddedServer
from ktrdr_async.storage.places import HOME_VARIABLE
from ktrdr_async.storage.record import Record


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


def make_home() -> Path:
    """A directory for an embedded server. pytest's own are 0700, and as root the server's account couldn't pass."""
    place = "/var/tmp" if os.access("/var/tmp", os.W_OK) else tempfile.gettempdir()
    made = Path(tempfile.mkdtemp(prefix="ktrdr-test-", dir=place))
    made.chmod(0o755)
    return made


def remove_home(home: Path) -> None:
    """Wait until the server in a home is gone, then delete it with its socket's directory."""
    if home.exists() and (record := Record.read(EmbeddedServer(home).root / "server.json")) is not None:
        assert EmbeddedServer(home).wait_until_stopped(30), f"the server in {home} is still running"
        shutil.rmtree(record.sockets, ignore_errors=True)
    shutil.rmtree(home)


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory for a test's own embedded server, whose processes have to be gone at the end."""
    made = make_home()
    yield made
    remove_home(made)


@pytest.fixture(scope="session", autouse=True)
def private_home() -> Iterator[Path]:
    """Nothing of the developer's own is touched: neither the home nor the database that the environment names."""
    home = make_home()
    patch = pytest.MonkeyPatch()
    patch.setenv(HOME_VARIABLE, str(home))
    patch.delenv(DATABASE_VARIABLE, raising=False)
    yield home
    patch.undo()
    remove_home(home)


@pytest.fixture(scope="session")
def embedded_server(private_home: Path) -> Iterator[EmbeddedServer]:
    """The session's server. A test that kills or stops a server makes one of its own."""
    server = EmbeddedServer()
    server.start()
    yield server
    server.release()


@pytest.fixture
async def dsn(embedded_server: EmbeddedServer) -> AsyncIterator[str]:
    """A fresh empty database, owned by the role that isn't a superuser; dropped afterwards."""
    where = embedded_server.administrator
    name = f"test_{uuid.uuid4().hex[:12]}"
    admin = await asyncpg.connect(host=where.host, port=where.port, user=where.user, database=where.database, ssl=False)
    try:
        await admin.execute(f'CREATE DATABASE "{name}" OWNER ktrdr_async')
        yield f"postgresql://ktrdr_async@/{name}?host={where.host}&port={where.port}"
        await admin.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
    finally:
        await admin.close()


@pytest.fixture
async def database(dsn: str) -> AsyncIterator[Database]:
    """An open database, migrated, empty."""
    async with Database.open(dsn) as opened:
        yield opened
