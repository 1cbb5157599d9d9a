"""Runs whose end is in the way: strategies that let no cancellation through, databases that are away at the end."""

from __future__ import annotations

import asyncio
import json

import asyncpg
import pytest
from supervision_runs import EVERY_BLOCK, MARKET, NEVER, REQUEST, Gate, Held, held, held_digest, market, outside, until

import ktrdr_async as kt
from ktrdr_async.storage.embedded import EmbeddedServer
from ktrdr_async.supervision import endings
from ktrdr_async.supervision import worker as workers
from ktrdr_async.supervision.worker import BacktestWorker

pytestmark = pytest.mark.anyio


class Deaf(Held):
    """Swallows every cancellation at its gate until that is opened."""

    async def on_bar(self, bar: kt.Bar) -> None:
        while True:
            try:
                return await super().on_bar(bar)
            except asyncio.CancelledError:
                continue


async def test_closing_saves_the_boundary_of_a_strategy_that_lets_no_cancellation_through(dsn: str) -> None:
    gate = Gate(345)
    async with BacktestWorker.open(dsn, shutdown_seconds=0.2) as worker:
        handle = worker.start(REQUEST, "op", bars=market(), strategy=Deaf(gate), policy=NEVER)
        await gate.reached.wait()
        other, _ = await held(worker, name="other")
    row_task = handle._actor.task
    assert not row_task.done(), "it is left behind, not waited for"
    gate.open.set()
    await asyncio.wait({row_task})
    async with BacktestWorker.open(dsn) as worker:
        rows = {row.operation_id: row for row in await worker.operations.list()}
        assert (rows["op"].status, rows["op"].checkpoint_bar) == (kt.Status.INTERRUPTED, 299)
        assert (rows["other"].status, rows["other"].checkpoint_type) == (kt.Status.INTERRUPTED, "shutdown")
        results = await worker.resume("op", bars=market(), strategy=Deaf(Gate()))
        clean = await kt.backtest(market(), Deaf(Gate()), request=REQUEST)
        assert results.digest == clean.digest
    assert other.done


async def test_what_a_closed_worker_left_running_is_taken_up_by_the_next_one_here(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endings, "FINAL_SAVE_SECONDS", 0.3)
    monkeypatch.setattr(workers, "ABANDON_SECONDS", 0.3)
    async with outside(dsn) as holder:
        async with BacktestWorker.open(dsn, shutdown_seconds=1.0) as worker:
            for name in ("resumed", "cancelled", "orphan"):
                await held(worker, name=name, policy=EVERY_BLOCK)
            await holder.execute("BEGIN; SELECT 1 FROM ktrdr.operations FOR UPDATE")
        # What was sent would still land once the row is free: the server goes away with its statements here.
        await holder.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )

        async def alone() -> bool:
            await holder.execute("SELECT pg_stat_clear_snapshot()")
            count = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            return bool(await holder.fetchval(count) == 1)

        await until(alone, "the others are gone")
        await holder.execute("ROLLBACK")
        found = await holder.fetch("SELECT operation_id, status FROM ktrdr.operations")
        assert {row["status"] for row in found} == {"running"}, "their ends couldn't be written"
    async with BacktestWorker.open(dsn) as worker:
        results = await worker.resume("resumed", bars=market(), strategy=Held(Gate()))
        assert results.digest == await held_digest()
        assert (await worker.cancel("cancelled", timeout=20)).status is kt.Status.CANCELLED
        row = await worker.operations.get("orphan")
        assert worker.is_left_over(row)
        handle = worker.resume_handle("orphan", bars=market(), strategy=Held(Gate()))
        assert not worker.is_left_over(await worker.operations.get("resumed"))
        assert (await handle.result()).digest == await held_digest()


async def test_a_row_that_a_worker_here_runs_is_not_left_over(dsn: str) -> None:
    async with BacktestWorker.open(dsn) as one, BacktestWorker.open(dsn) as two:
        await held(one, name="op")
        assert not two.is_left_over(await two.operations.get("op"))
        with pytest.raises(kt.AlreadyClaimedError):
            await two.resume("op", bars=market(), strategy=Held(Gate()))


async def test_a_stored_result_that_was_changed_is_refused(dsn: str, embedded_server: EmbeddedServer) -> None:
    request = kt.BacktestRequest(data=MARKET, strategy="rsi_reversion", commission=0.0001)
    changes = {
        "request": lambda row: {**json.loads(row["request"]), "commission": 0.0002},
        "result": lambda row: {**json.loads(row["result"]), "digest": "0" * 64},
    }
    where = embedded_server.administrator
    database = dsn.partition("@/")[2].partition("?")[0]
    async with BacktestWorker.open(dsn) as worker:
        for column, change in changes.items():
            expected = await worker.run(request, f"changed-{column}")
            assert (await worker.results(f"changed-{column}")).digest == expected.digest
            owner = await asyncpg.connect(
                host=where.host, port=where.port, user=where.user, database=database, ssl=False
            )
            try:
                row = await owner.fetchrow(
                    "SELECT * FROM ktrdr.operations WHERE operation_id = $1", f"changed-{column}"
                )
                await owner.execute("SET session_replication_role = replica")  # past the triggers
                text = json.dumps(change(row))
                statement = {
                    "request": "UPDATE ktrdr.operations SET request = $1::jsonb WHERE operation_id = $2",
                    "result": "UPDATE ktrdr.operations SET result = $1::jsonb WHERE operation_id = $2",
                }[column]
                await owner.execute(statement, text, f"changed-{column}")
            finally:
                await owner.close()
            with pytest.raises(kt.CheckpointCorruptedError, match="isn't what its request, bars and ledger give"):
                await worker.results(f"changed-{column}")


async def test_terms_given_as_ints_give_one_digest_everywhere(dsn: str) -> None:
    whole = kt.BacktestRequest(data=MARKET, strategy="sma_cross", initial_capital=50_000, commission=0, lot_size=1)
    exact = kt.BacktestRequest(
        data=MARKET, strategy="sma_cross", initial_capital=50_000.0, commission=0.0, lot_size=1.0
    )
    assert whole == exact
    expected = (await kt.backtest(None, "sma_cross", request=exact)).digest
    async with BacktestWorker.open(dsn) as worker:
        assert (await worker.run(whole, "op")).digest == expected
        assert (await worker.results("op")).digest == expected


async def test_a_throttle_is_not_made_good_for_after_a_halt(dsn: str) -> None:
    async with BacktestWorker.open(dsn) as worker:
        handle = worker.start(REQUEST, "op", bars=market(), strategy=Held(Gate()), throttle=1000)

        async def past(bar: int) -> bool:
            return handle.inspect().bar_index >= bar

        await until(lambda: past(199), "it runs")
        handle.pause()
        clock = asyncio.get_running_loop().time
        await handle.checkpoint()
        halted, at = handle.inspect().bar_index, clock()
        await until(lambda: _later(clock, at + 1.0), "a second passes")
        handle.go_on()
        again = clock()
        await until(lambda: past(min(999, halted + 300)), "it goes on")
        assert clock() - again > 0.2, "300 bars at 1,000 a second"


async def _later(clock: object, moment: float) -> bool:
    return clock() >= moment  # type: ignore[operator]
