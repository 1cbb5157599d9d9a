"""Fixtures for all tests: an embedded PostgreSQL for the session, a fresh database for each test that asks."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import ModuleType

import asyncpg
import pytest
from campaigns import Figures
from homes import make_home, remove_home, seed

from ktrdr_async import compiling
from ktrdr_async.backtesting.tiers import load_compiled
from ktrdr_async.compiling import CACHE_VARIABLE
from ktrdr_async.storage.database import DATABASE_VARIABLE, Database
from ktrdr_async.storage.embedded import EmbeddedServer
from ktrdr_async.storage.places import HOME_VARIABLE

SEED = 20261125
LOADED: dict[str, ModuleType] = {}  # the compiled tier, between the tests that use it
FIGURES = pytest.StashKey[Figures]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=SEED, help=f"of everything that tests draw at random ({SEED})")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FIGURES] = Figures()


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed: {config.getoption('seed')}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The seed that repeats what failed, and the figures that were reached."""
    if terminalreporter.stats.get("failed") or terminalreporter.stats.get("error"):
        terminalreporter.write_line(f"to repeat: --seed {config.getoption('seed')}")
    if rows := config.stash[FIGURES].rows:
        terminalreporter.section("figures")
        for what, reached in rows:
            terminalreporter.write_line(f"{what}: {reached}")


@pytest.fixture(scope="session")
def campaign_seed(pytestconfig: pytest.Config) -> int:
    """Of all random draws of a campaign: `--seed`."""
    return int(pytestconfig.getoption("seed"))


@pytest.fixture(scope="session")
def figures(pytestconfig: pytest.Config) -> Figures:
    """Takes what a campaign has reached, for the summary."""
    return pytestconfig.stash[FIGURES]


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


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
    patch.setenv(CACHE_VARIABLE, str(home / "cache"))
    patch.delenv(DATABASE_VARIABLE, raising=False)
    yield home
    patch.undo()
    remove_home(home)


@pytest.fixture
def compiled(private_home: Path) -> Iterator[None]:
    """The compiled tier is loaded during a test, and hidden from the others."""
    if not LOADED:
        assert load_compiled().why_not is None
        LOADED.update(compiling._modules)
    compiling._modules.update(LOADED)
    yield
    compiling._modules.clear()


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
