"""X1 and X4, whatever the pattern: every pair of yields, chains of resumes, every step inside the bars.

The campaign: pytest -m campaign tests/backtesting/test_interruption_patterns.py -s
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import random
import sys
from collections.abc import Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import numpy as np
import pytest
from campaigns import Figures, sized
from engine_runs import SYMBOLS, Hops, account, checkpoint, hourly
from living import Busy, BusyAsync, Crossing
from numpy.typing import NDArray
from test_against_oracle import Case
from test_interruptions import whole

import ktrdr_async as kt
from ktrdr_async.backtesting.engine import BLOCK_BARS
from ktrdr_async.checkpoint.codec import (
    GENESIS,
    Counts,
    Segment,
    SegmentWork,
    canonical_head,
    decode_head,
    encode_head,
)
from ktrdr_async.strategies.base import AnyStrategy
from ktrdr_async.supervision.worker import BacktestWorker

pytestmark = pytest.mark.anyio

REQUEST = kt.BacktestRequest(initial_capital=50_000.0, seed=11)
KINDS = (Busy, BusyAsync, Crossing)
PRODUCT = tuple(str(Path(kt.__file__).parent / room) for room in ("backtesting", "strategies", "checkpoint"))


def coded(state: kt.BacktestCheckpointState) -> kt.BacktestCheckpointState:
    """A state as PostgreSQL gives it back: its head and its segment, encoded and decoded."""
    found = decode_head(encode_head(state).state)
    assert canonical_head(found) == canonical_head(state)
    written, read = (SegmentWork("op", 1, Counts(), GENESIS) for _ in range(2))
    *_, segment = written.encode(state.ledger, state.equity_samples, state.recorded)
    assert isinstance(segment, Segment)
    for _ in read.decode(segment.records):
        pass
    assert read.digest() == segment.digest
    found.ledger, found.equity_samples, found.recorded = read.ledger, read.samples, read.recorded
    return found


class Job:
    """One backtest, what it comes to uninterrupted, and every difference that an interrupted run of it shows."""

    def __init__(
        self,
        name: str,
        bars: kt.Bars,
        make: Callable[[], AnyStrategy],
        block_bars: int,
        request: kt.BacktestRequest = REQUEST,
    ) -> None:
        self.name, self.bars, self.make, self.block_bars, self.request = name, bars, make, block_bars, request
        self.boundaries: dict[int, str] = {}  # bar -> digest of the state there
        self.runs = self.compared = self.audits = self.waited = 0
        self.differing: list[str] = []

    def engine(self, **options: Any) -> kt.BacktestingEngine:
        return kt.BacktestingEngine(self.request, self.bars, self.make(), block_bars=self.block_bars, **options)

    async def learn(self) -> kt.BacktestResults:
        """The run that nothing interrupts."""
        engine = self.engine()
        async with aclosing(engine.run()) as blocks:
            async for block in blocks:
                self.boundaries[block.bar_index] = engine.portfolio.state_digest(engine.boundary)
        assert len(set(self.boundaries.values())) == len(self.boundaries)
        self.results = engine.results()
        account(self.results)
        self.expected = whole(self.results)
        return self.results

    @property
    def yields(self) -> int:
        return len(self.boundaries)

    async def until(
        self, yields: int, state: kt.BacktestCheckpointState | None, pattern: object
    ) -> kt.BacktestCheckpointState:
        """Goes on in a fresh engine, and is cancelled at a yield, counted from 1; the checkpoint through the codec."""
        engine = self.engine()
        task = asyncio.create_task(self._consume(engine, state, pattern, yields))
        await asyncio.wait({task})
        assert task.cancelled(), (pattern, task)
        left = coded(checkpoint(engine))
        self.waited += bool(left.waiting)
        return left

    async def to_end(self, state: kt.BacktestCheckpointState | None, pattern: object) -> None:
        """Goes on in a fresh engine to the end, and compares what comes out."""
        engine = self.engine()
        try:
            await self._consume(engine, state, pattern)
        except kt.KtrdrError as error:
            self.differing.append(f"{self.name}, {pattern}: {error}")
        else:
            self.check(engine.results(), pattern)

    def check(self, results: kt.BacktestResults, pattern: object) -> None:
        account(results)
        self.runs, self.audits = self.runs + 1, self.audits + 1
        if whole(results) != self.expected:
            self.differing.append(f"{self.name}, {pattern}: {results.digest}, not {self.results.digest}")

    def compare(self, bar: int, digest: str, pattern: object) -> None:
        self.compared += 1
        if self.boundaries[bar] != digest:
            self.differing.append(f"{self.name}, {pattern}: another state at bar {bar}")

    async def _consume(
        self, engine: kt.BacktestingEngine, state: kt.BacktestCheckpointState | None, pattern: object, yields: int = 0
    ) -> None:
        seen = 0
        async with aclosing(engine.run(state)) as blocks:
            async for block in blocks:
                seen += 1
                self.compare(block.bar_index, engine.portfolio.state_digest(engine.boundary), pattern)
                if seen == yields:
                    task = asyncio.current_task()
                    assert task is not None
                    task.cancel()
                    await asyncio.sleep(0)


def living(bars: int, block_bars: int) -> list[Job]:
    """Each kind, of one symbol, and of three of which one starts late, has gaps and stops early."""
    return [
        Job(f"{kind.__name__}, {k} symbols", hourly(bars, seed=4, symbols=SYMBOLS[:k]), kind, block_bars)
        for kind in KINDS
        for k in (1, 3)
    ]


def reached(figures: Figures, what: str, jobs: list[Job], unit: str) -> None:
    """The figure of some jobs, and the assertion: no digest differs."""
    runs, compared, audits = (sum(getattr(job, name) for job in jobs) for name in ("runs", "compared", "audits"))
    differing = [difference for job in jobs for difference in job.differing]
    figures.add(
        what,
        f"{runs} {unit}, {compared} boundaries compared, {audits} audits agreed: {len(differing)} differing digests",
    )
    assert not differing, differing[:10]


async def every_pair(job: Job) -> None:
    for first in range(1, job.yields + 1):
        state = await job.until(first, None, first)
        for second in range(first + 1, job.yields + 1):
            pair = (first, second)
            await job.to_end(await job.until(second - first, state, pair), pair)


@sized("block_bars", ci=43, whole=11)
async def test_every_pair_of_yields(block_bars: int, figures: Figures) -> None:
    jobs = living(258, block_bars)
    for job in jobs:
        results = await job.learn()
        assert job.yields == -(-258 // block_bars)
        assert results.fills["fee"].sum() > 0
        assert any(trade.side < 0 for trade in results.trade_records)
        assert any(
            one.symbol == other.symbol and one.bar == other.bar for one, other in itertools.pairwise(results.ledger)
        ), "no position was turned"
        await every_pair(job)
        assert job.runs == job.yields * (job.yields - 1) // 2
    assert sum(job.waited > 0 for job in jobs) >= 2, "hardly an order was waiting at a yield"
    reached(figures, f"every pair of {jobs[0].yields} yields", jobs, "pairs")


@sized("cases", ci=1, whole=60)
async def test_every_pair_of_yields_on_random_markets(cases: int, campaign_seed: int, figures: Figures) -> None:
    """Orders of all sorts under random terms, ruin and cuts among them; `cases` counts seeds."""
    jobs = []
    for seed in range(campaign_seed, campaign_seed + cases):
        case = Case(seed)
        for strategy in case.strategies():
            kind: Any = type(strategy)
            make = functools.partial(kind, getattr(strategy, kind.resources[0]), case.terms.warmup)
            job = Job(f"case {seed}, {kind.__name__}", case.bars, make, -(-len(case.bars) // 10), case.request)
            jobs.append(job)
            await job.learn()
            await every_pair(job)
    reached(figures, f"every pair of yields, {cases} random markets", jobs, "pairs")


@sized("resumes", ci=12, whole=200)
async def test_a_chain_of_resumes_in_one_run(resumes: int, figures: Figures) -> None:
    jobs = living((resumes + 1) * 5, 5)
    for job in jobs:
        await job.learn()
        state = None
        for number in range(resumes):
            state = await job.until(1, state, f"resume {number}")
            job.compare(number * 5 + 4, state.state_digest, f"checkpoint {number}")
        await job.to_end(state, f"after {resumes} resumes")
    reached(figures, f"{resumes} resumes in one run, through the codec", jobs, "runs")


class CancelAtOnce(kt.CheckpointPolicy):
    """Cancels the operation's task at its next yield, and has it saved there: the save is where that is heard."""

    def __init__(self) -> None:
        super().__init__(10**9, time_interval_seconds=1e9)
        self.done = False

    def should_checkpoint(self, bar_index: int, force: bool = False) -> bool:
        task = asyncio.current_task()
        if self.done or task is None:
            return False
        self.done = True
        task.cancel()
        return True


