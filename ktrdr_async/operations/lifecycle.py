"""The life of an operation: its statuses and their transitions, who owns it, and the records that tell of it.

Pure: the service writes, the schema's trigger holds the same table of transitions.
"""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal
from uuid import UUID

import msgspec

LEASE_SECONDS = (
    30.0  # without a heartbeat for so long, by the server's clock, an owner elsewhere has lost its operation
)
CHANNEL = "ktrdr_async"  # of NOTIFY; the payload is an operation's id. It only makes faster what polling finds


class Status(StrEnum):
    """Where an operation stands."""

    PENDING = "pending"  # created, never claimed
    RUNNING = "running"  # claimed; its owner sends heartbeats, or died
    COMPLETED = "completed"  # the result is stored; nothing changes any more
    FAILED = "failed"  # strategy or data raised; may be claimed again
    CANCELLED = "cancelled"  # somebody asked for it; may be claimed again
    INTERRUPTED = "interrupted"  # its worker left; wants to be claimed again


TRANSITIONS: Mapping[Status, frozenset[Status]] = MappingProxyType(
    {
        Status.PENDING: frozenset({Status.RUNNING, Status.CANCELLED}),
        Status.RUNNING: frozenset(
            {Status.RUNNING, Status.COMPLETED, Status.FAILED, Status.CANCELLED, Status.INTERRUPTED}
        ),  # to itself: a takeover
        Status.COMPLETED: frozenset(),
        Status.FAILED: frozenset({Status.RUNNING}),
        Status.CANCELLED: frozenset({Status.RUNNING}),
        Status.INTERRUPTED: frozenset({Status.RUNNING, Status.CANCELLED}),
    }
)
ENDINGS = frozenset({Status.COMPLETED, Status.FAILED, Status.CANCELLED, Status.INTERRUPTED})


class Owner(msgspec.Struct, frozen=True):
    """The process that runs an operation, exact enough that a reused pid isn't taken for it."""

    host: str
    boot_id: str  # of the running kernel
    pid_namespace: str | None  # None where the system has none
    pid: int
    started: float  # seconds since boot (Linux) or the epoch; compared for equality only

    @classmethod
    def this_process(cls) -> Owner:
        """This process."""
        pid = os.getpid()
        started = _started(pid)
        assert started is not None  # noqa: S101 - this process exists
        return cls(platform.node() or "localhost", _boot_id(), _pid_namespace(), pid, started)


def is_alive(owner: Owner) -> bool | None:
    """Whether the owner's process runs.

    None where that can't be known from here: another host, boot or PID namespace.
    """
    if (owner.host, owner.boot_id, owner.pid_namespace) != (
        platform.node() or "localhost",
        _boot_id(),
        _pid_namespace(),
    ):
        return None
    return _started(owner.pid) == owner.started


class Claim(msgspec.Struct, frozen=True):
    """What fences an owner's writes: every guarded statement names all three."""

    operation_id: str
    epoch: int
    token: UUID


class Parent(msgspec.Struct, frozen=True):
    """What an operation was forked from or extends."""

    operation_id: str
    bar_index: int | None = None  # the parent's bar that it goes on from
    digest: str | None = None  # hex, the parent's state digest at that bar


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """An operation as it stood when it was read. Times are UTC, by the server's clock."""

    operation_id: str
    type: str
    status: Status
    request: dict[str, Any]
    parent: Parent | None
    owner: Owner | None  # of the latest claim
    epoch: int  # counts claims
    attempts: int
    cancel_epoch: int | None  # the epoch that was cancelled; void unless equal to `epoch`
    paused: bool
    heartbeat_at: datetime | None
    progress: dict[str, Any] | None
    result: dict[str, Any] | None
    result_digest: str | None  # hex
    error: dict[str, Any] | None
    created_at: datetime
    started_at: datetime | None  # first claim
    finished_at: datetime | None  # latest end
    checkpoint_bar: int | None  # absolute index; None: there is no checkpoint
    checkpoint_type: str | None
    checkpoint_at: datetime | None
    checkpoint_bytes: int | None  # of the head

    @property
    def cancel_requested(self) -> bool:
        """Whether the present run was asked to end."""
        return self.cancel_epoch is not None and self.cancel_epoch == self.epoch


class Beat(msgspec.Struct, frozen=True):
    """One operation's part of a heartbeat."""

    claim: Claim
    progress: dict[str, Any] | None = None  # None: leave what is stored


class Answer(msgspec.Struct, frozen=True):
    """What the database says to one beat."""

    operation_id: str
    kind: Literal["ours", "busy", "ended", "lost"]  # busy: a save or a claim holds the row at this moment; ask again
    cancel: bool
    paused: bool


@functools.cache
def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        import psutil  # where there is no /proc

        return f"booted {psutil.boot_time():.0f}"


def _pid_namespace() -> str | None:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _started(pid: int) -> float | None:
    """When the process started, or None if it doesn't run (a zombie doesn't).

    Linux: the kernel's own clock ticks since boot. psutil's time of day is made from them and the boot's time, which
        moves
    whenever the clock is set: a live owner would seem to be another process.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return None if fields[0] in (b"Z", b"X") else float(fields[19]) / os.sysconf("SC_CLK_TCK")
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None
