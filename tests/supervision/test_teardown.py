"""A loop that is torn down under its runs: each is saved, also where the teardown cancels the save's own task."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from supervision_runs import (
    EVERY_BLOCK,
    NEVER,
    REQUEST,
    Gate,
    Held,
    held,
    market,
    resumed,
    row_held,
    standing,
    stored_request,
)

from ktrdr_async.supervision.worker import BacktestWorker

pytestmark = pytest.mark.anyio


def in_a_loop_of_its_own(main: Callable[[], Any]) -> BaseException | None:
    """Runs `asyncio.run(main())` in a thread to its very end; what it raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    return raised[0] if raised else None


@pytest.mark.parametrize("kept", [True, False], ids=["referenced", "collected"])
@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
async def test_a_loop_that_is_torn_down_under_its_runs(dsn: str, fails: bool, kept: bool) -> None:
    keep: list[Any] = []

    async def main() -> None:
        opened = BacktestWorker.open(dsn)
        if kept:
            keep.append(opened)
        worker = await opened.__aenter__()  # and never left
        for number in range(5):
            gate = Gate(345)
            policy = EVERY_BLOCK if number % 2 else NEVER
            worker.start(REQUEST, f"op{number}", bars=market(), strategy=Held(gate), policy=policy)
            await gate.reached.wait()
        if fails:
            raise RuntimeError("main failed")

    raised = await anyio.to_thread.run_sync(in_a_loop_of_its_own, main)
    assert type(raised) is (RuntimeError if fails else type(None))
    async with BacktestWorker.open(dsn) as worker:
        for number in range(5):
            status, _, bar = standing(await worker.operations.get(f"op{number}"))
            assert (status, bar) in (("cancelled", 299), ("interrupted", 299))
            await resumed(worker, f"op{number}")


async def test_main_is_cancelled_under_its_runs(dsn: str) -> None:
    async def main() -> None:
        async with BacktestWorker.open(dsn) as worker:
            gates = [Gate(345) for _ in range(3)]
            for number, gate in enumerate(gates):
                worker.start(REQUEST, f"op{number}", bars=market(), strategy=Held(gate), policy=NEVER)
                await gate.reached.wait()
            me = asyncio.current_task()
            assert me is not None
            for _ in range(3):
                asyncio.get_running_loop().call_soon(me.cancel)
            await asyncio.sleep(60)

    assert isinstance(await anyio.to_thread.run_sync(in_a_loop_of_its_own, main), asyncio.CancelledError)
    async with BacktestWorker.open(dsn) as worker:
        for number in range(3):
            assert standing(await worker.operations.get(f"op{number}")) == ("interrupted", "shutdown", 299)
            await resumed(worker, f"op{number}")


async def test_a_save_that_the_teardown_cancels_is_made_again(dsn: str) -> None:
    at_the_gate, locked, saving = threading.Event(), threading.Event(), threading.Event()
    keep: list[Any] = []

    async def main() -> None:
        opened = BacktestWorker.open(dsn)
        keep.append(opened)
        worker = await opened.__aenter__()
        handle, _ = await held(worker)
        at_the_gate.set()
        await asyncio.to_thread(locked.wait, 60)
        keep.append(asyncio.create_task(handle.cancel()))
        await asyncio.to_thread(saving.wait, 60)  # the save waits for the row; now everything here is cancelled

    async with BacktestWorker.open(dsn) as worker:
        await worker.operations.create("op", await stored_request(Held(Gate())))
        running = asyncio.create_task(anyio.to_thread.run_sync(in_a_loop_of_its_own, main))

        assert await anyio.to_thread.run_sync(at_the_gate.wait, 60)
        async with row_held(dsn, "op") as until_blocked:
            locked.set()
            await until_blocked()
            saving.set()
            await until_blocked(2)  # the save that was cut off, which the server knows nothing of, and the new one
        assert await running is None
        assert standing(await worker.operations.get("op")) == ("cancelled", "cancellation", 299)
        await resumed(worker)
