"""A run without a database: the engine alone. Nothing is kept of one that is stopped."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import msgspec

from ktrdr_async.cli.failures import Failure, failure_of
from ktrdr_async.cli.progress import view_of
from ktrdr_async.cli.running import Ended
from ktrdr_async.supervision.jobs import Permissions, read_bars
from ktrdr_async.supervision.local import backtest
from ktrdr_async.supervision.mailbox import Progress

if TYPE_CHECKING:
    from ktrdr_async.backtesting.engine import Block
    from ktrdr_async.backtesting.request import BacktestRequest
    from ktrdr_async.backtesting.results import BacktestResults
    from ktrdr_async.cli.context import Context
    from ktrdr_async.cli.options import PaceOptions

SLICE = 0.02  # seconds between two looks for a signal while a run is slowed down


async def carry_out(context: Context, request: BacktestRequest, pace: PaceOptions) -> Ended:
    """Runs a request on this loop. A signal ends it, and says that nothing was kept."""
    watched = _Watched(context, pace)

    async def work() -> BacktestResults:
        bars = await read_bars(request, Permissions(trusted=True))
        watched.bars = len(bars)
        return await backtest(
            bars, request.strategy or "", request=request, on_block=watched.block, cwd=True, tier=pace.tier, alone=True
        )

    task = asyncio.ensure_future(work())

    def stop(_: int) -> None:
        task.cancel()

    context.signals.react = stop
    try:
        await asyncio.wait({task})
    finally:
        watched.view.close()
    ended = Ended(progress=watched.now)
    error = asyncio.CancelledError() if task.cancelled() else task.exception()
    if error is None:
        results = task.result()
        ended.status, ended.outcome, ended.equity = "completed", results.outcome(), results.equity
        ended.request = results.request.to_dict()
        if pace.output is not None:
            try:
                ended.files = [str(path) for path in await asyncio.to_thread(results.export, pace.output)]
            except Exception as broken:
                ended.failure = failure_of(broken, started=True)
    elif not isinstance(error, Exception) and context.signals.first is not None:
        kept = "nothing was kept: without --no-database a run can be resumed"
        ended.status = "cancelled"
        ended.failure = Failure("cancelled", f"{context.signals.name}: {kept}", exit_code=context.signals.exit_code)
    else:
        ended.status = "failed" if watched.now is not None else None
        ended.failure = failure_of(error, started=watched.now is not None)
    ended.exit_code = ended.failure.exit_code if ended.failure is not None else 0
    return ended


class _Watched:
    """Looks at each block: tells where the run stands, and slows it down."""

    def __init__(self, context: Context, pace: PaceOptions) -> None:
        self.bars = 0
        self.now: Progress | None = None
        self.view = view_of(context.output, pace.progress_seconds)
        self._signals = context.signals
        self._throttle = pace.throttle
        self._began: float | None = None
        self._shown = 0.0

    def block(self, block: Block) -> None:
        now = time.monotonic()
        if self._began is None:
            self._began = self._shown = now
        elapsed = now - self._began
        speed = (block.bar_index + 1) / elapsed if elapsed > 0 else None
        self.now = Progress(
            operation_id="",
            status="running",
            bar_index=block.bar_index,
            bars=self.bars,
            timestamp=block.timestamp,
            equity=block.equity,
            trades=block.trades,
            bars_per_second=speed,
            seconds_left=(self.bars - 1 - block.bar_index) / speed if speed else None,
        )
        if now - self._shown >= self.view.interval:
            self._shown = now
            self.view.update(msgspec.structs.replace(self.now))
        if self._throttle is not None:
            due = self._began + (block.bar_index + 1) / self._throttle
            # The loop stands still meanwhile: there is nothing else on it, and the signals' handler runs in between.
            while (left := due - time.monotonic()) > 0 and self._signals.count == 0:
                time.sleep(min(SLICE, left))
