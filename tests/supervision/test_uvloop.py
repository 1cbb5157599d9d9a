"""The whole of it on uvloop's loop, where that is installed: runs, cancels, kills, resumes, other processes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest
from isolated_strategies import Endless, Features
from supervision_runs import EVERY_BLOCK, REQUEST, Counter, Gate, Held, digest_of, held, held_digest, market, resumed

import ktrdr_async as kt
from ktrdr_async.cli.context import _new_loop
from ktrdr_async.supervision.worker import BacktestWorker

uvloop = pytest.importorskip("uvloop")
pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module", params=[("asyncio", {"use_uvloop": True})], ids=["uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def the_loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = _new_loop()
    yield loop
    loop.close()


async def test_it_is_this_loop() -> None:
    assert isinstance(asyncio.get_running_loop(), uvloop.Loop)


def test_the_command_line_takes_it(the_loop: asyncio.AbstractEventLoop) -> None:
    assert isinstance(the_loop, uvloop.Loop)


async def test_runs_cancels_and_resumes(worker: BacktestWorker) -> None:
    clean = await digest_of(Counter, "counter")
    several = [
        worker.start(REQUEST, f"op{n}", bars=market(), strategy=Counter(), policy=EVERY_BLOCK) for n in range(20)
    ]
    assert {(await each.result()).digest for each in several} == {clean}
    handle, gate = await held(worker, policy=EVERY_BLOCK)
    task = handle._actor.task
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    await asyncio.wait({task})
    assert task.cancelled()
    row = await worker.operations.get("op")
    assert (row.status.value, row.checkpoint_bar) == ("cancelled", 299)
    gate.open.set()
    await resumed(worker)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await worker.run(REQUEST, "late", bars=market(), strategy=Held(Gate(345)))
    results = await worker.resume("late", bars=market(), strategy=Held(Gate()))
    assert results.digest == await held_digest()
    lag = results.run.loop_lag_ms
    assert lag is not None
    assert 0 < lag.p50 <= lag.max


async def test_leaving_saves_and_orphans_are_taken_up(dsn: str) -> None:
    async with BacktestWorker.open(dsn) as first:
        await held(first, policy=EVERY_BLOCK)
    async with BacktestWorker.open(dsn) as second:
        assert (await second.operations.get("op")).status.value == "interrupted"
        await resumed(second)


async def test_other_processes(worker: BacktestWorker, tmp_path: Any) -> None:
    here = await kt.backtest(market(), Features(), request=REQUEST)
    there = await worker.run(REQUEST, "op", bars=market(), strategy=Features(), isolate="process")
    assert there.digest == here.digest
    note = tmp_path / "process"
    running = asyncio.create_task(kt.backtest(market(), Endless(str(note)), request=REQUEST, isolate="process"))
    deadline = time.monotonic() + 20
    while not note.exists():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)
    running.cancel()
    await asyncio.wait({running})
    assert running.cancelled()
