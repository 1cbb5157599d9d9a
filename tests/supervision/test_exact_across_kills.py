"""X1 and R1: the digest is that of an uninterrupted run, whatever killed the process or its server, and when.

The campaign: pytest -m campaign tests/supervision/test_exact_across_kills.py -s
"""

from __future__ import annotations

import asyncio
import importlib.util
import random
import time
from pathlib import Path
from typing import Any

import pytest
from supervision_kills import INTERVAL, Marked, kill_server, postmaster, request_of, running
from supervision_runs import Counter, outside

import ktrdr_async as kt
from ktrdr_async.supervision.worker import BacktestWorker

pytestmark = pytest.mark.anyio


COMPLETED = 10**9


async def clean_digest(bars: int) -> str:
    return (await kt.backtest(None, Marked(), request=request_of(bars))).digest


async def stored_bar(dsn: str) -> int:
    """The bar of the checkpoint that a kill has left; -1: none. Of a completed operation nothing is lost."""
    async with outside(dsn) as other:
        if await other.fetchval("SELECT to_regclass('ktrdr.operations')") is None:
            return -1
        if await other.fetchval("SELECT status FROM ktrdr.operations") == "completed":
            return COMPLETED
        found = await other.fetchval("SELECT (state ->> 'bar_index')::int FROM ktrdr.operation_checkpoints")
        return -1 if found is None else int(found)


async def processes_killed(dsn: str, mark: Path, times: int, seed: int, bars: int) -> list[int]:
    """Kills one process after the other under one operation; how many bars each kill has cost."""
    chance = random.Random(seed)
    moments = sorted(chance.randrange(bars) for _ in range(times))
    lost: list[int] = []
    clean = await clean_digest(bars)
    for number, moment in enumerate(moments):
        early = number % 5 == 4  # while it starts, opens, claims, loads
        delay = chance.random() * 0.7 if early else chance.random() * 0.002
        with running(dsn, bars, 40_000, mark) as child:
            if not early:
                await asyncio.to_thread(child.until, lambda child=child, moment=moment: child.bar >= moment)  # type: ignore[misc]
            await asyncio.to_thread(time.sleep, delay)
            assert child.running or child.bar == bars - 1
            child.kill()
            reached = child.bar
        checkpoint = await stored_bar(dsn)
        if checkpoint == COMPLETED:
            print(f"kill {number + 1} of {times} came too late")
            break
        if reached >= 0:
            lost.append(reached - checkpoint)
            assert lost[-1] <= INTERVAL, f"kill {number} at bar {reached}: the checkpoint is of bar {checkpoint}"
        print(f"kill {number + 1} of {times}: at bar {reached}, checkpoint {checkpoint}", flush=True)
    with running(dsn, bars, 1e9, mark) as child:
        assert await asyncio.to_thread(child.digest) == clean
    return lost


