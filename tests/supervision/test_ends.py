"""How an operation ends, one by one: what is stored, what is raised, and that it can be gone on with."""

from __future__ import annotations

import asyncio
import linecache
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from supervision_runs import (
    EVERY_BLOCK,
    HERE,
    NEVER,
    REQUEST,
    Counter,
    Gate,
    Held,
    held,
    held_digest,
    market,
    nothing_left,
    outside,
    resumed,
    row_held,
    standing,
    stored_request,
)

import ktrdr_async as kt
from ktrdr_async.operations.jsonb import to_json
from ktrdr_async.operations.lifecycle import Owner
from ktrdr_async.supervision.worker import BacktestWorker, OperationHandle

pytestmark = pytest.mark.anyio
CHECKOUT = Path(kt.__file__).parents[1]
CANCEL_IT = """
import asyncio, sys
import ktrdr_async as kt
async def main():
    async with kt.BacktestWorker.open(sys.argv[1]) as worker:
        print((await worker.cancel(sys.argv[2])).status.value)
asyncio.run(main())
"""


async def rows(dsn: str, table: str) -> int:
    async with outside(dsn) as looker:
        return int(await looker.fetchval(f"SELECT count(*) FROM ktrdr.{table}"))


async def test_success_stores_the_result_and_deletes_the_head(worker: BacktestWorker, dsn: str) -> None:
    before = asyncio.all_tasks()
    handle, gate = await held(worker, policy=EVERY_BLOCK)
    assert await rows(dsn, "operation_checkpoints") == 1
    gate.open.set()
    results = await handle.result()
    row = await worker.operations.get("op")
    assert row.status is kt.Status.COMPLETED
    assert row.result_digest == results.digest == await held_digest()
    assert await rows(dsn, "operation_checkpoints") == 0
    assert row.result is not None
    assert results.run.checkpoints_saved == 10
    assert results.run.bars_computed == 1000
    await nothing_left(worker, dsn, before)


async def test_success_is_one_transaction(worker: BacktestWorker, dsn: str) -> None:
    async with outside(dsn) as other:
        await other.execute(
            "CREATE TABLE seen (transaction xid8, what text);"
            "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN INSERT INTO public.seen VALUES (pg_current_xact_id(), TG_OP); RETURN NULL; END $$;"
            "CREATE TRIGGER gone AFTER DELETE ON ktrdr.operation_checkpoints FOR EACH ROW EXECUTE FUNCTION note();"
            "CREATE TRIGGER done AFTER UPDATE ON ktrdr.operations FOR EACH ROW WHEN (NEW.status = 'completed')"
            " EXECUTE FUNCTION note()"
        )
        await worker.run(REQUEST, "op", bars=market(), strategy=Counter(), policy=EVERY_BLOCK)
        found = await other.fetch("SELECT DISTINCT transaction, what FROM seen ORDER BY what")
    assert [row["what"] for row in found] == ["DELETE", "UPDATE"]
    assert found[0]["transaction"] == found[1]["transaction"]


async def test_an_error_of_the_strategy(worker: BacktestWorker, dsn: str) -> None:
    before = asyncio.all_tasks()
    with pytest.raises(ZeroDivisionError, match="at 555") as caught:
        await worker.run(REQUEST, "op", bars=market(), strategy=Counter(fail_at=555), policy=NEVER)
    notes = "\n".join(caught.value.__notes__)
    when = str(market().timestamps[555].astype("datetime64[ns]").astype("datetime64[s]"))
    for part in ("bar 555", when, market().symbols[0], "ktrdr-async resume op"):
        assert part in notes
    row = await worker.operations.get("op")
    assert standing(row) == ("failed", "failure", 499)
    assert row.error is not None
    assert (row.error["type"], row.error["message"], row.error["bar"]) == ("ZeroDivisionError", "at 555", 555)
    await nothing_left(worker, dsn, before)
    with pytest.raises(kt.OperationFailedError, match="ZeroDivisionError: at 555"):
        await worker.results("op", bars=market())
    with pytest.raises(ZeroDivisionError):  # it is gone on with, and fails at the same bar
        await worker.resume("op", bars=market(), strategy=Counter(fail_at=555))


