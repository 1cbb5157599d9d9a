"""Saves don't hold the loop: a state is built a piece between two turns, and what comes in between loses nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from supervision_runs import EVERY_BLOCK, REQUEST, Counter, digest_of, market, nothing_left, standing, until

import ktrdr_async as kt
from ktrdr_async.checkpoint import pieces
from ktrdr_async.supervision import supervisor
from ktrdr_async.supervision.worker import BacktestWorker

pytestmark = pytest.mark.anyio


class Steps:
    """Takes each step of building a state for a piece, and calls something at the n-th of a run."""

    def __init__(self, at: int = -1) -> None:
        self.at, self.taken, self.builds = at, 0, 0
        self.call: Any = None

    def __call__(self, steps: Iterator[Any]) -> Iterator[Any]:
        self.builds += 1
        for given in steps:
            if self.taken == self.at:
                self.call()
            self.taken += 1
            yield given


def test_short_steps_go_together_and_a_result_ends_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(pieces.time, "perf_counter", lambda: now)

    def steps() -> Iterator[int | None]:
        nonlocal now
        for step in range(10):
            now += pieces.PIECE_SECONDS / 3.5
            taken.append(step)
            yield 7 if step == 9 else None

    taken: list[int] = []
    found = [(given, len(taken)) for given in pieces.together(steps())]
    assert found == [(None, 4), (None, 8), (7, 10)]


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("at", [0, 1, 3, 7, 9, 24, 60, 61, 62, 63, 64, 65, 66, 67, 68])
async def test_a_cancel_between_two_steps_loses_nothing(
    worker: BacktestWorker, dsn: str, monkeypatch: pytest.MonkeyPatch, at: int, times: int
) -> None:
    """Of a periodic save, or of the last build before the result: the final save builds anew what was left off."""
    before = asyncio.all_tasks()
    steps = Steps(at)
    monkeypatch.setattr(supervisor, "together", steps)
    task = asyncio.create_task(worker.run(REQUEST, "op", bars=market(), strategy=Counter(), policy=EVERY_BLOCK))
    steps.call = lambda: [task.cancel() for _ in range(times)]
    await asyncio.wait({task})
    assert task.cancelled()
    status, kind, bar = standing(await worker.operations.get("op"))
    assert (status, kind) == ("cancelled", "cancellation")
    assert bar in range(99, 1000, 100)
    state = await kt.CheckpointService(worker.database).load_checkpoint("op")
    assert state is not None
    await nothing_left(worker, dsn, before)
    monkeypatch.undo()
    results = await worker.resume("op", bars=market(), strategy=Counter())
    assert results.digest == await digest_of(Counter, "counter")


@pytest.mark.parametrize("at", range(6))
async def test_cancels_while_the_final_state_is_built(
    worker: BacktestWorker, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    steps = Steps(at)
    monkeypatch.setattr(supervisor, "together", steps)
    policy = kt.CheckpointPolicy(10**9)
    handle = worker.start(REQUEST, "op", bars=market(), strategy=Counter(), policy=policy, throttle=1000)
    reached = handle._actor

    async def begun() -> bool:
        return reached.progress().bar_index >= 99

    await until(begun, "the first boundary")
    steps.call = handle._actor.task.cancel
    handle._actor.task.cancel()
    await asyncio.wait({handle._actor.task})
    assert handle._actor.task.cancelled()
    assert steps.taken > at
    status, kind, bar = standing(await worker.operations.get("op"))
    assert (status, kind) == ("cancelled", "cancellation")
    assert bar >= 99
    results = await worker.resume("op", bars=market(), strategy=Counter())
    assert results.digest == await digest_of(Counter, "counter")


async def test_the_loop_turns_between_two_pieces(worker: BacktestWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two operations that save at once don't come twice between two turns of the loop."""
    turns, seen = 0, list[int]()

    async def count() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    steps = Steps()

    def looked(given: Iterator[Any]) -> Iterator[Any]:
        for piece in steps(given):
            seen.append(turns)
            yield piece

    monkeypatch.setattr(supervisor, "together", looked)
    counting = asyncio.create_task(count())
    runs = [worker.run(REQUEST, bars=market(), strategy=Counter(), policy=EVERY_BLOCK) for _ in range(2)]
    first, second = await asyncio.gather(*runs)
    counting.cancel()
    assert first.digest == second.digest == await digest_of(Counter, "counter")
    assert steps.builds >= 20
    assert len(seen) > 5 * steps.builds
    assert len(set(seen)) == len(seen)


class Standing:
    """A clock that somebody moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_the_first_save_waits_until_the_run_is_long_enough_for_it(worker: BacktestWorker) -> None:
    clock = Standing()
    policy = kt.CheckpointPolicy(100, clock=clock)
    results = await worker.run(REQUEST, bars=market(), strategy=Counter(), policy=policy)
    assert results.run.checkpoints_saved == 0
    plain = kt.CheckpointPolicy(100, max_overhead=None, clock=clock)
    results = await worker.run(REQUEST, bars=market(), strategy=Counter(), policy=plain)
    assert results.run.checkpoints_saved >= 9


async def test_the_more_is_new_the_longer_a_save_waits(worker: BacktestWorker) -> None:
    expected: list[float] = []

    class Asked(kt.CheckpointPolicy):
        def expect(self, save_seconds: float) -> None:
            expected.append(save_seconds)

        def should_checkpoint(self, bar_index: int, force: bool = False) -> bool:
            return bar_index == 499

    results = await worker.run(REQUEST, bars=market(), strategy=Counter(), policy=Asked())
    assert results.run.checkpoints_saved == 1
    assert expected[:5] == sorted(set(expected[:5]))
    assert expected[5] < expected[4]
    assert all(seconds > 0 for seconds in expected)


async def test_so_many_new_records_are_saved_whatever_their_share(
    worker: BacktestWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A last save of all that a fast run makes in the time between two would come too late."""
    seldom = kt.CheckpointPolicy(unit_interval=1_000_000, time_interval_seconds=1e6, max_overhead=0.001)
    await worker.run(REQUEST, "few", bars=market(), strategy=Counter(), policy=seldom)
    monkeypatch.setattr(supervisor, "MOST_UNSAVED", 10)
    handle = worker.start(REQUEST, "many", bars=market(), strategy=Counter(), policy=seldom)
    results = await handle.result()
    assert len(results.ledger) + len(results.recorded_values) > 30
    assert handle.statistics.checkpoints_saved >= 2
    assert (await worker.operations.get("few")).result["run"]["checkpoints_saved"] == 0  # type: ignore[index]
