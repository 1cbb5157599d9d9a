"""What a checkpoint costs: against the length of the run, against the original's ways, and as a share of the run.

    python benchmarks/checkpoints.py [--bars N] [--repeat R] [--json]

- `by trades`: one save (the state built, encoded, sent and acknowledged) of 100 new trades, after 1 k to 1 M trades; for
  comparison `one_row`, which rewrites one growing JSONB row (up to 100 k trades).
- `100th save`: over a run that saves every 10,000 bars, the last ten saves against the first ten.
- `completion`: the end of a run of which all but the last 100 trades are saved, by its length.
- `one save`: of 100 new trades on the shared loop through the pool, against a new thread, loop and connection each.
- `share`: of a run's time, at the default policy: the same run with and without checkpoints, and what it says itself.

The database is an embedded PostgreSQL on a disk, with fsync. `ratio` is the row's seconds over those of the first row
of its kind, for `one save` over ours, and for `share` the share.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import msgspec
import numpy as np
from common import Column, Row, parser, pin, private_server, report
from cross import Cross
from original import NewLoop, state_of

import ktrdr_async as kt
from ktrdr_async.backtesting.checkpoint_builder import build_backtest_checkpoint_state, build_closing_state
from ktrdr_async.backtesting.engine import BacktestingEngine, Block
from ktrdr_async.checkpoint.schemas import CheckpointType
from ktrdr_async.operations.lifecycle import Claim, Owner, Status
from ktrdr_async.operations.service import OperationsService
from ktrdr_async.storage.database import Database

BUDGETS = {"by trades": 1.2, "100th save": 1.2, "completion": 1.2, "one save": 0.2, "share": 0.05}  # largest ratio
REQUEST = kt.BacktestRequest(initial_capital=1e6, commission=0.00002, slippage=0.0)
NEVER = kt.CheckpointPolicy(10**9, time_interval_seconds=1e9)
SIZES = (1_000, 10_000, 100_000, 1_000_000)
GROWING = SIZES[:3]  # trades at which one growing row is still rewritten
SAVES = 20  # of which a median is taken
clock = time.perf_counter


class Flip(kt.WeightStrategy):
    """One unit long, one short, in turn: a trade a bar."""

    def target_quantities(self, bars: kt.Bars) -> np.ndarray:
        return np.where(np.arange(len(bars)) % 2, 1.0, -1.0)[:, None]


class Thinking(Cross):
    """As `Cross`, after 0.2 ms of computing at each bar."""

    def on_bar(self, bar: kt.Bar) -> None:
        ends = clock() + 0.0002
        while clock() < ends:
            pass
        super().on_bar(bar)


def synthetic(count: int) -> kt.Bars:
    return kt.Bars.read(f"synthetic:?bars={count}&seed=7&timeframe=1h")


class Run:
    """One claimed operation and its engine, saved by hand."""

    def __init__(self, database: Database, claim: Claim, bars: kt.Bars, strategy: Any) -> None:
        self.database, self.claim = database, claim
        self.service = kt.CheckpointService(database, claim)
        self.engine = BacktestingEngine(REQUEST, bars, strategy)

    @classmethod
    async def begin(cls, database: Database, bars: kt.Bars, strategy: Any) -> Run:
        operations = OperationsService(database)
        row = await operations.create(None, REQUEST.to_dict())
        claim = await operations.claim(row.operation_id, owner=Owner.this_process())
        return cls(database, claim, bars, strategy)

    async def blocks(self) -> AsyncIterator[Block]:
        async with aclosing(self.engine.run()) as blocks:
            async for block in blocks:
                yield block

    async def save(self) -> float:
        """Builds and saves; seconds."""
        started = clock()
        state = state_of(self.engine, self.service)
        await self.service.save_checkpoint(self.claim.operation_id, CheckpointType.PERIODIC, state)
        return clock() - started

    async def rewrite(self, connection: Any) -> float:
        """Builds the whole state and rewrites it as one row; seconds."""
        started = clock()
        boundary = self.engine.boundary.bar_index
        state = build_backtest_checkpoint_state(self.engine, boundary, int(self.engine.bars.timestamps[boundary]))
        text = msgspec.json.encode(state.to_dict()).decode()
        await connection.execute(
            "INSERT INTO one_row.checkpoints VALUES ($1, $2::text::jsonb) "
            "ON CONFLICT (operation_id) DO UPDATE SET state = excluded.state",
            self.claim.operation_id,
            text,
        )
        return clock() - started

    async def finish(self) -> float:
        """Completes a run that has come to its end; seconds, without those of computing its results."""
        results = self.engine.results()
        outcome = msgspec.to_builtins(results.outcome())
        started = clock()
        at = self.service.acknowledged
        closing = build_closing_state(self.engine, since_of(at))
        await self.service.finish(Status.COMPLETED, state=closing, result=outcome, result_digest=outcome["digest"])
        return clock() - started