class Failing(Held):
    """Raises where it was held."""

    async def on_bar(self, bar: kt.Bar) -> None:
        await super().on_bar(bar)
        if bar.index == self.gate.bar:
            raise KeyError("as it happens")


@pytest.mark.parametrize("through", ["mailbox", "task"])
async def test_a_cancel_while_a_failure_is_being_written(worker: BacktestWorker, dsn: str, through: str) -> None:
    """Too late to be what ended it; a pending cancellation of the caller's own task is raised all the same."""
    before = asyncio.all_tasks()
    gate = Gate(345)
    caller = asyncio.create_task(worker.run(REQUEST, "op", bars=market(), strategy=Failing(gate), policy=NEVER))
    await gate.reached.wait()
    async with row_held(dsn, "op") as until_blocked:
        gate.open.set()
        await until_blocked()
        asked = asyncio.create_task(worker.cancel("op"))
        if through == "task":
            caller.cancel()
        for _ in range(5):
            await asyncio.sleep(0)
    await asyncio.wait({caller})
    assert (await asked).status is kt.Status.FAILED
    assert standing(await worker.operations.get("op")) == ("failed", "failure", 299)
    if through == "task":
        assert caller.cancelled()
    else:
        assert isinstance(caller.exception(), KeyError)
    await nothing_left(worker, dsn, before)


async def test_a_strategy_that_awaits_something_that_others_cancelled_has_failed(worker: BacktestWorker) -> None:
    class Unlucky(kt.AsyncStrategy):
        async def on_bar(self, bar: kt.Bar) -> None:
            if bar.index == 345:
                answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                answer.cancel()
                await answer

    with pytest.raises(kt.KtrdrError, match="was cancelled; nobody has cancelled the operation"):
        await worker.run(REQUEST, "op", bars=market(), strategy=Unlucky())
    assert standing(await worker.operations.get("op")) == ("failed", "failure", 299)


async def test_a_strategy_that_swallows_its_cancellation_ends_at_the_next_boundary(worker: BacktestWorker) -> None:
    class Deaf(kt.AsyncStrategy):
        resources = ("gate",)

        def __init__(self, gate: Any = None) -> None:
            self.gate = gate

        async def on_bar(self, bar: kt.Bar) -> None:
            if bar.index == 345:
                self.gate.reached.set()
                try:
                    await self.gate.open.wait()
                except asyncio.CancelledError:
                    return

    gate = Gate()
    handle = worker.start(REQUEST, "op", bars=market(), strategy=Deaf(gate), policy=NEVER)
    await gate.reached.wait()
    await handle.cancel()
    assert standing(await worker.operations.get("op")) == ("cancelled", "cancellation", 399)


async def test_a_cancel_through_the_mailbox(worker: BacktestWorker, dsn: str) -> None:
    before = asyncio.all_tasks()
    handle, _ = await held(worker)
    waiting = asyncio.create_task(handle.result())
    await handle.cancel()
    with pytest.raises(kt.CancellationError, match="cancelled on request"):
        await waiting
    assert [now.status async for now in handle.progress()] == ["cancelled"]
    assert standing(await worker.operations.get("op")) == ("cancelled", "cancellation", 299)
    await nothing_left(worker, dsn, before)
    with pytest.raises(kt.CancellationError):
        await worker.results("op", bars=market())
    await resumed(worker)


async def test_a_cancel_from_another_worker(worker: BacktestWorker, dsn: str) -> None:
    handle, _ = await held(worker)
    async with BacktestWorker.open(dsn) as other:
        assert standing(await other.cancel("op")) == ("cancelled", "cancellation", 299)
        with pytest.raises(kt.CancellationError):
            await handle.result()
        await resumed(other)


async def test_a_cancel_from_another_process(worker: BacktestWorker, dsn: str) -> None:
    handle, _ = await held(worker)
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CANCEL_IT, dsn, "op", stdout=subprocess.PIPE, env={"PYTHONPATH": f"{CHECKOUT}:{HERE}"}
    )
    said, _ = await child.communicate()
    assert said.split() == [b"cancelled"]
    with pytest.raises(kt.CancellationError, match="cancelled on request"):
        await handle.result()
    await resumed(worker)


