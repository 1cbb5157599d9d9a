"""Creates, claims, cancels and finds operations in the database.

Saving, loading and ending a run is the checkpoint service's.
"""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, TypeVar

import asyncpg

from ktrdr_async.errors import (
    AlreadyClaimedError,
    DatabaseError,
    InputError,
    InvalidTransitionError,
    OperationConflictError,
    OperationNotFoundError,
)
from ktrdr_async.operations.bounded import bounded
from ktrdr_async.operations.jsonb import canonical, to_json
from ktrdr_async.operations.lifecycle import (
    LEASE_SECONDS,
    Answer,
    Beat,
    Claim,
    Operation,
    Owner,
    Parent,
    Status,
    is_alive,
)
from ktrdr_async.operations.rows import already_claimed, existing, first_difference, not_found, operation_of, owner_of
from ktrdr_async.storage.database import Database, is_transient

CALL_SECONDS = 10.0  # for each call, retries included
CONTENTIONS = 20  # tries after a serialization failure
AMBIGUOUS_SHOWN = 10  # ids that an ambiguous prefix lists

T = TypeVar("T")
# Inside the service `list` is its method.
Operations = list[Operation]
Answers = list[Answer]
Ids = list[str]
_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


def validated_id(operation_id: str) -> str:
    """The id, if it is one. :raises InputError: unless it is 1 to 128 of `A-Z a-z 0-9 . _ -`."""
    if not isinstance(operation_id, str) or not _ID.fullmatch(operation_id):
        raise InputError(
            f"{str(operation_id)[:140]!r} can't be an operation's id", hint="1 to 128 of A-Z a-z 0-9 . _ -"
        )
    return operation_id


