"""A plain model of the protocol, and the ground that a state machine stands on: one server, real processes."""

from __future__ import annotations

import asyncio
import subprocess
import uuid
from collections import Counter
from collections.abc import Awaitable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import count
from typing import Any, TypeVar

import asyncpg
import msgspec

from ktrdr_async.backtesting.ledger import LedgerEvent
from ktrdr_async.checkpoint.schemas import BacktestCheckpointState, EquitySample, RecordedValue
from ktrdr_async.checkpoint.service import CheckpointService
from ktrdr_async.errors import (
    CancellationError,
    CheckpointConflictError,
    InvalidTransitionError,
    OperationNotFoundError,
    OwnershipLostError,
)
from ktrdr_async.operations.lifecycle import TRANSITIONS, Claim, Owner, Status, _started
from ktrdr_async.operations.service import OperationsService
from ktrdr_async.storage.database import Database
from ktrdr_async.storage.embedded import EmbeddedServer

ME = Owner.this_process()
LEASE = 3_600.0  # seconds; longer than any example takes, so that a lease is over only where the machine says so
MONTH = 31 * 86_400
T = TypeVar("T")
STANDING = """
SELECT o.operation_id, o.status, o.epoch, o.owner_token, o.cancel_epoch, o.paused, o.result_digest,
    (o.result ->> 'session')::int AS result, o.error IS NOT NULL AS failed, c.revision, c.checkpoint_type,
    (c.state ->> 'bar_index')::int AS bar, c.ledger_count, c.last_segment,
    ARRAY(SELECT s.sequence FROM ktrdr.ledger_segments s WHERE s.operation_id = o.operation_id ORDER BY 1) AS sequences,
    ARRAY(SELECT s.ledger_from FROM ktrdr.ledger_segments s WHERE s.operation_id = o.operation_id ORDER BY s.sequence)
        AS starts,
    ARRAY(SELECT s.ledger_to FROM ktrdr.ledger_segments s WHERE s.operation_id = o.operation_id ORDER BY s.sequence)
        AS stops,
    (SELECT count(*) FROM ktrdr.operation_checkpoints) AS heads,
    (SELECT count(*) FROM ktrdr.ledger_segments) AS segments
FROM ktrdr.operations o LEFT JOIN ktrdr.operation_checkpoints c ON c.operation_id = o.operation_id
"""
AGE = f"""
ALTER TABLE ktrdr.operations DISABLE TRIGGER operations_fixed;
UPDATE ktrdr.operations SET created_at = created_at - make_interval(secs => {MONTH}),
    finished_at = finished_at - make_interval(secs => {MONTH}),
    heartbeat_at = heartbeat_at - make_interval(secs => {MONTH}) WHERE operation_id = '%s';
ALTER TABLE ktrdr.operations ENABLE TRIGGER operations_fixed
"""


class Ground:
    """One server, database and loop for all examples, and the processes that own operations."""

    def __init__(self, server: EmbeddedServer) -> None:
        self.runner = asyncio.Runner()
        self.reached: Counter[str] = Counter()
        self.sessions = count(1)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._stack = AsyncExitStack()
        where = server.administrator
        self._admin = {"host": where.host, "port": where.port, "user": where.user, "database": where.database}
        self._name = f"machine_{uuid.uuid4().hex[:12]}"
        self.run(self._administer(f'CREATE DATABASE "{self._name}" OWNER ktrdr_async'))
        dsn = f"postgresql://ktrdr_async@/{self._name}?host={where.host}&port={where.port}"
        self.database = self.run(self._stack.enter_async_context(Database.open(dsn)))
        self.operations = OperationsService(self.database)
        self.eyes = self.run(self._connect(dsn))

    def run(self, work: Awaitable[T]) -> T:
        async def awaited() -> T:
            return await work

        return self.runner.run(awaited())

    def owner(self, which: str) -> Owner:
        """The owner as it lives now: a process of this host, or something on another one."""
        if which == "z":
            return Owner("elsewhere", "boot", None, 7, 1.0)
        process = self.processes.get(which)
        if process is None:
            process = self.processes[which] = subprocess.Popen(["sleep", "1000000"])
        started = _started(process.pid)
        assert started is not None
        return msgspec.structs.replace(ME, pid=process.pid, started=started)

    def kill(self, which: str) -> None:
        process = self.processes.pop(which)
        process.kill()
        process.wait()

    def silence(self, name: str) -> None:
        """The time of a lease passes without a heartbeat."""
        statement = "UPDATE ktrdr.operations SET heartbeat_at = heartbeat_at - make_interval(secs => $2)"
        self.run(self.eyes.execute(f"{statement} WHERE operation_id = $1", name, 2 * LEASE))

    def age(self, name: str) -> None:
        """A month passes for one operation."""
        self.run(self.eyes.execute(AGE % name))

    def close(self) -> None:
        for which in list(self.processes):
            self.kill(which)
        self.run(self.eyes.close())
        self.run(self._stack.aclose())
        self.run(self._administer(f'DROP DATABASE "{self._name}"'))
        self.runner.close()

    async def _connect(self, dsn: str) -> Any:
        return await asyncpg.connect(dsn)

    async def _administer(self, statement: str) -> None:
        admin = await asyncpg.connect(**self._admin, ssl=False)
        try:
            await admin.execute(statement)
        finally:
            await admin.close()


