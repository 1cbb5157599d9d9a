"""Makes the one statement of a save or an ending out of a state, and delivers it: the same bytes, as often as it takes.

A statement is in doubt from the moment it is sent until an answer says otherwise. What resolves it is the operation
row's lock, which waits for the old statement, and a look at the head afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NoReturn

import asyncpg

from ktrdr_async.checkpoint.codec import (
    EncodedHead,
    Head,
    Segment,
    SegmentWork,
    encode_head,
    head_digest,
    segment_rows,
)
from ktrdr_async.checkpoint.pieces import in_pieces, one_piece
from ktrdr_async.checkpoint.position import Position, Write
from ktrdr_async.checkpoint.schemas import SEGMENT_LIMIT, BacktestCheckpointState, CheckpointType
from ktrdr_async.errors import (
    CancellationError,
    CheckpointConflictError,
    CheckpointError,
    CheckpointTooLargeError,
    InputError,
    InvalidTransitionError,
    OperationNotFoundError,
    OwnershipLostError,
)
from ktrdr_async.operations.jsonb import ValueTooLargeError, to_json
from ktrdr_async.operations.lifecycle import Claim, Status
from ktrdr_async.storage.database import Database, is_transient

MAX_WRITE_BYTES = 500_000_000  # of one statement's parameters; PostgreSQL's limit for a message is 1 GB
HEADLESS = "finish_without_checkpoint"  # the one statement that leaves the head alone
CONTENTIONS = 5  # tries after a serialization failure or a deadlock, in which nothing was written


async def build_save(claim: Claim, position: Position, state: BacktestCheckpointState, kind: CheckpointType) -> Write:
    """The statement that saves a state.

    Raises:
        CheckpointError: if it doesn't continue what was acknowledged, or can't be stored.
    """
    segments, grown = await _encode_segments(claim.operation_id, position, state)
    head, after = await one_piece(lambda: _encode_head(claim.operation_id, grown, state, kind))
    query = "save_checkpoint" if position.revision else "save_first_checkpoint"
    arguments = (*_head_arguments(head, after, kind), *segment_rows(segments[-1:]))
    return _write(query, claim, (position, after), arguments, (head.state,), segments)


async def build_completion(
    claim: Claim, position: Position, state: BacktestCheckpointState | None, result: dict[str, Any], result_digest: str
) -> Write:
    """The statement that completes an operation.

    Raises:
        CheckpointError: as `build_save`.
        InputError: if the result can't be stored.
    """
    segments: tuple[Segment, ...] = ()
    after = position
    if state is not None:
        segments, after = await _encode_segments(claim.operation_id, position, state)
    text = await one_piece(lambda: to_json(result))
    arguments = (*segment_rows(segments[-1:]), text, result_digest, after.segments, after.tip)
    ending = {"status": Status.COMPLETED, "result_digest": result_digest}
    return _write("finish_completed", claim, (position, after), arguments, (text,), segments, **ending)


async def build_ending(
    claim: Claim,
    position: Position,
    state: BacktestCheckpointState | None,
    kind: CheckpointType,
    status: Status,
    error: dict[str, Any] | None,
) -> Write:
    """The statement that ends a run as cancelled, failed or interrupted.

    Raises:
        CheckpointError: as `build_save`.
        InputError: if the error can't be stored.
    """
    text = None if error is None else to_json(error, repair=True)
    if state is None:
        alone = (claim.operation_id, claim.epoch, claim.token, status.value, text)
        return Write(HEADLESS, alone, position, position, len(text or ""), 0, status)
    segments, grown = await _encode_segments(claim.operation_id, position, state)
    head, after = await one_piece(lambda: _encode_head(claim.operation_id, grown, state, kind))
    query = "finish_with_checkpoint" if position.revision else "finish_with_first_checkpoint"
    arguments = (*_head_arguments(head, after, kind), *segment_rows(segments[-1:]), status.value, text)
    return _write(query, claim, (position, after), arguments, (head.state, text or ""), segments, status=status)


def _write(
    query: str,
    claim: Claim,
    step: tuple[Position, Position],
    rest: tuple[Any, ...],
    texts: Sequence[str],
    segments: Sequence[Segment],
    **ending: Any,
) -> Write:
    before, after = step
    size = sum(len(text.encode()) for text in texts) + sum(segment.bytes for segment in segments)
    if size > MAX_WRITE_BYTES:
        raise CheckpointTooLargeError(
            claim.operation_id,
            f"{size} bytes since the last save are more than the {MAX_WRITE_BYTES} that one save can hold",
        )
    arguments = (claim.operation_id, claim.epoch, claim.token, before.revision, before.digest, *rest)
    early = tuple(segment_rows([segment]) for segment in segments[:-1])
    return Write(query, arguments, before, after, size, len(segments), before_it=early, **ending)


def _head_arguments(head: EncodedHead, after: Position, kind: CheckpointType) -> tuple[Any, ...]:
    return (
        kind.value, head.state, len(head.state.encode()), after.segments, after.ledger, after.samples, after.recorded,
        after.digest,
    )  # fmt: skip


def _encode_head(
    operation_id: str, after: Position, state: BacktestCheckpointState, kind: CheckpointType
) -> tuple[EncodedHead, Position]:
    try:
        encoded = encode_head(state)
    except InputError as error:
        _unstorable(operation_id, error)
    described = Head(operation_id, kind.value, after.revision + 1, after.segments, after.tip, after.counts)
    return encoded, Position(
        after.revision + 1, head_digest(described, encoded.canonical), after.ledger, after.samples, after.recorded,
        after.segments, state.bar_index, after.tip,
    )  # fmt: skip


async def _encode_segments(
    operation_id: str, position: Position, state: BacktestCheckpointState
) -> tuple[tuple[Segment, ...], Position]:
    """What the state holds beyond the acknowledged counts, as segments; and the position with their counts."""
    if state.bar_index < position.bar_index:
        raise CheckpointError(
            operation_id, f"the state is of bar {state.bar_index}, bar {position.bar_index} was saved already"
        )
    ledger = _beyond(operation_id, "ledger", state.ledger, state.ledger_from, position.ledger)
    samples = _beyond(operation_id, "equity_samples", state.equity_samples, state.samples_from, position.samples)
    recorded = _beyond(operation_id, "recorded", state.recorded, state.recorded_from, position.recorded)
    segments: list[Segment] = []
    counts, tip, sequence = position.counts, position.tip, position.segments
    for first in range(0, max(len(ledger), len(samples), len(recorded)), SEGMENT_LIMIT):
        stop = first + SEGMENT_LIMIT
        work = SegmentWork(operation_id, sequence + 1, counts, tip)
        try:
            segments += await in_pieces(work.encode(ledger[first:stop], samples[first:stop], recorded[first:stop]))
        except InputError as error:
            _unstorable(operation_id, error)
        counts, tip, sequence = work.stop, segments[-1].digest, sequence + 1
    return tuple(segments), Position(
        position.revision,
        position.digest,
        counts.ledger,
        counts.samples,
        counts.recorded,
        sequence,
        state.bar_index,
        tip,
    )


def _beyond(operation_id: str, name: str, records: list[Any], start: int, acknowledged: int) -> list[Any]:
    if start > acknowledged or start + len(records) < acknowledged:
        raise CheckpointError(
            operation_id,
            f"the state's {name} are {start} to {start + len(records)},"
            f" the last acknowledged save ends at {acknowledged}",
            hint="build the state from the acknowledged counts on",
        )
    return records[acknowledged - start :] if acknowledged > start else records


def _unstorable(operation_id: str, error: InputError) -> NoReturn:
    kind = CheckpointTooLargeError if isinstance(error, ValueTooLargeError) else CheckpointError
    raise kind(operation_id, f"the checkpoint can't be stored: {error.message}") from error


class _Unwritten(Exception):  # noqa: N818 - never leaves this module
    """Takes back the segments that were sent before a statement that found nothing to write to."""


class Delivery:
    """One write on its way: sent, looked for when in doubt, sent again.

    All of its state: `sent`, whether the statement may be, or become, durable without our having heard of it, and
    `stored`, the status that the operation was found to have ended with.
    """

    def __init__(self, database: Database, claim: Claim, write: Write) -> None:
        self.write = write
        self.sent = False
        self.stored: Status | None = None
        self._database = database
        self._claim = claim

    async def deliver(self, connection: Any) -> None:
        """Make it durable: look first where it is in doubt, then send. May be called again after any error.

        Raises:
            OwnershipLostError: if a newer owner holds the operation.
            OperationNotFoundError: if it is gone.
            CancellationError: if a cancellation came first.
            InvalidTransitionError: if it has ended otherwise.
            CheckpointConflictError: if the head isn't the one that this owner last saw.
            CheckpointTooLargeError: if PostgreSQL says so.
            CheckpointError: if PostgreSQL refuses it otherwise.
        """
        named = self._claim.operation_id
        for _ in range(CONTENTIONS):
            if self.sent and await self.look(connection):
                return
            self.sent = True
            try:
                row = await self._send(connection)
            except asyncpg.UniqueViolationError as error:
                # A head or segment is there already: an earlier try of this very statement, or a conflict.
                if await self.look(connection):
                    return
                raise self._conflict() from error
            except (asyncpg.SerializationError, asyncpg.DeadlockDetectedError):
                self.sent = False  # the caller's pool has another isolation level; nothing was written
                continue
            except asyncpg.PostgresError as error:
                if is_transient(error):
                    raise
                self.sent = False  # the server answered, and an error's transaction is rolled back
                raise self._refusal(error) from error
            if row["own"] == 0:
                self._judge(await connection.fetchrow(self._database.sql("standing"), named))
            elif row["written"]:
                self.stored = None if self.write.status is None else Status(row["status"])
                self.sent = False
            elif not await self.look(connection):
                # The head isn't where it was, and no earlier try has landed while this one waited.
                raise self._conflict()
            return
        raise CheckpointError(named, f"{CONTENTIONS} writes of operation {named} in a row met a serialization failure")

    async def _send(self, connection: Any) -> Any:
        """The statement's row. Segments go one by one, as the driver holds the loop for all that it is given at once.

        Then it is one transaction, which holds the operation's row from its first statement on: all of it lands, or
        nothing. An owner that stops in the middle of it doesn't hold the row for ever.
        """
        write = self.write
        if not write.before_it:
            return await connection.fetchrow(self._database.sql(write.query), *write.arguments)
        row = None
        with contextlib.suppress(_Unwritten):
            async with connection.transaction(isolation="read_committed"):
                await connection.execute(self._database.sql("bound_idleness"))
                for columns in write.before_it:
                    await connection.execute(self._database.sql("add_segments"), *write.arguments[:3], *columns)
                row = await connection.fetchrow(self._database.sql(write.query), *write.arguments)
                if not row["written"]:
                    raise _Unwritten
        return row

    async def look(self, connection: Any) -> bool:
        """Whether it is durable. Lock and look are two statements: one snapshot for both would be from before the wait.

        False where it isn't, and `deliver` may send it again: if a late copy of it still lands, the other one
        conflicts, and looking again finds it.

        Raises:
            OperationError: as `deliver`, where the operation isn't running under our claim, or the head is another.
        """
        named = self._claim.operation_id
        async with connection.transaction(isolation="read_committed"):
            row = await connection.fetchrow(self._database.sql("lock_operation"), named)
            head = await connection.fetchrow(self._database.sql("head_position"), named)
        if row is None or not self._is_mine(row) or row["status"] != Status.RUNNING:
            self._judge(row)
            return True
        found = (0, "") if head is None else (head["revision"], head["digest"])
        if self.write.status is None and found == (self.write.after.revision, self.write.after.digest):
            self.sent = False
            return True
        if found != (self.write.before.revision, self.write.before.digest) and self.write.query != HEADLESS:
            raise self._conflict()
        return False

    def _judge(self, row: Any) -> None:
        """Take in what a row means that isn't running under our claim.

        Raises:
            OperationError: unless the operation has ended as this write wanted.
        """
        self.sent = False
        named, epoch = self._claim.operation_id, self._claim.epoch
        if row is None:
            raise OperationNotFoundError(named, f"operation {named} was deleted while it ran")
        if not self._is_mine(row):
            raise OwnershipLostError(
                named,
                f"operation {named} has another owner: its epoch is {row['epoch']}, ours was {epoch};"
                " nothing was written",
            )
        status, wanted = Status(row["status"]), self.write.status
        same = status is wanted and (status is not Status.COMPLETED or row["result_digest"] == self.write.result_digest)
        if same or (status is Status.CANCELLED and wanted is Status.INTERRUPTED):
            self.stored = status
        elif status is Status.CANCELLED or (status is Status.RUNNING and row["cancel_epoch"] == row["epoch"]):
            raise CancellationError(named, f"operation {named} was cancelled")
        else:
            raise InvalidTransitionError(named, f"operation {named} is {status}: it can't be {wanted or 'saved'}")

    def _is_mine(self, row: Any) -> bool:
        return bool(row["epoch"] == self._claim.epoch and row["owner_token"] == self._claim.token)

    def _conflict(self) -> CheckpointConflictError:
        self.sent = False
        named = self._claim.operation_id
        return CheckpointConflictError(
            named,
            f"the stored checkpoint of operation {named} isn't revision {self.write.before.revision},"
            " which this owner last saw; nothing was written",
            hint="resume it: that loads what is stored",
        )

    def _refusal(self, error: asyncpg.PostgresError) -> CheckpointError:
        named = self._claim.operation_id
        large = isinstance(error, asyncpg.ProgramLimitExceededError | asyncpg.OutOfMemoryError)
        kind = CheckpointTooLargeError if large else CheckpointError
        what = f"{self.write.bytes} bytes of operation {named}: {type(error).__name__}: {error}"
        return kind(named, f"PostgreSQL refused a checkpoint of {what}")