@sized("resumes", ci=5, whole=200)
@pytest.mark.parametrize("kind", KINDS)
async def test_a_chain_of_resumes_through_postgresql(
    dsn: str, kind: type[AnyStrategy], resumes: int, figures: Figures
) -> None:
    """The worker's own blocks; each resume by a worker that has seen nothing of the run."""
    bars = hourly((resumes + 1) * BLOCK_BARS + 37, symbols=SYMBOLS[:3])
    job = Job(kind.__name__, bars, kind, BLOCK_BARS)
    await job.learn()
    for number in range(resumes):
        async with BacktestWorker.open(dsn) as worker:
            task = asyncio.create_task(worker.run(REQUEST, "op", bars=bars, strategy=kind(), policy=CancelAtOnce()))
            await asyncio.wait({task})
            with pytest.raises(kt.CancellationError):
                task.result()
            state = await kt.CheckpointService(worker.database).load_checkpoint("op")
        assert state is not None
        assert state.bar_index == number * BLOCK_BARS + BLOCK_BARS - 1
        assert len(state.resumed_from) == number
        job.compare(state.bar_index, state.state_digest, f"checkpoint {number}")
    async with BacktestWorker.open(dsn) as worker:
        job.check(await worker.run(REQUEST, "op", bars=bars, strategy=kind()), f"after {resumes} resumes")
    reached(figures, f"{resumes} resumes in one run of {kind.__name__}, through PostgreSQL", [job], "runs")


