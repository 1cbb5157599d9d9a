"""X3: bars after t change nothing up to t, neither perturbed nor cut off; a `prepare` that looked ahead is refused."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import aclosing

import numpy as np
import pytest
from engine_runs import cancel_at, checkpoint, finish, hourly
from living import Busy, BusyAsync, Crossing
from numpy.typing import NDArray

import ktrdr_async as kt
from ktrdr_async.strategies.base import AnyStrategy

pytestmark = pytest.mark.anyio

REQUEST = kt.BacktestRequest(initial_capital=40_000.0, force_close=False)
BARS = hourly(600)
KINDS = (Busy, BusyAsync, Crossing)


def perturbed(bars: kt.Bars, after: int, seed: int) -> kt.Bars:
    """Other prices, volumes and gaps from bar `after + 1` on; the same up to `after`."""
    rng = np.random.default_rng(seed)
    factor = np.exp(0.2 * rng.standard_normal((len(bars) - after - 1, 1)))
    fields = [np.array(getattr(bars, name)) for name in ("open", "high", "low", "close", "volume")]
    for values in fields:
        values[after + 1 :] *= factor
    missing = np.isnan(fields[3])
    missing[after + 1 :, 1] |= rng.random(len(factor)) < 0.3
    for values in fields:
        values[missing] = np.nan
    return kt.Bars.from_arrays(bars.timestamps, *fields, symbols=bars.symbols, timeframe=bars.timeframe)


async def seen_up_to(bars: kt.Bars, kind: type[AnyStrategy], t: int) -> tuple[object, ...]:
    """Fills, equity, boundary digest and checkpoint at bar t of a run over all the bars."""
    engine = kt.BacktestingEngine(REQUEST, bars, kind(), block_bars=10)
    digest, state = "", None
    async with aclosing(engine.run()) as blocks:
        async for block in blocks:
            if block.bar_index == t:
                state = checkpoint(engine)
                digest = engine.portfolio.state_digest(engine.boundary)
    assert state is not None
    results = engine.results()
    fills = [event for event in results.ledger if event.bar <= t]
    recorded = [each for each in results.recorded_values if each[0] <= t]
    assert state.manifest is not None
    state.manifest.recorded.pop("data")  # tells of all bars, and is compared with nothing
    return digest, state.to_dict(), fills, recorded, results.equity[: t + 1].tobytes()


@pytest.mark.parametrize("kind", KINDS)
async def test_later_bars_change_nothing_before(kind: type[AnyStrategy]) -> None:
    for t in (9, 49, 199, 399, 589):
        expected = await seen_up_to(BARS, kind, t)
        for seed in (1, 2):
            assert await seen_up_to(perturbed(BARS, t, seed), kind, t) == expected
        assert await seen_up_to(BARS.head(t + 1), kind, t) == expected
        assert await seen_up_to(BARS.head(t + 2), kind, t) == expected


@pytest.mark.parametrize("kind", KINDS)
async def test_the_perturbation_is_seen_afterwards(kind: type[AnyStrategy]) -> None:
    expected = await seen_up_to(BARS, kind, 399)
    assert await seen_up_to(perturbed(BARS, 199, 1), kind, 399) != expected


@pytest.mark.parametrize("kind", KINDS)
async def test_a_finished_prefix_goes_on_with_appended_bars(kind: type[AnyStrategy]) -> None:
    """The checkpoint before the closing step is that of a run that had all the bars from the beginning."""
    short = kt.BacktestingEngine(REQUEST, BARS.head(433), kind())
    await finish(short)
    state = checkpoint(short)
    assert state.bar_index == 432
    longer = await finish(kt.BacktestingEngine(REQUEST, BARS, kind()), state)
    assert longer.digest == (await finish(kt.BacktestingEngine(REQUEST, BARS, kind()))).digest


class Peeking(kt.Strategy):
    """Row i of its feature is made from bar i + 1."""

    def prepare(self, bars: kt.Bars) -> Mapping[str, NDArray[np.float64]]:
        return {"next": np.concatenate([bars.close[1:], bars.close[-1:]])}

    def on_bar(self, bar: kt.Bar) -> None:
        if bar.index % 5 == 0:
            bar.target_weight(0, 0.5 if bar.feature("next")[0] > bar.close[0] else -0.5)


class Scaled(kt.Strategy):
    """Its feature is scaled by the mean of the whole history."""

    def prepare(self, bars: kt.Bars) -> Mapping[str, NDArray[np.float64]]:
        return {"scaled": bars.close[:, 0] / bars.close[:, 0].mean()}

    def on_bar(self, bar: kt.Bar) -> None:
        pass


class PeekingAsync(kt.AsyncStrategy):
    async def prepare(self, bars: kt.Bars) -> Mapping[str, NDArray[np.float64]]:
        return {"scaled": bars.close[:, 0] / bars.close[:, 0].mean()}

    async def on_bar(self, bar: kt.Bar) -> None:
        pass


class PeekingWeights(kt.WeightStrategy):
    def target_weights(self, bars: kt.Bars) -> NDArray[np.float64]:
        last = bars.close[-1, 0]
        return np.where(bars.close < last, 0.3, -0.3) * np.array([[1.0, np.nan]])


class Hidden(kt.Strategy):
    """Randomness of its own: another feature at every run."""

    def prepare(self, bars: kt.Bars) -> Mapping[str, NDArray[np.float64]]:
        return {"noise": np.random.default_rng().random(len(bars))}

    def on_bar(self, bar: kt.Bar) -> None:
        pass


@pytest.mark.parametrize("kind", [Peeking, Scaled, PeekingAsync, PeekingWeights])
async def test_a_checkpoint_made_with_look_ahead_is_refused_when_bars_were_appended(kind: type[AnyStrategy]) -> None:
    short = kt.BacktestingEngine(REQUEST, BARS.head(300), kind())
    await finish(short)
    with pytest.raises(kt.CheckpointMismatchError, match="decisions") as caught:
        await finish(kt.BacktestingEngine(REQUEST, BARS, kind()), checkpoint(short))
    assert set(caught.value.differences) == {"decisions"}
    # Over the same bars it is no other run, however bad.
    again = kt.BacktestingEngine(REQUEST, BARS.head(300), kind())
    await cancel_at(again, 2)
    results = await finish(kt.BacktestingEngine(REQUEST, BARS.head(300), kind()), checkpoint(again))
    assert results.digest == short.results().digest


async def test_hidden_randomness_in_prepare_is_refused() -> None:
    engine = kt.BacktestingEngine(REQUEST, BARS, Hidden())
    await cancel_at(engine, 2)
    with pytest.raises(kt.CheckpointMismatchError, match="decisions"):
        await finish(kt.BacktestingEngine(REQUEST, BARS, Hidden()), checkpoint(engine))


async def test_a_changed_past_is_refused() -> None:
    engine = kt.BacktestingEngine(REQUEST, BARS, Busy())
    await cancel_at(engine, 4)
    state = checkpoint(engine)
    with pytest.raises(kt.CheckpointMismatchError) as caught:
        await finish(kt.BacktestingEngine(REQUEST, perturbed(BARS, 398, 3), Busy()), state)
    assert set(caught.value.differences) == {"bars"}
    await finish(kt.BacktestingEngine(REQUEST, perturbed(BARS, 399, 3), Busy()), state)
    with pytest.raises(kt.CheckpointMismatchError, match="the checkpoint is of bar 399 and the data have 399 bars"):
        await finish(kt.BacktestingEngine(REQUEST, BARS.head(399), Busy()), state)


@pytest.mark.parametrize(
    ("request_", "strategy", "field"),
    [
        (kt.BacktestRequest(initial_capital=40_000.0, force_close=False, commission=0.002), Busy, "request.commission"),
        (kt.BacktestRequest(initial_capital=40_000.0, force_close=False, seed=1), Busy, "request.seed"),
        (kt.BacktestRequest(initial_capital=40_000.0), Busy, "request.force_close"),
        (REQUEST, BusyAsync, "strategy"),
    ],
)
async def test_another_request_or_strategy_is_refused(
    request_: kt.BacktestRequest, strategy: type[AnyStrategy], field: str
) -> None:
    engine = kt.BacktestingEngine(REQUEST, BARS, Busy())
    await cancel_at(engine, 2)
    with pytest.raises(kt.CheckpointMismatchError) as caught:
        await finish(kt.BacktestingEngine(request_, BARS, strategy()), checkpoint(engine))
    assert field in caught.value.differences


async def test_other_parameters_are_refused() -> None:
    engine = kt.BacktestingEngine(REQUEST, BARS, Busy(every=3))
    await cancel_at(engine, 2)
    with pytest.raises(kt.CheckpointMismatchError):
        await finish(kt.BacktestingEngine(REQUEST, BARS, Busy(every=4)), checkpoint(engine))


async def test_the_past_that_a_bar_shows_ends_at_the_bar_and_is_read_only() -> None:
    class Looking(kt.Strategy):
        def on_bar(self, bar: kt.Bar) -> None:
            for name in ("open", "high", "low", "close", "volume", "timestamps"):
                past = getattr(bar.past, name)
                assert len(past) == len(bar.past) == bar.index + 1
                with pytest.raises(ValueError, match="read-only"):
                    past[0] = 0
            assert bar.past.close[-1, 0] == bar.close[0]

    await finish(kt.BacktestingEngine(REQUEST, BARS.head(30), Looking()))
