"""`isolate="process"`: the same bits, errors with their notes, no process left, and nothing imported unasked."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio.to_process
import numpy as np
import psutil
import pytest
from isolated_strategies import (
    Endless,
    Failing,
    Features,
    Frame,
    Quantities,
    TooLarge,
    Untyped,
    Weights,
)
from supervision_runs import EVERY_BLOCK, HERE, MARKET, REQUEST, Gate, Held, market, nothing_left, standing, until

import ktrdr_async as kt
from ktrdr_async.supervision import shielding
from ktrdr_async.supervision.isolation import Isolate, spec_of
from ktrdr_async.supervision.worker import BacktestWorker

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where files go between processes; none is left."""
    made = tmp_path / "between"
    made.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(made))
    yield made
    assert list(made.iterdir()) == []


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE}


def signals(tmp_path: Path) -> kt.Signals:
    file = tmp_path / "signals.csv"
    times = market().timestamps[::7].astype("datetime64[ns]").astype(str)
    file.write_text("time,ASSET\n" + "".join(f"{t},{0.5 if i % 2 else -0.2}\n" for i, t in enumerate(times)))
    return kt.Signals(file=str(file))


@pytest.mark.parametrize("made", ["features", "weights", "frame", "quantities", "built-in", "signals"])
async def test_every_bit_is_the_same(made: str, tmp_path: Path) -> None:
    def make() -> Any:
        makers = {
            "features": lambda: Features(span=13, spans=(7, 31)),
            "weights": lambda: Weights(span=10),
            "frame": Frame,
            "quantities": Quantities,
            "built-in": lambda: kt.MomentumRotation(lookback=20),
            "signals": lambda: signals(tmp_path),
        }
        return makers[made]()

    bars = kt.Bars.read("synthetic:?bars=3000&seed=5&symbols=A,B") if made == "built-in" else market()
    here = await kt.backtest(bars, make(), request=REQUEST)
    there = await kt.backtest(bars, make(), request=REQUEST, isolate="process")
    assert there.digest == here.digest
    assert len(there.ledger) > 10
    assert there.run.prepare_lag_ms is not None


async def test_it_is_another_process(worker: BacktestWorker, tmp_path: Path, dsn: str) -> None:
    note = tmp_path / "process"
    before = asyncio.all_tasks()
    results = await worker.run(
        REQUEST, "op", bars=market(), strategy=Features(where=str(note)), policy=EVERY_BLOCK, isolate="process"
    )
    child = int(note.read_text())
    assert child not in (os.getpid(), os.getppid())
    assert child in children(), "anyio keeps it for the next one"
    # Its state came along: what `prepare` had set decides the orders.
    assert len(results.ledger) > 10
    again = await worker.run(REQUEST, "again", bars=market(), strategy=Features(where=str(note)), isolate="process")
    assert int(note.read_text()) == child
    assert again.digest == results.digest
    here = await worker.run(REQUEST, "here", bars=market(), strategy=Features(where=str(note)))
    assert int(note.read_text()) == os.getpid()
    assert here.digest == results.digest
    pool = {task for task in asyncio.all_tasks() if "process pool" in task.get_name()}
    await nothing_left(worker, dsn, before | pool)


async def test_a_run_goes_on_isolated_or_not(worker: BacktestWorker) -> None:
    clean = await kt.backtest(market(), Features(), request=REQUEST)
    ways: list[tuple[str, Isolate | None, Isolate | None]] = [
        ("one", None, "process"), ("two", "process", None), ("three", "process", "process"),
    ]  # fmt: skip
    for name, first, then in ways:
        handle = worker.start(
            REQUEST, name, bars=market(), strategy=Features(), policy=EVERY_BLOCK, throttle=2000, isolate=first
        )

        async def saved(handle: Any = handle) -> bool:
            return handle.inspect().checkpoint_bar is not None

        await until(saved, "a first checkpoint")
        await handle.cancel()
        assert standing(await worker.operations.get(name))[0] == "cancelled"
        results = await worker.resume(name, bars=market(), strategy=Features(), isolate=then)
        assert results.digest == clean.digest
        assert results.run.resumed_from


# Errors.


async def failed(strategy: Any) -> Any:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - each caller looks at it
        await kt.backtest(market(), strategy, request=REQUEST, isolate="process")
    return caught.value


async def test_what_the_strategy_raises_comes_through() -> None:
    error = await failed(Failing())
    assert type(error) is ValueError
    assert str(error) == "no number"
    noted, where = error.__notes__
    assert noted == "as the strategy noted"
    assert where.startswith("in another process:\n")
    assert "isolated_strategies.py" in where
    assert "in prepare" in where


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("two", "the strategy's code raised TwoPartsError: this and that"),
        ("stop", "the strategy's code raised StopIteration: 5"),
        ("exit", "the strategy's code raised SystemExit: 3"),
        ("gone", "the process that computed for the strategy ended"),
    ],
)
async def test_what_cannot_come_through_is_told(how: str, said: str) -> None:
    error = await failed(Failing(how))
    assert type(error) is kt.StrategyError
    assert error.message == said
    if how == "two":
        assert error.__notes__[0] == "as the strategy noted"