async def test_a_cancel_that_is_asked_for_while_saves_hold_the_row(worker: BacktestWorker, dsn: str) -> None:
    gate = Gate(250)
    handle = worker.start(REQUEST, "op", bars=market(), strategy=Held(gate), policy=EVERY_BLOCK)
    await gate.reached.wait()
    async with BacktestWorker.open(dsn) as other:
        async with row_held(dsn, "op") as until_blocked:
            gate.open.set()
            await until_blocked()
            asked = asyncio.create_task(other.operations.cancel("op"))
        await asked
        row = await other.cancel("op")  # one that has ended stays as it is
    assert row.status in (kt.Status.CANCELLED, kt.Status.COMPLETED)
    if row.status is kt.Status.CANCELLED:
        with pytest.raises(kt.CancellationError):
            await handle.result()
        await resumed(worker)


async def test_a_cancel_of_what_has_ended_changes_nothing(worker: BacktestWorker) -> None:
    await worker.run(REQUEST, "done", bars=market(), strategy=Counter())
    assert (await worker.cancel("done")).status is kt.Status.COMPLETED
    with pytest.raises(ZeroDivisionError):
        await worker.run(REQUEST, "failed", bars=market(), strategy=Counter(fail_at=5))
    assert (await worker.cancel("failed")).status is kt.Status.FAILED
    with pytest.raises(kt.OperationError, match="no operation"):
        await worker.cancel("nothing")


async def test_a_cancel_before_the_first_boundary_leaves_no_checkpoint(worker: BacktestWorker) -> None:
    handle, _ = await held(worker, bar=30)
    await handle.cancel()
    assert standing(await worker.operations.get("op")) == ("cancelled", None, None)
    results = await resumed(worker)
    assert results.run.resumed_from == []
    assert results.run.bars_computed == 1000


@pytest.mark.parametrize("times", [1, 3])
async def test_a_cancel_between_create_and_claim(worker: BacktestWorker, dsn: str, times: int) -> None:
    await worker.operations.create("op", await stored_request(Held(Gate())))
    before = asyncio.all_tasks()
    async with row_held(dsn, "op") as until_blocked:
        task = asyncio.create_task(worker.run(REQUEST, "op", bars=market(), strategy=Held(Gate())))
        await until_blocked()  # the claim waits
        for _ in range(times):
            task.cancel()
            await asyncio.sleep(0)
    await asyncio.wait({task})
    assert task.cancelled()
    assert standing(await worker.operations.get("op")) == ("cancelled", None, None)
    await nothing_left(worker, dsn, before)
    await resumed(worker)


@pytest.mark.parametrize("first", ["claim", "cancel"])
async def test_a_cancel_by_others_between_create_and_claim(worker: BacktestWorker, dsn: str, first: str) -> None:
    await worker.operations.create("op", await stored_request(Held(Gate())))
    async with row_held(dsn, "op") as until_blocked:

        def start() -> OperationHandle:
            return worker.start(REQUEST, "op", bars=market(), strategy=Held(Gate()), throttle=1_000)

        if first == "claim":
            handle = start()
            await until_blocked()
        cancelled = asyncio.create_task(worker.operations.cancel("op"))
        await until_blocked(2 if first == "claim" else 1)
        if first == "cancel":
            handle = start()
            await until_blocked(2)
    await cancelled
    with pytest.raises(kt.CancellationError):
        await handle.result()
    assert (await worker.operations.get("op")).status is kt.Status.CANCELLED