@dataclass(eq=False)
class Session:
    """One claim, and what its owner has heard of."""

    number: int
    name: str
    owner: str
    claim: Claim
    service: CheckpointService
    revision: int = 0
    bar: int = -1

    @property
    def digest(self) -> str:
        return f"{self.number:064x}"

    def next_state(self, events: int) -> BacktestCheckpointState:
        """The next boundary: whatever this session writes bears its number."""
        at, number = self.service.acknowledged, self.number
        places = range(at.ledger, at.ledger + events)
        return BacktestCheckpointState(
            bar_index=self.bar + 1, current_date="2026-01-01", cash=float(number),
            ledger=[LedgerEvent(n, 0, 1, 1, 1.5, 0.0, 2.5, "open", "order", str(number)) for n in places],
            equity_samples=[EquitySample(n, n, float(number)) for n in places],
            recorded=[RecordedValue(n, "x", float(number)) for n in places],
            ledger_from=at.ledger, samples_from=at.samples, recorded_from=at.recorded,
        )  # fmt: skip


@dataclass(eq=False)
class Expected:
    """One operation as the protocol says that it is."""

    status: Status = Status.PENDING
    epoch: int = 0
    session: Session | None = None  # of the latest claim
    cancel_epoch: int | None = None
    paused: bool = False
    head: tuple[int, str, int, int] | None = None  # revision, type, bar, who wrote it
    ledger: list[int] = field(default_factory=list)  # who wrote each event
    segments: int = 0
    failed: bool = False
    alive: bool = True  # its owner's process, on this host
    silent: bool = False  # its owner's lease is over
    old: bool = False  # nobody has touched it for a month

    @property
    def abandoned(self) -> bool:
        """Whether it runs and nobody is left to run it."""
        assert self.session is not None
        return self.silent if self.session.owner == "z" else not self.alive

    @property
    def cancelled(self) -> bool:
        return self.cancel_epoch == self.epoch

    def touch(self) -> None:
        self.silent = self.old = False


def verdict(
    row: Expected | None, session: Session, wanted: Status | None, whole: bool
) -> type[Exception] | Status | None:
    """What a guarded write meets: None where it may write, a status where it was written before."""
    if row is None:
        return OperationNotFoundError
    if row.session is not session:
        return OwnershipLostError
    if row.status is Status.RUNNING:
        if wanted is Status.COMPLETED and row.cancelled:
            return CancellationError
        other = session.revision != (row.head[0] if row.head else 0)
        return CheckpointConflictError if whole and other else None
    if row.status is wanted or (row.status is Status.CANCELLED and wanted is Status.INTERRUPTED):
        return row.status
    return CancellationError if row.status is Status.CANCELLED else InvalidTransitionError


def check(row: Any, expected: Expected, before: Status) -> None:
    """What stands of one operation is what the protocol says, and it came there by a permitted transition."""
    status = Status(row["status"])
    assert status is before or status in TRANSITIONS[before], (before, status)
    session = expected.session
    assert (status, row["epoch"], row["owner_token"]) == (
        expected.status, expected.epoch, session.claim.token if session else None,
    )  # fmt: skip
    assert (row["cancel_epoch"], row["paused"], row["failed"]) == (
        expected.cancel_epoch, expected.paused, expected.failed,
    )  # fmt: skip
    head = None if row["revision"] is None else (row["revision"], row["checkpoint_type"], row["bar"])
    assert head == (expected.head[:3] if expected.head else None)
    if status is Status.COMPLETED:
        assert session is not None
        assert (row["result"], row["result_digest"]) == (session.number, session.digest)
        assert head is None
    if status is Status.RUNNING and session is not None:
        at = session.service.acknowledged
        assert (at.revision, at.bar_index) == (session.revision, session.bar)
    assert row["sequences"] == list(range(1, expected.segments + 1))
    assert row["starts"] == [0, *row["stops"]][: expected.segments]
    assert (row["stops"] or [0])[-1] == len(expected.ledger)
    if head is not None:
        assert (row["ledger_count"], row["last_segment"]) == (len(expected.ledger), expected.segments)
