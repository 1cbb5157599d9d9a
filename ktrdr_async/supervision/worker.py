"""BacktestWorker, what services import: hundreds of operations on the caller's own loop; each verb takes an id."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack
from weakref import WeakSet

import anyio

from ktrdr_async.backtesting.request import BacktestRequest
from ktrdr_async.backtesting.results import BacktestResults
from ktrdr_async.backtesting.tiers import TierName, checked_tier, load_compiled, pays
from ktrdr_async.checkpoint.service import CheckpointService
from ktrdr_async.errors import (
    InputError,
    InvalidTransitionError,
    OperationConflictError,
    ParameterError,
)
from ktrdr_async.operations.lifecycle import Operation, Owner, Status, is_alive
from ktrdr_async.operations.service import OperationsService, validated_id
from ktrdr_async.storage.database import Database
from ktrdr_async.supervision.actor import Actor, Plan
from ktrdr_async.supervision.debts import Debts
from ktrdr_async.supervision.descent import EXTENSION, FORK, descend
from ktrdr_async.supervision.handle import OperationHandle as OperationHandle
from ktrdr_async.supervision.heart import Heart, LastLine, Running
from ktrdr_async.supervision.isolation import Isolate, checked_isolate
from ktrdr_async.supervision.jobs import Permissions
from ktrdr_async.supervision.mailbox import Ending, Progress
from ktrdr_async.supervision.shielding import finish_or_raise, in_thread, until_done
from ktrdr_async.supervision.stored import progress_of, rebuild
from ktrdr_async.supervision.turns import Turns
from ktrdr_async.supervision.warming import warm_up

if TYPE_CHECKING:
    import asyncpg

    from ktrdr_async.checkpoint.policy import CheckpointPolicy
    from ktrdr_async.market import Bars
    from ktrdr_async.strategies.base import AnyStrategy

logger = logging.getLogger("ktrdr_async.supervision")

POLL_SECONDS = 0.25
ABANDON_SECONDS = 2.0  # for saving what a task that doesn't end has left

_open_workers: WeakSet[BacktestWorker] = WeakSet()


class RunOptions(TypedDict, total=False):
    """What every verb takes that runs something: each may be left out."""

    bars: Bars | None  # the bars, where the request's data name none
    strategy: AnyStrategy | None  # the strategy, where it isn't looked up by name
    policy: CheckpointPolicy | None  # when to checkpoint; None: the default policy
    throttle: float | None  # bars a second at most
    keep_state: bool  # store the state before the closing step with the result, so that it can be extended
    isolate: Isolate | None  # "process": `prepare`, or the targets, are computed in another process


class ResumeOptions(RunOptions, total=False):
    """What `resume` takes as well."""

    take_over: bool  # claim it although its owner seems to be alive
    accept_mismatch: bool  # go on although data, code or numbers differ; the result remembers it for ever


class BacktestWorker:
    """Runs operations on this loop; made by `open`. Every verb takes an id and works from any process."""

    def __init__(
        self,
        database: Database,
        *,
        allow: Sequence[str],
        data_roots: Sequence[str | Path],
        max_operations: int,
        shutdown_seconds: float,
        loop_share: float,
        max_restarts: int,
        transient: tuple[type[Exception], ...],
        tier: TierName,
        alone: bool,
    ) -> None:
        self.database = database
        self.operations = OperationsService(database)
        self._allow = tuple(allow)
        self._roots = None if database.embedded else tuple(str(root) for root in data_roots)
        self._shutdown_seconds = shutdown_seconds
        self._max_restarts, self._transient = max_restarts, transient
        self.tier, self.alone = tier, alone
        self._turns = Turns(loop_share=loop_share)
        self._slots = asyncio.Semaphore(max_operations)
        self._running: dict[str, Running] = {}
        self._actors: dict[str, Actor] = {}
        self.debts = Debts()  # ends that couldn't be written yet
        self._closing = False
        self.owner = Owner.this_process()
        _open_workers.add(self)
        self.heart: Heart | None = None  # set by `open`
        self.last_line: LastLine | None = None  # where final saves go; set by `open`

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        dsn: str | None = None,
        pool: asyncpg.Pool | None = None,
        schema: str = "ktrdr",
        migrate: bool = True,
        allow: Sequence[str] = (),
        resume_orphans: bool = False,
        data_roots: Sequence[str | Path] = (),
        max_operations: int = 1_000,
        shutdown_seconds: float = 10.0,
        *,
        loop_share: float = 1.0,
        max_restarts: int = 0,
        transient: tuple[type[Exception], ...] = (ConnectionError, TimeoutError),
        tier: TierName = "auto",
        alone: bool = False,
    ) -> AsyncIterator[BacktestWorker]:
        """Opens the database and a worker on it. Leaving shuts every operation down with a `shutdown` checkpoint.

        Args:
            dsn: PostgreSQL to use; None: `KTRDR_ASYNC_DATABASE`, or the embedded one.
            pool: an asyncpg pool that the service owns, used as it is instead of a DSN.
            schema: the schema of our tables.
            migrate: bring the schema up to date.
            allow: modules (`module` or `module:Class`) from which a stored operation's strategy may be imported.
            resume_orphans: take up what was interrupted or whose owner has died.
            data_roots: directories from which a stored operation's data may be read, unless the database is embedded.
            max_operations: operations at once; more wait.
            shutdown_seconds: for the final checkpoints of all of them together.
            loop_share: share of the loop's time that all operations together may take.
            max_restarts: how often an operation goes on from its checkpoint after a transient error.
            transient: errors of a strategy that count as transient.
            tier: "compiled" loads the compiled tier before the worker is ready; "auto" uses it where it is loaded;
                "interpreted" doesn't. Every bit is the same.
            alone: nobody else is on this loop, so that "auto" may load the compiled tier for a long run, and what is
                imported at first use is imported then; else all of it is before the worker is ready.

        Raises:
            InputError: if a number is out of its range, or the pool too small.
            DatabaseError: if the database can't be used.
        """
        if max_operations < 1 or max_restarts < 0 or not shutdown_seconds > 0 or not 0 < loop_share <= 1:
            raise ParameterError(
                f"max_operations is {max_operations} (1 or more), max_restarts {max_restarts} (0 or more), "
                f"shutdown_seconds {shutdown_seconds} (above 0), loop_share {loop_share} (above 0, at most 1)"
            )
        if pool is not None and pool.get_max_size() < 2:
            raise InputError(
                "the pool has one connection, and a worker needs two: it keeps one for its heartbeats",
                hint="create it with max_size=2 or more",
            )
        if pays(checked_tier(tier), 0, alone=alone):
            await in_thread(load_compiled)
        if not alone:
            await in_thread(warm_up)
        async with Database.open(dsn, pool=pool, schema=schema, migrate=migrate) as database:
            worker = cls(
                database,
                allow=allow,
                data_roots=data_roots,
                max_operations=max_operations,
                shutdown_seconds=shutdown_seconds,
                loop_share=loop_share,
                max_restarts=max_restarts,
                transient=transient,
                tier=tier,
                alone=alone,
            )
            async with database.reserved() as reserved:
                worker.last_line = LastLine(database, reserved)
                worker.heart = Heart(reserved, worker.operations, worker._running, worker.debts)
                heart = asyncio.create_task(worker.heart.beat_for_ever())
                try:
                    if resume_orphans:
                        await worker._adopt_orphans()
                    yield worker
                finally:
                    await finish_or_raise(lambda: worker._leave(heart))

    async def _adopt_orphans(self) -> None:
        """Takes up what was interrupted or whose owner has died, each as an actor of its own."""

        def tell(task: asyncio.Task[BacktestResults]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                logger.warning("%s, an orphan, ended: %s: %s", task.get_name(), type(error).__name__, error)

        running = await self.operations.list(statuses=[Status.RUNNING], limit=10_000)
        for orphan in [*await self.operations.orphans(), *filter(self.is_left_over, running)]:
            self._resume(orphan.operation_id).task.add_done_callback(tell)

    # Running.

    def start(
        self,
        request: BacktestRequest,
        operation_id: str | None = None,
        *,
        cwd: bool = False,
        **options: Unpack[RunOptions],
    ) -> OperationHandle:
        """Starts an operation as a task of its own, or joins the one that this worker runs under the id.

        Args:
            request: what to run.
            operation_id: 1 to 128 of A-Z a-z 0-9 . _ -; None: a random one.
            cwd: look for the strategy's module in the current directory too.
            options: see `RunOptions`.

        Raises:
            InputError: if the id isn't one, or the throttle isn't above 0.
            OperationConflictError: if this worker runs another request under the id.
        """
        name = secrets.token_hex(8) if operation_id is None else validated_id(operation_id)
        present = self._actors.get(name)
        if present is not None and not present.task.done():
            if present.plan.request is not None and present.plan.request != request:
                raise OperationConflictError(name, f"{name} runs another request here", hint="choose another id")
            return OperationHandle(self, present)
        permissions = Permissions(trusted=True, allow=self._allow, cwd=cwd)
        return OperationHandle(self, self._spawn(name, Plan(request=request, permissions=permissions, **options)))

    async def run(
        self,
        request: BacktestRequest,
        operation_id: str | None = None,
        *,
        cwd: bool = False,
        **options: Unpack[RunOptions],
    ) -> BacktestResults:
        """Starts an operation, goes on with it, or returns its finished result; idempotent by id.

        Cancelling the awaiting task cancels the operation; its checkpoint is durable when the cancellation gets
        through.

        Args:
            request: what to run.
            operation_id: 1 to 128 of A-Z a-z 0-9 . _ -; None: a random one.
            cwd: look for the strategy's module in the current directory too.
            options: see `RunOptions`.

        Raises:
            OperationConflictError: if the id belongs to another request.
            AlreadyClaimedError: if it runs elsewhere.
            InputError: if data, strategy or a parameter can't be used; nothing was started.
            CancelledError: if this task was cancelled.
            CancellationError: if somebody else cancelled it.
        """
        return await self._owned(self.start(request, operation_id, cwd=cwd, **options)._actor)

    async def resume(self, operation_id: str, **options: Unpack[ResumeOptions]) -> BacktestResults:
        """Goes on from the last checkpoint; of a completed operation the stored result, of one that runs here that run.

        Args:
            operation_id: the operation.
            options: see `ResumeOptions`.

        Raises:
            OperationNotFoundError: if there is none.
            AlreadyClaimedError: if its owner is alive, or its lease isn't over (`take_over` claims it anyway).
            CheckpointMismatchError: if data, code or numbers differ; nothing was changed.
            CodeNotAllowedError: if its strategy isn't registered and no `allow` names it.
        """
        return await self._owned(self._resume(operation_id, **options))

    def resume_handle(self, operation_id: str, **options: Unpack[ResumeOptions]) -> OperationHandle:
        """As `resume`, as a task of its own: what `start` is to `run`."""
        return OperationHandle(self, self._resume(operation_id, **options))

    def _resume(self, operation_id: str, **options: Unpack[ResumeOptions]) -> Actor:
        present = self._actors.get(operation_id)
        if present is not None and not present.task.done():
            return present
        permissions = Permissions(trusted=False, allow=self._allow, data_roots=self._roots)
        return self._spawn(operation_id, Plan(request=None, permissions=permissions, **options))

    async def extend(
        self,
        parent_id: str,
        operation_id: str | None = None,
        *,
        changes: Mapping[str, Any] | None = None,
        **options: Unpack[RunOptions],
    ) -> BacktestResults:
        """Goes on with a completed run over new bars, as an operation of its own; equal to one run over all of them.

        The parent must have been run with `keep_state`, and its bars must be the first ones of the new data.

        Args:
            parent_id: the completed operation.
            operation_id: the new one's id; None: a random one.
            changes: `data` and `end` of the request, where they differ.
            options: see `RunOptions`; `bars` where they are handed over.

        Raises:
            InvalidTransitionError: if the parent isn't completed, or didn't keep its state.
            CheckpointMismatchError: if the old bars aren't a prefix of the new ones, or the code differs.
        """
        return await self._owned((await self.extend_handle(parent_id, operation_id, changes=changes, **options))._actor)

    async def extend_handle(
        self,
        parent_id: str,
        operation_id: str | None = None,
        *,
        changes: Mapping[str, Any] | None = None,
        **options: Unpack[RunOptions],
    ) -> OperationHandle:
        """As `extend`, as a task of its own."""
        return await self._descend(EXTENSION, parent_id, operation_id, dict(changes or {}), options)

    async def fork(
        self,
        parent_id: str,
        operation_id: str | None = None,
        *,
        changes: Mapping[str, Any],
        **options: Unpack[RunOptions],
    ) -> BacktestResults:
        """Goes on from an operation's checkpoint, or kept state, with other costs or parameters, as one of its own.

        Args:
            parent_id: the operation.
            operation_id: the new one's id; None: a random one.
            changes: commission, slippage, min_trade, force_close, seed; of `parameters` those that change.
            options: see `RunOptions`.

        Raises:
            InvalidTransitionError: if the parent has no state to go on from.
            ParameterError: if something else is to change.
        """
        return await self._owned((await self.fork_handle(parent_id, operation_id, changes=changes, **options))._actor)

    async def fork_handle(
        self,
        parent_id: str,
        operation_id: str | None = None,
        *,
        changes: Mapping[str, Any],
        **options: Unpack[RunOptions],
    ) -> OperationHandle:
        """As `fork`, as a task of its own."""
        return await self._descend(FORK, parent_id, operation_id, dict(changes), options)

    async def _descend(
        self, kind: str, parent_id: str, operation_id: str | None, changes: dict[str, Any], options: RunOptions
    ) -> OperationHandle:
        parent = await self.operations.get(parent_id)
        own_data = "data" in changes
        if options.get("bars") is not None:
            changes["data"] = None
        request, descent = await descend(self.database, parent, kind, changes)
        name = secrets.token_hex(8) if operation_id is None else validated_id(operation_id)
        if name in self._actors:
            raise OperationConflictError(name, f"{name} runs here already", hint="choose another id, or resume it")
        permissions = Permissions(trusted=False, allow=self._allow, data_roots=self._roots, own_data=own_data)
        plan = Plan(request=request, permissions=permissions, descent=descent, **options)
        return OperationHandle(self, self._spawn(name, plan))

    def _spawn(self, operation_id: str, plan: Plan) -> Actor:
        if self._closing:
            raise InvalidTransitionError(operation_id, f"{operation_id} can't start: its worker is leaving")
        if plan.throttle is not None and not plan.throttle > 0:
            raise ParameterError(f"throttle is {plan.throttle}; it must be above 0 bars a second")
        checked_isolate(plan.isolate)
        actor = Actor(self, operation_id, plan, self._turns.turn())
        self._actors[operation_id] = actor
        actor.task.add_done_callback(lambda _: self._forget(actor))
        return actor

    def _forget(self, actor: Actor) -> None:
        if self._actors.get(actor.operation_id) is actor:
            del self._actors[actor.operation_id]

    async def _owned(self, actor: Actor) -> BacktestResults:
        """Waits for an actor whose life hangs on the awaiting task."""
        try:
            await asyncio.wait({actor.task})
        except asyncio.CancelledError as error:
            actor.task.cancel()
            await until_done(actor.task)
            for note in actor.notes():
                error.add_note(note)
            raise
        return actor.outcome()

    # Looking.

    def handle(self, operation_id: str) -> OperationHandle | None:
        """The handle of an operation that this worker runs now."""
        actor = self._actors.get(operation_id)
        return None if actor is None else OperationHandle(self, actor)

    async def progress(self, operation_id: str, interval: float = POLL_SECONDS) -> AsyncIterator[Progress]:
        """Where an operation of any process stands, until its end. :raises OperationNotFoundError: if there is none."""
        actor = self._actors.get(operation_id)
        if actor is not None:
            async for now in OperationHandle(self, actor).progress(interval):
                yield now
            return
        seen: Progress | None = None
        while True:
            row = await self.operations.get(operation_id)
            now = progress_of(row)
            if now != seen:
                seen = now
                yield now
            if row.status not in (Status.PENDING, Status.RUNNING):
                return
            await anyio.sleep(interval)

    async def results(self, operation_id: str, *, bars: Bars | None = None) -> BacktestResults:
        """The stored result of a completed operation of any process, whole.

        Raises:
            OperationNotFoundError: if there is none.
            OperationFailedError: if it failed.
            CancellationError: if it was cancelled or interrupted.
            InvalidTransitionError: if it hasn't ended.
            CheckpointMismatchError: if its data aren't those of the run any more.
        """
        row = await self.operations.get(operation_id)
        return await rebuild(
            self.database, row, bars, Permissions(trusted=False, allow=self._allow, data_roots=self._roots)
        )

    # Ending.

    async def cancel(self, operation_id: str, *, timeout: float | None = 60.0) -> Operation:
        """Cancels an operation of any process; its checkpoint is durable on return. One that has ended stays as it is.

        Raises:
            OperationNotFoundError: if there is none, or it was cancelled here before its data were read.
            TimeoutError: if its owner doesn't answer within `timeout` seconds.
            Exception: if the final save failed.
        """
        actor = self._actors.get(operation_id)
        if actor is not None:
            actor.end(Ending.CANCEL)
            _, late = await asyncio.wait({actor.task}, timeout=timeout)
            if late:
                raise TimeoutError(f"{operation_id} was told to end, and hasn't within {timeout} s")
            actor.raise_failed_save()
            return await self.operations.get(operation_id)
        try:
            row = await self.operations.cancel(operation_id)
            with anyio.fail_after(timeout):
                while row.status is Status.RUNNING and row.cancel_requested:
                    await anyio.sleep(POLL_SECONDS / 2)
                    row = await self.operations.get(operation_id)
                    if self.is_left_over(row):
                        claim = await self.operations.claim(operation_id, owner=self.owner, take_over=True)
                        await CheckpointService(self.database, claim).finish(Status.CANCELLED, state=None)
                    elif row.owner is not None and is_alive(row.owner) is False:
                        row = await self.operations.cancel(operation_id)  # it died before it heard of it
        except InvalidTransitionError:
            return await self.operations.get(operation_id)
        return row

    async def pause(self, operation_id: str) -> Operation:
        """Halts an operation of any process at its next boundary, after a checkpoint; it stays so across claims.

        Raises:
            OperationNotFoundError: if there is none.
            InvalidTransitionError: if it is completed.
        """
        return await self.operations.pause(operation_id, True)

    async def go_on(self, operation_id: str) -> Operation:
        """Ends a halt, in any process.

        Raises:
            OperationNotFoundError: if there is none.
            InvalidTransitionError: if it is completed.
        """
        return await self.operations.pause(operation_id, False)

    async def shutdown(self) -> None:
        """Ends every operation with a `shutdown` checkpoint; nothing starts here any more."""
        self._closing = True
        tasks = {actor.task for actor in self._actors.values()}
        for actor in list(self._actors.values()):
            actor.end(Ending.SHUTDOWN)
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=self._shutdown_seconds)
        if not late:
            return
        stubborn = [actor for actor in list(self._actors.values()) if actor.task in late]
        saves = [asyncio.create_task(actor.abandon()) for actor in stubborn]
        await asyncio.wait(saves, timeout=ABANDON_SECONDS)
        await self.database.terminate()  # what still waits for an answer ends with its connection
        await asyncio.wait([*late, *saves], timeout=ABANDON_SECONDS)

    async def _leave(self, heart: asyncio.Task[None]) -> None:
        try:
            await self.shutdown()
        finally:
            heart.cancel()
            await asyncio.wait({heart})
            if self.debts:
                await self.debts.pay(seconds=2.0)
            _open_workers.discard(self)

    def is_left_over(self, row: Operation) -> bool:
        """Whether a row says that this process runs it, and none of its workers does: its end couldn't be written."""
        mine = row.status is Status.RUNNING and row.owner == self.owner
        named = row.operation_id
        here = (
            named in worker._running or (worker is not self and (actor := worker._actors.get(named)) and actor.claiming)
            for worker in _open_workers
        )
        return mine and not any(here)
