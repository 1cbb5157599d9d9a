"""X1: the compiled tier gives every bit of the interpreted one, and is never required."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from campaigns import Figures, sized
from engine_runs import bars_of, cancel_at, checkpoint, finish, flat_bars, hourly
from living import Busy
from markets import random_market
from test_against_oracle import SEEDS, case_of, compare

import ktrdr_async as kt
from ktrdr_async import compiling
from ktrdr_async.backtesting.tiers import INTERPRETED, checked_tier, pays, tier_of
from ktrdr_async.strategies import indicators
from ktrdr_async.strategies.base import AnyStrategy

pytestmark = pytest.mark.anyio

BUILT_INS: dict[str, Callable[[], AnyStrategy]] = {
    "sma_cross": lambda: kt.SmaCross(fast=3, slow=8),
    "sma_cross, short, powers of two": lambda: kt.SmaCross(fast=4, slow=16, short=True),
    "sma_cross, units": lambda: kt.SmaCross(fast=1, slow=2, quantity=3.5),
    "buy_and_hold": kt.BuyAndHold,
    "donchian_breakout": lambda: kt.DonchianBreakout(entry=5, exit=3, short=True),
    "momentum_rotation": lambda: kt.MomentumRotation(lookback=6, top=2, every=4),
    "rsi_reversion": lambda: kt.RsiReversion(period=4, low=45.0, high=55.0),
    "async_reversion": kt.AsyncReversion,
}


class Looking(kt.Strategy):
    """Looks at its equity at each bar from the 300th on, and trades all the time."""

    def on_bar(self, bar: kt.Bar) -> None:
        if bar.index >= 300 and bar.portfolio.equity < 0:
            raise AssertionError
        bar.target_quantity(0, float(bar.index % 7 - 3), tag=f"t{bar.index % 5}")


def looking(given: kt.Strategy, *, at_all: bool, heard: bool = False) -> kt.Strategy:
    """The same strategy, which writes down cash and units of each bar; `at_all`: after a look at what each bar moves.

    `heard`: it is told of fills too.
    """

    class Watchful(type(given)):  # type: ignore[misc]
        def on_bar(self, bar: kt.Bar) -> None:
            if at_all:
                assert bar.portfolio.equity == bar.portfolio.equity
            super().on_bar(bar)
            held = {f"held{j}": bar.portfolio[j].quantity for j in range(len(bar.symbols))}
            bar.record(cash=bar.portfolio.cash, **held)

        if heard:

            def on_fill(self, bar: kt.Bar, fill: kt.Fill) -> None:
                bar.record(price=fill.price, at=bar.index)

    object.__setattr__(given, "__class__", Watchful)
    return given


class Greedy(kt.Strategy):
    """At bar 7 a weight that comes to too many lots; by then nothing has been looked at since bar 4."""

    def on_bar(self, bar: kt.Bar) -> None:
        if bar.index == 4:
            assert bar.portfolio.cash > 0
        if bar.index == 7:
            bar.target_weight(0, 1.0)
        if bar.index == 60:
            raise RuntimeError("later")


def random_bars(seed: int, bars: int = 260) -> kt.Bars:
    return bars_of(random_market(np.random.default_rng(seed), bars=bars))


@sized("cases", ci=60, whole=SEEDS)
async def test_the_oracle_agrees_with_compiled_code_too(compiled: None, cases: int, figures: Figures) -> None:
    runs = 0
    for seed in range(0, SEEDS, SEEDS // cases):
        case = case_of(seed)
        for strategy in case.strategies():
            engine = kt.BacktestingEngine(case.request, case.bars, strategy, block_bars=(7, 100, 50)[seed % 3])
            assert engine.tier == "compiled"
            results = await finish(engine, audited=False)
            try:
                compare(case, results, case.expected)
            except AssertionError as error:
                raise AssertionError(f"seed {seed}, {type(strategy).__name__}: {error}") from error
            runs += 1
    figures.add("compiled runs against the oracle", f"{runs} equal")


@pytest.mark.parametrize("name", BUILT_INS)
async def test_built_ins_come_to_the_same_digest_in_both_tiers(compiled: None, name: str) -> None:
    fills = 0
    for seed in range(12):
        bars, request = random_bars(seed), kt.BacktestRequest(initial_capital=50_000.0)
        ends = {}
        for tier in ("interpreted", "compiled"):
            engine = kt.BacktestingEngine(request, bars, BUILT_INS[name](), tier=tier, block_bars=30)  # type: ignore[arg-type]
            states = [engine.portfolio.state_digest(engine.boundary) async for _ in engine.run()]
            results = engine.results()
            ends[tier] = (states, results.digest, engine.decided.digest(len(bars) - 1))
            fills += len(results.ledger)
        assert ends["interpreted"] == ends["compiled"], seed
    assert fills > 20


async def test_pieces_end_between_boundaries_and_lose_no_decision(compiled: None) -> None:
    """Compiled code computes pieces of blocks; what is decided at a piece's last bar counts in the next one."""
    for symbols, bars in (("A", 40_000), ("A,B,C", 14_000)):
        data, digests = kt.Bars.read(f"synthetic:?bars={bars}&seed=7&symbols={symbols}"), set()
        for tier in ("interpreted", "compiled"):
            strategy = kt.SmaCross(fast=1, slow=2, quantity=1.0)
            engine = kt.BacktestingEngine(kt.BacktestRequest(), data, strategy, tier=tier, block_bars=70)  # type: ignore[arg-type]
            results = await finish(engine, audited=False)
            digests.add(results.digest)
        assert len(results.ledger) > bars / 3  # a decision at about every other bar, at ends of pieces too
        assert len(digests) == 1, symbols