async def test_the_checks_are_the_same() -> None:
    for strategy, kind in ((TooLarge(), kt.OrderError), (Failing("shape"), kt.StrategyError)):
        there = await failed(strategy)
        with pytest.raises(kind) as here:
            await kt.backtest(market(), strategy, request=REQUEST)
        assert type(there) is kind
        assert there.message == here.value.message
        if isinstance(there, kt.OrderError):
            assert there.bar_index == 345


async def test_a_failure_is_stored_and_gone_on_from(worker: BacktestWorker) -> None:
    with pytest.raises(ValueError, match="no number") as caught:
        await worker.run(REQUEST, "op", bars=market(), strategy=Failing(), isolate="process")
    row = await worker.operations.get("op")
    assert row.status.value == "failed"
    assert row.error is not None
    assert row.error["type"] == "ValueError"
    assert row.error["notes"][0] == "as the strategy noted"
    assert any("resume op" in note for note in caught.value.__notes__)


# What can't be isolated: said before anything is started.


def local_strategy() -> Any:
    class Local(kt.WeightStrategy):
        def target_weights(self, bars: kt.Bars) -> Any:
            return np.zeros(bars.close.shape)

    return Local()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (local_strategy, "can't be imported"),
        (lambda: Held(Gate()), "awaits on this loop"),
        (lambda: Untyped(model=np.zeros(3)), "the parameter model is a ndarray"),
        (lambda: Untyped(spans=(1, 2)), "other parameters there"),
    ],
)
async def test_what_cannot_be_isolated_is_refused(make: Any, said: str, worker: BacktestWorker) -> None:
    with pytest.raises(kt.InputError, match=said):
        await worker.run(REQUEST, "op", bars=market(), strategy=make(), isolate="process")
    assert await worker.operations.list() == []
    with pytest.raises(kt.InputError, match=said):
        await kt.backtest(market(), make(), request=REQUEST, isolate="process")


async def test_a_strategy_of_a_prompt_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    main = sys.modules["__main__"]
    typed = type("Typed", (Weights,), {"__module__": "__main__"})
    monkeypatch.setattr(main, "Typed", typed, raising=False)
    assert spec_of(typed()).module == "__main__"  # of a script it can be imported
    monkeypatch.delattr(main, "__file__")
    with pytest.raises(kt.InputError, match="can't be imported"):
        spec_of(typed())


async def test_no_other_way_of_isolating(worker: BacktestWorker) -> None:
    wrong: Any = "thread"
    with pytest.raises(kt.ParameterError, match="isolate is 'thread'"):
        worker.start(REQUEST, bars=market(), strategy=Weights(), isolate=wrong)
    with pytest.raises(kt.ParameterError, match="isolate is 'thread'"):
        await kt.backtest(market(), Weights(), isolate=wrong)


@pytest.mark.parametrize("guarded", [True, False])
def test_a_script_of_ones_own(guarded: bool, tmp_path: Path) -> None:
    """Its strategy is imported from it; without the guard it would run itself for ever, process after process."""
    lines = [
        "import numpy as np, ktrdr_async as kt",
        "class Mine(kt.WeightStrategy):",
        "    def target_weights(self, bars):",
        "        return np.where(bars.close > bars.open, 0.5, 0.0)",
        "GUARD",
        f"    print(kt.backtest_sync({MARKET!r}, Mine(), isolate='process').digest)",
        f"    print(kt.backtest_sync({MARKET!r}, Mine()).digest)",
    ]
    script = tmp_path / "script.py"
    script.write_text("\n".join(lines).replace("GUARD", 'if __name__ == "__main__":' if guarded else "if True:"))
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1]), "TMPDIR": str(tmp_path / "between")}
    ended = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=60)
    if guarded:
        assert ended.returncode == 0, ended.stderr
        one, other = ended.stdout.split()
        assert one == other
    else:
        assert ended.returncode == 1
        assert 'if __name__ == "__main__":' in ended.stderr


# Cancellation.


@pytest.mark.parametrize("times", [1, 3])
async def test_a_cancellation_ends_the_process(worker: BacktestWorker, tmp_path: Path, times: int) -> None:
    note = tmp_path / "process"
    running = asyncio.create_task(
        worker.run(REQUEST, "op", bars=market(), strategy=Endless(str(note)), isolate="process")
    )

    async def begun() -> bool:
        return note.exists() and note.read_text() != ""

    await until(begun, "the strategy computes in its process")
    child = int(note.read_text())
    for _ in range(times):
        running.cancel()
        await asyncio.sleep(0)
    await asyncio.wait({running})
    assert running.cancelled()
    assert child not in children()
    assert standing(await worker.operations.get("op")) == ("cancelled", None, None)


