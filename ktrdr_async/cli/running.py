"""One run at the command line: from its launch to its end, whatever ends it, and what is said about that."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from ktrdr_async.backtesting.results import BacktestResults, Outcome, RunStatistics
from ktrdr_async.cli.failures import Failure, failure_of, resumable
from ktrdr_async.cli.output import blank
from ktrdr_async.cli.progress import view_of
from ktrdr_async.cli.tables import print_summary
from ktrdr_async.errors import CancellationError, CheckpointError, OperationNotFoundError
from ktrdr_async.operations.lifecycle import Operation, Status

if TYPE_CHECKING:
    from ktrdr_async.cli.context import Context
    from ktrdr_async.cli.options import PaceOptions
    from ktrdr_async.supervision.mailbox import Progress
    from ktrdr_async.supervision.worker import BacktestWorker, OperationHandle

LOOK_SECONDS = 5.0  # for reading how the operation stands after its end


class Ended(msgspec.Struct, kw_only=True):
    """How a run ended."""

    operation_id: str | None = None  # None: there is no operation
    status: str | None = None
    outcome: Outcome | None = None
    request: dict[str, Any] = {}
    equity: Any = None  # float64[n]
    statistics: RunStatistics = msgspec.field(default_factory=RunStatistics)
    progress: Any = None  # Progress
    checkpoint_bar: int | None = None
    failure: Failure | None = None
    exit_code: int = 0
    files: list[str] = []

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        found = blank() | {
            "operation_id": self.operation_id,
            "status": self.status,
            "resumed_from": list(self.statistics.resumed_from),
            "checkpoints": {"saved": self.statistics.checkpoints_saved, "failed": self.statistics.checkpoints_failed},
        }
        if self.outcome is not None:
            found |= {
                "result_digest": self.outcome.digest,
                "metrics": msgspec.to_builtins(self.outcome.metrics),
                "trades": self.outcome.metrics.trades,
                "bars": self.outcome.bars,
                "warnings": self.outcome.warnings,
            }
        elif self.progress is not None and self.progress.bars:
            found |= {"trades": self.progress.trades, "bars": self.progress.bars}
        found["checkpoint_bar"] = self.checkpoint_bar
        if self.files:
            found["files"] = self.files
        if self.failure is not None:
            found["error"] = self.failure.to_dict()
        return found


class Runner:
    """Carries one run out under this command line's signals.

    Args:
        context: the command line.
        pace: how it runs.
        dsn: the database that was named on the command line.
        allow: code that the resume command has to permit.
        roots: directories that the resume command has to permit.
    """

    def __init__(
        self, context: Context, pace: PaceOptions, *, dsn: str | None, allow: Sequence[str], roots: Sequence[str]
    ) -> None:
        self.context = context
        self.pace = pace
        self._dsn, self._allow, self._roots = dsn, tuple(allow), tuple(roots)

    async def carry_out(
        self, worker: BacktestWorker, operation_id: str, launch: Callable[[], Awaitable[BacktestResults]]
    ) -> Ended:
        """Launches, shows progress, and ends with whatever ends the run. A signal here always leaves a checkpoint."""
        output, signals = self.context.output, self.context.signals
        task = asyncio.ensure_future(launch())
        leaving: list[asyncio.Task[None]] = []
        handle: OperationHandle | None = None

        def react(number: int) -> None:
            if signals.first == signal.SIGINT:
                task.cancel()
            elif not leaving:
                leaving.append(asyncio.create_task(worker.shutdown()))
            running = handle is not None and handle.claimed
            if signals.count > 1:
                output.note("still saving ..." if running else "still stopping ...")
            else:
                output.note(f"{signals.name}: saving a checkpoint ..." if running else f"{signals.name}: stopping ...")

        signals.react = react
        if signals.first is not None:  # it came just before
            react(signals.first)
        await asyncio.sleep(0)
        handle = worker.handle(operation_id)
        shown = asyncio.create_task(self._show(handle, task)) if handle is not None else None
        await asyncio.wait({task, *leaving})
        if leaving:
            await asyncio.wait(leaving)
        if shown is not None:
            await asyncio.wait({shown})
        signals.react = lambda _: output.note("finishing ...")
        return await self._ended(worker, operation_id, handle, task)

    async def _show(self, handle: OperationHandle, task: asyncio.Future[Any]) -> None:
        await handle.until_claimed()
        if not handle.claimed:
            return
        self.context.output.note(f"operation {handle.operation_id}")
        view = view_of(self.context.output, self.pace.progress_seconds)
        try:
            while not task.done():
                if self.context.signals.count == 0:
                    view.update(handle.inspect())
                await asyncio.wait({task}, timeout=view.interval)
        finally:
            view.close()

    async def _ended(
        self,
        worker: BacktestWorker,
        operation_id: str,
        handle: OperationHandle | None,
        task: asyncio.Future[BacktestResults],
    ) -> Ended:
        started = handle is not None and handle.claimed
        progress: Progress | None = handle.inspect() if handle is not None else None
        ended = Ended(
            operation_id=operation_id,
            progress=progress,
            statistics=handle.statistics if handle is not None else RunStatistics(),
        )
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is None:
            results = task.result()
            ended.status, ended.outcome, ended.equity = Status.COMPLETED.value, results.outcome(), results.equity
            ended.statistics, ended.request = results.run, results.request.to_dict()
            await self._export(ended, results)
            return ended
        row = await _row(worker, operation_id)
        if row is None and not started:
            return self._never_began(ended, error)
        if row is not None:
            ended.status, ended.checkpoint_bar, ended.request = row.status.value, row.checkpoint_bar, row.request
            if row.status is Status.COMPLETED and row.result is not None and not isinstance(error, Exception):
                from ktrdr_async.supervision.stored import outcome_of

                ended.outcome = outcome_of(row)  # the signal came when all was done
                ended.statistics = ended.outcome.run
                return ended
        elif progress is not None:
            ended.status, ended.checkpoint_bar = progress.status, progress.checkpoint_bar
        failed_save = handle.final_save_error if handle is not None else None
        return self._stopped(ended, error, started=started, failed_save=failed_save)

    def _never_began(self, ended: Ended, error: BaseException) -> Ended:
        """It ended before there was a row."""
        signals = self.context.signals
        if signals.first is not None and not (
            isinstance(error, Exception) and not isinstance(error, CancellationError)
        ):
            ended.failure = Failure("interrupted", f"{signals.name}: nothing was started", exit_code=signals.exit_code)
        else:
            ended.failure = failure_of(error)
        ended.operation_id, ended.exit_code = None, ended.failure.exit_code
        return ended

    def _stopped(
        self, ended: Ended, error: BaseException, *, started: bool, failed_save: BaseException | None
    ) -> Ended:
        assert ended.operation_id is not None  # noqa: S101 - there is a row
        signals = self.context.signals
        command, remark = resumable(ended.operation_id, dsn=self._dsn, allow=self._allow, roots=self._roots)
        by_signal = signals.first is not None and (
            not isinstance(error, Exception) or isinstance(error, CancellationError)
        )
        if by_signal or isinstance(error, CancellationError):
            at = (
                "before the first checkpoint"
                if ended.checkpoint_bar is None
                else f"checkpoint at bar {ended.checkpoint_bar:,}"
            )
            why = signals.name if by_signal else "asked for from elsewhere"
            ended.failure = Failure(ended.status or "cancelled", f"{ended.status} ({why}), {at}")
            ended.exit_code = ended.failure.exit_code = signals.exit_code if by_signal else 1
        else:
            ended.failure = failure_of(error, started=started)
            ended.exit_code = ended.failure.exit_code
        if failed_save is not None:
            ended.failure.message += f"; the last save failed ({type(failed_save).__name__}: {failed_save})"
        # What wasn't ours to claim, or what no resume would get past, isn't told to be resumed.
        if started and not (isinstance(error, CheckpointError) and not by_signal):
            then = f"{ended.failure.hint}; then go on with" if ended.failure.hint else "go on with"
            ended.failure.hint = f"{then}: {command}" + (f"  ({remark})" if remark else "")
        return ended

    async def _export(self, ended: Ended, results: BacktestResults) -> None:
        """Writes the files that were asked for."""
        if self.pace.output is None:
            return
        directory = self.pace.output
        try:
            written = await asyncio.to_thread(results.export, directory)
            ended.files = [str(path) for path in written]
        except Exception as error:
            ended.failure = failure_of(error, started=True)
            ended.failure.hint = f"the result is stored: ktrdr-async export {ended.operation_id} -o DIR"
            ended.exit_code = ended.failure.exit_code


async def _row(worker: BacktestWorker, operation_id: str) -> Operation | None:
    try:
        async with asyncio.timeout(LOOK_SECONDS):
            return await worker.operations.get(operation_id)
    except OperationNotFoundError:
        return None
    except Exception:  # the database is away: what is known of the run has to do
        return None


def report(context: Context, ended: Ended) -> int:
    """Prints how a run ended. Returns the exit code."""
    output = context.output
    if ended.failure is not None:
        ended.failure.message = output.hide(ended.failure.message)
        ended.failure.hint = output.hide(ended.failure.hint)
    if output.json:
        output.emit(ended.to_dict())
    elif ended.outcome is not None:
        print_summary(output, ended.operation_id, ended.outcome, ended.request, ended.equity)
    failure = ended.failure
    if failure is not None and failure.exit_code > 128:
        output.note(failure.message)
        if failure.hint:
            output.note(failure.hint)
    elif failure is not None:
        output.error(failure.message, failure.hint, failure.details)
    if ended.files:
        output.note(f"{len(ended.files)} files written to {os.path.dirname(ended.files[0]) or '.'}")
    return ended.exit_code
