"""A transient error restarts its operation from the checkpoint; a save that fails for a while doesn't end the run."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from supervision_runs import (
    EVERY_BLOCK,
    NEVER,
    REQUEST,
    Count,
    Gate,
    Held,
    digest_of,
    held_digest,
    market,
    nothing_left,
    outside,
    row_held,
    standing,
    stored_request,
    until,
)

import ktrdr_async as kt
from ktrdr_async.supervision.worker import BacktestWorker

pytestmark = pytest.mark.anyio


class Left:
    """How often it still raises."""

    def __init__(self, times: int = 0) -> None:
        self.times = times


class Flaky(kt.Strategy):
    """Raises a transient error a number of times at one bar."""

    resources = ("left",)

    def __init__(self, left: Any = None) -> None:
        self.left = left if isinstance(left, Left) else Left()
        self.state = Count()

    def on_bar(self, bar: kt.Bar) -> None:
        if bar.index == 345 and self.left.times:
            self.left.times -= 1
            raise ConnectionResetError("the model server went away")
        self.state.seen += 1
        if self.state.seen % 7 == 0:
            bar.target_weight(0, 0.8 if self.state.seen % 2 else -0.3)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ktrdr_async.supervision.actor._FIRST_RESTART", 0.01)


@pytest.mark.usefixtures("quick")
async def test_a_transient_error_restarts_from_the_checkpoint(dsn: str) -> None:
    clean = await digest_of(lambda: Flaky(Left(0)), "flaky")
    async with BacktestWorker.open(dsn, max_restarts=3) as worker:
        before = asyncio.all_tasks()
        results = await worker.run(REQUEST, "op", bars=market(), strategy=Flaky(Left(3)), policy=NEVER)
        assert results.digest == clean
        assert results.run.resumed_from == [299, 299, 299]
        assert results.run.bars_computed == 1000
        await nothing_left(worker, dsn, before)


@pytest.mark.usefixtures("quick")
async def test_one_restart_too_few_is_a_failure(dsn: str) -> None:
    async with BacktestWorker.open(dsn, max_restarts=2) as worker:
        with pytest.raises(ConnectionResetError):
            await worker.run(REQUEST, "op", bars=market(), strategy=Flaky(Left(3)), policy=NEVER)
        assert standing(await worker.operations.get("op")) == ("failed", "failure", 299)
        results = await worker.resume("op", bars=market(), strategy=Flaky(Left(0)))
        assert results.digest == await digest_of(lambda: Flaky(Left(0)), "flaky")


async def test_a_cancel_between_a_transient_error_and_the_restart(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ktrdr_async.supervision.actor._FIRST_RESTART", 60.0)
    left = Left(1)
    async with BacktestWorker.open(dsn, max_restarts=3) as worker:
        handle = worker.start(REQUEST, "op", bars=market(), strategy=Flaky(left), policy=NEVER)

        async def saved() -> bool:
            return not left.times and (await worker.operations.get("op")).checkpoint_bar == 299

        await until(saved, "the failure's checkpoint")
        await handle.cancel()
        assert standing(await worker.operations.get("op")) == ("cancelled", "cancellation", 299)
        with pytest.raises(kt.CancellationError):
            await handle.result()


@pytest.mark.parametrize("through", ["mailbox", "task"])
async def test_a_cancel_while_a_transient_error_is_being_saved(dsn: str, through: str) -> None:
    left = Left(1)
    async with BacktestWorker.open(dsn, max_restarts=3) as worker:
        before = asyncio.all_tasks()
        await worker.operations.create("op", await stored_request(Flaky(Left(1))))
        task = asyncio.create_task(
            worker.run(REQUEST, "op", bars=market(), strategy=Flaky(left), policy=NEVER, throttle=2_000)
        )

        async def claimed() -> bool:
            return (await worker.operations.get("op")).status is kt.Status.RUNNING

        await until(claimed, "it runs")
        async with row_held(dsn, "op") as until_blocked:
            await until_blocked()  # the failure's checkpoint
            if through == "task":
                task.cancel()
            else:
                asked = asyncio.create_task(worker.cancel("op"))
            await asyncio.sleep(0)
        await asyncio.wait({task})
        if through == "mailbox":
            await asked
            assert isinstance(task.exception(), kt.CancellationError)
        assert task.cancelled() is (through == "task")
        assert standing(await worker.operations.get("op")) == ("cancelled", "cancellation", 299)
        await nothing_left(worker, dsn, before)


BREAK_SAVES = """
    CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN RAISE EXCEPTION 'disk full' USING ERRCODE = '53100'; END $$;
    CREATE TRIGGER refuse BEFORE INSERT OR UPDATE ON ktrdr.operation_checkpoints
    FOR EACH ROW EXECUTE FUNCTION refuse()
