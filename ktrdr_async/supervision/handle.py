"""The handle of an operation that runs in this worker."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from ktrdr_async.backtesting.results import RunStatistics
from ktrdr_async.errors import OperationNotFoundError

if TYPE_CHECKING:
    from ktrdr_async.backtesting.results import BacktestResults
    from ktrdr_async.supervision.actor import Actor
    from ktrdr_async.supervision.mailbox import Progress
    from ktrdr_async.supervision.worker import BacktestWorker


class OperationHandle:
    """An operation that this worker runs. Awaiting it cancels nothing: a client's disconnect ends no run."""

    def __init__(self, worker: BacktestWorker, actor: Actor) -> None:
        self._worker, self._actor = worker, actor

    @property
    def operation_id(self) -> str:
        """The operation's id."""
        return self._actor.operation_id

    @property
    def done(self) -> bool:
        """Whether it has ended, one way or another."""
        return self._actor.task.done()

    @property
    def claimed(self) -> bool:
        """Whether its row was committed and claimed."""
        return self._actor.claimed.is_set()

    async def until_stored(self) -> None:
        """Waits until its row is committed: from then on it survives this process, and everybody finds it by its id.

        Raises:
            InputError: if data, strategy or a parameter can't be used; nothing was started.
            OperationConflictError: if the id belongs to another request.
            Exception: what else kept it from being stored.
        """
        stored = asyncio.create_task(self._actor.stored.wait())
        await asyncio.wait({stored, self._actor.task}, return_when=asyncio.FIRST_COMPLETED)
        stored.cancel()
        if not self._actor.stored.is_set():
            self._actor.outcome()

    async def until_claimed(self) -> None:
        """Waits for that; also returns where it ends before."""
        claimed = asyncio.create_task(self._actor.claimed.wait())
        await asyncio.wait({claimed, self._actor.task}, return_when=asyncio.FIRST_COMPLETED)
        claimed.cancel()

    @property
    def statistics(self) -> RunStatistics:
        """How the run goes, or went, in this process."""
        supervisor = self._actor._supervisor
        return RunStatistics() if supervisor is None else supervisor.statistics

    @property
    def final_save_error(self) -> BaseException | None:
        """Why the save of its end failed; None: it didn't."""
        supervisor = self._actor._supervisor
        return None if supervisor is None else supervisor.final_save_error

    async def result(self) -> BacktestResults:
        """Waits for the end.

        Raises:
            CancellationError: if it was cancelled on request or by its worker's leaving.
            Exception: what ended it.
        """
        await asyncio.wait({self._actor.task})
        return self._actor.outcome()

    async def progress(self, interval: float = 0.1) -> AsyncIterator[Progress]:
        """Where it stands, at most every `interval` seconds, until it has ended; the last one tells its end."""
        seen: Progress | None = None
        while not self._actor.task.done():
            now = self._actor.progress()
            if now != seen:
                seen = now
                yield now
            await asyncio.wait({self._actor.task}, timeout=interval)
        yield self._actor.progress()

    def inspect(self) -> Progress:
        """Where it stands now."""
        return self._actor.progress()

    async def cancel(self) -> None:
        """Asks it to end and waits until its checkpoint is durable. :raises Exception: if that save failed."""
        with contextlib.suppress(OperationNotFoundError):  # it ended before anything was stored of it
            await self._worker.cancel(self.operation_id)

    async def checkpoint(self) -> int:
        """Asks for a checkpoint at the next boundary; its bar, once it is durable."""
        return await self._actor.mailbox.ask_checkpoint()

    def pause(self) -> None:
        """Halts it at the next boundary, after a checkpoint."""
        self._actor.mailbox.pause()

    def go_on(self) -> None:
        """Ends a halt."""
        self._actor.mailbox.go_on()