class InjectedError(Exception):
    pass


class Steps:
    """Counts the opcodes of the strategy under test, or the lines of the engine's rooms, and strikes at one of them."""

    def __init__(self, place: str, strike_at: int = 0, *, cancels: bool = False) -> None:
        self.place, self.strike_at, self.cancels = place, strike_at, cancels
        self.passed = 0
        self.where = ""  # the strike fell

    async def follow(self, engine: kt.BacktestingEngine, state: kt.BacktestCheckpointState | None) -> bool:
        """Runs to the end, or to the strike; whether that was what ended it."""
        task = asyncio.create_task(self._run(engine, state))
        await asyncio.wait({task})
        if not self.where:
            task.result()
            return False
        return task.cancelled() if self.cancels else task.exception() is not None

    async def _run(self, engine: kt.BacktestingEngine, state: kt.BacktestCheckpointState | None) -> None:
        sys.settrace(self._called)
        try:
            async with aclosing(engine.run(state)) as blocks:
                async for _ in blocks:
                    pass
        finally:
            sys.settrace(None)

    def _called(self, frame: FrameType, _event: str, _argument: object) -> Any:
        code = frame.f_code
        if self.place == "strategy":
            frame.f_trace_opcodes = ours = code.co_filename == __file__ and code.co_qualname.startswith("Awaited.")
        else:
            ours = code.co_filename.startswith(PRODUCT)
        return self._step if ours else None

    def _step(self, frame: FrameType, event: str, _argument: object) -> Any:
        if event == ("opcode" if self.place == "strategy" else "line"):
            self.passed += 1
            if self.passed == self.strike_at:
                self.where = f"{frame.f_code.co_qualname}:{frame.f_lineno}"
                if not self.cancels:
                    raise InjectedError(self.where)
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
        return self._step


