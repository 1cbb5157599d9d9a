"""Each fault of the original's supervision by its name: none of them may come back."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from supervision_runs import (
    EVERY_BLOCK,
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
    row_held,
    standing,
)

import ktrdr_async as kt
from ktrdr_async.supervision.worker import BacktestWorker

pytestmark = pytest.mark.anyio


async def test_original_fault_a_second_cancel_lost_the_save(worker: BacktestWorker, dsn: str) -> None:
    gate = Gate(345)
    task = asyncio.create_task(worker.run(REQUEST, "op", bars=market(), strategy=Held(gate), policy=NEVER))
    await gate.reached.wait()
    async with row_held(dsn, "op") as until_blocked:
        task.cancel()
        await until_blocked()  # the save is on its way
        task.cancel()
        for _ in range(10):
            await asyncio.sleep(0)
        assert not task.done()
    await asyncio.wait({task})
    assert task.cancelled()
    assert standing(await worker.operations.get("op")) == ("cancelled", "cancellation", 299)
    await resumed(worker)


async def test_original_fault_the_engine_ran_on_after_a_cancel(worker: BacktestWorker, dsn: str) -> None:
    """No thread computes bars at any time, and none after the cancel."""
    threads: set[int] = set()
    seen: list[int] = []

    class Looking(kt.AsyncStrategy):
        resources = ("gate",)

        def __init__(self, gate: Any = None) -> None:
            self.gate = gate

        async def on_bar(self, bar: kt.Bar) -> None:
            threads.add(threading.get_ident())
            seen.append(bar.index)
            if bar.index == 345:
                self.gate.reached.set()
                await self.gate.open.wait()

    before = asyncio.all_tasks()
    gate = Gate()
    handle = worker.start(REQUEST, "op", bars=market(), strategy=Looking(gate), policy=NEVER)
    await gate.reached.wait()
    await handle.cancel()
    gate.open.set()
    count = len(seen)
    await asyncio.to_thread(lambda: None)
    for _ in range(10):
        await asyncio.sleep(0)
    assert len(seen) == count == 346
    assert threads == {threading.get_ident()}
    await nothing_left(worker, dsn, before)


async def test_original_fault_a_new_loop_and_connection_for_each_save(
    worker: BacktestWorker, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loops: list[Any] = []
    make = asyncio.new_event_loop

    def counted() -> asyncio.AbstractEventLoop:
        loops.append(1)
        return make()

    monkeypatch.setattr(asyncio, "new_event_loop", counted)
    saves = "SELECT count(*) FROM saves"
    async with outside(dsn) as other:
        await other.execute(
            "CREATE TABLE saves (pid int, connected timestamptz);"
            "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " INSERT INTO public.saves SELECT pid, backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid();"
            " RETURN NULL; END $$;"
            "CREATE TRIGGER saved AFTER INSERT OR UPDATE ON ktrdr.operation_checkpoints"
            " FOR EACH ROW EXECUTE FUNCTION note()"
        )
        connected = "SELECT array_agg(pid) FROM pg_stat_activity WHERE datname = current_database()"
        bars = kt.Bars.read("synthetic:?bars=2000&seed=7&timeframe=1h")
        gate = Gate(50)
        handle = worker.start(REQUEST, "op", bars=bars, strategy=Held(gate), policy=EVERY_BLOCK)
        await gate.reached.wait()
        before = set(await other.fetchval(connected))
        gate.open.set()
        results = await handle.result()
        assert results.run.checkpoints_saved == 20
        assert await other.fetchval(saves) == 20
        used = {row["pid"] for row in await other.fetch("SELECT DISTINCT pid FROM saves")}
        assert used <= before, "a save came over a connection that was made for it"
        assert set(await other.fetchval(connected)) == before
    assert loops == []


@pytest.mark.parametrize("table", ["operations", "operation_checkpoints", "ledger_segments"])
async def test_original_fault_completion_and_deletion_were_two_steps(
    worker: BacktestWorker, dsn: str, table: str
) -> None:
    """Whatever part of a completion fails, none of it is done: status, result, head and segments are as before."""
    whole = (
        "SELECT (SELECT row(o.status, o.result, o.result_digest, o.epoch, o.error)::text FROM ktrdr.operations o),"
        " (SELECT row(c.*)::text FROM ktrdr.operation_checkpoints c),"
        " (SELECT array_agg(s.digest ORDER BY s.sequence)::text FROM ktrdr.ledger_segments s)"
    )
    event = {"operations": "UPDATE OF result", "operation_checkpoints": "DELETE", "ledger_segments": "INSERT"}[table]
    handle, gate = await held(worker, bar=950, policy=kt.CheckpointPolicy(300, max_overhead=None))
    async with outside(dsn) as other:
        before = await other.fetchrow(whole)
        await other.execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE EXCEPTION 'in the middle'; END $$;"
            f"CREATE TRIGGER refuse AFTER {event} ON ktrdr.{table} FOR EACH ROW EXECUTE FUNCTION refuse();"
            "CREATE TRIGGER no_end AFTER UPDATE OF status ON ktrdr.operations FOR EACH ROW EXECUTE FUNCTION refuse()"
        )
        gate.open.set()
        with pytest.raises(kt.CheckpointError, match="in the middle") as caught:
            await handle.result()
        assert any("in the middle" in note for note in caught.value.__notes__)  # nor could another end be written
        assert before == await other.fetchrow(whole)
        await other.execute(
            f"DROP TRIGGER refuse ON ktrdr.{table}; DROP TRIGGER no_end ON ktrdr.operations; DROP FUNCTION refuse"
        )
    results = await resumed(worker)
    assert results.run.resumed_from == [899]
    assert (await worker.operations.get("op")).checkpoint_bar is None


async def test_original_fault_no_checkpoint_after_a_resume(worker: BacktestWorker) -> None:
    """There every save after a resume failed with a logged KeyError; here each goes on from the one before."""
    handle, _ = await held(worker, bar=345, policy=EVERY_BLOCK)
    await handle.cancel()
    for bar in (445, 655, 865):
        gate = Gate(bar)
        again = worker.resume_handle("op", bars=market(), strategy=Held(gate), policy=EVERY_BLOCK)
        await gate.reached.wait()
        boundary = bar // 100 * 100 - 1
        row = await worker.operations.get("op")
        assert (row.checkpoint_bar, row.checkpoint_type) == (boundary, "periodic")
        await again.cancel()
        assert standing(await worker.operations.get("op")) == ("cancelled", "cancellation", boundary)
    results = await worker.resume("op", bars=market(), strategy=Held(Gate()), policy=EVERY_BLOCK)
    assert results.digest == await held_digest()
    assert results.run.resumed_from == [299, 399, 599, 799]
    assert results.run.checkpoints_failed == 0
    assert results.run.checkpoints_saved == 14, "by all runs together"


async def test_original_fault_the_bar_index_was_relative_to_the_resume(worker: BacktestWorker) -> None:
    handle, _ = await held(worker)
    await handle.cancel()
    gate = Gate(345)
    again = worker.resume_handle("op", bars=market(), strategy=Held(gate), policy=NEVER)
    await gate.reached.wait()
    assert again.inspect().checkpoint_bar == 299
    gate.open.set()
    async for now in again.progress(0.001):
        assert now.bar_index == -1 or now.bar_index >= 399
    assert now.bar_index == 999


async def test_original_fault_a_cancelled_run_was_read_while_it_changed(worker: BacktestWorker) -> None:
    """What is saved is the last boundary, not what the block that was interrupted has done since."""
    clean = await digest_of(Counter, "counter")
    for bar in (301, 350, 399):
        handle, _ = await held(worker, bar=bar, name=f"op{bar}")
        await handle.cancel()
        row = await worker.operations.get(f"op{bar}")
        assert row.checkpoint_bar == 299
        await resumed(worker, f"op{bar}")
    assert (await worker.run(REQUEST, "other", bars=market(), strategy=Counter())).digest == clean
