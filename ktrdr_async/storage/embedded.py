"""The embedded PostgreSQL: one server a home directory, shared by all processes of its user, stopped after the last.

Who may do what is decided by four locks in the directory (`keeper.py` says what each means). All of this blocks: an
event loop calls it in a thread. What counts is what the server answers and which locks are held; process ids are hints.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from ktrdr_async.errors import EmbeddedServerError
from ktrdr_async.storage import cluster, keeper, places
from ktrdr_async.storage.accounts import Account, choose_account, copy_for_account, environment
from ktrdr_async.storage.record import DATABASE, ROLE, Record, answers, postmaster, ready

PORT = 5432  # only part of the socket's name: there is no TCP
START_PATIENCE = 300.0  # seconds; crash recovery of a large database takes its time
FOREIGN_PATIENCE = 5.0  # seconds for a server that can't be reached from here to answer all the same
    2.0  # seconds that a running server may be without a socket: it makes it before it does anything else
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ConnectArguments:
    """Where the embedded server listens, in asyncpg's words."""

    host: str  # directory of the Unix socket
    port: int
    user: str
    database: str


class EmbeddedServer:
    """The embedded server of one home directory, as one user of it.

    Args:
        home: the directory that holds everything; None chooses it (`places.default_home`).
    """

    def __init__(self, home: str | Path | None = None) -> None:
        self.home = places.default_home() if home is None else Path(os.path.abspath(os.path.expanduser(home)))
        self._guard = threading.Lock()  # of the two below: several threads may ask at once
        self._users = -1  # descriptor that holds `users.lock` shared; -1: not a user
        self._arguments: ConnectArguments | None = None

    @property
    def label(self) -> str:
        """Name of the server for messages."""
        text, user_home = str(self.home), os.path.expanduser("~")
        if user_home != "/" and text.startswith(user_home + os.sep):
            text = "~" + text[len(user_home) :]
        return f"embedded PostgreSQL in {text}"

    @property
    def root(self) -> Path:
        """The directory inside the home that belongs to one major version of PostgreSQL."""
        return places.version_directory(self.home)

    @property
    def arguments(self) -> ConnectArguments:
        """Where the server listens, for the application's role.

        Raises:
            EmbeddedServerError: if it wasn't started, or was released.
        """
        if self._arguments is None:
            raise EmbeddedServerError(f"{self.label} isn't started")
        return self._arguments

    @property
    def administrator(self) -> ConnectArguments:
        """The same server as its superuser, for upkeep by hand and for tests."""
        return ConnectArguments(self.arguments.host, PORT, cluster.ADMINISTRATOR, "postgres")

    def start(self) -> ConnectArguments:
        """Count this process as a user, and start the server if it doesn't run.

        Returns:
            Where it listens.

        Raises:
            EmbeddedServerError: if it can't be started here; the message says why and what to do.
        """
        account = choose_account(self.root / "data")
        places.prepare_home(self.home, shared_with_account=account.drops)
        with self._guard:
            if self._users < 0:
                self._users = self._open("users.lock")
        try:
            with self._starting(START_PATIENCE):
                fcntl.flock(self._users, fcntl.LOCK_SH)
                return self._bring_up(START_PATIENCE)
        except BaseException:
            self._forget()
            raise

    def ensure_running(self, patience: float = START_PATIENCE) -> ConnectArguments:
        """Bring the server back if it is gone; returns at once if it answers.

        Raises:
            EmbeddedServerError: if it doesn't answer within `patience` seconds, or this isn't one of its users.
        """
        where = self.arguments
        if answers(where.host) and not self._keeper_missing():
            return where
        with self._starting(patience):
            return self._bring_up(patience)

    def release(self) -> None:
        """Stop being a user. The keeper stops the server when nobody is left; this doesn't wait for it."""
        if self._arguments is not None and self._keeper_missing():
            try:
                with self._starting(1.0):
                    self._adopt()
            except EmbeddedServerError as error:
                log.warning("%s", error)
        self._forget()

    def wait_until_stopped(self, patience: float) -> bool:
        """Whether every process of the server is gone within `patience` seconds; for upkeep and tests."""
        deadline = time.monotonic() + patience
        while (run := self._take_run()) is None:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.01)
        os.close(run)
        return True

    def _forget(self) -> None:
        with self._guard:
            users, self._users, self._arguments = self._users, -1, None
        if users >= 0:
            os.close(users)

    # From here on `start.lock` is held.

    def _bring_up(self, patience: float) -> ConnectArguments:
        began = time.monotonic()
        launched = interrupted = False
        while True:
            run = self._take_run()
            waited = time.monotonic() - began
            if run is None:
                found = self._reachable()
                if found is not None:
                    return found
                self._refuse_foreign(waited)
                if not interrupted:
                    interrupted = self._interrupt_without_socket()
            elif launched:
                os.close(run)
                raise EmbeddedServerError(f"{self.label} didn't start: {self._log_tail()}", hint=self._see_log())
            else:
                try:
                    self._launch(run)
                finally:
                    os.close(run)
                launched = True
            if waited >= patience:
                raise EmbeddedServerError(
                    f"{self.label} didn't answer within {patience:g} s: {self._log_tail()}",
                    hint=f"it may still be recovering or stopping; {self._see_log()}",
                )
            time.sleep(0.01)

    def _take_run(self) -> int | None:
        """`run.lock`, if neither a server's process nor a keeper is left.

        A keeper that adopted waits for that lock itself: holding it while waiting for the keeper's end would not end.
        """
        run = self._try_lock("run.lock")
        if run is not None and not self._keeper_missing():
            os.close(run)
            return None
        return run

    def _reachable(self) -> ConnectArguments | None:
        record = Record.read(self._record_path)
        if record is None or not os.path.lexists(record.sockets):
            return None
        reason = places.private_directory(Path(record.sockets), choose_account(self.root / "data").uid)
        if reason:
            raise EmbeddedServerError(
                f"the socket directory {record.sockets} of the {self.label} can't be trusted: {reason}"
            )
        if not answers(record.sockets):
            return None
        if self._keeper_missing():
            self._adopt()
        with self._guard:
            if self._users >= 0:  # else it was released meanwhile, by another thread
                self._arguments = ConnectArguments(record.sockets, PORT, ROLE, DATABASE)
        return ConnectArguments(record.sockets, PORT, ROLE, DATABASE)

    def _launch(self, run: int) -> None:
        before = Record.read(self._record_path)
        data = self.root / "data"
        self._refuse_another_machine(before, data)
        self._refuse_stranger(data)
        account = choose_account(data)
        blocked = places.can_enter(self.root, account.uid, account.gids)
        if blocked is not None:
            raise places.unusable(
                self.home,
                f"PostgreSQL doesn't run as root, and the account {account.name} that runs it can't enter {blocked}",
            )
        installation = copy_for_account(places.installation(), self.root, places.installed_version(), account)
        try:
            if not data.exists():
                cluster.initialize(self.root, installation, account)
            cluster.check_version(data)
            recorded = before.sockets if before else ""
            sockets = places.socket_directory(self.root, recorded, account.uid, account.gid, account.gids)
            cluster.write_settings(self.root, sockets)
            record = json.dumps(asdict(Record.of_this_process(str(sockets))))
            cluster.write_file(self._record_path, record, 0o600)
        except OSError as error:
            raise places.unusable(self.home, (error.strerror or str(error)).lower()) from error
        self._spawn_keeper(installation, account, str(sockets), run)

    def _refuse_another_machine(self, before: Record | None, data: Path) -> None:
        clean = not os.path.lexists(data / "postmaster.pid")
        if before is not None and not clean and before.another_machine(Record.of_this_process()):
            raise EmbeddedServerError(
                f"{self.label} was last run on another machine ({before.host}) and wasn't stopped there: "
                "it may still be running",
                hint=f"stop it there; if it is gone for good, delete {self._record_path} and start again",
            )

    def _refuse_stranger(self, data: Path) -> None:
        # `run.lock` is free: a server on this directory was started by other means, by hand for example.
        process = postmaster(data)
        if process is not None:
            raise EmbeddedServerError(
                f"{data} is in use by a server that wasn't started by ktrdr_async (process {process.pid})",
                hint=f"stop it: kill -INT {process.pid}",
            )

    def _refuse_foreign(self, waited: float) -> None:
        record, here = Record.read(self._record_path), Record.of_this_process()
        if record is not None and waited >= FOREIGN_PATIENCE and not record.visible_from(here):
            raise EmbeddedServerError(
                f"{self.label} is run from another PID namespace or machine ({record.host}; a container?), "
                f"and its socket in {record.sockets} doesn't answer here",
                hint=f"share that directory too, or use one server for both with --database, or {places.ELSEWHERE}",
            )

    def _interrupt_without_socket(self) -> bool:
        """Stop our server if its socket was deleted (by a cleaner of /tmp): it never makes it again by itself."""
        record, process = Record.read(self._record_path), postmaster(self.root / "data")
        if record is None or process is None or not record.visible_from(Record.of_this_process()):
            return False
        # It makes its socket before it says that it is ready, and deletes it after it said that it is stopping.
        lost = ready(self.root / "data") and not os.path.lexists(os.path.join(record.sockets, places.SOCKET_NAME))
        if not lost or not ready(self.root / "data"):
            return False
        log.warning("%s lost its socket in %s and is started again", self.label, record.sockets)
        try:
            process.send_signal(signal.SIGINT)
        except psutil.Error:
            return False
        return True

    def _adopt(self) -> None:
        """Give a running server whose keeper was killed another one, if its processes can be seen from here."""
        record, process = Record.read(self._record_path), postmaster(self.root / "data")
        if record is None or process is None or not record.visible_from(Record.of_this_process()):
            return
        log.warning("%s had lost its keeper", self.label)
        account = choose_account(self.root / "data")
        self._spawn_keeper(places.installation(), account, record.sockets, None, process.pid)

    def _spawn_keeper(
        self, installation: Path, account: Account, sockets: str, run: int | None, process: int = 0
    ) -> None:
        """Start the keeper: of a server that it starts, with the held lock `run`, or of the one that runs as `process`."""
        opened: list[int] = []
        try:
            opened += [
                self._open("keeper.lock"),
                self._open("users.lock"),
                self._open("start.lock"),
                self._open("server.log"),
            ]
            # Free, or held for a moment by somebody who looks whether it is.
            fcntl.flock(opened[0], fcntl.LOCK_EX)
            given = {
                "adopt": process,
                "data": str(self.root / "data"),
                "server": str(installation / "bin" / "postgres"),
                "sockets": sockets,
                "run_path": str(self.root / "run.lock"),
                "log": opened[3],
                "locks": {
                    "keeper": opened[0],
                    "users": opened[1],
                    "start": opened[2],
                    "run": -1 if run is None else run,
                },
                "drops": account.drops,
                "uid": account.uid,
                "gid": account.gid,
            }
            subprocess.run(  # noqa: S603 - it forks, and the one that we wait for ends at once
                [sys.executable, "-I", "-S", keeper.__file__, json.dumps(given)],
                stdin=subprocess.DEVNULL, stdout=opened[3], stderr=opened[3], cwd="/", env=environment(), timeout=60,
                check=True, start_new_session=True, pass_fds=[*opened, *([] if run is None else [run])],
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError) as error:
            raise EmbeddedServerError(
                f"{self.label}: the process that keeps the server couldn't be started: {error}", hint=self._see_log()
            ) from error
        finally:
            for descriptor in opened:
                os.close(descriptor)

    # Small readers; no lock is needed.

    def _keeper_missing(self) -> bool:
        descriptor = self._try_lock("keeper.lock")
        if descriptor is None:
            return False
        os.close(descriptor)
        return True

    @property
    def _record_path(self) -> Path:
        return self.root / "server.json"

    def _see_log(self) -> str:
        return f"see {self.root / 'server.log'}"

    def _log_tail(self) -> str:
        try:
            lines = (self.root / "server.log").read_text(errors="replace").splitlines()
        except OSError:
            lines = []
        return " / ".join(lines[-6:])[-1500:] or "its log is empty"

    def _open(self, name: str) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            return os.open(self.root / name, flags | (os.O_APPEND if name.endswith(".log") else 0), 0o600)
        except OSError as error:
            raise places.unusable(self.home, f"{name}: {(error.strerror or str(error)).lower()}") from error

    def _try_lock(self, name: str) -> int | None:
        descriptor = self._open(name)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return descriptor

    @contextmanager
    def _starting(self, patience: float) -> Iterator[None]:
        """Hold `start.lock`: one process or thread at a time starts, adopts or stops."""
        deadline = time.monotonic() + patience
        while (descriptor := self._try_lock("start.lock")) is None:
            if time.monotonic() >= deadline:
                raise EmbeddedServerError(
                    f"{self.label}: another process was still starting or stopping it after {patience:g} s",
                    hint=self._see_log(),
                )
            time.sleep(0.005)
        try:
            yield
        finally:
            os.close(descriptor)
