"""BacktestWorker: every verb by id, from this worker and from another one, and what its leaving leaves."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from supervision_runs import (
    EVERY_BLOCK,
    MARKET,
    NEVER,
    REQUEST,
    Counter,
    Gate,
    Held,
    digest_of,
    held,
    held_digest,
    market,
    nothing_left,
    outside,
    resumed,
    standing,
    until,
)

import ktrdr_async as kt
from ktrdr_async.supervision.worker import BacktestWorker

pytestmark = pytest.mark.anyio
BUILT_IN = kt.BacktestRequest(data=MARKET, strategy="sma_cross", commission=0.00002, slippage=0.00005)


async def test_run_is_idempotent_by_id(worker: BacktestWorker) -> None:
    first = await worker.run(BUILT_IN, "op")
    again = await worker.run(BUILT_IN, "op")
    assert first.digest == again.digest
    assert first.run == again.run, "it was computed again"
    assert (await worker.operations.get("op")).attempts == 1
    one, two = await asyncio.gather(worker.run(BUILT_IN, "both"), worker.run(BUILT_IN, "both"))
    assert one is two


async def test_another_request_under_the_id_is_refused(worker: BacktestWorker) -> None:
    other = kt.BacktestRequest(data=MARKET, strategy="sma_cross", initial_capital=5.0)
    handle, _ = await held(worker)
    with pytest.raises(kt.OperationConflictError):  # of one that runs here
        worker.start(other, "op")
    await handle.cancel()
    with pytest.raises(kt.OperationConflictError):  # of a stored one
        await worker.run(other, "op")
    assert standing(await worker.operations.get("op")) == ("cancelled", "cancellation", 299)


async def test_nothing_is_started_by_what_cannot_run(worker: BacktestWorker, tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text("Date,Open,High,Low,Close\n2024-01-01,1,2,0,nonsense\n")
    for request in (
        kt.BacktestRequest(data=MARKET, strategy="no_such_strategy"),
        kt.BacktestRequest(data=MARKET, strategy="sma_cross", parameters={"fast": -1}),
        kt.BacktestRequest(data=str(tmp_path / "bad.csv"), strategy="sma_cross"),
        kt.BacktestRequest(strategy="sma_cross"),
    ):
        with pytest.raises(kt.InputError):
            await worker.run(request, "op")
    with pytest.raises(kt.InputError):
        await worker.run(BUILT_IN, "not an id")
    assert await worker.operations.list() == []


async def test_verbs_take_an_id_and_work_from_another_worker(worker: BacktestWorker, dsn: str) -> None:
    handle, gate = await held(worker, policy=EVERY_BLOCK)
    async with BacktestWorker.open(dsn) as other:
        assert other.handle("op") is None
        with pytest.raises(kt.InvalidTransitionError, match="no result yet"):
            await other.results("op", bars=market())
        with pytest.raises(kt.AlreadyClaimedError):
            await other.resume("op", bars=market(), strategy=Held(Gate()))
        with pytest.raises(kt.AlreadyClaimedError):
            await other.run(REQUEST, "op", bars=market(), strategy=Held(Gate()))
        seen: asyncio.Queue[str] = asyncio.Queue()

        async def watch() -> None:
            async for now in other.progress("op", interval=0.01):
                seen.put_nowait(now.status)

        watching = asyncio.create_task(watch())
        joined = asyncio.create_task(worker.resume("op"))  # of one that runs here: that run
        assert await seen.get() == "running"
        gate.open.set()
        assert await joined is await handle.result()
        await watching
        assert [seen.get_nowait() for _ in range(seen.qsize())][-1] == "completed"
        stored = await other.results("op", bars=market())
        assert stored.digest == (await handle.result()).digest == await held_digest()
        assert (stored.equity == (await handle.result()).equity).all()
        assert stored.metrics == (await handle.result()).metrics
        assert (await other.resume("op", bars=market(), strategy=Held(Gate()))).digest == stored.digest
        with pytest.raises(kt.CheckpointMismatchError):  # the data have changed since
            await other.results("op", bars=kt.Bars.read("synthetic:?bars=1000&seed=8&timeframe=1h"))
        with pytest.raises(kt.OperationNotFoundError):
            await other.results("nothing")
        with pytest.raises(kt.OperationNotFoundError):
            await other.resume("nothing")


async def test_leaving_shuts_everything_down_and_orphans_are_taken_up(dsn: str) -> None:
    before = asyncio.all_tasks()
    async with BacktestWorker.open(dsn) as first:
        handles = [first.start(BUILT_IN, f"op{n}", policy=NEVER, throttle=2_000) for n in range(5)]
        for handle in handles:
            async for now in handle.progress(0.01):
                if now.bar_index >= 99:
                    break
    for number, handle in enumerate(handles):
        with pytest.raises(kt.CancellationError, match="shut down with its worker"):
            await handle.result()
        assert handle.inspect().status == "interrupted"
        with pytest.raises(kt.InvalidTransitionError):
            first.start(BUILT_IN, f"new{number}")
    assert {task for task in asyncio.all_tasks() if not task.done()} <= before
    clean = (await kt.backtest(None, "sma_cross", request=BUILT_IN)).digest
    async with BacktestWorker.open(dsn, resume_orphans=True) as second:
        for number in range(5):
            found = second.handle(f"op{number}")
            results = await (found.result() if found is not None else second.results(f"op{number}"))
            assert results.digest == clean
            assert results.run.resumed_from


async def test_leaving_takes_no_longer_than_it_may(dsn: str) -> None:
    clock = asyncio.get_running_loop().time
    async with outside(dsn) as holder:
        async with BacktestWorker.open(dsn, shutdown_seconds=1.0) as worker:
            await held(worker)
            await holder.execute("BEGIN; SELECT 1 FROM ktrdr.operations FOR UPDATE")
            started = clock()
        assert clock() - started < 8.0
        await holder.execute("ROLLBACK")


async def test_who_only_watches_cancels_nothing(worker: BacktestWorker) -> None:
    handle, gate = await held(worker)

    async def watch() -> None:
        async for _ in handle.progress(0.01):
            pass

    watching = [asyncio.create_task(handle.result()), asyncio.create_task(watch())]
    await asyncio.sleep(0)
    for task in watching:
        task.cancel()
    await asyncio.wait(watching)
    assert all(task.cancelled() for task in watching)
    assert not handle.done
    gate.open.set()
    assert (await handle.result()).digest == await held_digest()


async def test_operations_above_the_limit_wait_and_can_be_seen_and_ended(dsn: str) -> None:
    async with BacktestWorker.open(dsn, max_operations=2) as worker:
        before = asyncio.all_tasks()
        gates = [Gate(345) for _ in range(6)]
        handles = [
            worker.start(REQUEST, f"op{n}", bars=market(), strategy=Held(gate), policy=NEVER)
            for n, gate in enumerate(gates)
        ]
        await gates[0].reached.wait()
        await gates[1].reached.wait()

        async def all_there() -> bool:
            return len(await worker.operations.list()) == 6

        await until(all_there, "those that wait have rows")
        assert [gate.reached.is_set() for gate in gates] == [True, True, False, False, False, False]
        assert (await worker.operations.get("op2")).status is kt.Status.PENDING
        assert (await worker.cancel("op2")).status is kt.Status.CANCELLED
        async with BacktestWorker.open(dsn) as other:
            assert (await other.cancel("op3")).status is kt.Status.CANCELLED
        for gate in gates:
            gate.open.set()  # all of them: who waits for a slot gets it in the order in which their rows were made
        for number in range(6):
            if number in (2, 3):
                with pytest.raises(kt.CancellationError):
                    await handles[number].result()
            else:
                assert (await handles[number].result()).digest == await held_digest()
        for number in (2, 3):
            await resumed(worker, f"op{number}")
        await nothing_left(worker, dsn, before)


async def test_what_waited_when_its_worker_left_is_an_orphan(dsn: str) -> None:
    async with BacktestWorker.open(dsn, max_operations=1) as worker:
        handles = [worker.start(BUILT_IN, f"op{n}", throttle=500) for n in range(3)]

        async def all_there() -> bool:
            return len(await worker.operations.list()) == 3

        await until(all_there, "those that wait have rows")
    for handle in handles:
        with pytest.raises(kt.CancellationError):
            await handle.result()
    async with BacktestWorker.open(dsn, resume_orphans=True) as second:
        for number in range(3):
            found = second.handle(f"op{number}")
            await (found.result() if found is not None else second.results(f"op{number}"))


async def test_pause_go_on_checkpoint_inspect(worker: BacktestWorker) -> None:
    gate = Gate(345)
    handle = worker.start(REQUEST, "op", bars=market(), strategy=Held(gate), policy=NEVER)
    await gate.reached.wait()
    assert handle.inspect().bar_index == 299
    asked = asyncio.create_task(handle.checkpoint())
    handle.pause()
    await asyncio.sleep(0)
    gate.open.set()
    assert await asked == 399

    async def paused() -> bool:
        return (await worker.operations.get("op")).checkpoint_bar == 399

    await until(paused, "the checkpoint before the halt")
    assert handle.inspect().paused
    assert handle.inspect().bar_index == handle.inspect().checkpoint_bar == 399
    assert await handle.checkpoint() == 399, "it can be asked for during a halt"
    assert handle.inspect().bar_index == 399
    handle.go_on()
    assert (await handle.result()).digest == await held_digest()
    with pytest.raises(kt.InvalidTransitionError, match="completed"):
        await handle.checkpoint()


async def test_who_asks_for_a_checkpoint_hears_of_the_end(worker: BacktestWorker) -> None:
    handle, gate = await held(worker, bar=950)
    asked = [asyncio.create_task(handle.checkpoint()) for _ in range(3)]
    await asyncio.sleep(0)
    await handle.cancel()
    for task in asked:
        with pytest.raises(kt.CancellationError):
            await task
    with pytest.raises(kt.CancellationError):
        await handle.checkpoint()
    gate.open.set()


async def test_a_halt_can_be_cancelled(worker: BacktestWorker) -> None:
    handle, gate = await held(worker)
    handle.pause()
    gate.open.set()

    async def halted() -> bool:
        return (await worker.operations.get("op")).checkpoint_bar == 399

    await until(halted, "it halts")
    await handle.cancel()
    assert standing(await worker.operations.get("op")) == ("cancelled", "cancellation", 399)
    await resumed(worker)


async def test_a_pause_from_another_worker_stays_across_claims(worker: BacktestWorker, dsn: str) -> None:
    handle, gate = await held(worker, policy=NEVER)
    async with BacktestWorker.open(dsn) as other:
        await other.pause("op")

        async def told() -> bool:
            return handle.inspect().paused

        await until(told, "the heart hears of it")
        gate.open.set()

        async def halted() -> bool:
            return (await other.operations.get("op")).checkpoint_bar == 399

        await until(halted, "it halts")
        await handle.cancel()
        again = worker.resume_handle("op", bars=market(), strategy=Held(Gate()))

        async def halted_again() -> bool:
            return again.inspect().bar_index == 499

        await until(halted_again, "it halts at its first boundary")
        assert again.inspect().paused
        await other.go_on("op")
        assert (await again.result()).digest == await held_digest()


async def test_hundreds_at_once(worker: BacktestWorker, dsn: str) -> None:
    """All digests are equal, and the loop goes on: another task gets its turns in between."""
    clean = await digest_of(Counter, "counter")
    before = asyncio.all_tasks()
    ticks, done = 0, False

    async def tick() -> None:
        nonlocal ticks
        while not done:
            ticks += 1
            await asyncio.sleep(0)

    ticking = asyncio.create_task(tick())
    handles = [worker.start(REQUEST, f"op{n}", bars=market(), strategy=Counter(), policy=NEVER) for n in range(300)]
    digests = {(await handle.result()).digest for handle in handles}
    done = True
    await ticking
    assert digests == {clean}
    assert ticks > 1_000
    await nothing_left(worker, dsn, before)


async def test_bars_and_strategy_in_memory_are_handed_over_again(worker: BacktestWorker) -> None:
    handle, _ = await held(worker)
    await handle.cancel()
    other: Any = kt.Bars.read("synthetic:?bars=1000&seed=8&timeframe=1h")
    was = standing(await worker.operations.get("op"))
    with pytest.raises(kt.InputError, match="are not those of the operation"):
        await worker.resume("op", bars=other, strategy=Held(Gate()))
    with pytest.raises(kt.InputError, match="names no data"):
        await worker.resume("op", strategy=Held(Gate()))
    with pytest.raises(kt.InputError):
        await worker.resume("op", bars=market(), strategy=Counter())
    assert standing(await worker.operations.get("op")) == was
    await resumed(worker)
