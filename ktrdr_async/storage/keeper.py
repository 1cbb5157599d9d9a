"""The process beside the embedded server: its parent while it runs, and the one who stops it after the last user.

Run as a program of its own (`python -I -S keeper.py SPECIFICATION`), with the standard library only: it has to stay
small, start in milliseconds and outlive whoever started it. The locks come as inherited descriptors; a `flock` belongs
to the open file, so it is held as long as anybody has that descriptor:

- `run`: the server inherits it too. It is free exactly when the keeper, the postmaster and every backend are gone,
  whatever happened to process ids, and in every PID namespace of this kernel.
- `keeper`: only the keeper has it. Free beside a held `run` means: killed, and another keeper has to adopt the server.
- `users`: each user process holds it shared, on a descriptor of its own; the kernel frees it on kill -9.
- `start`: whoever starts or stops holds it exclusively.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time

LOG_LIMIT = 4 * 1024 * 1024  # bytes; then the log keeps its last LOG_KEPT
LOG_KEPT = 128 * 1024  # bytes
LOG_INTERVAL = 20.0  # seconds between two looks at the log's size
EMPTY_PATIENCE = 2.0  # seconds that a starting server may take between making its postmaster.pid and writing it
STOP_PATIENCE = 60.0  # seconds for a fast shutdown, its checkpoint included; then an immediate one


def bound_log(descriptor: int) -> None:
    """Cut the log to its end. The server appends (`O_APPEND`), so it goes on at the new end."""
    size = os.fstat(descriptor).st_size
    if size > LOG_LIMIT:
        tail = os.pread(descriptor, LOG_KEPT, size - LOG_KEPT)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, b"[the older part was cut off]\n" + tail)


def claim_lock_file(data: str, stale: int) -> bool:
    """Make a left-over postmaster.pid count as stale if it still names process `stale`; whether a server may start.

    Whoever holds `run` knows that its server is gone, but the number in the file may now be another process's, and then
    PostgreSQL refuses to start. Its own parent's number counts as stale. Only the first line changes: the shared-memory
    id in the others still guards against a server that was started by other means. Such a one may have come since the
    file was looked at: overwriting its number let two postmasters run on one directory for a minute (measured).
    """
    path = os.path.join(data, "postmaster.pid")
    deadline = time.monotonic() + EMPTY_PATIENCE
    while os.path.exists(path) and postmaster_id(data) == 0:
        if time.monotonic() >= deadline:
            os.unlink(path)  # nobody is writing it: what a crash left
        time.sleep(0.02)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return True  # PostgreSQL makes it exclusively
    with open(descriptor, "r+") as file:
        first, *others = file.read().splitlines(keepends=True) or [""]
        if first.strip() != str(stale):
            return False
        file.seek(0)
        file.write("".join([f"{os.getpid()}\n", *others]))
        file.truncate()
    return True


def start_server(given: dict[str, object], run: int) -> subprocess.Popen[bytes] | None:
    """Start the postmaster as our child, with `run` inherited; None if another server came first."""
    data, sockets = str(given["data"]), str(given["sockets"])
    if not claim_lock_file(data, int(str(given["stale"]))):
        return None
    for name in (".s.PGSQL.5432", ".s.PGSQL.5432.lock"):  # the socket's lock file names the dead process too
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(sockets, name))
    log = int(str(given["log"]))
    who: dict[str, object] = {}
    if given["drops"]:
        who = {"user": given["uid"], "group": given["gid"], "extra_groups": []}
    return subprocess.Popen(  # type: ignore[call-overload,no-any-return]  # noqa: S603
        [str(given["server"]), "-D", data],
        stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", pass_fds=[run], umask=0o077, start_new_session=True,
        **who,
    )  # fmt: skip


def postmaster_id(data: str) -> int:
    """The process id in postmaster.pid; 0 if there is none."""
    try:
        with open(os.path.join(data, "postmaster.pid")) as file:
            return int(file.readline())
    except (OSError, ValueError):
        return 0


def main() -> None:
    """Start the server, or adopt the one that runs, and stay until it is gone."""
    given = json.loads(sys.argv[1])
    locks: dict[str, int] = given["locks"]
    if os.fork():
        os._exit(0)  # the one who asked doesn't get a zombie when the keeper ends
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # A machine going down signals everybody: users save first, and the last one's end is ours. A handler, not
        # SIG_IGN, because the postmaster would inherit an ignored signal.
        signal.signal(number, lambda *_: None)
    events: queue.Queue[str] = queue.Queue()
    child: subprocess.Popen[bytes] | None = None
    if given["adopt"]:
        process = int(given["adopt"])
    else:
        child = start_server(given, locks["run"])
        if child is None:
            os._exit(0)
        process = child.pid

    def gone() -> None:
        if child is not None:
            child.wait()
        else:
            descriptor = os.open(given["run_path"], os.O_RDWR | os.O_CLOEXEC)
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # free when the last of the server's processes is gone
        events.put("gone")

    def unused() -> None:
        while True:
            fcntl.flock(locks["users"], fcntl.LOCK_EX)  # waits while any user lives
            try:
                fcntl.flock(locks["start"], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                fcntl.flock(locks["users"], fcntl.LOCK_UN)  # somebody is just coming
                time.sleep(0.02)
                continue
            events.put("unused")
            return

    for waiter in (gone, unused):
        threading.Thread(target=waiter, daemon=True).start()
    deadline: float | None = None
    while True:
        try:
            wait = LOG_INTERVAL if deadline is None else max(deadline - time.monotonic(), 0.0)
            event = events.get(timeout=wait)
        except queue.Empty:
            event = ""
        if event == "gone":
            os._exit(0)
        if event == "unused":
            deadline = time.monotonic() + STOP_PATIENCE
            stop(process, signal.SIGINT)
        elif deadline is not None and time.monotonic() >= deadline:
            deadline += 10.0
            stop(process, signal.SIGQUIT)
        bound_log(int(given["log"]))


def stop(process: int, number: signal.Signals) -> None:
    """Ask the postmaster to end: SIGINT is PostgreSQL's fast shutdown, SIGQUIT its immediate one."""
    if process > 0:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


if __name__ == "__main__":
    main()
