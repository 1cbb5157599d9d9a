"""A state is built in small steps; what is left off between two of them loses nothing. Counted, not timed."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest
from engine_runs import checkpoint, finish, hourly
from numpy.typing import NDArray

import ktrdr_async as kt
from ktrdr_async.backtesting import checkpoint_builder
from ktrdr_async.backtesting.checkpoint_builder import Since, at_once, checkpoint_steps, closing_steps
from ktrdr_async.backtesting.ledger import Ledger, PriceRange
from ktrdr_async.market import fingerprint

pytestmark = pytest.mark.anyio
REQUEST = kt.BacktestRequest(initial_capital=1e6, commission=0.00002, slippage=0.0)
RECORDS, VALUES, PRICES = 250, 8192, 8192  # the most that a step may take


class Busy(kt.Strategy):
    """Turns a position over at each bar, holds another one for ever, and records values."""

    def prepare(self, bars: kt.Bars) -> dict[str, NDArray[np.float64]]:
        return {"twice": bars.close * 2.0, "one": bars.close[:, 0] + 1.0}

    def on_bar(self, bar: kt.Bar) -> None:
        bar.target_quantity(0, 1.0 if bar.index % 2 else -1.0, tag="abc"[bar.index % 3])
        if 200 <= bar.index < 900:
            bar.order(1, 1.0)
        bar.record(x=float(bar.index), y=-0.0)


class Flip(kt.WeightStrategy):
    def target_quantities(self, bars: kt.Bars) -> NDArray[np.float64]:
        found = np.where(np.arange(len(bars))[:, None] % 2, 1.0, -1.0) * np.ones((1, bars.k))
        found[:200, 1:] = np.nan  # no bars yet
        return found


CASES: list[Callable[[], Any]] = [Busy, Flip]


def steps(engine: kt.BacktestingEngine, since: Since | None) -> Any:
    at = engine.boundary.bar_index
    return checkpoint_steps(engine, at, int(engine.bars.timestamps[at]), since=since)


class Counted:
    """What an engine's digests have taken in."""

    def __init__(self, engine: kt.BacktestingEngine) -> None:
        self._engine = engine
        self.last = self._now()

    def _now(self) -> tuple[int, int, int]:
        portfolio, decided = self._engine.portfolio, self._engine.decided
        width = sum(column.size for column in decided.columns.values()) // len(self._engine.bars)
        return portfolio._ledger_digest.count, portfolio._recorded_hashed, decided._hashed * width

    def step(self) -> tuple[int, int, int]:
        before, self.last = self.last, self._now()
        events, recorded, values = (now - then for now, then in zip(self.last, before, strict=True))
        return events, recorded, values