"""
MEND_SAVES = "DROP TRIGGER refuse ON ktrdr.operation_checkpoints; DROP FUNCTION refuse"


async def test_saves_that_fail_for_a_while_are_counted_and_end_nothing(
    worker: BacktestWorker, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ktrdr_async.supervision.supervisor._FIRST_BACKOFF", 0.0)
    before = asyncio.all_tasks()
    gate = Gate(650)
    async with outside(dsn) as other:
        await worker.operations.create("op", await stored_request(Held(gate)))
        await other.execute(BREAK_SAVES)
        handle = worker.start(REQUEST, "op", bars=market(), strategy=Held(gate), policy=EVERY_BLOCK, throttle=20_000)
        await gate.reached.wait()
        assert handle.inspect().checkpoint_bar is None
        await other.execute(MEND_SAVES)
        gate.open.set()
        results = await handle.result()
    assert results.digest == await held_digest()
    assert results.run.checkpoints_failed >= 1
    assert results.run.checkpoints_saved >= 1
    await nothing_left(worker, dsn, before)


async def test_an_end_whose_save_is_refused_is_marked_and_the_last_good_checkpoint_stands(
    worker: BacktestWorker, dsn: str
) -> None:
    gate = Gate(345)
    handle = worker.start(REQUEST, "op", bars=market(), strategy=Held(gate), policy=EVERY_BLOCK)
    await gate.reached.wait()
    async with outside(dsn) as other:
        await other.execute(BREAK_SAVES)
        with pytest.raises(kt.CheckpointError, match="disk full"):
            await handle.cancel()
        await other.execute(MEND_SAVES)
    with pytest.raises(kt.CancellationError) as caught:
        await handle.result()
    assert any("disk full" in note for note in caught.value.__notes__)
    results = await worker.resume("op", bars=market(), strategy=Held(Gate()))
    assert results.digest == await held_digest()


async def test_a_completion_that_is_refused_can_be_gone_on_with(worker: BacktestWorker, dsn: str) -> None:
    gate = Gate(950)
    handle = worker.start(REQUEST, "op", bars=market(), strategy=Held(gate), policy=EVERY_BLOCK)
    await gate.reached.wait()
    async with outside(dsn) as other:
        await other.execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE EXCEPTION 'not today'; END $$;"
            "CREATE TRIGGER refuse BEFORE UPDATE ON ktrdr.operations FOR EACH ROW"
            " WHEN (NEW.status = 'completed') EXECUTE FUNCTION refuse()"
        )
        gate.open.set()
        with pytest.raises(kt.CheckpointError, match="not today"):
            await handle.result()
        row = await worker.operations.get("op")
        assert standing(row) == ("failed", "failure", 999)
        assert row.error is not None
        assert "not today" in row.error["message"]
        await other.execute("DROP TRIGGER refuse ON ktrdr.operations")
    results = await worker.resume("op", bars=market(), strategy=Held(Gate()))
    assert results.digest == await held_digest()
    assert results.run.bars_computed == 0


@pytest.mark.parametrize("lands", [True, False])
async def test_a_completion_whose_answer_is_lost(
    worker: BacktestWorker, dsn: str, monkeypatch: pytest.MonkeyPatch, lands: bool
) -> None:
    """Its connection was cut at the deadline; the server goes on with the statement, or dies with it."""
    monkeypatch.setattr("ktrdr_async.supervision.supervisor.COMPLETION_SECONDS", 0.3)
    gate = Gate(950)
    handle = worker.start(REQUEST, "op", bars=market(), strategy=Held(gate), policy=NEVER)
    await gate.reached.wait()
    async with row_held(dsn, "op") as until_blocked:
        gate.open.set()
        await until_blocked(2)  # the completion, and after its deadline what asks for the row to end it otherwise
        if not lands:
            async with outside(dsn) as other:
                await other.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
                    " AND wait_event_type = 'Lock' ORDER BY query_start LIMIT 1"
                )
    if lands:
        results = await handle.result()
        assert (await worker.operations.get("op")).result_digest == results.digest
    else:
        with pytest.raises(kt.SaveTimeoutError):
            await handle.result()
        assert standing(await worker.operations.get("op")) == ("interrupted", "shutdown", 999)
        results = await worker.resume("op", bars=market(), strategy=Held(Gate()))
    assert results.digest == await held_digest()


@pytest.mark.parametrize("first", ["cancel", "completion"])
async def test_a_cancel_against_the_completion(worker: BacktestWorker, dsn: str, first: str) -> None:
    """Whoever gets the row first wins; the other one hears it."""
    gate = Gate(950)
    handle = worker.start(REQUEST, "op", bars=market(), strategy=Held(gate), policy=NEVER)
    await gate.reached.wait()
    async with BacktestWorker.open(dsn) as other:
        async with row_held(dsn, "op") as until_blocked:
            if first == "completion":
                gate.open.set()
                await until_blocked()
            cancelling = asyncio.create_task(other.cancel("op"))
            await until_blocked(2 if first == "completion" else 1)
            if first == "cancel":
                gate.open.set()
                await until_blocked(2)
        row = await cancelling
    if first == "completion":
        assert row.status is kt.Status.COMPLETED
        assert (await handle.result()).digest == await held_digest()
    else:
        assert standing(row) == ("cancelled", "cancellation", 999)
        with pytest.raises(kt.CancellationError):
            await handle.result()
        results = await worker.resume("op", bars=market(), strategy=Held(Gate()))
        assert results.digest == await held_digest()
