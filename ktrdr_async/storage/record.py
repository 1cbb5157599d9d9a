"""Who started the embedded server, and what can be seen of it from here: no locks and no starting in this file."""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path

import psutil

from ktrdr_async.storage import keeper, places

ROLE = "ktrdr_async"  # of the application: no superuser
DATABASE = "ktrdr_async"


@dataclass(frozen=True)
class Record:
    """What the starter of a server leaves in the home for those who come later."""

    host: str  # the machine's name
    machine: str  # identifier that survives a reboot
    boot: str  # identifier that doesn't
    pid_namespace: str  # empty where the system has none
    sockets: str  # directory of the server's socket

    @classmethod
    def of_this_process(cls, sockets: str = "") -> Record:
        """The record of a server that this process starts."""
        return cls(socket.gethostname(), _machine(), _boot(), _pid_namespace(), sockets)

    @classmethod
    def read(cls, path: Path) -> Record | None:
        """The record in a file; None if there is none that can be read."""
        try:
            return cls(**json.loads(path.read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def another_machine(self, here: Record) -> bool:
        """Whether another kernel than this one started the server, a reboot of the same machine excepted.

        In doubt it is another one: a container that was made anew on a machine that lost power looks like that too.
        """
        if self.boot == here.boot:
            return False
        if sys.platform == "darwin":  # where a laptop's name follows its network
            return self.machine != here.machine
        return not self.machine or (self.machine, self.host) != (here.machine, here.host)

    def visible_from(self, here: Record) -> bool:
        """Whether process ids of the server mean the same here as there."""
        return self.boot == here.boot and self.pid_namespace == here.pid_namespace


def answers(sockets: str) -> bool:
    """Whether the server takes a new connection: one start-up packet, and a look at the first byte of the answer.

    A server that starts, recovers or stops answers with an error; a socket without a server refuses.
    """
    words = ("user", ROLE, "database", DATABASE, "application_name", "ktrdr_async probe", "")
    body = struct.pack("!I", 196608) + b"".join(word.encode() + b"\0" for word in words)  # protocol 3.0
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(2.0)
            connection.connect(os.path.join(sockets, places.SOCKET_NAME))
            connection.sendall(struct.pack("!I", len(body) + 4) + body)
            first = connection.recv(1)
            if first == b"R":
                connection.sendall(b"X\0\0\0\4")
            return first == b"R"
    except OSError:
        return False


def postmaster(data: Path) -> psutil.Process | None:
    """The live PostgreSQL process on a data directory that its postmaster.pid names; None if that is stale.

    A zombie isn't alive, and another program under the same number isn't it.
    """
    try:
        process = psutil.Process(keeper.postmaster_id(str(data)) or -1)
        if process.status() == psutil.STATUS_ZOMBIE or not process.name().startswith("postgres"):
            return None
        return process if str(data) in process.cmdline() or process.cwd() == str(data) else None
    except (psutil.Error, ValueError):
        return None


def ready(data: Path) -> bool:
    """Whether the server itself says in postmaster.pid that it takes connections."""
    try:
        return (data / "postmaster.pid").read_text().splitlines()[7].strip() == "ready"
    except (OSError, IndexError):
        return False


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"{psutil.boot_time():.0f}"


def _machine() -> str:
    try:
        return Path("/etc/machine-id").read_text().strip()
    except OSError:
        return f"{uuid.getnode():x}"


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