async def servers_killed(home: Path, mark: Path, times: int, seed: int, bars: int) -> tuple[int, int]:
    """Kills the server under one operation again and again; how many processes it took, and how many kills hit."""
    chance = random.Random(seed)
    moments = sorted(chance.randrange(bars * 9 // 10) for _ in range(times))
    clean = await clean_digest(bars)
    processes, hit, digest = 0, 0, None
    while digest is None:
        processes += 1
        with running("", bars, 8_000, mark, home) as child:
            while moments and child.running:
                moment = moments[0]
                if not await asyncio.to_thread(
                    child.until,
                    lambda child=child, moment=moment: child.bar >= moment and postmaster(home) is not None,  # type: ignore[misc]
                ):
                    break
                await asyncio.to_thread(time.sleep, chance.random() * 0.005)
                if not kill_server(home):
                    continue  # it was down already
                hit += 1
                moments.pop(0)
                print(f"server kill {hit} of {times}: at bar {child.bar}", flush=True)
            said = await asyncio.to_thread(child.process.communicate, None, 110)
            digest = said[0].strip() or None
        assert processes <= times + 1
    assert digest == clean
    return processes, hit


async def test_exact_after_ten_kills_of_the_process(dsn: str, tmp_path: Path) -> None:
    lost = await processes_killed(dsn, tmp_path / "mark", times=10, seed=1, bars=20_000)
    assert len(lost) >= 6


async def test_exact_after_five_kills_of_the_server(home: Path, tmp_path: Path) -> None:
    processes, hit = await servers_killed(home, tmp_path / "mark", times=5, seed=2, bars=20_000)
    assert hit == 5
    assert processes <= 6


@pytest.mark.campaign
@pytest.mark.timeout(1_800)
async def test_campaign_of_process_kills(dsn: str, tmp_path: Path) -> None:
    lost = await processes_killed(dsn, tmp_path / "mark", times=50, seed=3, bars=60_000)
    mean = sum(lost) / len(lost)
    print(f"{len(lost)} kills while bars were computed: {mean:.0f} bars lost on average, {max(lost)} at most")


@pytest.mark.campaign
@pytest.mark.timeout(1_800)
async def test_campaign_of_server_kills(home: Path, tmp_path: Path) -> None:
    processes, hit = await servers_killed(home, tmp_path / "mark", times=50, seed=4, bars=200_000)
    print(f"{hit} kills of the server, {processes} processes")
    assert hit == 50


class CancelAt(kt.CheckpointPolicy):
    """Cancels the operation's task once, at a yield or the first one after it."""

    def __init__(self, bar: int) -> None:
        super().__init__(10**9, time_interval_seconds=1e9)
        self.bar, self.done = bar, False

    def should_checkpoint(self, bar_index: int, force: bool = False) -> bool:
        task = asyncio.current_task()
        if bar_index >= self.bar and task is not None and not self.done:
            self.done = True
            task.cancel()
        return super().should_checkpoint(bar_index, force)


def real_data() -> str:
    found = importlib.util.find_spec("backtesting")
    if found is None or found.origin is None:
        pytest.skip("the package `backtesting`, whose data these are, isn't installed")
    return str(Path(found.origin).parent / "test" / "EURUSD.csv")


KINDS: dict[str, Any] = {
    "weights": lambda: kt.SmaCross(fast=10, slow=30),
    "bars": Counter,
    "awaited": lambda: kt.AsyncReversion(period=10),
}


async def cancelled_at_each(worker: BacktestWorker, kind: str, yields: list[int], chained: bool) -> None:
    """Cancels at these yields, each in a run of its own or all in one, and compares what comes out."""
    request = kt.BacktestRequest(data=real_data(), commission=0.00002, slippage=0.00005)
    bars = kt.Bars.read(real_data())
    clean = await kt.backtest(bars, KINDS[kind](), request=request)
    assert clean.trade_records, "nothing that could be lost"
    for count, number in enumerate(yields):
        name = "chain" if chained else f"{kind}{number}"
        bar = min(number * 100 + 99, len(bars) - 1)
        if chained and count and (await worker.operations.get(name)).checkpoint_bar == len(bars) - 1:
            break  # the cancel before this one was heard at the last yield: there is none left
        task = asyncio.create_task(worker.run(request, name, strategy=KINDS[kind](), policy=CancelAt(bar)))
        await asyncio.wait({task})
        with pytest.raises(kt.CancellationError):
            task.result()
        row = await worker.operations.get(name)
        assert row.status is kt.Status.CANCELLED
        assert row.checkpoint_bar is not None
        assert row.checkpoint_bar >= bar
        if not chained:
            same_as(clean, await worker.run(request, name, strategy=KINDS[kind]()))
    if chained:
        same_as(clean, await worker.run(request, "chain", strategy=KINDS[kind]()))


def same_as(clean: kt.BacktestResults, results: kt.BacktestResults) -> None:
    assert results.digest == clean.digest
    assert results.metrics == clean.metrics
    assert (results.equity == clean.equity).all()


@pytest.mark.parametrize("kind", list(KINDS))
async def test_exact_after_a_cancel_at_every_tenth_yield_on_real_data(worker: BacktestWorker, kind: str) -> None:
    await cancelled_at_each(worker, kind, list(range(0, 50, 10)), chained=False)
    await cancelled_at_each(worker, kind, list(range(5, 50, 10)), chained=True)


@pytest.mark.campaign
@pytest.mark.timeout(1_800)
@pytest.mark.parametrize("kind", list(KINDS))
async def test_campaign_of_a_cancel_at_every_yield_on_real_data(worker: BacktestWorker, kind: str) -> None:
    await cancelled_at_each(worker, kind, list(range(50)), chained=False)
    await cancelled_at_each(worker, kind, list(range(50)), chained=True)
    print(f"{kind}: 50 yields, each alone and all in one run")