async def test_a_lost_operation_ends_at_once_and_writes_nothing(worker: BacktestWorker, dsn: str) -> None:
    before = asyncio.all_tasks()
    handle, _ = await held(worker, policy=EVERY_BLOCK)
    claim = await worker.operations.claim("op", owner=Owner.this_process(), take_over=True)
    async with outside(dsn) as other:
        found = await other.fetchrow("SELECT * FROM ktrdr.operations")
        head = await other.fetchrow("SELECT * FROM ktrdr.operation_checkpoints")
        await other.execute("SELECT pg_notify('ktrdr_async', 'op')")
        with pytest.raises(kt.OwnershipLostError):
            await handle.result()
        assert found == await other.fetchrow("SELECT * FROM ktrdr.operations")
        assert head == await other.fetchrow("SELECT * FROM ktrdr.operation_checkpoints")
    assert found is not None
    assert (found["epoch"], found["status"]) == (claim.epoch, "running")
    await nothing_left(worker, dsn, before)


async def test_a_save_that_finds_it_lost_ends_it(worker: BacktestWorker) -> None:
    handle, gate = await held(worker, policy=EVERY_BLOCK)
    await worker.operations.claim("op", owner=Owner.this_process(), take_over=True)
    gate.open.set()  # the next save finds out
    with pytest.raises(kt.OwnershipLostError):
        await handle.result()
    assert (await worker.operations.get("op")).checkpoint_bar == 299


@pytest.mark.parametrize("ended", ["cancelled", "failed", "interrupted"])
async def test_other_data_or_code_on_resume_change_nothing(worker: BacktestWorker, dsn: str, ended: str) -> None:
    class Changed(Counter):
        pass

    if ended == "failed":
        with pytest.raises(ZeroDivisionError):
            await worker.run(REQUEST, "op", bars=market(), strategy=Counter(fail_at=555))
    else:
        async with BacktestWorker.open(dsn) as first:
            gate = Gate(555)
            handle = first.start(REQUEST, "op", bars=market(), strategy=Held(gate))
            await gate.reached.wait()
            if ended == "cancelled":
                await handle.cancel()
    made: Any = Counter(fail_at=555) if ended == "failed" else Held(Gate())
    before = await worker.operations.get("op")
    assert before.status.value == ended
    async with outside(dsn) as other:
        head = await other.fetchrow("SELECT * FROM ktrdr.operation_checkpoints")
        await other.execute("ALTER TABLE ktrdr.operations DISABLE TRIGGER operations_fixed")
        # As if the file that it names had changed: the stored reference is of these bars, the checkpoint of others.
        changed = kt.Bars.read("synthetic:?bars=1000&seed=8&timeframe=1h")
        stored = dict(before.request, data=f"memory:{changed.fingerprint()}")
        await other.execute("UPDATE ktrdr.operations SET request = $1", to_json(stored))
        with pytest.raises(kt.CheckpointMismatchError) as caught:
            await worker.resume("op", bars=changed, strategy=made)
        assert "bars" in caught.value.differences
        assert caught.value.differences["bars"] == (market().fingerprint(499), changed.fingerprint(499))
        assert caught.value.operation_id == "op"
        after = await worker.operations.get("op")
        assert standing(after) == standing(before)
        assert after.error == before.error
        assert head == await other.fetchrow("SELECT * FROM ktrdr.operation_checkpoints")


MINE = """
import ktrdr_async as kt
class Mine(kt.Strategy):
    def on_bar(self, bar):
        bar.target_weight(0, {weight})
"""


async def test_changed_code_on_resume_names_it(dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_changing_code.py").write_text(MINE.format(weight=0.5))
    request = kt.BacktestRequest(data="synthetic:?bars=1000", strategy="my_changing_code:Mine")
    async with BacktestWorker.open(dsn) as worker:
        handle = worker.start(request, "op", policy=EVERY_BLOCK, throttle=5_000)
        async for now in handle.progress(0.01):
            if now.bar_index > 200:
                break
        await handle.cancel()
        was = standing(await worker.operations.get("op"))
    sys.modules.pop("my_changing_code")
    (tmp_path / "my_changing_code.py").write_text(MINE.format(weight=0.25))
    linecache.clearcache()
    async with BacktestWorker.open(dsn, allow=("my_changing_code",)) as worker:
        with pytest.raises(kt.CheckpointMismatchError) as caught:
            await worker.resume("op")
        assert list(caught.value.differences) == ["strategy_source.my_changing_code"]
        assert standing(await worker.operations.get("op")) == was
