"""A backtest without a database: the engine alone, with turns, awaited or from a script."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from ktrdr_async.backtesting.engine import BacktestingEngine
from ktrdr_async.backtesting.results import BacktestResults, RunStatistics
from ktrdr_async.backtesting.tiers import TierName, checked_tier, load_compiled, pays
from ktrdr_async.supervision.holding import watched
from ktrdr_async.supervision.isolation import Elsewhere, Isolate, checked_isolate
from ktrdr_async.supervision.jobs import job_of
from ktrdr_async.supervision.shielding import in_thread
from ktrdr_async.supervision.turns import turns_of_this_loop

if TYPE_CHECKING:
    from collections.abc import Callable

    from ktrdr_async.backtesting.engine import Block
    from ktrdr_async.backtesting.request import BacktestRequest
    from ktrdr_async.strategies.base import AnyStrategy
    from ktrdr_async.supervision.jobs import Data


async def backtest(
    data: Data,
    strategy: AnyStrategy | str,
    *,
    request: BacktestRequest | None = None,
    on_block: Callable[[Block], None] | None = None,
    cwd: bool = False,
    tier: TierName = "auto",
    isolate: Isolate | None = None,
    alone: bool = False,
    **terms: Any,
) -> BacktestResults:
    """Runs a backtest on this loop, without a database: nothing is saved, and a cancelled run starts at bar 0 again.

    Args:
        data: a data reference, a frame or a dict of frames, `Bars`; None: the request's data.
        strategy: a strategy, or a name.
        request: a whole request; `terms` override its fields.
        on_block: called at each boundary.
        cwd: look for the strategy's module in the current directory too.
        tier: "auto": compiled where that is loaded; "compiled" loads it first; "interpreted". Every bit is the same.
        isolate: "process": `prepare`, or the targets, are computed in another process, which imports the strategy.
        alone: nobody else is on this loop, so that "auto" may load the compiled tier for a long run.
        terms: fields of `BacktestRequest`: initial_capital, commission, slippage, lot_size, ...

    Raises:
        InputError: if data, strategy or a term can't be used.
        StrategyError: if the strategy breaks a rule; what it raises itself comes through.
    """
    checked_isolate(isolate)
    turn = turns_of_this_loop().turn()
    await turn.once()
    job = await job_of(data, strategy, request, terms, cwd=cwd)
    turn.elsewhere = None if isolate is None else Elsewhere(job.strategy)
    if pays(checked_tier(tier), len(job.bars) * job.bars.k, alone=alone):
        await in_thread(load_compiled)
    started, run = time.monotonic(), RunStatistics(bars_computed=len(job.bars))
    engine = BacktestingEngine(job.request, job.bars, job.strategy, turn=turn, tier=tier)
    with turn.lag.watch() as watch:
        async with aclosing(engine.run()) as blocks:  # where `on_block` raises, the turn is given back at once
            async for block in watched(blocks, turn, job.strategy, run, "backtest", alone=alone):
                if on_block is not None:
                    on_block(block)
                    if turn.due():
                        await turn.give_way()
        run.loop_lag_ms, run.prepare_lag_ms = watch.figures(), turn.prepare_lag
    results = engine.results()
    run.seconds, results.run = time.monotonic() - started, run
    return results


def backtest_sync(
    data: Data,
    strategy: AnyStrategy | str,
    *,
    request: BacktestRequest | None = None,
    tier: TierName = "auto",
    isolate: Isolate | None = None,
    **terms: Any,
) -> BacktestResults:
    """`backtest` for scripts. :raises RuntimeError: inside a running loop, where `await kt.backtest(...)` serves."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(backtest(data, strategy, request=request, tier=tier, isolate=isolate, alone=True, **terms))
    raise RuntimeError("a loop is running here: use `await kt.backtest(...)` instead of kt.backtest_sync(...)")