@pytest.mark.parametrize("make", CASES)
async def test_no_step_looks_at_more_than_a_few_records(
    make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[tuple[str, int]] = []
    get, extremes = Ledger.__getitem__, PriceRange.extremes

    def events(self: Ledger, at: Any) -> Any:
        found = get(self, at)
        looked.append(("events", len(found) if isinstance(at, slice) else 1))
        return found

    def prices(self: PriceRange, symbol: int, first: int, stop: int) -> Any:
        looked.append(("prices", stop - first))
        return extremes(self, symbol, first, stop)

    engine = kt.BacktestingEngine(REQUEST, hourly(9_000), make())
    await finish(engine)
    monkeypatch.setattr(Ledger, "__getitem__", events)
    monkeypatch.setattr(PriceRange, "extremes", prices)
    counted, most = Counted(engine), (0, 0, 0)
    for number, state in enumerate(steps(engine, Since())):
        taken = counted.step()
        assert taken <= (RECORDS, RECORDS, VALUES)
        assert sum(count > 0 for count in taken) <= 1
        most = tuple(map(max, most, taken))  # type: ignore[assignment]
        for what, limit in (("events", 2 * RECORDS), ("prices", PRICES)):  # walking back and digesting may meet
            assert sum(count for name, count in looked if name == what) <= limit, number
        looked.clear()
        last = state
    assert last is not None
    assert len(last.ledger) > 5_000
    assert len(last.equity_samples) == 90
    assert most[0] == RECORDS
    assert VALUES / 2 < most[2] <= VALUES
    if make is Busy:
        assert most[1] == RECORDS
        assert len(last.recorded) == 18_000
        assert len(last.positions) == 2
    with_all = kt.build_backtest_checkpoint_state(engine, 8_999, int(engine.bars.timestamps[8_999]), since=Since())
    assert with_all == last


async def test_samples_of_a_long_stretch_are_made_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made = 0

    def sample(*values: Any) -> Any:
        nonlocal made
        made += 1
        return checkpoint_builder.__dict__["_Sample"](*values)

    monkeypatch.setattr(checkpoint_builder, "_Sample", checkpoint_builder.EquitySample, raising=False)
    monkeypatch.setattr(checkpoint_builder, "EquitySample", sample)
    engine = kt.BacktestingEngine(REQUEST, hourly(60_000, symbols=("A",)), kt.BuyAndHold(), block_bars=20_000)
    await finish(engine)
    for _ in steps(engine, Since()):
        assert made <= RECORDS
        total, made = made, 0
    assert total == 0  # the last step only puts together what there is


@pytest.mark.parametrize("make", CASES)
async def test_what_is_left_off_between_two_steps_loses_nothing(make: Callable[[], Any]) -> None:
    """At each boundary so many steps, left off, and sometimes all: the states are those of an engine left alone."""
    rng = random.Random(5)
    bars = hourly(3_000)
    left_off, alone = (kt.BacktestingEngine(REQUEST, bars, make()) for _ in range(2))
    since = Since()
    async with aclosing(left_off.run()) as ours, aclosing(alone.run()) as theirs:
        async for block in ours:
            await anext(theirs)
            for _ in range(rng.randrange(3)):
                some = steps(left_off, since)
                for _ in range(rng.randrange(1, 40)):
                    next(some, None)
                if rng.random() < 0.5:
                    some.close()
            if rng.random() < 0.3:
                found = at_once(steps(left_off, since))
                assert found == at_once(steps(alone, since))
                since = Since(block.fills, block.bar_index // 100 + 1, len(left_off.portfolio.recorded))
        assert await anext(theirs, None) is None
    found = at_once(closing_steps(left_off, since))
    assert found == at_once(closing_steps(alone, since))
    assert len(found.ledger) >= 2, "the closing step's fills are among them"
    assert left_off.results().digest == alone.results().digest


async def test_a_resume_takes_the_ledger_in_in_steps() -> None:
    saved = kt.BacktestingEngine(REQUEST, bars := hourly(4_000), Busy())
    async with aclosing(saved.run()) as blocks:
        async for block in blocks:
            if block.bar_index >= 2_999:
                break
    state = checkpoint(saved)
    assert len(state.ledger) > 10 * RECORDS

    class Turn:
        """Always over."""

        deadline = 0.0
        passed: list[int] = []

        @staticmethod
        def clock() -> float:
            return 1.0

        async def pass_on(self) -> None:
            self.passed.append(engine.portfolio._ledger_digest.count)

        async def enter(self) -> None: ...

        def leave(self) -> None: ...

        async def offload(self, work: Any) -> Any:
            return work()

        async def prepare(self, engine: Any, work: Any) -> Any:
            return work()

    engine = kt.BacktestingEngine(REQUEST, bars, Busy(), turn=Turn())
    async with aclosing(engine.run(state)) as blocks:
        await anext(blocks)
    counts = sorted(set(Turn.passed))
    assert counts[-1] == len(state.ledger)
    assert max(np.diff([0, *counts])) <= RECORDS


def test_a_prefix_of_what_was_hashed_costs_a_piece_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    bars = hourly(30_000, symbols=("A",))
    hashed: list[int] = []
    laid_out = fingerprint.PrefixHash._bytes

    def counted(self: fingerprint.PrefixHash, start: int, end: int) -> memoryview:
        found = laid_out(self, start, end)
        hashed.append(found.nbytes)
        return found

    monkeypatch.setattr(fingerprint.PrefixHash, "_bytes", counted)
    whole = bars.fingerprint()
    assert sum(hashed) == 30_000 * 6 * 8
    for upto in (0, 5_460, 5_461, 17_000, 29_998):
        hashed.clear()
        assert bars.fingerprint(upto) == hourly(30_000, symbols=("A",)).head(upto + 1).fingerprint() != whole
        assert hashed[0] <= fingerprint._PIECE_BYTES
    hashed.clear()
    assert bars.fingerprint() == whole
    assert hashed == []
