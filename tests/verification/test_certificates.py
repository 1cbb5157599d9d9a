"""Certificates: what is right gets one, the engine's own faults don't, and what was tried was really tried."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
import zoo
from verification_runs import COSTS, EURUSD

import ktrdr_async as kt
from ktrdr_async.backtesting import engine
from ktrdr_async.backtesting.portfolio import Portfolio
from ktrdr_async.strategies.base import AnyStrategy
from ktrdr_async.verification.certificate import Step
from ktrdr_async.verification.futures import FUTURES, other_future
from ktrdr_async.verification.plan import Plan
from ktrdr_async.verification.strikes import Strike

pytestmark = pytest.mark.anyio

BARS = EURUSD.head(1_000)
engine_module: Any = engine  # whose own imports are replaced here


@pytest.fixture
def signals(tmp_path: Path) -> kt.Signals:
    """Orders of a file, at every 50th bar."""
    times = EURUSD.to_pandas().index[::50]
    rows = [f"{time.isoformat()},{0.5 if i % 2 else -0.25}" for i, time in enumerate(times)]
    file = tmp_path / "signals.csv"
    file.write_text("time,EURUSD\n" + "\n".join(rows) + "\n")
    return kt.Signals(file=str(file), clip=True)


@pytest.mark.parametrize(
    "strategy",
    [
        kt.SmaCross(fast=5),
        kt.BuyAndHold(),
        kt.RsiReversion(),
        kt.DonchianBreakout(),
        kt.MomentumRotation(),
        kt.AsyncReversion(),
        None,
    ],
    ids=lambda strategy: type(strategy).__name__,
)
async def test_every_built_in_on_real_bars(strategy: AnyStrategy | None, signals: kt.Signals) -> None:
    tried = strategy or signals
    certificate = await kt.verify(EURUSD, tried, kills=1, hash_seeds=1, **COSTS)
    assert certificate, certificate
    assert certificate.difference is None
    assert certificate.untried == ()
    assert certificate.digest == (await kt.backtest(EURUSD, tried, **COSTS)).digest
    counts = {trial.what: trial.count for trial in certificate.trials}
    assert counts == {
        "uninterrupted": 1,
        "again, a new object": 1,
        "again, the same object": 1,
        "block sizes": 3,
        "tiers": 1,
        "hash seeds": 1,
        "interruptions": 20,
        "kill -9": 1,
        "look-ahead": 30,
    }
    assert all(set(trial.digests) <= {certificate.digest} for trial in certificate.trials)
    assert json.loads(json.dumps(certificate.to_dict()))["ok"] is True
    assert certificate.digest in str(certificate)
    assert str(certificate).startswith("verified: ")


@pytest.mark.parametrize("kind", [zoo.Sound, zoo.SoundAsync])
async def test_a_sound_strategy_with_two_symbols_gaps_and_features(kind: type[AnyStrategy]) -> None:
    n = 450
    made = kt.Bars.read(f"synthetic:?bars={n}&seed=3&symbols=A,B")
    fields = [np.array(getattr(made, name)) for name in ("open", "high", "low", "close", "volume")]
    for values in fields:
        values[100:130, 1] = np.nan
        values[:20, 1] = np.nan
    features = {"shared": np.arange(n) % 5.0, "own": fields[3] * 2}
    bars = kt.Bars.from_arrays(made.timestamps, *fields, symbols=made.symbols, features=features)
    certificate = await kt.verify(bars, kind, interruptions="all", block_sizes=(3,), initial_capital=50_000.0, seed=5)
    assert certificate, certificate
    counts = {trial.what: trial.count for trial in certificate.trials}
    assert counts["interruptions"] == 5 + n  # every yield, and inside every bar
    assert counts["kill -9"] == 2


class Waiting(kt.Strategy):
    """Has an order waiting at every boundary, and some of them are cut."""

    def on_bar(self, bar: kt.Bar) -> None:
        bar.target_weight(0, 1.0 if bar.index % 2 else -1.0, tag="other")


@pytest.mark.parametrize(
    ("loss", "named"),
    [
        ({"waiting": []}, "EURUSD.waiting.lots"),
        ({"waiting": "untagged"}, "EURUSD.waiting.tag"),
        ({"counters": "uncut"}, "orders.cut"),
        ({"ledger": "short"}, "cash"),
    ],
    ids=["orders", "tags", "counters", "ledger"],
)
async def test_an_engine_that_loses_a_field_on_restore_is_found_and_the_field_is_named(
    loss: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Portfolio.restore

    def forgetful(self: Portfolio, state: kt.BacktestCheckpointState, recorded: Any, operation: str) -> None:
        [(name, lost)] = loss.items()
        if lost == "untagged":
            lost = [msgspec.structs.replace(order, tag=None) for order in state.waiting]
        elif lost == "uncut":
            lost = msgspec.structs.replace(state.counters, cut=0)
        elif lost == "short":
            lost = state.ledger[:-1]
            state = msgspec.structs.replace(state, cash=lost[-1].cash_after)
        real(self, msgspec.structs.replace(state, **{name: lost}), recorded, operation)

    monkeypatch.setattr(Portfolio, "restore", forgetful)
    certificate = await kt.verify(BARS, Waiting, kills=0, hash_seeds=0)
    assert certificate.difference is not None
    assert certificate.difference.kind == "engine"
    assert f"resumed from bar {certificate.difference.bar:,} by a new object" in certificate.difference.trial
    assert named in [field.name for field in certificate.difference.fields]


async def test_an_engine_that_loses_the_equity_before_a_resume_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = engine_module.equity_curve

    def flat(*args: Any) -> Any:
        curve = real(*args)
        curve[7] += 1e-9
        return curve

    monkeypatch.setattr(engine_module, "equity_curve", flat)
    certificate = await kt.verify(BARS, kt.BuyAndHold, kills=0, hash_seeds=0)
    assert certificate.difference is not None
    assert (certificate.difference.bar, certificate.difference.kind) == (7, "engine")
    assert [field.name for field in certificate.difference.fields] == ["equity"]


class Recent(msgspec.Struct):
    prices: list[float] = []
    ring: Any = msgspec.field(default_factory=lambda: np.zeros(3))


class Remembering(kt.Strategy):
    def __init__(self) -> None:
        self.state = Recent()

    def on_bar(self, bar: kt.Bar) -> None:
        self.state.prices = [*self.state.prices[-2:], bar.close[0]]


async def test_a_state_that_comes_back_wrong_is_named_by_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    real = engine_module.decode_state

    def wrong(data: bytes | None, kind: type | None) -> Any:
        state = real(data, kind)
        if state is not None and len(state.prices) == 3:
            state.prices[1] += 1.0
        return state

    monkeypatch.setattr(engine_module, "decode_state", wrong)
    certificate = await kt.verify(BARS, Remembering, kills=0, hash_seeds=0)
    difference = certificate.difference
    assert difference is not None
    assert difference.exact
    assert [field.name for field in difference.fields] == ["state.prices[0]"]  # the next bar has dropped another
    assert float(difference.fields[0].found) == float(difference.fields[0].reference) + 1.0
    assert f"resumed from bar {difference.bar - 1:,} by" in difference.trial
    assert "lost_on_resume" in str(certificate)


async def test_other_futures_keep_the_past_and_the_rules_of_bars() -> None:
    features = {"kind": np.arange(len(BARS)) % 3.0}
    columns = [getattr(BARS, name) for name in ("open", "high", "low", "close", "volume")]
    bars = kt.Bars.from_arrays(BARS.timestamps, *columns, symbols=BARS.symbols, features=features)
    for future in FUTURES:
        other = other_future(bars, 300, future, 0)
        assert other.fingerprint(300) == bars.fingerprint(300)
        assert len(other) == (301 if future == "cut off" else len(bars))
        if future == "cut off":
            continue
        columns = [getattr(other, name) for name in ("open", "high", "low", "close", "volume")]
        kt.Bars.from_arrays(other.timestamps, *columns, symbols=other.symbols)  # which validates
        assert ((other.close > bars.close) == (future == "raised"))[301:].all()
        assert sorted(other.features["kind"][301:].ravel()) == sorted(bars.features["kind"][301:].ravel())
        assert (other.features["kind"] != bars.features["kind"]).any()


def test_the_same_seed_tries_the_same_and_another_one_something_else() -> None:
    def strikes(seed: int) -> list[Strike]:
        return Plan.checked(20, 2, 2, (1,), 10, seed).strikes(zoo.SoundAsync(), 5_000)

    assert strikes(1) == strikes(1) != strikes(2)
    assert {strike.how for strike in strikes(1)} == {"yield", "between", "await", "raise"}
    assert len(strikes(1)) == 20
    every = Plan.checked("all", 2, 2, (1,), 10, 1).strikes(zoo.SoundAsync(), 450)
    assert sum(strike.how == "yield" for strike in every) == 5
    assert {strike.bar for strike in every if strike.how != "yield"} == set(range(450))


@pytest.mark.parametrize(
    "options",
    [{"kills": -1}, {"interruptions": "some"}, {"block_sizes": (0,)}, {"lookahead": 1.5}, {"capital": 1.0}],
)
async def test_what_cannot_be_tried_is_bad_input(options: dict[str, Any]) -> None:
    with pytest.raises(kt.InputError):
        await kt.verify(BARS, kt.SmaCross, **options)


@pytest.mark.parametrize("n", [1, 3, 101])
async def test_few_bars(n: int) -> None:
    certificate = await kt.verify(BARS.head(n), zoo.Sound, kills=1, hash_seeds=0)
    assert certificate, certificate


async def test_a_strategys_own_error_comes_through() -> None:
    class Broken(kt.Strategy):
        def on_bar(self, bar: kt.Bar) -> None:
            raise LookupError(f"at {bar.index}")

    with pytest.raises(LookupError, match="at 0"):
        await kt.verify(BARS, Broken)


async def test_what_another_process_cannot_make_is_told() -> None:
    class Local(zoo.Sound):
        pass

    certificate = await kt.verify(BARS, Local, interruptions=2, lookahead=1)
    assert certificate
    assert len(certificate.untried) == 2
    assert "can't be imported by another process" in certificate.untried[0]
    assert "not tried: kill -9" in str(certificate)


async def test_a_file_of_signals_that_names_later_bars_is_no_look_ahead(tmp_path: Path) -> None:
    file = tmp_path / "signals.csv"
    file.write_text(f"time,EURUSD\n{BARS.to_pandas().index[-2].isoformat()},0.5\n")
    certificate = await kt.verify(BARS, kt.Signals(file=str(file)), interruptions=0, kills=0, hash_seeds=0)
    assert certificate
    assert certificate.untried == ("9 of 30 other futures: the strategy's data refuse them",)


@pytest.mark.parametrize("what", ["hash seeds", "kill -9", "interruptions", "look-ahead"])
async def test_a_cancelled_verification_leaves_no_process_no_file_and_no_task(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    tasks = asyncio.all_tasks()
    seen: list[int] = []

    def on_step(step: Step) -> None:
        if step.what == what:
            seen.append(len(os.listdir(tmp_path)))
            asyncio.get_running_loop().call_later(0.05, task.cancel)

    counts: dict[str, Any] = {
        "interruptions": "all" if what == "interruptions" else 0,
        "kills": 2 if what == "kill -9" else 0,
    }
    counts["hash_seeds"] = 2 if what == "hash seeds" else 0
    task = asyncio.ensure_future(kt.verify(BARS, zoo.SoundAsync, on_step=on_step, lookahead=99, **counts))
    with pytest.raises(asyncio.CancelledError):
        await task
    assert seen[0] == 1
    assert os.listdir(tmp_path) == []
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
    assert asyncio.all_tasks() == tasks


async def test_an_await_that_was_cancelled_is_the_strategys_error_and_ends_nothing_else() -> None:
    bars = kt.Bars.read("synthetic:?bars=200&seed=3")
    with pytest.raises(kt.StrategyError, match="something that the strategy awaited was cancelled"):
        await kt.verify(bars, zoo.Cancels())
