"""An actor: one operation's task in this worker, from its request or its row to one of its ends."""

from __future__ import annotations

import asyncio
import copy
import logging
from typing import TYPE_CHECKING

import anyio
import msgspec

from ktrdr_async.backtesting.engine import BacktestingEngine
from ktrdr_async.backtesting.request import BacktestRequest
from ktrdr_async.backtesting.results import BacktestResults, RunStatistics
from ktrdr_async.checkpoint.policy import CheckpointPolicy
from ktrdr_async.checkpoint.service import CheckpointService
from ktrdr_async.errors import CancellationError, OwnershipLostError
from ktrdr_async.operations.lifecycle import Claim, Operation, Status
from ktrdr_async.supervision.heart import Running
from ktrdr_async.supervision.jobs import Job, Permissions, resolve
from ktrdr_async.supervision.mailbox import Ending, Mailbox, Progress
from ktrdr_async.supervision.shielding import finish
from ktrdr_async.supervision.supervisor import FINAL_SAVE_SECONDS, Supervisor

if TYPE_CHECKING:
    from ktrdr_async.checkpoint.schemas import BacktestCheckpointState
    from ktrdr_async.market import Bars
    from ktrdr_async.strategies.base import AnyStrategy
    from ktrdr_async.supervision.turns import OperationTurn
    from ktrdr_async.supervision.worker import BacktestWorker

logger = logging.getLogger("ktrdr_async.supervision")

_FIRST_RESTART, _LONGEST_RESTART = 0.5, 30.0  # seconds before an operation goes on after a transient error


class Plan(msgspec.Struct, kw_only=True):
    """What an actor was asked to do."""

    request: BacktestRequest | None  # None: the stored one
    bars: Bars | None
    strategy: AnyStrategy | None
    permissions: Permissions
    policy: CheckpointPolicy | None
    throttle: float | None
    take_over: bool = False


