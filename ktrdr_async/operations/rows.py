"""Rows of the database to records, and to the errors that tell of them. Nothing here asks the database."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from ktrdr_async.errors import AlreadyClaimedError, CheckpointCorruptedError, KtrdrError, OperationNotFoundError
from ktrdr_async.operations.jsonb import canonical, from_json
from ktrdr_async.operations.lifecycle import Operation, Owner, Parent, Status

T = TypeVar("T")


def operation_of(row: Any) -> Operation:
    """An operation from a row of the overview. :raises CheckpointCorruptedError: if its JSON can't be read."""
    parent = None if row["parent_id"] is None else Parent(row["parent_id"], row["parent_bar"], row["parent_digest"])
    return Operation(
        operation_id=row["operation_id"],
        type=row["type"],
        status=Status(row["status"]),
        request=_tree(row, "request") or {},
        parent=parent,
        owner=None if row["owner_host"] is None else owner_of(row),
        epoch=row["epoch"],
        attempts=row["attempts"],
        cancel_epoch=row["cancel_epoch"],
        paused=row["paused"],
        heartbeat_at=row["heartbeat_at"],
        progress=_tree(row, "progress"),
        result=_tree(row, "result"),
        result_digest=row["result_digest"],
        error=_tree(row, "error"),
        created_at=row["created_at"],
        started_at=row["started_at"],
        finished_at=row["finished_at"],
        checkpoint_bar=row["checkpoint_bar"],
        checkpoint_type=row["checkpoint_type"],
        checkpoint_at=row["checkpoint_at"],
        checkpoint_bytes=row["checkpoint_bytes"],
    )


def _tree(row: Any, column: str) -> dict[str, Any] | None:
    text = row[column]
    return None if text is None else read(row["operation_id"], column, lambda: msgspec.convert(from_json(text), dict))


def read(operation_id: str, what: str, call: Callable[[], T]) -> T:
    """What a call makes of something that is stored of an operation.

    Raises:
        CheckpointCorruptedError: if it can't: something else than we has written it.
    """
    try:
        return call()
    except (ValueError, TypeError, OverflowError, RecursionError, KtrdrError) as error:
        raise CheckpointCorruptedError(
            operation_id, f"the {what} of operation {operation_id} can't be read: {error}", hint="restore the database"
        ) from error


def owner_of(row: Any) -> Owner:
    """The owner in a row that has one."""
    return Owner(
        row["owner_host"], row["owner_boot_id"], row["owner_pid_namespace"], row["owner_pid"], row["owner_started"]
    )


def existing(operation_id: str, found: Operation | None) -> Operation:
    """The operation that was found.

    Raises:
        OperationNotFoundError: if there was none.
    """
    if found is None:
        raise not_found(operation_id)
    return found


def not_found(operation_id: str) -> OperationNotFoundError:
    """The error that no operation has this id."""
    return OperationNotFoundError(operation_id, f"there is no operation {operation_id!r}")


def already_claimed(operation_id: str, row: Any) -> AlreadyClaimedError:
    """The error that the operation runs, and where."""
    return AlreadyClaimedError(
        operation_id,
        f"operation {operation_id} is running: process {row['owner_pid']} on {row['owner_host']}, epoch {row['epoch']}",
        hint="cancel it there, or take it over if you know that it is gone",
    )


def first_difference(stored: dict[str, Any], asked: dict[str, Any]) -> str:
    """Names the first field in which two requests differ, with both values."""
    for key in sorted(stored.keys() | asked.keys()):
        if canonical(stored.get(key)) != canonical(asked.get(key)):
            return f"{key}: stored {stored.get(key)!r}, asked {asked.get(key)!r}"[:300]
    return "of another type"
