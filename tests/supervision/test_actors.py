"""One that dies takes no other with it; what can't be asked for is refused before anything is stored."""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from supervision_runs import (
    MARKET,
    NEVER,
    REQUEST,
    Counter,
    Gate,
    Held,
    held,
    held_digest,
    market,
    nothing_left,
    resumed,
    standing,
    stored_request,
    until,
)

import ktrdr_async as kt
from ktrdr_async.operations.lifecycle import Owner
from ktrdr_async.supervision.worker import BacktestWorker

pytestmark = pytest.mark.anyio


class Leaving(kt.Strategy):
    """Ends its process, or tries to."""

    def __init__(self, where: str = "on_bar") -> None:
        self.where = where

    def prepare(self, bars: kt.Bars) -> dict[str, Any]:
        if self.where == "prepare":
            sys.exit(3)
        return {}

    def on_bar(self, bar: kt.Bar) -> None:
        if bar.index == 345:
            raise SystemExit(3)


@pytest.mark.parametrize(("where", "bar"), [("prepare", None), ("on_bar", 299)])
async def test_a_strategy_that_exits_takes_no_other_with_it(
    worker: BacktestWorker, dsn: str, where: str, bar: int | None
) -> None:
    before = asyncio.all_tasks()
    other, gate = await held(worker, name="other")
    with pytest.raises(kt.KtrdrError, match="ended its process: SystemExit"):
        await worker.run(REQUEST, "op", bars=market(), strategy=Leaving(where), policy=NEVER)
    row = await worker.operations.get("op")
    assert (row.status, row.checkpoint_bar) == (kt.Status.FAILED, bar)
    gate.open.set()
    assert (await other.result()).digest == await held_digest()
    await nothing_left(worker, dsn, before)


async def test_a_module_that_exits_takes_no_other_with_it(
    worker: BacktestWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "module_that_exits.py").write_text("import sys\nsys.exit('no')\n")
    with pytest.raises((kt.KtrdrError, SystemExit)) as caught:
        await worker.run(kt.BacktestRequest(data=MARKET, strategy="module_that_exits:X"), "op")
    assert isinstance(caught.value, kt.KtrdrError)
    assert await worker.operations.list() == []


async def test_many_that_fail_beside_many_that_do_not(worker: BacktestWorker, dsn: str) -> None:
    before = asyncio.all_tasks()
    clean = (await kt.backtest(market(), Counter(), request=REQUEST)).digest
    good = [worker.start(REQUEST, f"good{n}", bars=market(), strategy=Counter()) for n in range(20)]
    bad = [worker.start(REQUEST, f"bad{n}", bars=market(), strategy=Counter(fail_at=50 * n)) for n in range(20)]
    for handle in bad:
        with pytest.raises(ZeroDivisionError):
            await handle.result()
    for handle in good:
        assert (await handle.result()).digest == clean
    await nothing_left(worker, dsn, before)


async def test_what_cannot_be_asked_for(worker: BacktestWorker, dsn: str) -> None:
    for throttle in (0.0, -1.0, float("nan")):
        with pytest.raises(kt.ParameterError, match="throttle"):
            worker.start(REQUEST, "op", bars=market(), strategy=Counter(), throttle=throttle)
    for name in ("", "a b", "x" * 129, "../up"):
        with pytest.raises(kt.InputError, match="can't be an operation's id"):
            worker.start(REQUEST, name, bars=market(), strategy=Counter())
    assert await worker.operations.list() == []
    wrong: list[dict[str, Any]] = [
        {"max_operations": 0}, {"max_restarts": -1}, {"shutdown_seconds": 0.0}, {"loop_share": 0.0},
    ]  # fmt: skip
    for terms in wrong:
        with pytest.raises(kt.ParameterError, match=next(iter(terms))):
            await BacktestWorker.open(dsn, **terms).__aenter__()


async def test_a_cancel_while_the_data_are_read_stores_nothing(
    worker: BacktestWorker, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The read is held at its door by a lock of the test's own: a FIFO would be refused."""
    before = asyncio.all_tasks()
    reading, go_on = threading.Event(), threading.Event()
    read = kt.Bars.read

    def slowly(*args: Any, **keywords: Any) -> kt.Bars:
        reading.set()
        assert go_on.wait(20)
        return read(*args, **keywords)

    monkeypatch.setattr(kt.Bars, "read", slowly)
    handle = worker.start(kt.BacktestRequest(data=MARKET, strategy="sma_cross"), "op")
    await asyncio.to_thread(reading.wait)
    cancelling = asyncio.create_task(handle.cancel())
    await asyncio.sleep(0)
    go_on.set()
    await cancelling
    with pytest.raises(kt.CancellationError, match="cancelled on request"):
        await handle.result()
    assert await worker.operations.list() == []
    await nothing_left(worker, dsn, before)


async def test_a_dead_owner_of_this_host_is_taken_over_or_buried_at_once(worker: BacktestWorker) -> None:
    """Its lease isn't over: that it is dead is known."""
    mine = Owner.this_process()
    dead = Owner(mine.host, mine.boot_id, mine.pid_namespace, mine.pid, mine.started - 1.0)
    for name in ("cancelled", "resumed"):
        await worker.operations.create(name, await stored_request(Held(Gate())))
        await worker.operations.claim(name, owner=dead)
    assert standing(await worker.cancel("cancelled")) == ("cancelled", None, None)
    await resumed(worker, "resumed")


async def test_an_owner_that_may_be_alive_is_taken_over_only_on_a_persons_word(worker: BacktestWorker) -> None:
    mine = Owner.this_process()
    elsewhere = Owner("elsewhere", "another boot", None, 1, 1.0)
    assert elsewhere != mine
    await worker.operations.create("op", await stored_request(Held(Gate())))
    await worker.operations.claim("op", owner=elsewhere)
    with pytest.raises(kt.AlreadyClaimedError):
        await worker.resume("op", bars=market(), strategy=Held(Gate()))
    with pytest.raises(TimeoutError):
        await worker.cancel("op", timeout=0.3)  # it is asked, and doesn't answer
    results = await worker.resume("op", bars=market(), strategy=Held(Gate()), take_over=True)
    assert results.digest == await held_digest()


async def test_an_operation_that_completes_while_it_is_resumed_elsewhere(worker: BacktestWorker, dsn: str) -> None:
    """The other worker is told that it runs, or gets the result; it never computes it a second time."""
    handle, gate = await held(worker, bar=950)
    async with BacktestWorker.open(dsn) as other:
        gate.open.set()
        found: list[kt.BacktestResults] = []

        async def got() -> bool:
            try:
                found.append(await other.run(REQUEST, "op", bars=market(), strategy=Held(Gate())))
            except kt.AlreadyClaimedError:
                return False
            return True

        await until(got, "the result from elsewhere")
        assert found[0].digest == (await handle.result()).digest
        assert (await other.operations.get("op")).attempts == 1