class Written(msgspec.Struct):
    """A scalar, a list, an array, a dict."""

    score: float = 0.0
    path: list[float] = []
    grid: NDArray[np.float64] = msgspec.field(default_factory=lambda: np.zeros(4))
    fills: dict[str, float] = {}


class Awaited(kt.AsyncStrategy):
    """Awaits in each of its methods; orders, records and writes its state before, between and after its awaits."""

    def __init__(self) -> None:
        self.state = Written()

    async def _ask(self, value: float) -> float:
        await asyncio.sleep(0)
        return value * 1.5

    async def prepare(self, bars: kt.Bars) -> dict[str, NDArray[np.float64]]:
        self.state.score = await self._ask(0.25)
        past = np.concatenate([bars.close[:1], bars.close[:-1]])
        self.state.path.append(await self._ask(self.state.score))
        return {"past": past}

    async def on_fill(self, bar: kt.Bar, fill: kt.Fill) -> None:
        self.state.fills[fill.symbol] = self.state.fills.get(fill.symbol, 0.0) + fill.quantity
        self.state.score += await self._ask(fill.price)
        if fill.part == "open" and len(self.state.path) % 2:
            bar.target_weight(0, -0.2 if fill.quantity > 0 else 0.2, tag="filled")
        self.state.score -= await self._ask(fill.fee)

    async def on_trade(self, bar: kt.Bar, trade: kt.TradeClosed) -> None:
        self.state.path.append(await self._ask(trade.net_pnl))
        bar.record(pnl=trade.net_pnl)

    async def on_bar(self, bar: kt.Bar) -> None:
        state, close = self.state, bar.close[0]
        state.grid[bar.index % 4] += await self._ask(close)
        if bar.index % 3 == 0:
            bar.target_weight(0, 0.4 if state.grid.sum() % 2.0 > 1.0 else -0.4, tag=f"t{bar.index}")
            state.score = await self._ask(state.score) * 0.1
        bar.record(score=state.score, past=bar.feature("past")[0])
        if bar.close[1] == bar.close[1] and bar.index % 2:
            bar.order(1, await self._ask(2.0))
            bar.order(1, -1.0)

    async def on_end(self, bar: kt.Bar) -> None:
        bar.record(end=await self._ask(self.state.score))


@sized("strikes", ci=12, whole=3_000, minutes=90)
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")  # struck between the two
@pytest.mark.parametrize("cancels", [False, True], ids=["raised", "cancelled"])
@pytest.mark.parametrize("place", ["strategy", "engine", "engine that was resumed"])
async def test_struck_at_any_step_of_strategy_and_engine(
    strikes: int, place: str, cancels: bool, campaign_seed: int, figures: Figures
) -> None:
    """Around every await, order, record and write of the strategy; between any two lines of the engine itself."""
    job = Job("Awaited", hourly(9, symbols=SYMBOLS[:3]), Awaited, 3)
    results = await job.learn()
    assert {trade.side for trade in results.trade_records} == {1, -1}
    before = await job.until(2, None, "before") if "resumed" in place else None
    for _ in range(2):  # what is computed once and kept takes steps the first time
        counted = Steps(place)
        assert not await counted.follow(job.engine(turn=Hops()), before)
    assert counted.passed > 1_000
    steps: Sequence[int] = range(1, counted.passed + 1)
    if strikes < counted.passed:
        steps = sorted(random.Random(campaign_seed).sample(steps, strikes))
    for at in steps:
        engine = job.engine(turn=Hops())
        struck = Steps(place, at, cancels=cancels)
        assert await struck.follow(engine, before), at
        pattern, bar = f"step {at} of the {place} ({struck.where})", engine.boundary.bar_index
        if bar >= 0:
            job.compare(bar, engine.portfolio.state_digest(engine.boundary), pattern)
        await job.to_end(coded(checkpoint(engine)) if bar >= 0 else before, pattern)
    how = "cancelled" if cancels else "an exception"
    reached(figures, f"{how} at {len(steps)} of {counted.passed} steps of the {place}", [job], "runs")
