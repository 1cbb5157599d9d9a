"""Directories for the embedded servers of tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from ktrdr_async.storage.embedded import EmbeddedServer
from ktrdr_async.storage.places import prepare_home, version_directory
from ktrdr_async.storage.record import Record


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


def seed(home: Path, initialized: Path) -> None:
    """Give a home the data directory of a server that was started and stopped once."""
    prepare_home(home, shared_with_account=os.geteuid() == 0)
    subprocess.run(["cp", "-a", str(initialized / "data"), str(version_directory(home) / "data")], check=True)
