"""What is stored of an operation, as people see it: its progress, and its results made whole again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from ktrdr_async.backtesting.checkpoint_builder import recorded_values
from ktrdr_async.backtesting.curve import equity_curve
from ktrdr_async.backtesting.request import BacktestRequest
from ktrdr_async.backtesting.results import BacktestResults, Outcome
from ktrdr_async.checkpoint.service import CheckpointService
from ktrdr_async.errors import (
    CancellationError,
    CheckpointCorruptedError,
    CheckpointMismatchError,
    InvalidTransitionError,
    OperationFailedError,
)
from ktrdr_async.operations.lifecycle import Status
from ktrdr_async.operations.rows import read
from ktrdr_async.supervision.endings import resume_hint
from ktrdr_async.supervision.jobs import narrowed, read_bars
from ktrdr_async.supervision.mailbox import Progress
from ktrdr_async.supervision.shielding import in_thread

if TYPE_CHECKING:
    from ktrdr_async.market import Bars
    from ktrdr_async.operations.lifecycle import Operation
    from ktrdr_async.storage.database import Database
    from ktrdr_async.supervision.jobs import Permissions


class Failed(msgspec.Struct, frozen=True):
    """What is stored of an error that ended a run."""

    type: str = ""
    message: str = ""
    bar: int | None = None
    notes: list[str] = []


def outcome_of(row: Operation) -> Outcome:
    """A completed operation's outcome. :raises CheckpointCorruptedError: if what is stored is none."""
    return read(row.operation_id, "result", lambda: msgspec.convert(row.result, Outcome))


def request_of(row: Operation) -> BacktestRequest:
    """An operation's request. :raises CheckpointCorruptedError: if what is stored is none."""
    return read(row.operation_id, "request", lambda: BacktestRequest.from_dict(row.request))


def check(row: Operation) -> None:
    """Looks whether what is shown of a row can be read. :raises CheckpointCorruptedError: if it can't."""
    request_of(row)
    if row.result is not None:
        outcome_of(row)
    if row.progress:
        _told(row)
    read(row.operation_id, "error", lambda: msgspec.convert(row.error, Failed | None))


def _told(row: Operation) -> Progress:
    return read(row.operation_id, "progress", lambda: msgspec.convert(row.progress, Progress))


def progress_of(row: Operation) -> Progress:
    """What a stored operation tells of its progress."""
    named, status = row.operation_id, row.status.value
    if row.status is Status.COMPLETED and row.result is not None:
        outcome = outcome_of(row)
        return Progress(
            operation_id=named,
            status=status,
            bar_index=outcome.bars - 1,
            bars=outcome.bars,
            timestamp=outcome.last_timestamp,
            equity=outcome.metrics.final_equity,
            trades=outcome.metrics.trades,
        )
    stored = _told(row) if row.progress else Progress(operation_id=named, status="")
    running = row.status is Status.RUNNING
    return msgspec.structs.replace(
        stored,
        status=status,
        bar_index=max(stored.bar_index, -1 if row.checkpoint_bar is None else row.checkpoint_bar),
        bars_per_second=stored.bars_per_second if running else None,
        seconds_left=stored.seconds_left if running else None,
        checkpoint_bar=row.checkpoint_bar,
        paused=row.paused,
    )


async def rebuild(database: Database, row: Operation, bars: Bars | None, permissions: Permissions) -> BacktestResults:
    """A completed operation's results, from its row, its ledger and its bars."""
    if row.status is Status.FAILED:
        error = row.error or {}
        raise OperationFailedError(
            row.operation_id, f"{row.operation_id} failed: {error.get('type')}: {error.get('message')}"
        )
    if row.status in (Status.CANCELLED, Status.INTERRUPTED):
        raise CancellationError(
            row.operation_id,
            f"{row.operation_id} is {row.status.value}",
            hint=resume_hint(row.operation_id),
        )
    if row.status is not Status.COMPLETED or row.result is None:
        raise InvalidTransitionError(
            row.operation_id, f"{row.operation_id} is {row.status.value}: it has no result yet"
        )
    outcome, request = outcome_of(row), request_of(row)
    loaded = await CheckpointService(database, None).load_ledger(row.operation_id)
    if bars is not None:
        given = bars
        found = await in_thread(lambda: narrowed(given, request))
    else:
        found = await read_bars(request, permissions)

    def build() -> BacktestResults:
        now = found.fingerprint()
        if now != outcome.fingerprint:
            raise CheckpointMismatchError(
                row.operation_id,
                f"the data of {row.operation_id} have changed since it ran",
                differences={"bars": (outcome.fingerprint, now)},
                hint="hand over the data that it ran on",
            )
        equity = equity_curve(loaded.ledger, found.close, request.initial_capital, request.lot_size)
        results = BacktestResults(
            request=request,
            bars=found,
            strategy=outcome.strategy,
            ledger=tuple(loaded.ledger),
            recorded=tuple(recorded_values(loaded.recorded, row.operation_id)),
            counters=outcome.counters,
            unfilled=tuple(outcome.unfilled),
            equity=equity,
            run=outcome.run,
            accepted_mismatches=outcome.accepted_mismatches,
        )
        if not results.digest == outcome.digest == row.result_digest:
            raise CheckpointCorruptedError(
                row.operation_id,
                f"the stored result of {row.operation_id} isn't what its request, bars and ledger give: its digest is "
                f"{row.result_digest}, theirs {results.digest}",
                hint="restore the database, or run it again under another id",
            )
        _ = results.metrics
        return results

    return await in_thread(build)
