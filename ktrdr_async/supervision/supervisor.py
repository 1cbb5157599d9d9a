"""The supervisor: the coroutine that consumes one engine, and saves what must not be lost.

    block -> policy -> save -> mailbox -> progress

Every save is awaited on this loop, in a task of its own until it is done, whatever happens to the supervisor meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import anyio
import msgspec

from ktrdr_async.backtesting.checkpoint_builder import Since, at_once, checkpoint_steps, closing_steps, final_steps
from ktrdr_async.backtesting.provenance import prepare_manifests
from ktrdr_async.backtesting.results import BacktestResults, Outcome, RunStatistics
from ktrdr_async.checkpoint.pieces import in_pieces, together
from ktrdr_async.checkpoint.schemas import BacktestCheckpointState, CheckpointType
from ktrdr_async.errors import (
    CancellationError,
    CheckpointCorruptedError,
    CheckpointError,
    CheckpointMismatchError,
    DatabaseError,
    InvalidTransitionError,
    KtrdrError,
    SaveTimeoutError,
    SchemaVersionError,
    StrategyError,
)
from ktrdr_async.operations.lifecycle import Status
from ktrdr_async.supervision.endings import SETTLED, End, Endings, note_of, resume_hint
from ktrdr_async.supervision.holding import watched
from ktrdr_async.supervision.mailbox import Ending, Mailbox, Progress
from ktrdr_async.supervision.shielding import finish

if TYPE_CHECKING:
    from ktrdr_async.backtesting.engine import BacktestingEngine, Block
    from ktrdr_async.checkpoint.policy import CheckpointPolicy
    from ktrdr_async.checkpoint.service import CheckpointService
    from ktrdr_async.operations.bounded import Source
    from ktrdr_async.supervision.descent import Start
    from ktrdr_async.supervision.lag import Watch
    from ktrdr_async.supervision.turns import OperationTurn

logger = logging.getLogger("ktrdr_async.supervision")

COMPLETION_SECONDS = 60.0
MOST_UNSAVED = 500_000  # records, above which a save is due whatever its share: a last one must come in time
_SAVE_SECONDS, _RECORD_SECONDS = 0.005, 5e-6  # what a save is expected to take, and more for each new record of it
_FIRST_BACKOFF, _LONGEST_BACKOFF = 1.0, 30.0  # seconds between tries of a periodic save that failed


class Supervisor:
    """Runs one engine under one claim to one of its ends.

    Args:
        operation_id: the operation.
        engine: not started yet.
        checkpoints: the service that holds the claim.
        policy: when a checkpoint is due.
        turn: the engine's turn.
        mailbox: what others ask for.
        prior: what to go back to where nothing may change.
        statistics: how the run goes; goes on across restarts.
        lag: how late the loop is meanwhile; None: nobody looks.
        alone: nobody else is on the loop.
        last_line: where final saves go; None: the checkpoints' own database.
        throttle: bars a second at most; None: as fast as it goes.
        keep_state: store the state before the closing step with the result.
        transient: errors after which the operation goes on from its checkpoint instead of having failed.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        operation_id: str,
        engine: BacktestingEngine,
        checkpoints: CheckpointService,
        policy: CheckpointPolicy,
        turn: OperationTurn,
        mailbox: Mailbox,
        *,
        prior: End,
        statistics: RunStatistics,
        lag: Watch | None = None,
        alone: bool = False,
        last_line: Source | None = None,
        throttle: float | None = None,
        keep_state: bool = False,
        transient: tuple[type[Exception], ...] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.operation_id = operation_id
        self.statistics = statistics
        self._lag, self._alone = lag, alone
        self.restartable = False  # it ended with a transient error, and still holds its claim
        self.ends = Endings(operation_id, checkpoints, mailbox, statistics, last_line)
        self._transient = transient
        self._engine = engine
        self._checkpoints = checkpoints
        self._policy = policy
        self._turn = turn
        self._mailbox = mailbox
        self._prior = prior
        self._throttle = throttle
        self._keep_state = keep_state
        self._accepted: list[str] = []  # differences under which somebody let it go on before
        self._inherited = False  # what differs from another operation's state was asked for
        self._clock = clock
        self._began = clock()
        self._first_bar = 0
        self._block: Block | None = None
        self._settled = False  # a save found that the operation doesn't run under our claim any more
        self._counted = False  # the statistics hold this run
        self._paced: tuple[float, int] | None = None  # when a throttled run may go on, and from which bar
        self._retry_at: float | None = None
        self._backoff = _FIRST_BACKOFF

    async def run(self, start: Start) -> BacktestResults:
        """Runs from where it begins to an end.

        Raises:
            CancelledError: if this task was cancelled; its checkpoint is durable, or a note says why it isn't.
            CancellationError: if the mailbox or another process asked for it.
            OwnershipLostError: if a newer owner holds the operation; nothing was written.
            Exception: what the strategy raised, with a note that names the bar.
        """
        state = start.state
        if state is not None:
            self._first_bar = state.bar_index + 1
            self._accepted = list(state.accepted_mismatches)
            self._inherited = start.inherited
            self.ends.checkpoint_bar = None if start.inherited else state.bar_index
            before = self.statistics.resumed_from or state.resumed_from  # a restart here may have saved nothing new
            self.statistics.resumed_from = [*before, state.bar_index]
            saved = self._checkpoints.acknowledged.revision  # by all processes together
            self.statistics.checkpoints_saved = max(self.statistics.checkpoints_saved, saved)
        self._policy.start(self._first_bar - 1)
        self._began = self._clock()
        try:
            await self._turn.offload(lambda: prepare_manifests(self._engine))
            async with aclosing(self._engine.run(state, accept=start.accept)) as blocks:
                strategy, named = self._engine.strategy, self.operation_id
                async for block in watched(blocks, self._turn, strategy, self.statistics, named, alone=self._alone):
                    self._block = block
                    if self._told_to_end():  # and the strategy has swallowed it
                        raise asyncio.CancelledError
                    if self._due(block) or (start.inherited and self.ends.checkpoint_bar is None):
                        await self._save(CheckpointType.PERIODIC)
                    if self._mailbox.waiting:
                        await self._answer()
                    if self._throttle is not None:
                        await self._slow_down(block.bar_index, self._throttle)
            self._finish_statistics()
            self._turn.leave()
            closing = await _built(closing_steps(self._engine, self._since()))
            final = await _built(final_steps(self._engine)) if self._keep_state else None
            results, outcome = await self._turn.offload(self._results)
            outcome.final_state = final
        except asyncio.CancelledError as error:
            if self._told_to_end():
                await self.end_cancelled(error)
                raise
            await self._end_failed(failed := _cancelled_itself())
            raise failed from error
        except (SystemExit, KeyboardInterrupt) as error:  # would end the service's loop, and every other operation
            await self._end_failed(failed := StrategyError(f"the strategy's code ended its process: {error!r}"))
            raise failed from error
        except (CheckpointMismatchError, CheckpointCorruptedError, SchemaVersionError) as error:
            await self._hand_back(error)
            raise
        except self._transient as error:
            await self._prepare_restart(error)
            raise
        except Exception as error:
            if not self._settled:
                await self._end_failed(error)
            raise
        finally:
            self._turn.leave()
        return await self._complete(results, outcome, closing)

    @property
    def final_save_error(self) -> BaseException | None:
        """Why its end couldn't be written; None: it was."""
        return self.ends.failed_save

    @property
    def progress(self) -> Progress:
        """Where the run stands."""
        block, bars = self._block, len(self._engine.bars)
        status = Status.RUNNING.value
        if block is None:
            return Progress(
                operation_id=self.operation_id, status=status, bars=bars, checkpoint_bar=self.ends.checkpoint_bar
            )
        elapsed = self._clock() - self._began
        speed = (block.bar_index + 1 - self._first_bar) / elapsed if elapsed > 0 else None
        return Progress(
            operation_id=self.operation_id,
            status=status,
            bar_index=block.bar_index,
            bars=bars,
            timestamp=block.timestamp,
            equity=block.equity,
            trades=block.trades,
            bars_per_second=speed,
            seconds_left=(bars - 1 - block.bar_index) / speed if speed else None,
            checkpoint_bar=self.ends.checkpoint_bar,
            paused=self._mailbox.paused,
        )

    def _all_accepted(self) -> list[str]:
        return [*self._accepted, *([] if self._inherited else self._engine.accepted)]

    def _results(self) -> tuple[BacktestResults, Outcome]:
        """What the run came to, in a thread: digest and figures."""
        results = self._engine.results()
        results.run, results.accepted_mismatches = self.statistics, tuple(self._all_accepted())
        return results, results.outcome()

    def _finish_statistics(self) -> None:
        if not self._counted:
            self._counted = True
            self.statistics.seconds += self._clock() - self._began
            self.statistics.bars_computed += max(0, self._engine.boundary.bar_index + 1 - self._first_bar)
            self.statistics.loop_lag_ms = self._lag.figures() if self._lag is not None else None
            self.statistics.prepare_lag_ms = self._turn.prepare_lag

    def _told_to_end(self) -> bool:
        """Whether this task was cancelled, by the mailbox or from outside; else a CancelledError is the strategy's."""
        task = asyncio.current_task()
        return self._mailbox.ending is not None or (task is not None and task.cancelling() > 0)

    # Checkpoints while it runs.

    def _due(self, block: Block) -> bool:
        if self._retry_at is not None:
            return self._clock() >= self._retry_at
        saved = self._checkpoints.acknowledged
        new = block.fills - saved.ledger + len(self._engine.portfolio.recorded) - saved.recorded
        self._policy.expect(_SAVE_SECONDS + _RECORD_SECONDS * new)
        return self._policy.should_checkpoint(block.bar_index, force=new > MOST_UNSAVED)

    async def _state(self) -> BacktestCheckpointState:
        """The last boundary's, in pieces: the engine stands, and the turn is others' meanwhile."""
        return self._signed(await _built(self._steps()))

    def _steps(self) -> Iterator[BacktestCheckpointState | None]:
        bar = self._engine.boundary.bar_index
        return checkpoint_steps(self._engine, bar, int(self._engine.bars.timestamps[bar]), since=self._since())

    def _signed(self, state: BacktestCheckpointState) -> BacktestCheckpointState:
        state.resumed_from, state.accepted_mismatches = list(self.statistics.resumed_from), self._all_accepted()
        return state

    def _since(self) -> Since:
        at = self._checkpoints.acknowledged
        return Since(at.ledger, at.samples, at.recorded)

    async def _save(self, kind: CheckpointType) -> bool:
        """A save at a boundary. One that fails doesn't end the run: it is counted and tried again after a while."""
        bar = self._engine.boundary.bar_index
        started = self._clock()  # making the state is a part of what a save costs
        self._turn.leave()
        state = await self._state()
        done = await finish(
            lambda: self._checkpoints.save_checkpoint(self.operation_id, kind, state), patience=self.ends.patience
        )
        self.ends.hurried = done.given_up
        seconds = self._clock() - started
        self.statistics.save_seconds += seconds
        if done.error is None:
            self.ends.checkpoint_bar = bar
            self.statistics.checkpoints_saved += 1
            self._policy.record_checkpoint(bar, seconds)
            self._retry_at, self._backoff = None, _FIRST_BACKOFF
        elif isinstance(done.error, SETTLED):
            self._settled, self.ends.owed = True, None
            raise done.error
        elif not isinstance(done.error, Exception):
            raise done.error
        else:
            self.statistics.checkpoints_failed += 1
            self._retry_at = self._clock() + self._backoff
            logger.warning(
                "%s: the checkpoint at bar %d failed (%s: %s); next try in %.0f s",
                self.operation_id, bar, type(done.error).__name__, done.error, self._backoff,
            )  # fmt: skip
            self._backoff = min(2 * self._backoff, _LONGEST_BACKOFF)
        if done.cancelled is not None:
            raise done.cancelled
        await anyio.lowlevel.checkpoint_if_cancelled()
        await self._turn.enter()
        return done.error is None

    async def _answer(self) -> None:
        """What the mailbox asks for at a boundary."""
        box, bar = self._mailbox, self._engine.boundary.bar_index
        while box.waiting:
            asked = list(box.checkpoint_requests)  # they stay in the box, which answers them if the save doesn't return
            saved = self.ends.checkpoint_bar == bar or await self._save(CheckpointType.PERIODIC)
            failed = KtrdrError(f"{self.operation_id}: the checkpoint failed", hint="see the log")
            box.answer(asked, bar if saved else failed)
            if box.paused and not box.checkpoint_requests:
                self._turn.leave()
                await box.until_news()
                await self._turn.enter()

    async def _slow_down(self, bar_index: int, throttle: float) -> None:
        now = self._clock()
        at, bar = self._paced or (self._began, self._first_bar - 1)
        self._paced = max(now, at + (bar_index - bar) / throttle), bar_index  # what was lost isn't made good for
        if self._paced[0] > now:
            self._turn.leave()
            await anyio.sleep(self._paced[0] - now)
            await self._turn.enter()

    # Ends.

    async def abandon(self) -> None:
        """Saves the last boundary of a run whose task doesn't end, as its strategy lets no cancellation through."""

        async def build() -> BacktestCheckpointState:
            return self._signed(at_once(self._steps()))  # not in pieces: this engine may move meanwhile

        state = build if self._engine.boundary.bar_index >= 0 else None
        await self.ends.write(End(Status.INTERRUPTED), CheckpointType.SHUTDOWN, state, CancellationError("", ""))

    async def _complete(
        self, results: BacktestResults, outcome: Outcome, closing: BacktestCheckpointState
    ) -> BacktestResults:
        """Result stored and checkpoint deleted, in one statement; a cancel that was committed before it wins."""
        before = self._checkpoints.acknowledged
        done = await finish(
            lambda: self._checkpoints.finish(
                Status.COMPLETED,
                state=closing,
                result=msgspec.to_builtins(outcome),
                result_digest=outcome.digest,
                deadline=COMPLETION_SECONDS,
            ),
            patience=self.ends.patience,
        )
        self.ends.hurried = done.given_up
        error, cancelled = done.error, done.cancelled
        if error is not None:
            late = await self._end_incomplete(error, done.given_up)
            other = None if isinstance(error, SETTLED) else self.ends.failed_save
            if isinstance(other, InvalidTransitionError) or (other and self._checkpoints.acknowledged != before):
                # The completion, whose answer was lost, has landed after all: no other end could be written.
                error = self.ends.owed = self.ends.failed_save = None
            cancelled = late or cancelled
        else:
            self.ends.owed = None
        if cancelled is not None:
            if error is not None:
                cancelled.add_note(note_of(self.operation_id, error))
            raised = self.ends.translated(cancelled)
            if isinstance(raised, asyncio.CancelledError):
                raise raised
        if error is not None:
            raise error
        return results  # also where the mailbox asked for an end too late

    async def _end_incomplete(self, error: BaseException, given_up: bool) -> asyncio.CancelledError | None:
        """What is written where the completion couldn't be, or was given up as somebody cancelled."""
        leaving = self._mailbox.ending is Ending.SHUTDOWN
        if isinstance(error, CancellationError) or (given_up and not leaving):
            return await self._write_end(End(Status.CANCELLED), CheckpointType.CANCELLATION, error)
        if isinstance(error, SETTLED):
            self.ends.owed = None
            return None
        if given_up or isinstance(error, SaveTimeoutError | DatabaseError) or not isinstance(error, Exception):
            return await self._write_end(End(Status.INTERRUPTED), CheckpointType.SHUTDOWN, error)
        return await self._write_end(End(Status.FAILED, self._failure(error)), CheckpointType.FAILURE, error)

    async def end_cancelled(self, error: asyncio.CancelledError) -> None:
        """A cancellation of this task: why it came decides what is written and what is raised."""
        why = self._mailbox.ending
        self._finish_statistics()
        if why is Ending.LOST:
            self.ends.owed = None
            error.add_note(f"{self.operation_id} wasn't saved: OwnershipLostError: a newer owner holds it")
        elif why is Ending.SHUTDOWN:
            await self._write_end(End(Status.INTERRUPTED), CheckpointType.SHUTDOWN, error)
        else:
            await self._write_end(End(Status.CANCELLED), CheckpointType.CANCELLATION, error)
        translated = self.ends.translated(error)
        if translated is not error:
            raise translated from None

    async def _prepare_restart(self, error: Exception) -> None:
        """After a transient error: its last boundary is saved, and the claim is kept."""
        self._finish_statistics()
        try:
            if self._engine.boundary.bar_index > (-1 if self.ends.checkpoint_bar is None else self.ends.checkpoint_bar):
                await self._save(CheckpointType.FAILURE)
        except asyncio.CancelledError as cancelled:
            cancelled.add_note(f"meanwhile: {type(error).__name__}: {error}")
            await self.end_cancelled(cancelled)
            raise
        except Exception as broken:
            if not self._settled:
                await self._end_failed(broken)
            raise
        self.restartable = True

    def _failure(self, error: Exception) -> dict[str, Any]:
        return {
            "type": type(error).__name__,
            "message": str(error),
            "bar": self._engine.failed_bar,
            "notes": list(getattr(error, "__notes__", [])),
        }

    async def _end_failed(self, error: Exception) -> None:
        self._finish_statistics()
        cancelled = await self._write_end(End(Status.FAILED, self._failure(error)), CheckpointType.FAILURE, error)
        error.add_note(resume_hint(self.operation_id))
        if cancelled is not None:
            raised = self.ends.translated(cancelled)
            if isinstance(raised, asyncio.CancelledError):  # what the mailbox asked for came too late
                raised.add_note(f"meanwhile the operation failed: {type(error).__name__}: {error}")
                raise raised

    async def _hand_back(self, error: CheckpointError | SchemaVersionError) -> None:
        """The checkpoint isn't for this code or these data: the operation goes back as it was."""
        if isinstance(error, CheckpointError):
            error.operation_id = self.operation_id
        cancelled = await self.ends.write(self._prior, None, None, error)
        if cancelled is not None:
            raised = self.ends.translated(cancelled)
            if isinstance(raised, asyncio.CancelledError):
                raised.add_note(f"meanwhile: {type(error).__name__}: {error}")
                raise raised

    async def _write_end(self, end: End, kind: CheckpointType, error: BaseException) -> asyncio.CancelledError | None:
        """Writes status and last boundary in one statement. What goes wrong becomes a note on `error`."""
        self._turn.leave()
        return await self.ends.write(end, kind, self._state if self._engine.boundary.bar_index >= 0 else None, error)


async def _built(steps: Iterator[BacktestCheckpointState | None]) -> BacktestCheckpointState:
    (state,) = await in_pieces(together(steps))
    return state


def _cancelled_itself() -> StrategyError:
    return StrategyError("something that the strategy awaited was cancelled; nobody has cancelled the operation")