async def test_its_files_go_however_often_it_is_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shielding, "OVERTAKING_SECONDS", 1_000.0)
    note, go_on = tmp_path / "process", threading.Event()
    running = asyncio.create_task(kt.backtest(market(), Endless(str(note)), request=REQUEST, isolate="process"))

    async def begun() -> bool:
        return note.exists() and note.read_text() != ""

    await until(begun, "the strategy computes in its process")
    held_up = asyncio.create_task(shielding.in_thread(lambda: go_on.wait(20)))
    running.cancel()
    line = shielding._lines[asyncio.get_running_loop()]

    async def waiting() -> bool:
        return bool(line._waiters)

    await until(waiting, "the process is ended, and its files wait for a thread to delete them")
    for _ in range(5):
        await asyncio.sleep(0.001)
        running.cancel()
    go_on.set()
    await held_up
    await asyncio.wait({running})
    assert running.cancelled()


async def test_leaving_ends_the_process(dsn: str, tmp_path: Path) -> None:
    note = tmp_path / "process"
    async with BacktestWorker.open(dsn) as worker:
        worker.start(REQUEST, "op", bars=market(), strategy=Endless(str(note)), isolate="process")

        async def begun() -> bool:
            return note.exists() and note.read_text() != ""

        await until(begun, "the strategy computes in its process")
    assert int(note.read_text()) not in children()


async def test_one_that_is_cancelled_as_its_process_starts_leaves_none(tmp_path: Path) -> None:
    """anyio itself leaves one behind that is cancelled before it is ready."""
    await kt.backtest(market(), Weights(), request=REQUEST, isolate="process")  # the pool's own is idle
    limiter = anyio.to_process.current_default_process_limiter()
    note = tmp_path / "process"
    first = asyncio.create_task(kt.backtest(market(), Endless(str(note)), request=REQUEST, isolate="process"))

    async def begun() -> bool:
        return note.exists()

    await until(begun, "the pool's process is taken")
    before = children()
    second = asyncio.create_task(kt.backtest(market(), Endless(str(note) + "2"), request=REQUEST, isolate="process"))

    async def started() -> bool:
        return children() > before

    await until(started, "a second process comes up")
    second.cancel()
    await asyncio.wait({second})
    assert children() <= before
    first.cancel()
    await asyncio.wait({first})
    assert int(note.read_text()) not in children()
    assert limiter.borrowed_tokens == 0


async def test_who_waits_for_a_process_can_be_cancelled(tmp_path: Path) -> None:
    limiter = anyio.to_process.current_default_process_limiter()
    total, limiter.total_tokens = limiter.total_tokens, 1
    try:
        note = tmp_path / "process"
        first = asyncio.create_task(kt.backtest(market(), Endless(str(note)), request=REQUEST, isolate="process"))

        async def begun() -> bool:
            return note.exists()

        await until(begun, "the only process is taken")
        second = asyncio.create_task(kt.backtest(market(), Weights(), request=REQUEST, isolate="process"))

        async def waits() -> bool:
            return limiter.statistics().tasks_waiting == 1

        await until(waits, "the second one waits")
        second.cancel()
        await asyncio.wait({second}, timeout=20)
        assert second.cancelled()
        first.cancel()
        await asyncio.wait({first})
    finally:
        limiter.total_tokens = total


# What a stored operation may name.


async def test_a_stored_operations_code_needs_permission(worker: BacktestWorker, dsn: str) -> None:
    request = kt.BacktestRequest(data=MARKET, strategy="isolated_strategies:Features", commission=0.0, slippage=0.0)
    handle = worker.start(request, "op", policy=EVERY_BLOCK, throttle=2000, isolate="process")

    async def saved() -> bool:
        return handle.inspect().checkpoint_bar is not None

    await until(saved, "a first checkpoint")
    await handle.cancel()
    async with BacktestWorker.open(dsn) as other:
        with pytest.raises(kt.CodeNotAllowedError):
            await other.resume("op", isolate="process")
    async with BacktestWorker.open(dsn, allow=("isolated_strategies",), data_roots=("/",)) as other:
        results = await other.resume("op", isolate="process")
    assert results.digest == (await kt.backtest(None, "isolated_strategies:Features", request=request)).digest


async def test_files_of_a_stored_operation_lie_in_the_roots_there_too(worker: BacktestWorker, tmp_path: Path) -> None:
    made = signals(tmp_path)
    object.__setattr__(made, "roots", (str(tmp_path / "elsewhere"),))
    with pytest.raises(kt.DataNotAllowedError):
        await kt.backtest(market(), made, request=REQUEST, isolate="process")