class OperationsService:
    """Operations in one database. Every call ends within its deadline; a repeated one finds what the first one did."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._unused: set[uuid.UUID] = (
            set()
        )  # tokens of claims that weren't heard of, and may have landed or still land

    async def create(
        self,
        operation_id: str | None,
        request: dict[str, Any],
        *,
        type: str = "backtesting",
        parent: Parent | None = None,
    ) -> Operation:
        """Create a pending operation, or find the one that has this id and an equal request.

        Args:
            operation_id: None makes a random one.
            request: plain JSON-ready values; compared canonically, so that key order, and 10 against 10.0, don't
                matter.
            type: what kind of work it is.
            parent: what it was forked from or extends.

        Raises:
            InputError: if the id or the request can't be stored.
            OperationConflictError: if the id belongs to another request.
        """
        named = uuid.uuid4().hex if operation_id is None else validated_id(operation_id)
        if parent is not None:
            validated_id(parent.operation_id)
        descent = (parent.operation_id, parent.bar_index, parent.digest) if parent else (None, None, None)
        text = to_json(request)

        async def work(connection: Any) -> Operation | None:
            await connection.execute(self._database.sql("create_operation"), named, type, text, *descent)
            return await self._read(connection, named)

        found = await self._call(work)
        if found is None:
            raise OperationNotFoundError(named, f"operation {named} was deleted while it was being created")
        if canonical(found.request) != canonical(request) or found.type != type:
            raise OperationConflictError(
                named,
                f"operation {named} exists with another request ({first_difference(found.request, request)})",
                hint="use another id, or none for a random one",
            )
        return found

    async def claim(
        self, operation_id: str, *, owner: Owner, take_over: bool = False, lease_seconds: float = LEASE_SECONDS
    ) -> Claim:
        """Become the operation's owner: its epoch rises, and whatever owned it before can't write any more.

        An owner in this very host, boot and PID namespace is looked at exactly: dead, it is taken over at once; alive,
        it isn't, whatever its lease. Of any other owner the lease must have passed, by the server's clock.

        Args:
            operation_id: any operation that isn't completed.
            owner: usually `Owner.this_process()`.
            take_over: a person's decision to take it from an owner that seems to be alive.
            lease_seconds: how long without a heartbeat is a lost lease.

        Raises:
            OperationNotFoundError: if there is none.
            AlreadyClaimedError: if its owner is alive, or another claim came first.
            InvalidTransitionError: if it is completed.
        """
        token = uuid.uuid4()

        async def work(connection: Any) -> Claim:
            row = await connection.fetchrow(self._database.sql("claimable"), operation_id, lease_seconds)
            if row is None:
                raise not_found(operation_id)
            if row["owner_token"] == token and row["status"] == Status.RUNNING:
                return Claim(operation_id, row["epoch"], token)  # an earlier try, whose answer was lost
            if row["status"] == Status.COMPLETED:
                raise InvalidTransitionError(
                    operation_id, f"operation {operation_id} is completed: nothing is left to run"
                )
            free = take_over or row["owner_token"] in self._unused
            if row["status"] == Status.RUNNING and not free:
                alive = is_alive(owner_of(row))
                if alive or (alive is None and not row["lease_passed"]):
                    raise already_claimed(operation_id, row)
                free = alive is False
            epoch = await connection.fetchval(
                self._database.sql("claim_operation"),
                operation_id,
                row["epoch"],
                token,
                owner.host,
                owner.boot_id,
                owner.pid_namespace,
                owner.pid,
                owner.started,
                lease_seconds,
                free,
            )
            if epoch is not None:
                return Claim(operation_id, epoch, token)
            # Another claim, a heartbeat or the run's own end came between: one of them won, and this isn't tried again.
            row = await connection.fetchrow(self._database.sql("claimable"), operation_id, lease_seconds)
            if row is None:
                raise not_found(operation_id)
            if row["owner_token"] == token and row["status"] == Status.RUNNING:
                return Claim(operation_id, row["epoch"], token)  # an earlier try landed while this one waited for it
            if row["owner_token"] is None or row["status"] != Status.RUNNING:
                raise AlreadyClaimedError(operation_id, f"operation {operation_id} changed while it was being claimed")
            raise already_claimed(operation_id, row)

        try:
            return await self._call(work)
        except BaseException:
            self._unused.add(token)
            raise

    async def heartbeat(self, connection: Any, beats: Sequence[Beat]) -> Answers:
        """Renew the lease of every operation that is still ours, store progress, and hear of cancellations and pauses.

        One statement on the given (reserved) connection. No deadline of its own: the caller's task cuts the connection.
        """
        rows = await connection.fetch(
            self._database.sql("heartbeat"),
            [beat.claim.operation_id for beat in beats],
            [beat.claim.epoch for beat in beats],
            [beat.claim.token for beat in beats],
            [None if beat.progress is None else to_json(beat.progress, repair=True) for beat in beats],
        )
        return [Answer(row["operation_id"], row["kind"], row["cancel"], row["paused"]) for row in rows]

    async def cancel(self, operation_id: str, *, epoch: int | None = None) -> Operation:
        """Cancel: what nobody runs ends at once, a running one is asked to end and hears of it by its heartbeat.

        A running one whose owner is dead, or lost its lease elsewhere, ends at once too. An already cancelled one is
        returned.

        Args:
            operation_id: which.
            epoch: cancel only this run of it, as `Operation.epoch` said; None: whichever runs now.

        Raises:
            OperationNotFoundError: if there is none.
            InvalidTransitionError: if it is completed or failed, or runs in another epoch than the given one.
        """

        async def work(connection: Any) -> Operation | None:
            done = await connection.fetchrow(self._database.sql("cancel_operation"), operation_id, epoch)
            row = await connection.fetchrow(self._database.sql("claimable"), operation_id, LEASE_SECONDS)
            if row is not None and done is not None and row["status"] == Status.RUNNING:
                alive = is_alive(owner_of(row))
                if alive is False or (alive is None and row["lease_passed"]):
                    await connection.execute(
                        self._database.sql("cancel_abandoned"),
                        operation_id,
                        row["epoch"],
                        LEASE_SECONDS,
                        alive is False,
                    )
            found = await self._read(connection, operation_id)
            if found is not None and done is None and found.status is not Status.CANCELLED:
                other = "" if epoch is None else f" in epoch {found.epoch}, not {epoch}"
                raise InvalidTransitionError(
                    operation_id, f"operation {operation_id} is {found.status}{other}: it can't be cancelled"
                )
            return found

        return existing(operation_id, await self._call(work))

    async def pause(self, operation_id: str, paused: bool) -> Operation:
        """Ask the operation's owner to pause, or to go on; it stays so across claims.

        Raises:
            OperationNotFoundError: if there is none.
            InvalidTransitionError: if it is completed.
        """

        async def work(connection: Any) -> Operation | None:
            done = await connection.fetchrow(self._database.sql("pause_operation"), operation_id, paused)
            found = await self._read(connection, operation_id)
            if found is not None and done is None:
                raise InvalidTransitionError(
                    operation_id, f"operation {operation_id} is {found.status}: it can't be paused"
                )
            return found

        return existing(operation_id, await self._call(work))

    async def get(self, operation_id: str) -> Operation:
        """The operation. :raises OperationNotFoundError: if there is none."""
        return existing(operation_id, await self._call(lambda connection: self._read(connection, operation_id)))

    async def find(self, prefix: str) -> Operation:
        """The operation with this id, or the only one whose id begins with it.

        Raises:
            OperationNotFoundError: if there is none.
            InputError: if there are several; the message lists them.
        """
        validated_id(prefix)

        async def work(connection: Any) -> Operation | None:
            rows = await connection.fetch(self._database.sql("find_operations"), prefix, AMBIGUOUS_SHOWN + 1)
            ids = [row["operation_id"] for row in rows]
            if len(ids) > 1 and ids[0] != prefix:
                more = ", ..." if len(ids) > AMBIGUOUS_SHOWN else ""
                raise InputError(
                    f"{prefix!r} begins the ids of several operations: {', '.join(ids[:AMBIGUOUS_SHOWN])}{more}",
                    hint="give more of the id",
                )
            return await self._read(connection, ids[0]) if ids else None

        return existing(prefix, await self._call(work))

    async def latest(self) -> Operation:
        """The most recent operation that isn't completed, else the most recent.

        Raises:
            OperationNotFoundError: if there is none.
        """

        async def work(connection: Any) -> Operation | None:
            row = await connection.fetchrow(self._database.sql("latest_operation"))
            return None if row is None else operation_of(row)

        found = await self._call(work)
        if found is None:
            raise OperationNotFoundError("", f"there are no operations in {self._database.label}")
        return found

    async def list(self, *, statuses: Iterable[Status] = (), limit: int = 50) -> Operations:
        """Operations, newest first, of the given statuses or of all."""
        wanted = [Status(status).value for status in statuses]
        rows = await self._call(lambda c: c.fetch(self._database.sql("list_operations"), wanted, limit))
        return [operation_of(row) for row in rows]

    async def orphans(self) -> Operations:
        """What wants to be taken up again: interrupted, or running with an owner that died or elsewhere lost its lease.

        Those of them that were cancelled aren't taken up: nobody is left to hear of it, so they end as cancelled here.
        """

        async def work(connection: Any) -> Operations:
            found = []
            for row in await connection.fetch(self._database.sql("abandoned_operations"), LEASE_SECONDS):
                operation = operation_of(row)
                if operation.status is Status.RUNNING:
                    alive = is_alive(owner_of(row))
                    if alive or (alive is None and not row["lease_passed"]):
                        continue
                    if operation.cancel_requested:
                        await connection.execute(
                            self._database.sql("cancel_abandoned"),
                            operation.operation_id,
                            operation.epoch,
                            LEASE_SECONDS,
                            alive is False,
                        )
                        continue
                found.append(operation)
            return found

        return await self._call(work)

    async def clean(self, *, older_than_days: float = 30.0, dry_run: bool = False) -> Ids:
        """Delete operations that nobody touched for so long, with their checkpoints and ledgers; their ids.

        Finished and unfinished ones; never one that runs, which is looked at again under its row's lock.

        Args:
            older_than_days: since the last of its creation, heartbeat and end, by the server's clock.
            dry_run: only say what would be deleted.

        Raises:
            InputError: if `older_than_days` is negative.
        """
        if not older_than_days >= 0:
            raise InputError(f"older_than_days is {older_than_days}, it can't be negative")
        seconds = older_than_days * 86_400.0
        deleted: Ids = []  # outside the work: a repeated try doesn't see what an earlier one deleted

        async def work(connection: Any) -> None:
            for row in await connection.fetch(self._database.sql("old_operations"), seconds, LEASE_SECONDS):
                if row["status"] == Status.RUNNING and is_alive(owner_of(row)):
                    continue
                named = row["operation_id"]
                if dry_run:
                    deleted.append(named)
                    continue
                arguments = (named, row["epoch"], seconds, LEASE_SECONDS)
                if await connection.fetchval(self._database.sql("delete_operation"), *arguments) is not None:
                    deleted.append(named)

        await self._call(work)
        return deleted

    async def delete_checkpoint(self, operation_id: str) -> None:
        """Delete an unfinished operation's checkpoint and ledger: its next run starts at bar 0.

        Raises:
            OperationNotFoundError: if there is none.
            InvalidTransitionError: if it runs, or is completed (its ledger is the result then).
        """

        async def work(connection: Any) -> Operation | None:
            row = await connection.fetchrow(self._database.sql("delete_checkpoint"), operation_id)
            found = await self._read(connection, operation_id)
            if found is not None and row["own"] == 0:
                raise InvalidTransitionError(
                    operation_id, f"operation {operation_id} is {found.status}: its checkpoint can't be deleted"
                )
            return found

        existing(operation_id, await self._call(work))

    async def _read(self, connection: Any, operation_id: str) -> Operation | None:
        row = await connection.fetchrow(self._database.sql("operation"), operation_id)
        return None if row is None else operation_of(row)

    async def _call(self, work: Callable[[Any], Awaitable[T]]) -> T:
        async def contended(connection: Any) -> T:
            # On a caller's pool with another isolation level a concurrent change is an error that wrote nothing.
            for _ in range(CONTENTIONS):
                with contextlib.suppress(asyncpg.SerializationError, asyncpg.DeadlockDetectedError):
                    return await work(connection)
            return await work(connection)

        try:
            return await bounded(self._database, contended, seconds=CALL_SECONDS)
        except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError) as error:
            if is_transient(error):
                reason = f"didn't answer within {CALL_SECONDS:.0f} s"
            else:
                reason = "refused the statement"
            raise DatabaseError(f"{self._database.label} {reason}: {type(error).__name__}: {error}") from error
