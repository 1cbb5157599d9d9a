"""The lock files of an embedded server's directory, and how its keeper gets them (`keeper.py` says what each means)."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ktrdr_async.errors import EmbeddedServerError
from ktrdr_async.storage import keeper, places
from ktrdr_async.storage.accounts import Account, environment

LOOK_PATIENCE = 10.0  # seconds for those who only look whether there is a keeper


def open_file(root: Path, name: str) -> int:
    """Descriptor of a lock file or the log in `root`, made if it isn't there; a link isn't followed.

    Raises:
        EmbeddedServerError: if the file can't be opened for writing.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(root / name, flags | (os.O_APPEND if name.endswith(".log") else 0), 0o600)
    except OSError as error:
        raise places.unusable(root.parent, f"{name}: {(error.strerror or str(error)).lower()}") from error


def try_lock(root: Path, name: str) -> int | None:
    """A descriptor that holds the lock exclusively; None if somebody else has it."""
    descriptor = open_file(root, name)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def keeper_missing(root: Path) -> bool:
    """Whether no keeper lives."""
    descriptor = try_lock(root, "keeper.lock")
    if descriptor is None:
        return False
    os.close(descriptor)
    return True


def take_run(root: Path) -> int | None:
    """`run.lock`, if neither a server's process nor a keeper is left; else None.

    A keeper that adopted waits for that lock itself: holding it while waiting for the keeper's end would not end.
    """
    run = try_lock(root, "run.lock")
    if run is not None and not keeper_missing(root):
        os.close(run)
        return None
    return run


def _take_keeper(root: Path) -> int:
    # Whoever calls this found no keeper; others look in the same way, and hold the lock for a moment each.
    deadline = time.monotonic() + LOOK_PATIENCE
    while (descriptor := try_lock(root, "keeper.lock")) is None:
        if time.monotonic() >= deadline:
            raise EmbeddedServerError(f"the server in {root} has a keeper that should be gone")
        time.sleep(0.005)
    return descriptor


@contextmanager
def starting(root: Path, patience: float) -> Iterator[None]:
    """Hold `start.lock`: one process or thread at a time starts, adopts or stops.

    Raises:
        EmbeddedServerError: if another one has it for longer than `patience` seconds.
    """
    deadline = time.monotonic() + patience
    while (descriptor := try_lock(root, "start.lock")) is None:
        if time.monotonic() >= deadline:
            raise EmbeddedServerError(
                f"another process was still starting or stopping the server in {root} after {patience:g} s",
                hint=f"see {root / 'server.log'}",
            )
        time.sleep(0.005)
    try:
        yield
    finally:
        os.close(descriptor)


def spawn_keeper(
    root: Path,
    account: Account,
    sockets: str,
    *,
    run: int | None = None,
    server: Path | None = None,
    stale: int = 0,
    adopt: int = 0,
) -> None:
    """Start a keeper; called with `start.lock` held.

    Args:
        root: the server's directory.
        account: as whom the server runs.
        sockets: the directory of its socket.
        run: the held `run.lock` of a server that the keeper is to start.
        server: the program to start.
        stale: the process id in postmaster.pid when nobody was found to run; 0 if there was none.
        adopt: without `run`: the process id of the running server.

    Raises:
        EmbeddedServerError: if the keeper can't be started.
    """
    opened: list[int] = []
    try:
        opened.append(_take_keeper(root))
        opened.extend(open_file(root, name) for name in ("users.lock", "start.lock", "server.log"))
        given = {
            "adopt": adopt,
            "stale": stale,
            "data": str(root / "data"),
            "server": str(server),
            "sockets": sockets,
            "run_path": str(root / "run.lock"),
            "log": opened[3],
            "locks": {"keeper": opened[0], "users": opened[1], "start": opened[2], "run": -1 if run is None else run},
            "drops": account.drops,
            "uid": account.uid,
            "gid": account.gid,
        }
        done = subprocess.run(  # noqa: S603 - it forks, and the one that we wait for ends at once
            [sys.executable, "-I", "-S", keeper.__file__, json.dumps(given)],
            stdin=subprocess.DEVNULL, stdout=opened[3], stderr=opened[3], cwd="/", env=environment(), timeout=60,
            check=False, start_new_session=True, pass_fds=[*opened, *([] if run is None else [run])],
        )  # fmt: skip
        failure = f"it exited with {done.returncode}" if done.returncode > 0 else ""  # below: killed, to be tried again
    except (OSError, subprocess.TimeoutExpired) as error:
        failure = str(error)
    finally:
        for descriptor in opened:
            os.close(descriptor)
    if failure:
        raise EmbeddedServerError(
            f"the process that keeps the server in {root} couldn't be started: {failure}",
            hint=f"see {root / 'server.log'}",
        )
