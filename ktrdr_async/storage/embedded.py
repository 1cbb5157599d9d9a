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
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from ktrdr_async.errors import EmbeddedServerError
from ktrdr_async.storage import cluster, keeper, locks, places
from ktrdr_async.storage.accounts import choose_account, copy_for_account
from ktrdr_async.storage.record import DATABASE, ROLE, Record, answers, postmaster, ready

PORT = 5432  # only part of the socket's name: there is no TCP
START_PATIENCE = 300.0  # seconds; crash recovery of a large database takes its time
LAUNCHES = 3  # the keeper or the server may be killed while it starts; what fails for a reason fails as often
FOREIGN_PATIENCE = 5.0  # seconds for a server that can't be reached from here to answer all the same

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
                self._users = locks.open_file(self.root, "users.lock")
        try:
            with locks.starting(self.root, START_PATIENCE):
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
        if answers(where.host) and not locks.keeper_missing(self.root):
            return where
        with locks.starting(self.root, patience):
            return self._bring_up(patience)

    def release(self) -> None:
        """Stop being a user. The keeper stops the server when nobody is left; this doesn't wait for it."""
        if self._arguments is not None and locks.keeper_missing(self.root):
            try:
                with locks.starting(self.root, 1.0):
                    self._adopt()
            except EmbeddedServerError as error:
                log.warning("%s", error)
        self._forget()

    def wait_until_stopped(self, patience: float) -> bool:
        """Whether every process of the server is gone within `patience` seconds; for upkeep and tests."""
        deadline = time.monotonic() + patience
        while (run := locks.take_run(self.root)) is None:
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
        launches, position, interrupted = 0, self._log_size(), False
        while True:
            run = locks.take_run(self.root)
            waited = time.monotonic() - began
            if run is None:
                found = self._reachable()
                if found is not None:
                    return found
                self._refuse_foreign(waited)
                if not interrupted:
                    interrupted = self._interrupt_without_socket()
            else:
                try:
                    if launches == LAUNCHES:
                        raise EmbeddedServerError(
                            f"{self.label} didn't start: {self._log_tail(position)}", hint=self._see_log()
                        )
                    position = self._log_size()
                    self._launch(run)
                finally:
                    os.close(run)
                launches += 1
            if waited >= patience:
                raise EmbeddedServerError(
                    f"{self.label} didn't answer within {patience:g} s: {self._log_tail(position)}",
                    hint=f"it may still be recovering or stopping; {self._see_log()}",
                )
            time.sleep(0.01)

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
        self._adopt()
        with self._guard:
            if self._users >= 0:  # else it was released meanwhile, by another thread
                self._arguments = ConnectArguments(record.sockets, PORT, ROLE, DATABASE)
        return ConnectArguments(record.sockets, PORT, ROLE, DATABASE)

    def _launch(self, run: int) -> None:
        before = Record.read(self._record_path)
        data = self.root / "data"
        self._refuse_another_machine(before, data)
        stale = keeper.postmaster_id(str(data))  # before the look at what it is now: the keeper compares
        self._refuse_stranger(data)
        account = choose_account(data)
        blocked = places.can_enter(self.root, account.uid, account.gids)
        if blocked is not None:
            raise places.unusable(
                self.home,
                f"PostgreSQL doesn't run as root, and the account {account.name} that runs it can't enter {blocked}",
            )
        try:
            installation = copy_for_account(places.installation(), self.root, places.installed_version(), account)
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
        server = installation / "bin" / "postgres"
        locks.spawn_keeper(self.root, account, str(sockets), run=run, server=server, stale=stale)

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
        data, path = self.root / "data", os.path.join(record.sockets, places.SOCKET_NAME)
        if not ready(data) or os.path.lexists(path) or not ready(data):
            return False
        log.warning("%s lost its socket in %s and is started again", self.label, record.sockets)
        try:
            process.send_signal(signal.SIGINT)
        except psutil.Error:
            return False
        return True

    def _adopt(self) -> None:
        """Give a running server whose keeper was killed another one, if its processes can be seen from here."""
        if not locks.keeper_missing(self.root):
            return
        record, process = Record.read(self._record_path), postmaster(self.root / "data")
        if record is None or process is None or not record.visible_from(Record.of_this_process()):
            return
        log.warning("%s had lost its keeper", self.label)
        account = choose_account(self.root / "data")
        locks.spawn_keeper(self.root, account, record.sockets, adopt=process.pid)

    # Small readers; no lock is needed.

    @property
    def _record_path(self) -> Path:
        return self.root / "server.json"

    def _see_log(self) -> str:
        return f"see {self.root / 'server.log'}"

    def _log_size(self) -> int:
        try:
            return (self.root / "server.log").stat().st_size
        except FileNotFoundError:
            return 0

    def _log_tail(self, position: int) -> str:
        """The end of what the log got since it had the size `position`, on one line."""
        try:
            text = (self.root / "server.log").read_bytes()[position:].decode(errors="replace")
        except OSError:
            text = ""
        return " / ".join(text.splitlines()[-6:])[-1500:] or "it said nothing"
