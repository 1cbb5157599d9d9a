"""Fixtures for all tests: an embedded PostgreSQL for the session, a fresh database for each test that asks."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import pytest

from ktrdr_async.storage.database import DATABASE_VARIABLE, Database
from ktrdr_async.storage.embedded import EmbeddedServer
from ktrdr_async.storage.places import HOME_VARIABLE, prepare_home, version_directory
from ktrdr_async.storage.record import Record


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


def make_home(*, on_disk: bool = False) -> Path:
    """A directory for an embedded server. pytest's own are 0700: as root, the server's account couldn't pass.

    In memory where there is room: the server syncs as it does in earnest, and a busy disk takes seconds for that.
    """
    places = [Path("/var/tmp"), Path(tempfile.gettempdir())]
    memory = Path("/dev/shm")
    if not on_disk and memory.is_dir() and shutil.disk_usage(memory).free > 2 * 1024**3:
        places.insert(0, memory)
    place = next(place for place in places if os.access(place, os.W_OK | os.X_OK))
    made = Path(tempfile.mkdtemp(prefix="ktrdr-test-", dir=place))
    made.chmod(0o755)
    return made


def remove_home(home: Path) -> None:
    """Wait until the server in a home is gone, then delete it with its socket's directory."""
    if home.exists() and (record := Record.read(EmbeddedServer(home).root / "server.json")) is not None:
        assert EmbeddedServer(home).wait_until_stopped(30), f"the server in {home} is still running"
        shutil.rmtree(record.sockets, ignore_errors=True)
    shutil.rmtree(home)


@pytest.fixture(scope="session")
def initialized() -> Iterator[Path]:
    """The directory of a stopped server, to be copied: initdb takes most of a cold start."""
    made = make_home()
    server = EmbeddedServer(made)
    server.start()
    server.release()
    assert server.wait_until_stopped(60)
    yield server.root
    remove_home(made)


def seed(home: Path, initialized: Path) -> None:
    """Give a home the data directory of a server that was started and stopped once."""
    prepare_home(home, shared_with_account=os.geteuid() == 0)
    subprocess.run(["cp", "-a", str(initialized / "data"), str(version_directory(home) / "data")], check=True)


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
def embedded_server(private_home: Path, initialized: Path) -> Iterator[EmbeddedServer]:
    """The session's server. A test that kills or stops a server makes one of its own."""
    seed(private_home, initialized)
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