@pytest.mark.parametrize(
    "kind", [Busy, Looking, *list(BUILT_INS.values())[:2]], ids=["busy", "looking", "sma", "short"]
)
async def test_a_checkpoint_goes_on_in_the_other_tier(compiled: None, kind: Callable[[], AnyStrategy]) -> None:
    bars, request = hourly(900, symbols=("A", "B", "C")), kt.BacktestRequest(initial_capital=30_000.0, seed=5)
    whole = (await finish(kt.BacktestingEngine(request, bars, kind(), tier="interpreted"))).digest
    for number, (first, second) in enumerate([("interpreted", "compiled"), ("compiled", "interpreted")] * 4):
        engine = kt.BacktestingEngine(request, bars, kind(), tier=first)  # type: ignore[arg-type]
        await cancel_at(engine, 1 + number)
        other = kt.BacktestingEngine(request, bars, kind(), tier=second)  # type: ignore[arg-type]
        assert (await finish(other, checkpoint(engine))).digest == whole, (first, second)


@sized("cases", ci=40, whole=SEEDS)
@pytest.mark.parametrize("heard", [False, True])
async def test_bars_that_leave_cash_and_units_alone_neednt_be_computed_to_tell_them(
    compiled: None, cases: int, heard: bool
) -> None:
    """What a strategy reads at each bar is what it reads where every bar is computed; ruin, gaps and cuts included."""
    ruined = 0
    for seed in range(0, SEEDS, SEEDS // cases):
        case, seen = case_of(seed), []
        for tier, at_all in (("interpreted", True), ("interpreted", False), ("compiled", True), ("compiled", False)):
            strategy = next(each for each in case.strategies() if isinstance(each, kt.Strategy))
            engine = kt.BacktestingEngine(
                case.request, case.bars, looking(strategy, at_all=at_all, heard=heard), tier=tier, block_bars=37
            )  # type: ignore[arg-type]
            results = await finish(engine, audited=False)
            ruined += results.ruined_at is not None
            seen.append((results.ledger, results.recorded_values, results.equity.tobytes(), results.counters))
        assert all(each == seen[0] for each in seen), seed
    assert ruined


@pytest.mark.parametrize("tier", ["interpreted", "compiled"])
@pytest.mark.parametrize("at_all", [False, True])
async def test_ruin_ends_what_is_held_while_nobody_looks_closer(compiled: None, tier: Any, at_all: bool) -> None:
    """A has a long way down behind a gap, beside a short B: equity is gone at the close of bar 20, where A has none."""
    a = [100.0] * 15 + [50.0] + [float("nan")] * 10 + [50.0] * 4
    b = [100.0] * 20 + [260.0] + [110.0] * 9

    class Once(kt.Strategy):
        def on_bar(self, bar: kt.Bar) -> None:
            if bar.index == 1:
                bar.target_quantity(0, 50.0)
                bar.target_quantity(1, -50.0)

    strategy = looking(Once(), at_all=at_all)
    request = kt.BacktestRequest(initial_capital=20_000.0, commission=0.0, slippage=0.0, force_close=False)
    engine = kt.BacktestingEngine(request, flat_bars(a, b), strategy, tier=tier)
    results = await finish(engine, audited=False)
    assert results.ruined_at is None
    request = kt.BacktestRequest(initial_capital=10_100.0, commission=0.0, slippage=0.0, force_close=False)
    engine = kt.BacktestingEngine(request, flat_bars(a, b), looking(Once(), at_all=at_all), tier=tier)
    results = await finish(engine, audited=False)
    assert results.ruined_at == 20
    held = results.recorded[["held0", "held1"]].to_numpy()
    assert held[20].tolist() == [50.0, -50.0]
    assert held[21].tolist() == [50.0, 0.0]
    assert held[26].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("tier", ["interpreted", "compiled"])
async def test_at_the_end_what_the_closing_step_closed_is_no_longer_held(compiled: None, tier: Any) -> None:
    class Last(kt.Strategy):
        def on_bar(self, bar: kt.Bar) -> None:
            bar.record(held=bar.portfolio[0].quantity, cash=bar.portfolio.cash)
            if bar.index == 1:
                bar.target_quantity(0, 5.0)

        def on_end(self, bar: kt.Bar) -> None:
            bar.record(held_at_end=bar.portfolio[0].quantity, cash_at_end=bar.portfolio.cash)

    engine = kt.BacktestingEngine(kt.BacktestRequest(), flat_bars([100.0] * 9), Last(), tier=tier)
    results = await finish(engine, audited=False)
    last = results.recorded.iloc[-1]
    assert (last["held"], last["held_at_end"]) == (5.0, 0.0)
    assert last["cash_at_end"] == results.ledger[-1].cash_after > last["cash"]


async def test_looks_at_units_compute_the_account_only_where_something_happens(compiled: None) -> None:
    bars, computed = hourly(2_000), []

    class Rare(kt.Strategy):
        def on_bar(self, bar: kt.Bar) -> None:
            if bar.index % 100 == 50:
                bar.target_quantity(0, float(bar.index // 100 % 2))
            assert bar.portfolio[0].quantity in (0.0, 1.0)

    engine = kt.BacktestingEngine(kt.BacktestRequest(), bars, Rare())
    advance = engine.portfolio.advance
    engine.portfolio.advance = lambda stop, **how: (computed.append(stop), advance(stop, **how))  # type: ignore[method-assign]
    await finish(engine, audited=False)
    assert len(computed) < 100


@pytest.mark.parametrize("tier", ["interpreted", "compiled"])
async def test_an_order_that_cant_be_is_named_by_its_own_bar(compiled: None, tier: Any) -> None:
    request = kt.BacktestRequest(initial_capital=1e15, lot_size=1e-9)
    engine = kt.BacktestingEngine(request, hourly(200), Greedy(), tier=tier, block_bars=50)
    with pytest.raises(kt.OrderError, match=r"at bar 7 .*2\*\*53 lots"):
        await finish(engine)
    assert (engine.failed_bar, engine.boundary.bar_index) == (7, -1)
    later = kt.BacktestingEngine(request, hourly(200), Greedy(), tier=tier)  # it raises at bar 60 of the same block
    with pytest.raises(kt.OrderError, match=r"at bar 7 "):
        await finish(later)
    assert later.failed_bar == 7
    weights = kt.BacktestingEngine(request, hourly(200), kt.BuyAndHold(), tier=tier)
    with pytest.raises(kt.OrderError, match=r"2\*\*53 lots"):
        await finish(weights)


def test_indicators_have_the_same_bits(compiled: None) -> None:
    rng = np.random.default_rng(3)
    for n in (1, 2, 3, 4, 7, 8, 30, 31, 64, 100):
        for length in (n, n + 1, 2047 + n, 5000):
            flat = np.round(rng.normal(100, 1, (length, 2)), int(rng.integers(0, 3)))  # many equal neighbours
            flat[rng.random(flat.shape) < rng.choice([0.0, 0.1])] = np.nan
            high, low = flat + 1.0, flat - rng.random(flat.shape)
            calls: list[Callable[[], Any]] = [
                lambda v=flat, n=n: indicators.sma(v, n),
                lambda v=flat, n=n: indicators.ema(v[:, 0], n),
                lambda v=flat, n=n: indicators.rsi(v, n),
                lambda h=high, low=low, v=flat, n=n: indicators.atr(h, low, v, n),
            ]
            fast = [call().tobytes() for call in calls]
            kept = dict(compiling._modules)
            compiling._modules.clear()
            slow = [call().tobytes() for call in calls]
            compiling._modules.update(kept)
            assert fast == slow, (n, length)


def test_auto_is_compiled_where_it_is_loaded_and_loads_for_long_runs_of_a_process_of_their_own(compiled: None) -> None:
    assert tier_of("auto").name == tier_of("compiled").name == "compiled"
    assert tier_of("interpreted") is INTERPRETED
    assert not pays("compiled", 10, alone=True)  # it is loaded
    compiling._modules.clear()
    assert tier_of("auto") is INTERPRETED
    assert pays("compiled", 10, alone=False)
    assert pays("auto", 5_000_000, alone=True)
    assert not pays("auto", 5_000_000, alone=False)  # others are on that loop
    assert not pays("auto", 35_000, alone=True)
    assert not pays("interpreted", 5_000_000, alone=True)
    with pytest.raises(kt.ParameterError, match="there is no tier 'fast'"):
        checked_tier("fast")


def child(code: str, **environment: str) -> str:
    given = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    done = subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip() + done.stderr


RUN = """
import sys, ktrdr_async as kt
results = kt.backtest_sync("synthetic:?bars={bars}&seed=7", kt.SmaCross(), tier="{tier}")
print("numba" in sys.modules, results.digest)
"""


def test_loading_compiles_all_that_runs_call(private_home: Path) -> None:
    """Else a loop would stand still for seconds when a strategy first looks at its account."""
    assert child(
        """
import ktrdr_async as kt
from ktrdr_async import compiling

class Looks(kt.Strategy):
    def on_bar(self, bar):
        held, equity, cash = bar.portfolio[0].quantity, bar.portfolio.equity, bar.portfolio.cash
        bar.target_weight(0, 0.5 if bar.index % 7 else 0.0, tag="t")
        bar.order(1, 1.0)

    def on_fill(self, bar, fill):
        bar.record(price=fill.price)

def compiled():
    return {
        (source, name): len(function.signatures)
        for source, module in compiling._modules.items()
        for name, function in vars(module).items()
        if hasattr(function, "signatures")
    }

kt.load_compiled()
loaded = compiled()
bars = kt.Bars.read("synthetic:?bars=900&symbols=A,B")
for strategy in (Looks(), kt.SmaCross(), kt.SmaCross(quantity=2.0), kt.MomentumRotation(), kt.RsiReversion()):
    kt.backtest_sync(bars, strategy)
print(loaded == compiled(), len(loaded) > 20)
"""
    ).endswith("True True")


def test_short_runs_never_import_numba(private_home: Path) -> None:
    loaded, digest = child(RUN.format(bars=3_000, tier="auto")).split()
    assert loaded == "False"
    assert child(RUN.format(bars=3_000, tier="compiled")).split() == ["True", digest]


def test_jit_that_is_disabled_and_a_numba_that_is_missing_mean_interpreted_and_are_told(tmp_path: Path) -> None:
    digest = child(RUN.format(bars=3_000, tier="interpreted")).split()[1]
    said = child(RUN.format(bars=3_000, tier="compiled"), NUMBA_DISABLE_JIT="1")
    assert digest in said
    assert "NUMBA_DISABLE_JIT is set; runs are interpreted" in said
    missing = (
        "import importlib.util as u; found = u.find_spec\n"
        "u.find_spec = lambda name, *more: None if name == 'numba' else found(name, *more)"
    )
    said = child(f"{missing}\n{RUN.format(bars=3_000, tier='compiled')}")
    assert digest in said
    assert "numba isn't installed; runs are interpreted" in said


def test_a_damaged_cache_is_named_and_done_without(private_home: Path, tmp_path: Path) -> None:
    cache = {compiling.CACHE_VARIABLE: str(tmp_path)}
    assert "delete it" not in child(RUN.format(bars=3_000, tier="compiled"), **cache)
    for file in tmp_path.rglob("*.nbc"):
        file.write_bytes(b"junk")
    said = child(RUN.format(bars=3_000, tier="compiled"), **cache)
    assert "can't be used" in said
    assert "delete it" in said
    assert child(RUN.format(bars=3_000, tier="interpreted")).split()[1] in said
    assert "runs are interpreted" not in said


def test_a_broken_numba_means_interpreted_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "numba.py").write_text("raise OSError('no LLVM here')")
    broken = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{RUN.format(bars=3_000, tier='compiled')}"
    whole = child(RUN.format(bars=3_000, tier="interpreted"))
    said = child(broken)
    assert whole.split()[1] in said
    assert "numba doesn't work here: OSError: no LLVM here; runs are interpreted" in said


def test_compiled_code_is_cached_for_this_user_alone_and_for_exactly_these_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(compiling.CACHE_VARIABLE, str(tmp_path))
    one = compiling._cache_directory("0.68")
    assert one is not None
    assert one.stat().st_mode & 0o077 == 0
    assert compiling._cache_directory("0.68") == one
    assert compiling._cache_directory("0.69") != one
    assert compiling._cache_directory("0.68", ("ktrdr_async.strategies.kernels",)) != one  # other sources
    one.chmod(0o777)
    assert compiling._cache_directory("0.68") is None
    assert "isn't a directory of this user alone" in caplog.text
    one.rmdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    one.symlink_to(elsewhere)  # planted
    assert compiling._cache_directory("0.68") is None
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv(compiling.CACHE_VARIABLE, str(blocked))  # there can be no directory
    assert compiling._cache_directory("0.68") is None


def test_a_host_s_own_numba_settings_stay_as_they_are(compiled: None) -> None:
    import numba

    assert not numba.config.CACHE_DIR
