"""An actor: one operation's task in this worker, from its request or its row to one of its ends."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
from typing import TYPE_CHECKING

import anyio
import msgspec

from ktrdr_async.backtesting.engine import BacktestingEngine
from ktrdr_async.backtesting.provenance import anything, nothing
from ktrdr_async.backtesting.request import BacktestRequest
from ktrdr_async.backtesting.results import BacktestResults, RunStatistics
from ktrdr_async.backtesting.tiers import load_compiled, pays
from ktrdr_async.checkpoint.policy import CheckpointPolicy
from ktrdr_async.checkpoint.service import CheckpointService
from ktrdr_async.errors import (
    AlreadyClaimedError,
    CancellationError,
    InvalidTransitionError,
    KtrdrError,
    OwnershipLostError,
    StrategyError,
)
from ktrdr_async.operations.lifecycle import Claim, Operation, Status
from ktrdr_async.supervision.descent import Descent, Start, start_of
from ktrdr_async.supervision.endings import SETTLED, End, Endings, resume_hint
from ktrdr_async.supervision.heart import Running
from ktrdr_async.supervision.isolation import Elsewhere, Isolate
from ktrdr_async.supervision.jobs import Job, Permissions, resolve
from ktrdr_async.supervision.mailbox import Ending, Mailbox, Progress
from ktrdr_async.supervision.shielding import finish
from ktrdr_async.supervision.stored import rebuild
from ktrdr_async.supervision.supervisor import Supervisor

if TYPE_CHECKING:
    from ktrdr_async.market import Bars
    from ktrdr_async.strategies.base import AnyStrategy
    from ktrdr_async.supervision.lag import Watch
    from ktrdr_async.supervision.turns import OperationTurn
    from ktrdr_async.supervision.worker import BacktestWorker

logger = logging.getLogger("ktrdr_async.supervision")

_FIRST_RESTART, _LONGEST_RESTART = 0.5, 30.0  # seconds before an operation goes on after a transient error


class Plan(msgspec.Struct, kw_only=True):
    """What an actor was asked to do."""

    request: BacktestRequest | None  # None: the stored one
    permissions: Permissions
    bars: Bars | None = None
    strategy: AnyStrategy | None = None
    policy: CheckpointPolicy | None = None
    throttle: float | None = None
    take_over: bool = False
    accept_mismatch: bool = False  # go on although data, code or numbers differ, and remember it
    keep_state: bool = False
    isolate: Isolate | None = None
    descent: Descent | None = None


class Claimed(msgspec.Struct):
    """A claim, and the service that writes under it."""

    claim: Claim
    checkpoints: CheckpointService
    paused: bool = False  # what the row says


class Actor:
    """Owns one operation's task, mailbox and supervisor. One that dies takes no other with it."""

    def __init__(self, worker: BacktestWorker, operation_id: str, plan: Plan, turn: OperationTurn) -> None:
        self.operation_id = operation_id
        self.plan = plan
        self.mailbox = Mailbox()
        self.stored = asyncio.Event()  # the row is committed
        self.claimed = asyncio.Event()  # and claimed
        self.claiming = False  # a claim was sent: what the row says of this process may be its doing
        self._worker = worker
        self._turn = turn
        self._supervisor: Supervisor | None = None
        self._failed_save: BaseException | None = None
        self._notes: list[str] = []  # on what ended it; asyncio gives a cancelled task's own error only once
        self.task: asyncio.Task[BacktestResults] = asyncio.create_task(self._live(), name=f"backtest {operation_id}")
        self.mailbox.attach(self.task)
        self.task.add_done_callback(self._close)

    def _close(self, task: asyncio.Task[BacktestResults]) -> None:
        # Reading the exception also tells asyncio that somebody knows of it; handles and the log tell people.
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self.mailbox.close(error)
        elif task.cancelled():
            self.mailbox.close(self._cancellation())
        else:
            named = self.operation_id
            self.mailbox.close(
                InvalidTransitionError(named, f"{named} is completed: there is nothing to save any more")
            )
        if error is not None and not isinstance(error, CancellationError):
            logger.info("%s ended: %s: %s", self.operation_id, type(error).__name__, error)

    def _cancellation(self) -> KtrdrError:
        named, why = self.operation_id, self.mailbox.ending
        error: KtrdrError
        if why is Ending.LOST:
            error = OwnershipLostError(named, f"{named}: a newer owner holds it; nothing was written")
        elif why is not None:
            reason = "shut down with its worker" if why is Ending.SHUTDOWN else "cancelled on request"
            error = CancellationError(named, f"{named} was {reason}", hint=resume_hint(named))
        else:
            error = CancellationError(named, f"{named}: its task was cancelled", hint=resume_hint(named))
        for note in self._notes:
            error.add_note(note)
        return error

    # For handles.

    def end(self, why: Ending) -> None:
        """Asks it to end."""
        self.mailbox.end(why)

    def outcome(self) -> BacktestResults:
        """What it came to; raises what ended it."""
        if self.task.cancelled():
            raise self._cancellation()
        return self.task.result()

    def notes(self) -> list[str]:
        """What was noted on the error that ended it: a save that failed, for example."""
        return list(self._notes)

    def raise_failed_save(self) -> None:
        """After a cancel: raises where the final save failed."""
        if self._failed_save is not None and self.task.done() and (self.task.cancelled() or self.task.exception()):
            raise self._failed_save

    async def abandon(self) -> None:
        """Saves what can be saved of a run that doesn't end; its task is left behind."""
        logger.error(
            "%s doesn't end: its strategy lets no cancellation through, or a thread of it goes on; its last boundary "
            "is saved, and its task left behind",
            self.operation_id,
        )
        if self._supervisor is not None:
            await self._supervisor.abandon()

    def progress(self) -> Progress:
        """Where it stands."""
        supervisor = self._supervisor
        now = Progress(operation_id=self.operation_id, status="pending") if supervisor is None else supervisor.progress
        if not self.task.done():
            return now
        ended = Status.COMPLETED
        if self.task.cancelled() or isinstance(self.task.exception(), CancellationError):
            ended = self._status_of_cancel()
        elif isinstance(self.task.exception(), OwnershipLostError | AlreadyClaimedError):
            ended = Status.RUNNING  # elsewhere
        elif self.task.exception() is not None:
            ended = Status.FAILED
        return msgspec.structs.replace(now, status=ended.value)

    def _status_of_cancel(self) -> Status:
        return Status.INTERRUPTED if self.mailbox.ending is Ending.SHUTDOWN else Status.CANCELLED

    # Its life.

    async def _live(self) -> BacktestResults:
        try:
            return await self._run()
        except (
            SystemExit,
            KeyboardInterrupt,
        ) as error:  # of a strategy's module or thread
            raise StrategyError(f"the strategy's code ended its process: {error!r}") from error
        except BaseException as error:
            self._notes = list(getattr(error, "__notes__", []))
            raise

    async def _run(self) -> BacktestResults:
        worker = self._worker
        waited: Operation | None = None
        if worker._slots.locked():
            # Others see it, and may cancel it, while it waits. Its bars aren't kept: thousands may wait here.
            waited = (await self._look())[1]
            if waited.status is Status.COMPLETED:
                return await rebuild(worker.database, waited, self.plan.bars, self.plan.permissions)
            await self._wait_for_slot(waited)
        else:
            await worker._slots.acquire()
        try:
            job, found = await self._look()
            if job is None or found.status is Status.COMPLETED:
                return await rebuild(worker.database, found, job.bars if job else self.plan.bars, self.plan.permissions)
            claimed = await self._claim(waited or found)
            if claimed is None:
                row = await worker.operations.get(self.operation_id)
                return await rebuild(worker.database, row, job.bars, self.plan.permissions)
            return await self._own(job, claimed, found)
        finally:
            worker._slots.release()

    async def _look(self) -> tuple[Job | None, Operation]:
        """What is to run, and its row, which is made if need be; no job for a completed one that is resumed."""
        plan, row, request = self.plan, None, self.plan.request
        if request is None:
            row = await self._worker.operations.get(self.operation_id)
            self.stored.set()
            if row.status is Status.COMPLETED:
                return None, row
            request = BacktestRequest.from_dict(row.request)
        await self._turn.once()
        job = await resolve(request, plan.bars, plan.strategy, plan.permissions)
        if plan.isolate is not None:
            self._turn.elsewhere = Elsewhere(job.strategy)
        return job, row or await self._create(job.request)

    async def _create(self, request: BacktestRequest) -> Operation:
        """Makes the row, or finds it. A cancellation that came meanwhile writes `cancelled`."""
        kind, parent = (plan.kind, plan.parent) if (plan := self.plan.descent) else ("backtesting", None)
        operations = self._worker.operations
        done = await finish(lambda: operations.create(self.operation_id, request.to_dict(), type=kind, parent=parent))
        if done.cancelled is not None:
            if done.result is not None:
                await self._end_unclaimed(done.result, done.cancelled)
            raise done.cancelled
        if done.error is not None:
            raise done.error
        assert done.result is not None  # noqa: S101 - no error, so there is one
        self.stored.set()
        return done.result

    async def _wait_for_slot(self, found: Operation) -> None:
        try:
            await self._worker._slots.acquire()
        except asyncio.CancelledError as error:
            await self._end_unclaimed(found, error)
            raise

    async def _end_unclaimed(self, found: Operation, error: asyncio.CancelledError) -> None:
        """Ends what waited to run. Of a worker that leaves it becomes `interrupted`, for the next one to take up."""
        operations, leaving = self._worker.operations, self.mailbox.ending is Ending.SHUTDOWN
        if found.status is Status.RUNNING or (leaving and found.status is not Status.PENDING):
            return

        async def end() -> None:
            with contextlib.suppress(InvalidTransitionError, AlreadyClaimedError):  # somebody else has it by now
                if leaving:
                    claim = await operations.claim(self.operation_id, owner=self._worker.owner)
                    await CheckpointService(self._worker.database, claim).finish(Status.INTERRUPTED, state=None)
                else:
                    await operations.cancel(self.operation_id, epoch=found.epoch)

        done = await finish(end)
        if done.error is not None:
            error.add_note(f"{self.operation_id} couldn't be marked as ended: {done.error}")

    async def _claim(self, found: Operation) -> Claimed | None:
        """Claims it; None where it was completed meanwhile. A cancellation that came meanwhile writes `cancelled`."""
        worker, named = self._worker, self.operation_id
        operations = worker.operations
        claim: Claim | None = None

        async def claim_and_look() -> Operation:
            nonlocal claim
            if claim is None:
                await worker.debts.pay_one(named)  # what an earlier run of it here couldn't write
                left_over = worker.is_left_over(await operations.get(named))
                take_over, self.claiming = self.plan.take_over or left_over, True
                claim = await operations.claim(named, owner=worker.owner, take_over=take_over)
            return await operations.get(named)

        done = await finish(claim_and_look)
        if claim is None:
            if done.cancelled is not None:
                await self._end_unclaimed(found, done.cancelled)
                raise done.cancelled
            assert done.error is not None  # noqa: S101 - there is no claim
            if isinstance(done.error, InvalidTransitionError) and await self._is_completed():
                return None
            raise done.error
        claimed = Claimed(claim, CheckpointService(worker.database, claim))
        ending: BaseException | None = done.cancelled or done.error
        row = done.result
        if row is not None and claim.epoch == found.epoch + 1 and found.epoch == row.cancel_epoch != found.cancel_epoch:
            # Somebody cancelled it after it was found and before it was claimed, and a claim voids that.
            ending = ending or CancellationError(named, f"{named} was cancelled before it was claimed")
        if ending is not None:
            failed = done.cancelled is None and done.error is not None
            end = End(Status.INTERRUPTED if failed else self._status_of_cancel())
            await self._give_back(claimed, end, ending)
            raise ending
        assert row is not None  # noqa: S101 - no error, so there is one
        claimed.paused = row.paused
        self.claimed.set()
        return claimed

    async def _is_completed(self) -> bool:
        return (await self._worker.operations.get(self.operation_id)).status is Status.COMPLETED

    async def _give_back(self, claimed: Claimed, end: End, error: BaseException) -> None:
        """Ends what is claimed and has nothing new to save; what goes wrong becomes a note on `error`."""
        ends = Endings(self.operation_id, claimed.checkpoints, self.mailbox, RunStatistics(), self._worker.last_line)
        await ends.write(end, None, None, error)
        self._failed_save = ends.failed_save
        if ends.owed is not None:
            self._worker.debts.add(self.operation_id, claimed.checkpoints, ends.owed)

    async def _own(self, job: Job, claimed: Claimed, found: Operation) -> BacktestResults:
        """Runs what is claimed, and sees to it that its end is written, now or later."""
        worker, named = self._worker, self.operation_id
        prior = End(Status.INTERRUPTED)
        if found.status in (Status.CANCELLED, Status.FAILED):
            failure = found.error or {} if found.status is Status.FAILED else None
            prior = End(found.status, failure)
        running = worker._running[named] = Running(claimed.claim, self.mailbox, self.progress, claimed.paused)
        if claimed.paused:
            self.mailbox.pause()
        try:
            with self._turn.lag.watch() as watch:
                return await self._supervise(job, claimed, prior, found, watch)
        finally:
            if worker._running.get(named) is running:
                del worker._running[named]
            if self._supervisor is not None:
                self._failed_save = self._failed_save or self._supervisor.final_save_error
                if self._supervisor.ends.owed is not None:
                    worker.debts.add(named, claimed.checkpoints, self._supervisor.ends.owed)

    async def _supervise(self, job: Job, claimed: Claimed, prior: End, found: Operation, lag: Watch) -> BacktestResults:
        """Runs the engine to an end; after a transient error again from the checkpoint, a bounded number of times."""
        worker, plan = self._worker, self.plan
        statistics = RunStatistics()
        backoff = _FIRST_RESTART
        for restart in range(worker._max_restarts + 1):
            start = await self._load(claimed, prior, found)
            if pays(worker.tier, len(job.bars) * job.bars.k, alone=worker.alone):
                await self._turn.offload(load_compiled)
            try:
                engine = BacktestingEngine(job.request, job.bars, job.strategy, turn=self._turn, tier=worker.tier)
            except Exception as error:
                failure = {"type": type(error).__name__, "message": str(error)}
                await self._give_back(claimed, End(Status.FAILED, failure), error)
                raise
            self._supervisor = supervisor = Supervisor(
                self.operation_id,
                engine,
                claimed.checkpoints,
                copy.copy(plan.policy) if plan.policy is not None else CheckpointPolicy(),
                self._turn,
                self.mailbox,
                prior=prior,
                last_line=worker.last_line,
                statistics=statistics,
                lag=lag,
                alone=worker.alone,
                throttle=plan.throttle,
                keep_state=plan.keep_state,
                transient=worker._transient if restart < worker._max_restarts else (),
            )
            if worker.heart is not None:
                worker.heart.wake()
            try:
                return await supervisor.run(start)
            except worker._transient as error:
                if not supervisor.restartable:
                    raise
                logger.warning(
                    "%s: %s: %s; going on from its checkpoint in %.1f s",
                    self.operation_id,
                    type(error).__name__,
                    error,
                    backoff,
                )
                await self._pause(supervisor, backoff)
                backoff = min(2 * backoff, _LONGEST_RESTART)
            prior = End(Status.INTERRUPTED)
        raise AssertionError("the last restart returns or raises")

    async def _pause(self, supervisor: Supervisor, seconds: float) -> None:
        try:
            await anyio.sleep(seconds)
        except asyncio.CancelledError as error:
            await supervisor.end_cancelled(error)
            raise

    async def _load(self, claimed: Claimed, prior: End, found: Operation) -> Start:
        """The checkpoint to go on from; where it can't be loaded or this task is cancelled, the operation goes back."""
        try:
            state = await claimed.checkpoints.load_checkpoint(self.operation_id)
            if state is None:
                return await start_of(self._worker.database, self._worker.operations, found)
            return Start(state, anything if self.plan.accept_mismatch else nothing)
        except BaseException as error:
            if self._supervisor is not None:
                self._supervisor.ends.owed = None  # what is to be written is decided here
            end = prior
            if isinstance(error, asyncio.CancelledError) and self.mailbox.ending is not Ending.SHUTDOWN:
                end = End(Status.CANCELLED)
            if not isinstance(error, SETTLED) and self.mailbox.ending is not Ending.LOST:
                await self._give_back(claimed, end, error)
            raise
