"""R3: after any cancellation it is saved, or the CancelledError says why not; nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import anyio
import pytest
from supervision_runs import (
    EVERY_BLOCK,
    NEVER,
    REQUEST,
    Gate,
    Held,
    held_digest,
    market,
    nothing_left,
    outside,
    resumed,
    row_held,
    standing,
    until,
    whole,
)

import ktrdr_async as kt
from ktrdr_async.supervision import endings
from ktrdr_async.supervision.worker import BacktestWorker

pytestmark = pytest.mark.anyio
SAVED = ("cancelled", "cancellation", 299)  # the boundary before bar 345, where the gate is


async def begun(worker: BacktestWorker, name: str = "op", policy: kt.CheckpointPolicy = NEVER) -> asyncio.Task[Any]:
    """A task that awaits `worker.run`, held inside the block of bar 345."""
    gate = Gate(345)
    task = asyncio.create_task(
        worker.run(REQUEST, name, bars=market(), strategy=Held(gate), policy=policy), name="the caller"
    )
    await asyncio.wait({task, asyncio.create_task(gate.reached.wait())}, return_when=asyncio.FIRST_COMPLETED)
    assert gate.reached.is_set(), task
    return task


@pytest.mark.parametrize("turns", [0, 1, 2, 5])
@pytest.mark.parametrize("times", [1, 2, 3, 5])
async def test_cancelled_so_many_times_with_so_many_turns_between(
    worker: BacktestWorker, dsn: str, times: int, turns: int
) -> None:
    await held_digest()
    before = asyncio.all_tasks()
    task = await begun(worker)
    for _ in range(times):
        task.cancel()
        for _ in range(turns):
            await asyncio.sleep(0)
    await asyncio.wait({task})
    assert task.cancelled()
    assert standing(await worker.operations.get("op")) == SAVED
    await nothing_left(worker, dsn, before)
    await resumed(worker)
    await nothing_left(worker, dsn, before)


@pytest.mark.parametrize("times", [1, 2, 3, 4, 5])
async def test_a_cancel_while_the_save_waits_for_a_lock(worker: BacktestWorker, dsn: str, times: int) -> None:
    before = asyncio.all_tasks()
    task = await begun(worker)
    async with row_held(dsn, "op") as until_blocked:
        task.cancel()
        await until_blocked()
        for _ in range(times - 1):
            task.cancel()
            await asyncio.sleep(0)
        for _ in range(20):
            await asyncio.sleep(0)
        assert not task.done(), "it ended before its save did"
    await asyncio.wait({task})
    assert task.cancelled()
    assert standing(await worker.operations.get("op")) == SAVED
    await nothing_left(worker, dsn, before)
    await resumed(worker)


@pytest.mark.parametrize("times", [1, 3])
async def test_a_cancel_during_a_periodic_save(worker: BacktestWorker, dsn: str, times: int) -> None:
    before = asyncio.all_tasks()
    gate = Gate(250)
    task = asyncio.create_task(worker.run(REQUEST, "op", bars=market(), strategy=Held(gate), policy=EVERY_BLOCK))
    await gate.reached.wait()
    async with row_held(dsn, "op") as until_blocked:
        gate.open.set()
        await until_blocked()  # the save of bar 299
        for _ in range(times):
            task.cancel()
            await asyncio.sleep(0)
    await asyncio.wait({task})
    assert task.cancelled()
    assert standing(await worker.operations.get("op")) == SAVED
    await nothing_left(worker, dsn, before)
    await resumed(worker)


@pytest.mark.parametrize("times", [1, 3])
async def test_a_cancel_while_a_checkpoint_is_loaded(worker: BacktestWorker, dsn: str, times: int) -> None:
    """Reading is nothing to wait for: it ends at once, and the checkpoint stands."""
    before = asyncio.all_tasks()
    task = await begun(worker)
    task.cancel()
    await asyncio.wait({task})
    async with outside(dsn) as holder, outside(dsn) as looker:
        await holder.execute("BEGIN; LOCK TABLE ktrdr.ledger_segments IN ACCESS EXCLUSIVE MODE")
        task = asyncio.create_task(worker.resume("op", bars=market(), strategy=Held(Gate())))

        async def loading() -> bool:
            return bool(await looker.fetchval("SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))

        await until(loading, "the load waits")
        for _ in range(times):
            task.cancel()
            await asyncio.sleep(0)
        await asyncio.wait({task})
        await holder.execute("ROLLBACK")
    assert task.cancelled()
    assert standing(await worker.operations.get("op")) == SAVED
    await nothing_left(worker, dsn, before)
    await resumed(worker)


async def test_a_cancel_as_soon_as_the_end_is_durable(worker: BacktestWorker, dsn: str) -> None:
    before = asyncio.all_tasks()
    task = await begun(worker)
    async with outside(dsn) as looker:
        task.cancel()
        while await looker.fetchval("SELECT status FROM ktrdr.operations") == "running":
            task.cancel()
        task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    assert standing(await worker.operations.get("op")) == SAVED
    await nothing_left(worker, dsn, before)


async def test_a_timeout_says_timeout_and_leaves_no_cancellation_behind(worker: BacktestWorker, dsn: str) -> None:
    before = asyncio.all_tasks()
    gate = Gate(345)
    me = asyncio.current_task()
    assert me is not None
    with pytest.raises(TimeoutError):  # noqa: PT012 - what the block itself raises is the point
        async with asyncio.timeout(None) as timeout:
            run = worker.run(REQUEST, "op", bars=market(), strategy=Held(gate), policy=NEVER)
            expire = asyncio.create_task(gate.reached.wait())
            expire.add_done_callback(lambda _: timeout.reschedule(asyncio.get_running_loop().time()))
            await run
    assert me.cancelling() == 0
    assert standing(await worker.operations.get("op")) == SAVED
    await nothing_left(worker, dsn, before)
    await resumed(worker)


async def test_an_anyio_scope(worker: BacktestWorker, dsn: str) -> None:
    before = asyncio.all_tasks()
    gate = Gate(345)
    me = asyncio.current_task()
    assert me is not None
    with anyio.CancelScope() as scope:
        expire = asyncio.create_task(gate.reached.wait())
        expire.add_done_callback(lambda _: scope.cancel())
        await worker.run(REQUEST, "op", bars=market(), strategy=Held(gate), policy=NEVER)
    assert scope.cancelled_caught
    assert me.cancelling() == 0
    assert standing(await worker.operations.get("op")) == SAVED
    await nothing_left(worker, dsn, before)
    await resumed(worker)


async def test_a_task_group_that_fails_beside_it(worker: BacktestWorker, dsn: str) -> None:
    before = asyncio.all_tasks()
    gate = Gate(345)

    async def failing() -> None:
        await gate.reached.wait()
        raise KeyError("beside")

    with pytest.raises(ExceptionGroup) as caught:  # noqa: PT012 - what the block itself raises is the point
        async with asyncio.TaskGroup() as group:
            run = group.create_task(worker.run(REQUEST, "op", bars=market(), strategy=Held(gate), policy=NEVER))
            group.create_task(failing())
    assert [type(error) for error in caught.value.exceptions] == [KeyError]
    assert run.cancelled()
    assert standing(await worker.operations.get("op")) == SAVED
    await nothing_left(worker, dsn, before)
    await resumed(worker)


async def test_an_anyio_task_group_that_fails_beside_several(worker: BacktestWorker, dsn: str) -> None:
    before = asyncio.all_tasks()
    gates = [Gate(345) for _ in range(5)]

    async def failing() -> None:
        for gate in gates:
            await gate.reached.wait()
        raise KeyError("beside")

    async def running(number: int) -> None:
        await worker.run(REQUEST, f"op{number}", bars=market(), strategy=Held(gates[number]), policy=NEVER)

    with pytest.raises(ExceptionGroup) as caught:  # noqa: PT012 - what the block itself raises is the point
        async with anyio.create_task_group() as group:
            for number in range(5):
                group.start_soon(running, number)
            group.start_soon(failing)
    assert [type(error) for error in caught.value.exceptions] == [KeyError]
    for number in range(5):
        assert standing(await worker.operations.get(f"op{number}")) == SAVED
    await nothing_left(worker, dsn, before)


async def test_a_failed_save_is_a_note_and_never_what_is_raised(
    worker: BacktestWorker, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endings, "FINAL_SAVE_SECONDS", 1.0)
    before = asyncio.all_tasks()
    task = await begun(worker)
    handle = worker.handle("op")
    assert handle is not None
    async with row_held(dsn, "op") as until_blocked:
        task.cancel()
        await until_blocked()
        await asyncio.wait({task})
        assert task.cancelled()
        with pytest.raises(asyncio.CancelledError) as caught:
            task.result()
        assert any("SaveTimeoutError" in note for note in caught.value.__notes__)
        for _ in range(2):  # everybody who asks is told, not only the first one
            with pytest.raises(kt.CancellationError) as told:
                await handle.result()
            assert any("SaveTimeoutError" in note for note in told.value.__notes__)
        assert (await worker.operations.get("op")).status is kt.Status.RUNNING

        async def all_back() -> bool:
            return whole(worker)  # a heartbeat may be trying to write the end at this very moment

        await until(all_back, "every connection is back")
    # It isn't stranded: its end is written before anybody here goes on with it.
    await resumed(worker)
    await nothing_left(worker, dsn, before)


async def test_a_timeout_with_a_failed_save_is_still_a_timeout(
    worker: BacktestWorker, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endings, "FINAL_SAVE_SECONDS", 0.5)
    gate = Gate(345)
    async with outside(dsn) as holder:
        with pytest.raises(TimeoutError):  # noqa: PT012 - what the block itself raises is the point
            async with asyncio.timeout(None) as timeout:
                run = asyncio.ensure_future(worker.run(REQUEST, "op", bars=market(), strategy=Held(gate), policy=NEVER))
                await gate.reached.wait()
                await holder.execute("BEGIN; SELECT 1 FROM ktrdr.operations FOR UPDATE")
                timeout.reschedule(asyncio.get_running_loop().time())
                await run
        assert run.cancelled()
        await holder.execute("ROLLBACK")
    await resumed(worker)


async def test_an_end_that_was_not_written_is_written_when_the_database_answers(
    worker: BacktestWorker, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endings, "FINAL_SAVE_SECONDS", 0.5)
    task = await begun(worker, policy=EVERY_BLOCK)
    async with row_held(dsn, "op"):
        task.cancel()
        await asyncio.wait({task})
        assert (await worker.operations.get("op")).status is kt.Status.RUNNING

    async def ended() -> bool:
        return (await worker.operations.get("op")).status is kt.Status.CANCELLED

    await until(ended, "the heart writes what is owed")
    async with BacktestWorker.open(dsn) as other:  # anybody may go on with it now
        await resumed(other)


async def test_a_stopped_server_ends_within_the_deadline(
    worker: BacktestWorker, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endings, "FINAL_SAVE_SECONDS", 2.0)
    task = await begun(worker)
    async with outside(dsn) as looker:
        found = await looker.fetch(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name <> 'test'"
        )
    pids = [row["pid"] for row in found]
    assert len(pids) >= 2  # the pool's and the reserved one
    clock = asyncio.get_running_loop().time
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        started = clock()
        task.cancel()
        await asyncio.wait({task})
        seconds = clock() - started
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    assert task.cancelled()
    assert seconds < 4.5, "longer than the deadline and the time to cut a connection"
    with pytest.raises(asyncio.CancelledError) as caught:
        task.result()
    assert any("SaveTimeoutError" in note for note in caught.value.__notes__)
    await resumed(worker)
    assert whole(worker)


async def test_one_stopped_connection_does_not_lose_the_save(
    worker: BacktestWorker, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endings, "FINAL_SAVE_SECONDS", 3.0)
    task = await begun(worker)
    reserved = worker.database._reserved[0]._held
    assert reserved is not None
    async with outside(dsn) as looker:
        found = await looker.fetch(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name <> 'test'"
        )
    pids = [row["pid"] for row in found if row["pid"] != reserved.get_server_pid()]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        task.cancel()
        await asyncio.wait({task})
        assert standing(await worker.operations.get("op")) == SAVED
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    assert task.cancelled()
    await resumed(worker)
