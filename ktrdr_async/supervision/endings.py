"""Writing how a run ends: one statement, shielded, with a deadline; and what is raised where somebody cancelled."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import msgspec

from ktrdr_async.errors import (
    CancellationError,
    InvalidTransitionError,
    OperationNotFoundError,
    OwnershipLostError,
)
from ktrdr_async.operations.lifecycle import Status
from ktrdr_async.supervision.mailbox import Ending
from ktrdr_async.supervision.shielding import finish

if TYPE_CHECKING:
    from ktrdr_async.backtesting.results import RunStatistics
    from ktrdr_async.checkpoint.schemas import BacktestCheckpointState, CheckpointType
    from ktrdr_async.checkpoint.service import CheckpointService
    from ktrdr_async.operations.bounded import Source
    from ktrdr_async.supervision.mailbox import Mailbox

logger = logging.getLogger("ktrdr_async.supervision")

FINAL_SAVE_SECONDS = 10.0
# What a write of ours says where the operation isn't running under our claim any more: nothing is left to be written.
SETTLED = (OwnershipLostError, OperationNotFoundError, InvalidTransitionError, CancellationError)


class End(msgspec.Struct, frozen=True):
    """How an operation stands, or is to stand, when nobody runs it."""

    status: Status
    error: dict[str, Any] | None = None  # of a failure


class Endings:
    """Writes the end of one claimed run.

    Attributes:
        checkpoint_bar: of the last acknowledged checkpoint; None: there is none.
        owed: what is still to be written of the end; None: nothing.
        failed_save: why the end couldn't be written.
        hurried: a save that was under way has taken its part of a cancellation's time.
    """

    def __init__(
        self,
        operation_id: str,
        checkpoints: CheckpointService,
        mailbox: Mailbox,
        statistics: RunStatistics,
        last_line: Source | None,
    ) -> None:
        self.operation_id = operation_id
        self.checkpoint_bar: int | None = None
        self.owed: End | None = End(Status.INTERRUPTED)
        self.failed_save: BaseException | None = None
        self.hurried = False
        self._checkpoints = checkpoints
        self._mailbox = mailbox
        self._statistics = statistics
        self._last_line = last_line

    @property
    def patience(self) -> float:
        """Seconds that a save under way may still take when its run is cancelled; as many are left for the end then."""
        return FINAL_SAVE_SECONDS / 2

    async def write(
        self,
        end: End,
        kind: CheckpointType | None,
        build: Callable[[], Awaitable[BacktestCheckpointState]] | None,
        error: BaseException,
    ) -> asyncio.CancelledError | None:
        """Builds the state and writes it with the status, in one statement; gives the cancellation that came meanwhile.

        What goes wrong becomes a note on `error`, and is owed. Where the state can't be built, the status is written.
        """
        clock = asyncio.get_running_loop().time
        state: BacktestCheckpointState | None = None

        async def write() -> None:
            nonlocal build, state
            started = clock()
            if build is not None and state is None:
                try:
                    state = await build()
                except Exception as broken:
                    build = None
                    logger.exception("%s: its last boundary can't be saved", self.operation_id)
                    error.add_note(note_of(self.operation_id, broken))
            seconds = self.patience if self.hurried else FINAL_SAVE_SECONDS
            await self._checkpoints.finish(
                end.status,
                state=state,
                checkpoint_type=kind,
                error=end.error,
                deadline=seconds - (clock() - started),
                through=self._last_line,
            )

        done = await finish(write)
        if done.error is None:
            self.owed = None
            self._statistics.checkpoints_saved += state is not None
            self.checkpoint_bar = state.bar_index if state is not None else self.checkpoint_bar
        else:
            self.owed = None if isinstance(done.error, SETTLED) else end
            self._statistics.checkpoints_failed += state is not None
            self.failed_save = done.error
            logger.error("%s: the final save failed: %s: %s", self.operation_id, type(done.error).__name__, done.error)
            error.add_note(note_of(self.operation_id, done.error))
        return done.cancelled

    def translated(self, error: asyncio.CancelledError) -> BaseException:
        """What is raised: the cancellation where it came from outside, else what the mailbox asked for."""
        why, named = self._mailbox.ending, self.operation_id
        if why is None or _absorb_own_cancel():
            return error
        if why is Ending.LOST:
            return OwnershipLostError(named, f"{named}: a newer owner holds it; nothing was written")
        reason = "shut down with its worker" if why is Ending.SHUTDOWN else "cancelled on request"
        translated = CancellationError(named, f"{named} was {reason}", hint=resume_hint(named))
        for note in getattr(error, "__notes__", []):
            translated.add_note(note)
        return translated


def _absorb_own_cancel() -> bool:
    """Takes back the cancel that the mailbox sent to this task; whether others are still pending."""
    task = asyncio.current_task()
    return task is not None and task.uncancel() > 0


def note_of(operation_id: str, error: BaseException) -> str:
    """The note on what is raised that tells of a final save that failed."""
    return (
        f"the last save of {operation_id} failed: {type(error).__name__}: {error}; an earlier checkpoint still stands"
    )


def resume_hint(operation_id: str) -> str:
    """How a person goes on with it."""
    return f"go on with: ktrdr-async resume {operation_id}"
