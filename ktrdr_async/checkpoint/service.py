"""Saves, loads and ends: the one door to an operation's checkpoints. Every write is fenced by a claim.

Deadlines include the wait for a connection. A save whose answer was lost, whose deadline passed or whose await was
cancelled is in doubt; the next call resolves it first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import anyio
import asyncpg

from ktrdr_async.checkpoint.position import LoadedLedger, Position, SaveReceipt
from ktrdr_async.checkpoint.reading import read_checkpoint, read_ledger
from ktrdr_async.checkpoint.schemas import BacktestCheckpointState, CheckpointType
from ktrdr_async.checkpoint.writing import Delivery, build_completion, build_ending, build_save
from ktrdr_async.errors import DatabaseError, EmbeddedServerError, InputError, OwnershipLostError, SaveTimeoutError
from ktrdr_async.operations.bounded import Source, bounded
from ktrdr_async.operations.lifecycle import ENDINGS, Claim, Status
from ktrdr_async.storage.database import Database, is_transient

T = TypeVar("T")
DRIVER_ERRORS = (
    asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, EmbeddedServerError,
)  # fmt: skip
SAVE_SECONDS = 30.0
FINISH_SECONDS = 10.0
LOAD_SECONDS = 300.0

_TYPES = {
    Status.CANCELLED: CheckpointType.CANCELLATION,
    Status.FAILED: CheckpointType.FAILURE,
    Status.INTERRUPTED: CheckpointType.SHUTDOWN,
}


class CheckpointService:
    """The checkpoints of one claimed operation; without a claim it only reads, of any operation.

    `acknowledged` and `in_doubt` are all of its state.
    """

    def __init__(self, database: Database, claim: Claim | None = None) -> None:
        self.acknowledged = Position()
        self._claim = claim
        self._database = database
        self._undecided: Delivery | None = None
        self._lock = anyio.Lock()  # one call at a time: each begins where the one before it ended

    @property
    def in_doubt(self) -> bool:
        """Whether a write was sent of which isn't known whether it is durable."""
        return self._undecided is not None

    async def load_checkpoint(self, operation_id: str) -> BacktestCheckpointState | None:
        """The operation's checkpoint, its growing fields whole, or None. With the claim on it, saves go on from there.

        Raises:
            OperationNotFoundError: if there is no such operation.
            CheckpointCorruptedError: if a digest, the chain of segments or a type is wrong; the message says which.
            SchemaVersionError: if newer code wrote it; the operation is to be handed back, not failed.
            DatabaseError: if the database can't be reached.
        """
        async with self._lock:
            ours = self._claim is not None and self._claim.operation_id == operation_id
            if ours:
                await self._resolve(SAVE_SECONDS)
            found = await self._read(lambda connection: read_checkpoint(self._database, connection, operation_id))
            if found is None:
                return None
            state, position = found
            if ours:
                self.acknowledged = position
            return state

    async def load_ledger(self, operation_id: str) -> LoadedLedger:
        """The operation's ledger: all of it when completed, else up to its checkpoint.

        Raises:
            KtrdrError: as `load_checkpoint`.
        """
        return await self._read(lambda connection: read_ledger(self._database, connection, operation_id))

    async def save_checkpoint(
        self,
        operation_id: str,
        checkpoint_type: CheckpointType,
        state: BacktestCheckpointState,
        artifacts: object = None,
        *,
        deadline: float = SAVE_SECONDS,
    ) -> SaveReceipt:
        """Save a state: the head, and of the growing fields what came since the last acknowledged save.

        Args:
            operation_id: the claimed operation.
            checkpoint_type: why.
            state: its growing fields may begin before the acknowledged counts, not after them.
            artifacts: nothing; there are no file artifacts.
            deadline: seconds for everything.

        Raises:
            OwnershipLostError: if the operation isn't ours, or not any more; nothing was written.
            SaveTimeoutError: if it wasn't acknowledged in time; it is in doubt then.
            CheckpointConflictError: if the stored head isn't the one that was acknowledged.
            CheckpointTooLargeError: if the state is too large; the message gives the size.
            CheckpointError: if the state can't be stored or doesn't continue what was saved.
            CancellationError: if the operation was ended as cancelled.
        """
        if artifacts:
            raise InputError("a checkpoint has no file artifacts: everything is in the state")
        claim = self._owned(operation_id)
        clock = asyncio.get_running_loop().time
        started = clock()
        async with self._lock:
            await self._resolve(deadline)
            write = await build_save(claim, self.acknowledged, state, CheckpointType(checkpoint_type))
            await self._deliver(Delivery(self._database, claim, write), deadline - (clock() - started), self._database)
        return SaveReceipt(write.after.revision, write.bytes, write.segments, clock() - started)

    async def finish(
        self,
        status: Status,
        *,
        state: BacktestCheckpointState | None,
        checkpoint_type: CheckpointType | None = None,
        result: dict[str, Any] | None = None,
        result_digest: str | None = None,
        error: dict[str, Any] | None = None,
        deadline: float = FINISH_SECONDS,
        through: Source | None = None,
    ) -> Status:
        """End the run in one statement. May be called again after a SaveTimeoutError, also with another status.

        Args:
            status: completed, failed, cancelled or interrupted.
            state: of the last boundary; None keeps the checkpoint that is there. A completion takes its last segments
                from it.
            checkpoint_type: why; None: what goes with the status.
            result: of a completion.
            result_digest: of a completion, hex.
            error: what happened; of a failure it must be there.
            deadline: seconds for everything.
            through: a reserved connection; None: the pool.

        Returns:
            The status that was stored: `interrupted` becomes `cancelled` where a cancellation was pending.

        Raises:
            CancellationError: if a cancellation won against the completion; the run then ends with status cancelled.
            InvalidTransitionError: if the operation has ended otherwise already.
            OwnershipLostError, SaveTimeoutError, CheckpointConflictError, CheckpointTooLargeError, CheckpointError: as
                `save_checkpoint`.
            OperationNotFoundError: if it was deleted.
            InputError: if what the status needs wasn't given, or can't be stored.
        """
        if self._claim is None:
            raise OwnershipLostError("", "a service without a claim can't end an operation")
        status = Status(status)
        if status not in ENDINGS:
            raise InputError(f"a run can't end as {status}")
        if (status is Status.COMPLETED) != (result is not None and result_digest is not None):
            raise InputError(f"status {status}: a result and its digest belong to a completion, and only to it")
        if (status is Status.FAILED and error is None) or (status is Status.COMPLETED and error is not None):
            raise InputError(f"status {status}: an error belongs to a failure, and not to a completion")
        claim, source = self._claim, through or self._database
        clock = asyncio.get_running_loop().time
        started = clock()
        async with self._lock:
            await self._resolve(deadline, source)
            if result is not None and result_digest is not None:
                write = await build_completion(claim, self.acknowledged, state, result, result_digest)
            else:
                kind = checkpoint_type or _TYPES[status]
                write = await build_ending(claim, self.acknowledged, state, CheckpointType(kind), status, error)
            delivery = Delivery(self._database, claim, write)
            await self._deliver(delivery, deadline - (clock() - started), source)
        return delivery.stored or status

    async def resolve(self, *, deadline: float = SAVE_SECONDS) -> None:
        """Decide what is in doubt; nothing to do where nothing is.

        A save that isn't durable is sent again, the same bytes. An ending that isn't durable isn't sent again: call
        `finish`.

        Raises:
            OwnershipLostError, OperationNotFoundError, CancellationError, InvalidTransitionError,
            CheckpointConflictError,
            SaveTimeoutError: as `save_checkpoint` and `finish`.
        """
        async with self._lock:
            await self._resolve(deadline)

    async def _resolve(self, seconds: float, source: Source | None = None) -> None:
        delivery = self._undecided
        if delivery is None:
            return
        # A save is sent again where it didn't land. An ending isn't: its caller may by now want another one, and
        # whichever of them the row's lock lets first makes the other find a status that isn't `running`.
        ending = delivery.write.status is not None
        await self._settle(delivery, delivery.look if ending else delivery.deliver, seconds, source or self._database)
        self._undecided = None

    async def _deliver(self, delivery: Delivery, seconds: float, source: Source) -> None:
        if seconds <= 0:
            named = delivery.write.arguments[0]
            raise SaveTimeoutError(named, f"encoding the checkpoint of operation {named} took all of its time")
        self._undecided = delivery
        await self._settle(delivery, delivery.deliver, seconds, source)

    async def _settle(
        self, delivery: Delivery, step: Callable[[Any], Awaitable[bool | None]], seconds: float, source: Source
    ) -> None:
        async def work(connection: Any) -> None:
            # Decided here and not by the caller, whose await may be cancelled while the answer is on its way.
            if await step(connection) is not False:
                self.acknowledged = delivery.write.after

        try:
            await bounded(source, work, seconds=seconds)
        except DRIVER_ERRORS as error:
            if not is_transient(error):
                raise DatabaseError(f"{self._database.label}: {type(error).__name__}: {error}") from error
            named, write = delivery.write.arguments[0], delivery.write
            what = write.status or f"revision {write.after.revision}"
            raise SaveTimeoutError(
                named,
                f"the write ({what}) of operation {named} wasn't acknowledged in {seconds:.1f} s:"
                f" {type(error).__name__}: {error}",
                hint="it is resolved before the next one",
            ) from error
        finally:
            if not delivery.sent:
                self._undecided = None

    async def _read(self, work: Callable[[Any], Awaitable[T]]) -> T:
        try:
            return await bounded(self._database, work, seconds=LOAD_SECONDS)
        except DRIVER_ERRORS as error:
            raise DatabaseError(f"{self._database.label} can't be read: {type(error).__name__}: {error}") from error

    def _owned(self, operation_id: str) -> Claim:
        if self._claim is None or self._claim.operation_id != operation_id:
            ours = "no operation" if self._claim is None else f"operation {self._claim.operation_id}"
            raise OwnershipLostError(
                operation_id, f"this service has the claim on {ours}, not on {operation_id}: nothing was written"
            )
        return self._claim
