"""R3 against storms: cancellations of every kind, several at once, swept over the time of a save.

The campaign: pytest -m campaign tests/supervision/test_cancel_storm.py -s
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import threading
from collections import Counter as Tally
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import msgspec
import psutil
import pytest
from campaigns import Figures, sized
from homes import seed
from supervision_kills import postmaster
from supervision_runs import (
    held_digest,
    nothing_left,
    outside,
    resumed,
    standing,
    until,
    whole,
)
from supervision_storms import Caller, Storm, begun, broken_over, drawn, held_up, proxied
from test_teardown import in_a_loop_of_its_own

import ktrdr_async as kt
from ktrdr_async.storage.embedded import EmbeddedServer
from ktrdr_async.supervision import endings
from ktrdr_async.supervision.worker import BacktestWorker

pytestmark = pytest.mark.anyio
DEADLINE = 10.0  # of a cancellation
SHORT = 0.5  # the same where nothing lets the save through
CUTTING = 3.0  # seconds that cutting a connection may take beyond a deadline


def check_end(storm: Storm, caller: Caller, row: kt.Operation) -> str:
    """Saved, or a CancelledError that says why not."""
    notes = "\n".join(getattr(caller.seen, "__notes__", []))
    status, kind, bar = standing(row)
    if storm.moment == "after" and storm.save == "completion":
        assert caller.seen is None or isinstance(caller.seen, asyncio.CancelledError), storm
    else:
        assert isinstance(caller.seen, asyncio.CancelledError), (storm, caller.seen)
    if status == "running":
        assert storm.release == "late", storm
        assert "TimeoutError" in notes, (storm, notes)
        return "told"
    if storm.save == "completion" and status == "completed":
        return "completed"
    if storm.save == "completion":
        expected = (899, 999)
    elif storm.save == "final":
        expected = (299, 299)
    else:
        expected = (299, 399) if storm.moment == "before" else (399, 399)
    assert (status, kind) == ("cancelled", "cancellation"), (storm, row)
    assert bar in expected, (storm, row)
    assert storm.release == "late" or "save" not in notes, (storm, notes)  # it may have landed after all
    return "saved"


def check_caller(storm: Storm, caller: Caller) -> None:
    """One kind of cancellation alone is heard of as what it is, and leaves none behind."""
    kinds = {act for act, _ in storm.acts}
    if len(kinds) > 1 or caller.seen is None:
        return
    (kind,) = kinds
    if kind == "native":
        assert caller.task.cancelled(), (storm, caller.task)
        return
    assert caller.cancelling == 0, storm
    error = caller.task.exception()
    while isinstance(error, BaseExceptionGroup):
        (error,) = error.exceptions
    expected = {"scope": type(None), "timeout": TimeoutError, "fail_after": TimeoutError}
    assert type(error) is expected.get(kind, ArithmeticError), (storm, error)


async def usable(worker: BacktestWorker) -> None:
    """Every connection of the pool is in it, and works."""
    assert whole(worker)

    async def use() -> None:
        async with worker.database.connection(timeout=10) as connection:
            assert await connection.fetchval("SELECT 1") == 1

    await asyncio.gather(*(use() for _ in range(worker.database._pool.get_max_size())))
    assert whole(worker)


@sized("trials", ci=36, whole=1_080, minutes=60)
async def test_storms_over_every_moment_of_a_save(
    dsn: str, trials: int, campaign_seed: int, figures: Figures, monkeypatch: pytest.MonkeyPatch
) -> None:
    await held_digest()
    clock = asyncio.get_running_loop().time
    ends: Tally[str] = Tally()
    longest = {"let through": 0.0, "never let through": 0.0}
    with proxied(dsn) as (proxy, through):
        async with BacktestWorker.open(through) as worker:
            for number in range(trials):
                storm = drawn(campaign_seed, number)
                late, name = storm.release == "late", f"op{number}"
                monkeypatch.setattr(endings, "FINAL_SAVE_SECONDS", SHORT if late else DEADLINE)
                before = asyncio.all_tasks()
                caller, gate = await begun(worker, storm, name)
                async with held_up(storm, worker, dsn, proxy, name) as reached:
                    started = clock()
                    await broken_over(storm, caller, gate, reached)
                    if late:
                        await asyncio.wait({caller.task}, timeout=SHORT + CUTTING)
                        assert caller.task.done(), f"{storm}: longer than the deadline"
                        row = await worker.operations.get(name)
                await asyncio.wait({caller.task}, timeout=DEADLINE)
                assert caller.task.done(), f"{storm}: longer than the deadline"
                which = "never let through" if late else "let through"
                longest[which] = max(longest[which], clock() - started)
                if not late:
                    row = await worker.operations.get(name)
                ends[check_end(storm, caller, row)] += 1
                check_caller(storm, caller)
                await resumed(worker, name)
                await worker.debts.pay()
                await nothing_left(worker, dsn, before)
                await usable(worker)
    figures.add(
        "storms of cancellations over every moment of a save",
        f"{trials}: {ends['saved']} saved, {ends['completed']} completed, {ends['told']} told why not, 0 lost, "
        f"0 tasks, transactions or connections left, all resumed to the clean digest; the longest took "
        f"{longest['let through']:.1f} s, of those with a deadline of {SHORT} s {longest['never let through']:.1f} s",
    )


class Torn:
    """A worker in a loop that ends around its run, in the middle of a storm."""

    def __init__(self, dsn: str, storm: Storm, name: str, leaves: bool) -> None:
        self.dsn, self.storm, self.name, self.leaves = dsn, storm, name, leaves
        self.at_the_gate, self.armed, self.reached, self.torn = (threading.Event() for _ in range(4))
        self.keep: list[object] = []

    async def main(self) -> None:
        """Ends by leaving the worker, or with `asyncio.run` under it, while the save goes on."""
        opened = BacktestWorker.open(self.dsn)
        self.keep.append(opened)
        worker = await opened.__aenter__()
        caller, gate = await begun(worker, self.storm, self.name)
        self.at_the_gate.set()
        await asyncio.to_thread(self.armed.wait, 60)

        async def reached() -> None:
            await asyncio.to_thread(self.reached.wait, 60)

        await broken_over(self.storm, caller, gate, reached)
        if self.leaves:
            asyncio.get_running_loop().call_soon(self.torn.set)
            await opened.__aexit__(None, None, None)
            return
        self.keep.append(asyncio.create_task(self._feel()))
        await asyncio.sleep(0)

    async def _feel(self) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            self.torn.set()


@sized("trials", ci=6, whole=240, minutes=60)
async def test_storms_while_the_loop_or_the_worker_ends(
    dsn: str, trials: int, campaign_seed: int, figures: Figures, caplog: pytest.LogCaptureFixture
) -> None:
    await held_digest()
    ends: Tally[str] = Tally()
    with proxied(dsn) as (proxy, through):
        async with BacktestWorker.open(dsn) as worker:
            for number in range(trials):
                chance, name = random.Random(f"{campaign_seed}-torn-{number}"), f"op{number}"
                storm = msgspec.structs.replace(
                    drawn(campaign_seed, 10_000 + number), save=("final", "periodic", "completion")[number % 3],
                    moment=chance.choice(("before", "request", "row", "reply")), release=chance.choice(("on", "cut")),
                )  # fmt: skip
                if storm.save != "final" and chance.random() < 0.5:
                    storm = msgspec.structs.replace(storm, acts=())
                torn = Torn(f"{through}&application_name=torn", storm, name, leaves=number // 3 % 2 == 1)
                with caplog.at_level(logging.ERROR, "asyncio"):
                    caplog.clear()
                    running = asyncio.create_task(anyio.to_thread.run_sync(in_a_loop_of_its_own, torn.main))
                    assert await anyio.to_thread.run_sync(torn.at_the_gate.wait, 60)
                    async with held_up(storm, None, dsn, proxy, name) as reached:
                        torn.armed.set()
                        await reached()
                        torn.reached.set()
                        assert await anyio.to_thread.run_sync(torn.torn.wait, 60)
                    assert await running is None, storm
                    # Where a worker is never left, asyncio also tells that it closes its generators all at once.
                    said = [one.getMessage() for one in caplog.records if one.name == "asyncio"]
                    bad = [one for one in said if torn.leaves or "destroyed" in one or "never" in one]
                    assert not bad, (storm, bad)
                status, _, bar = standing(await worker.operations.get(name))
                saved = {"periodic": (299, 399), "final": (299,), "completion": (899, 999)}[storm.save]
                ended = status in ("cancelled", "interrupted")
                assert status == "completed" or (ended and bar in saved), (storm, status, bar)
                ends[status] += 1
                async with outside(dsn) as looker:

                    async def gone(looker: Any = looker) -> bool:
                        return not await looker.fetch("SELECT FROM pg_stat_activity WHERE application_name = 'torn'")

                    await until(gone, f"{storm}: every connection is closed")
                await resumed(worker, name)
    figures.add(
        "storms while asyncio.run or the worker ends",
        f"{trials}: {dict(sorted(ends.items()))}, 0 lost, all resumed to the clean digest",
    )


@sized("trials", ci=2, whole=40, minutes=30)
async def test_storms_over_a_server_that_stands_still(
    home: Path, initialized: Path, trials: int, campaign_seed: int, figures: Figures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGSTOP of the server and all of its processes during the save; SIGCONT before its deadline, or after."""
    await held_digest()
    seed(home, initialized)
    server = EmbeddedServer(home)
    where = server.start()
    dsn = f"postgresql://{where.user}@/{where.database}?host={where.host}&port={where.port}"
    clock = asyncio.get_running_loop().time
    ends: Tally[str] = Tally()
    longest = 0.0
    try:
        async with BacktestWorker.open(dsn) as worker:
            for number in range(trials):
                late, name = number % 2 == 1, f"op{number}"
                storm = msgspec.structs.replace(
                    drawn(campaign_seed, 20_000 + number), moment="before", release="late" if late else "on",
                    save=("final", "periodic", "completion")[number // 2 % 3],
                )  # fmt: skip
                monkeypatch.setattr(endings, "FINAL_SAVE_SECONDS", SHORT if late else DEADLINE)
                before = asyncio.all_tasks()
                caller, gate = await begun(worker, storm, name)
                with standing_still(home):
                    started = clock()
                    await broken_over(storm, caller, gate, anyio.lowlevel.checkpoint)
                    if late:
                        await asyncio.wait({caller.task}, timeout=SHORT + 2 * CUTTING)
                        assert caller.task.done(), f"{storm}: longer than the deadline"
                        longest = max(longest, clock() - started)
                    else:
                        await asyncio.wait({caller.task}, timeout=0.05)
                        assert not caller.task.done(), f"{storm}: {caller.seen}"
                await asyncio.wait({caller.task}, timeout=DEADLINE)
                assert caller.task.done(), f"{storm}: longer than the deadline"
                ends[check_end(storm, caller, await worker.operations.get(name))] += 1
                check_caller(storm, caller)
                await resumed(worker, name)
                await nothing_left(worker, dsn, before)
                await usable(worker)
    finally:
        server.release()
    figures.add(
        "storms over a server that stands still",
        f"{trials}: {dict(sorted(ends.items()))}, 0 lost, all resumed to the clean digest; with a deadline of "
        f"{SHORT} s the longest took {longest:.1f} s",
    )


@contextmanager
def standing_still(home: Path) -> Iterator[None]:
    """The home's server and all of its processes, stopped."""
    pid = postmaster(home)
    assert pid is not None
    processes = [psutil.Process(pid)]
    os.kill(pid, signal.SIGSTOP)  # first: it makes no more of them
    processes += processes[0].children(recursive=True)
    try:
        for process in processes:
            process.send_signal(signal.SIGSTOP)
        yield
    finally:
        for process in processes:
            process.send_signal(signal.SIGCONT)