class Actor:
    """Owns one operation's task, mailbox and supervisor. One that dies takes no other with it."""

    def __init__(self, worker: BacktestWorker, operation_id: str, plan: Plan, turn: OperationTurn) -> None:
        self.operation_id = operation_id
        self.plan = plan
        self.mailbox = Mailbox()
        self.claimed = asyncio.Event()  # the row is committed and claimed
        self._worker = worker
        self._turn = turn
        self._supervisor: Supervisor | None = None
        self._ended: Status | None = None
        self.task: asyncio.Task[BacktestResults] = asyncio.create_task(self._live(), name=f"backtest {operation_id}")
        self.mailbox.attach(self.task)
        self.task.add_done_callback(self._close)

    def _close(self, task: asyncio.Task[BacktestResults]) -> None:
        # Reading the exception also tells asyncio that somebody knows of it; handles and the log tell people.
        error = None if task.cancelled() else task.exception()
        self.mailbox.close(error)
        if error is not None and not isinstance(error, CancellationError):
            logger.info("%s ended: %s: %s", self.operation_id, type(error).__name__, error)

    # For handles.

    def end(self, why: Ending) -> None:
        """Asks it to end."""
        self.mailbox.end(why)

    def outcome(self) -> BacktestResults:
        """What it came to; raises what ended it."""
        if self.task.cancelled():
            error = CancellationError(self.operation_id, f"{self.operation_id}: its task was cancelled")
            for note in self.notes():
                error.add_note(note)
            raise error
        return self.task.result()

    def notes(self) -> list[str]:
        """What was noted on the error that ended it: a save that failed, for example."""
        if not self.task.done():
            return []
        try:
            self.task.result()
        except BaseException as error:
            return list(getattr(error, "__notes__", []))
        return []

    def raise_failed_save(self) -> None:
        """After a cancel: raises where the final save failed."""
        if self.notes() and self._supervisor is not None and self._supervisor.final_save_error is not None:
            raise self._supervisor.final_save_error

    def progress(self) -> Progress:
        """Where it stands."""
        supervisor = self._supervisor
        now = Progress(operation_id=self.operation_id, status="pending") if supervisor is None else supervisor.progress
        if not self.task.done():
            return now
        ended = Status.COMPLETED
        if self.task.cancelled():
            ended = Status.CANCELLED
        elif (error := self.task.exception()) is not None:
            ended = Status.FAILED
            if isinstance(error, CancellationError):
                ended = Status.INTERRUPTED if self.mailbox.ending is Ending.SHUTDOWN else Status.CANCELLED
        return msgspec.structs.replace(now, status=ended.value)

    # Its life.

    async def _live(self) -> BacktestResults:
        worker, plan = self._worker, self.plan
        async with worker._slots:
            row: Operation | None = None
            request = plan.request
            if request is None:
                row = await worker.operations.get(self.operation_id)
                if row.status is Status.COMPLETED:
                    return await worker.rebuild(row, plan.bars, plan.permissions)
                request = BacktestRequest.from_dict(row.request)
            job = await resolve(request, plan.bars, plan.strategy, plan.permissions)
            claimed = await self._begin(job, row)
            if isinstance(claimed, Operation):
                return await worker.rebuild(claimed, job.bars, plan.permissions)
            claim, prior = claimed
            running = Running(claim, self.mailbox, self.progress)
            worker._running[self.operation_id] = running
            try:
                return await self._supervise(job, claim, prior)
            finally:
                worker._running.pop(self.operation_id, None)

    async def _begin(self, job: Job, row: Operation | None) -> Operation | tuple[Claim, Status]:
        """Creates and claims; a cancellation that came meanwhile writes `cancelled`. A completed operation as it is."""
        operations = self._worker.operations

        async def create_and_claim() -> Operation | tuple[Claim, Status]:
            found = row or await operations.create(self.operation_id, job.request.to_dict())
            if found.status is Status.COMPLETED:
                return found
            claim = await operations.claim(self.operation_id, owner=self._worker.owner, take_over=self.plan.take_over)
            prior = found.status if found.status in (Status.CANCELLED, Status.FAILED) else Status.INTERRUPTED
            return claim, prior

        done = await finish(create_and_claim)
        if done.cancelled is not None:
            if isinstance(done.result, tuple):
                claim = done.result[0]
                service = CheckpointService(self._worker.database, claim)
                status = Status.INTERRUPTED if self.mailbox.ending is Ending.SHUTDOWN else Status.CANCELLED
                ended = await finish(lambda: service.finish(status, state=None, deadline=FINAL_SAVE_SECONDS))
                if ended.error is not None:
                    done.cancelled.add_note(f"{self.operation_id} couldn't be marked {status.value}: {ended.error}")
            raise done.cancelled
        if done.error is not None:
            raise done.error
        assert done.result is not None  # noqa: S101 - no error, so there is one
        self.claimed.set()
        return done.result

    async def _supervise(self, job: Job, claim: Claim, prior: Status) -> BacktestResults:
        """Runs the engine to an end; after a transient error again from the checkpoint, a bounded number of times."""
        worker, plan = self._worker, self.plan
        checkpoints = CheckpointService(worker.database, claim)
        statistics = RunStatistics()
        backoff = _FIRST_RESTART
        for restart in range(worker._max_restarts + 1):
            state = await self._load(checkpoints, prior)
            engine = BacktestingEngine(job.request, job.bars, job.strategy, turn=self._turn)
            self._supervisor = Supervisor(
                self.operation_id,
                engine,
                checkpoints,
                copy.copy(plan.policy) if plan.policy is not None else CheckpointPolicy(),
                self._turn,
                self.mailbox,
                prior=prior,
                last_line=worker.last_line,
                statistics=statistics,
                throttle=plan.throttle,
                transient=worker._transient if restart < worker._max_restarts else (),
            )
            try:
                return await self._supervisor.run(state)
            except worker._transient as error:
                if not self._supervisor.restartable:
                    raise
                logger.warning(
                    "%s: %s: %s; going on from its checkpoint in %.1f s",
                    self.operation_id,
                    type(error).__name__,
                    error,
                    backoff,
                )
                await self._pause(checkpoints, backoff)
                backoff = min(2 * backoff, _LONGEST_RESTART)
        raise AssertionError("the last restart returns or raises")

    async def _pause(self, checkpoints: CheckpointService, seconds: float) -> None:
        try:
            await anyio.sleep(seconds)
        except asyncio.CancelledError as error:
            assert self._supervisor is not None  # noqa: S101 - it has just run
            await self._supervisor.end_cancelled(error)
            raise

    async def _load(self, checkpoints: CheckpointService, prior: Status) -> BacktestCheckpointState | None:
        """The checkpoint to go on from; where it can't be loaded or this task is cancelled, the operation goes back."""
        done = await finish(lambda: checkpoints.load_checkpoint(self.operation_id))
        if done.cancelled is None and done.error is None:
            return done.result
        error = done.cancelled or done.error
        assert error is not None  # noqa: S101 - one of the two is there
        status = prior
        if done.cancelled is not None and self.mailbox.ending is not Ending.SHUTDOWN:
            status = Status.CANCELLED
        if not isinstance(error, OwnershipLostError):
            ended = await finish(lambda: checkpoints.finish(status, state=None, deadline=FINAL_SAVE_SECONDS))
            if ended.error is not None:
                error.add_note(f"{self.operation_id} couldn't be handed back: {ended.error}")
        raise error
