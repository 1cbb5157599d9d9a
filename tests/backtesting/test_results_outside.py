"""Results as they leave the process: frames and their types, files, plain values, warnings in words, the digest."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest
from engine_runs import finish, flat_bars, hourly
from living import Busy, Crossing
from scripted import Rows, ScriptedWeights, quantity, scripted, weight

import ktrdr_async as kt
from ktrdr_async.backtesting.export import export
from ktrdr_async.backtesting.results import BacktestResults
from ktrdr_async.market.synthetic import synthetic

pytestmark = pytest.mark.anyio

FREE = kt.BacktestRequest(initial_capital=1_000.0, commission=0.0, slippage=0.0)
FRAMES = ("fills", "trades", "round_trips", "recorded", "unfilled")


async def busy(n: int = 1_200, request: kt.BacktestRequest = FREE) -> BacktestResults:
    return await finish(kt.BacktestingEngine(request, hourly(n), Busy()))


async def idle() -> BacktestResults:
    return await finish(kt.BacktestingEngine(FREE, flat_bars([10.0] * 5), scripted(5, {})))


@pytest.mark.parametrize("name", FRAMES)
async def test_frames_have_the_same_columns_and_types_with_and_without_rows(name: str) -> None:
    full, empty = await busy(), await idle()
    with_rows, without = getattr(full, name), getattr(empty, name)
    assert len(without) == 0
    if name == "unfilled":
        late = scripted(5, {4: {0: weight(0.5, "late")}})
        with_rows = (await finish(kt.BacktestingEngine(FREE, flat_bars([10.0] * 5), late))).unfilled
    assert len(with_rows) > 0
    if name == "recorded":  # its further columns are the names that were recorded
        with_rows = with_rows[["bar", "time"]]
    assert without.columns.tolist() == with_rows.columns.tolist()
    assert without.dtypes.to_dict() == with_rows.dtypes.to_dict()


async def test_frames_name_bars_and_times() -> None:
    results = await busy()
    assert results.equity_curve.shape == (1_200,)
    assert str(results.equity_curve.index.tz) == "UTC"
    assert results.equity.dtype == np.float64
    assert not results.equity.flags.writeable
    for frame, pairs in ((results.fills, [("bar", "time")]), (results.trades, [("entry_bar", "entry_time")])):
        for bar, time in pairs:
            assert frame[time].astype("int64").tolist() == results.bars.timestamps[frame[bar]].tolist()
    assert len(results.fills) == len(results.ledger)
    assert results.trades["exit_bar"].max() == 1_199
    assert {"long", "short", "out"} <= set(results.fills["tag"])


@pytest.mark.parametrize("made", [busy, idle])
async def test_files_read_back_equal(made: Any, tmp_path: Path) -> None:
    results = await made()
    written = export(results, tmp_path / "deep" / "out")
    assert sorted(path.name for path in written) == sorted(path.name for path in (tmp_path / "deep" / "out").iterdir())
    frames = {name: getattr(results, name) for name in FRAMES} | {"equity": results.equity_curve.reset_index()}
    for name, frame in frames.items():
        parquet = pd.read_parquet(tmp_path / "deep" / "out" / f"{name}.parquet")
        tags = [column for column in frame if column.endswith("tag")]  # None or text: a file has one kind of missing
        pd.testing.assert_frame_equal(parquet.drop(columns=tags), frame.drop(columns=tags), check_exact=True)
        for column in tags:
            assert (
                parquet[column].astype(object).where(parquet[column].notna(), None).tolist() == frame[column].tolist()
            )
        with (tmp_path / "deep" / "out" / f"{name}.csv").open(newline="") as file:
            header, *rows = csv.reader(file)
        assert header == frame.columns.tolist()
        assert len(rows) == len(frame)
        for at, column in enumerate(header):
            texts = [row[at] for row in rows]
            if pd.api.types.is_numeric_dtype(frame[column]):
                found = np.array([float(text or "nan") for text in texts])
                assert found.tobytes() == frame[column].to_numpy(np.float64).tobytes(), column
            elif column.endswith("time"):
                assert pd.DatetimeIndex(texts, tz="UTC").as_unit("ns").tolist() == frame[column].tolist()
            else:
                assert texts == ["" if value is None else value for value in frame[column]]
    outcome = json.loads((tmp_path / "deep" / "out" / "result.json").read_text())
    assert outcome == json.loads(json.dumps(results.to_dict(), allow_nan=False))
    assert outcome["digest"] == results.digest
    assert results.export(tmp_path / "deep" / "out") == written  # once more over the same files


async def test_a_directory_that_can_not_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(kt.InputError, match="can't write the results"):
        export(await idle(), tmp_path / "file" / "out")


async def test_to_dict_is_plain_json() -> None:
    for results in (await busy(), await idle()):
        tree = results.to_dict()
        assert json.loads(json.dumps(tree, allow_nan=False)) == tree
        assert tree["digest"] == results.digest
        assert tree["metrics"]["final_equity"] == results.final_equity
        assert tree["run"]["checkpoints_saved"] == 0


# Words.


async def test_costs_above_a_fifth_of_the_capital_are_said_in_plain_words() -> None:
    request = kt.BacktestRequest(initial_capital=1_000.0, commission=0.02, slippage=0.01)
    at = {i: {0: weight(0.9 if i % 2 else -0.9)} for i in range(12)}
    results = await finish(kt.BacktestingEngine(request, flat_bars([10.0] * 40), scripted(40, at)))
    assert results.metrics.costs_share > 0.2
    (said,) = [w for w in results.warnings if w.startswith("costs ate")]
    assert f"{results.metrics.costs_share:.0%} of the starting capital" in said
    assert "commission 0.02 and slippage 0.01" in said
    assert said in results.summary()
    assert not [w for w in (await idle()).warnings if "costs" in w]


async def test_weights_of_zero_lots_are_warned_about_once_with_both_figures() -> None:
    at = {i: {0: weight(0.001)} for i in range(5)}
    results = await finish(kt.BacktestingEngine(FREE, flat_bars([10.0] * 40), scripted(40, at)))
    assert results.counters.zero_lots == [5]
    (said,) = [w for w in results.warnings if "zero lots" in w]
    assert said.startswith("A: 5 weights came to zero lots; the first was for 1.00, one lot is 10.00")


@pytest.mark.parametrize(("rows", "warned"), [(20, False), (21, True)])
async def test_more_than_half_of_the_rows_ordering_is_said(rows: int, warned: bool) -> None:
    at = {i: {0: quantity(1.0 + i % 2)} for i in range(rows)}
    results = await finish(kt.BacktestingEngine(FREE, flat_bars([10.0] * 40), scripted(40, at)))
    assert results.counters.ordered_rows == rows
    assert any("on_change" in w for w in results.warnings) == warned


async def test_the_summary_shows_what_matters() -> None:
    results = await busy()
    text = str(results)
    for part in ("buy and hold", "Sharpe", "max drawdown", "profit factor", "turnover", results.digest):
        assert part in text
    assert repr(results).startswith("BacktestResults(living:Busy, bars=1200, fills=")
    assert "-" in str(await idle())


# The digest (protocol, section 5).


async def digest_of(request: kt.BacktestRequest = FREE, *, n: int = 620, **kwargs: Any) -> str:
    engine = kt.BacktestingEngine(request, hourly(n), Busy(), **kwargs)
    return (await finish(engine, audited=False)).digest


async def test_what_changes_the_digest() -> None:
    base = await digest_of()
    changes: list[dict[str, Any]] = [
        {"initial_capital": 1_000.5}, {"commission": 0.0001}, {"slippage": 1e-9}, {"lot_size": 0.5},
        {"min_trade": 0.001}, {"force_close": False}, {"seed": 1}, {"start": "2020-01-01"}, {"end": "2030-01-01"},
    ]  # fmt: skip
    digests = {await digest_of(msgspec.structs.replace(FREE, **change)) for change in changes}
    digests.add(await digest_of(n=622))
    assert len(digests | {base}) == len(changes) + 2
    bars = hourly(620)
    others = [
        kt.Bars.from_arrays(
            bars.timestamps, bars.open, bars.high, bars.low, bars.close, bars.volume, symbols=("X", "B")
        ),
        kt.Bars.from_arrays(bars.timestamps + 1, *_fields(bars), symbols=bars.symbols),
        kt.Bars.from_arrays(bars.timestamps, *_fields(bars)[:4], _fields(bars)[4] * 2, symbols=bars.symbols),
    ]
    found = {(await finish(kt.BacktestingEngine(FREE, other, Busy()))).digest for other in others}
    assert len(found | {base}) == 4
    parameters = {(await finish(kt.BacktestingEngine(FREE, bars, Busy(every=e)))).digest for e in (3, 4)}
    assert parameters & {base} == {base}
    assert len(parameters) == 2
    assert (await finish(kt.BacktestingEngine(FREE, bars, Crossing()))).digest != base


def _fields(bars: kt.Bars) -> list[Any]:
    return [bars.open, bars.high, bars.low, bars.close, bars.volume]


async def test_what_does_not_change_the_digest() -> None:
    base = await digest_of()
    for change in ({"data": "elsewhere.csv"}, {"tz": "UTC"}, {"strategy": "some_name"}, {"timestamps": "close"}):
        assert await digest_of(msgspec.structs.replace(FREE, **change)) == base
    for size in (1, 64, 10_000):
        assert await digest_of(block_bars=size) == base
    results = await busy(620)
    results.run.seconds, results.run.checkpoints_saved = 99.0, 7
    assert results.digest == base


async def test_one_changed_bit_anywhere_in_the_outcome_changes_the_digest() -> None:
    results = await busy(620)

    def other(**changes: Any) -> str:
        kept: dict[str, Any] = {
            "request": results.request, "bars": results.bars, "strategy": results.strategy, "ledger": results.ledger,
            "recorded": results.recorded_values, "counters": results.counters, "unfilled": results.unfilled_orders,
            "equity": results.equity.copy(),
        }  # fmt: skip
        return BacktestResults(**(kept | changes)).digest

    assert other() == results.digest
    equity = results.equity.copy()
    equity[300] = np.nextafter(equity[300], math.inf)
    assert other(equity=equity) != results.digest
    event = results.ledger[4]
    for name in ("price", "fee", "cash_after"):
        moved = msgspec.structs.replace(event, **{name: math.nextafter(getattr(event, name), math.inf)})
        assert other(ledger=(*results.ledger[:4], moved, *results.ledger[5:])) != results.digest
    for change in ({"requested": event.requested + 1}, {"tag": "another"}, {"reason": "ruin"}):
        moved = msgspec.structs.replace(event, **change)
        assert other(ledger=(*results.ledger[:4], moved, *results.ledger[5:])) != results.digest


# Pinned: these rise with ARITHMETIC_VERSION, on no other ground, and are the same on every platform and Python.
GOLDEN = {
    "sma_cross": "2495ce3142b477558c1f39c1cb71582ae196bb3bcac14bae90267dc483d324f3",
    "short": "c2bb8067bfe3c395fae66e351f84faf1d67ba7c1fa30b0e39a4e0ac445080f53",
    "quantity": "a9977e7b981ec878828af76337c5831a5a9fe1ee135d440d9005b7a719bc78cb",
    "two symbols": "f94513d3f4eaabca1418d3a849532c294e91e95f7ab76ea1f6e0b9af4e7b9275",
}


async def golden(name: str) -> str:
    bars = synthetic(5_000, seed=7)
    strategy: Any = kt.SmaCross(fast=10, slow=30)
    if name == "short":
        strategy = kt.SmaCross(fast=5, slow=50, short=True)
    elif name == "quantity":
        strategy = kt.SmaCross(fast=10, slow=30, quantity=3.0)
    elif name == "two symbols":
        bars = synthetic(3_000, seed=3, symbols=("A", "B"))
    return (await finish(kt.BacktestingEngine(kt.BacktestRequest(), bars, strategy))).digest


@pytest.mark.parametrize("name", GOLDEN)
async def test_golden_digest(name: str) -> None:
    assert await golden(name) == GOLDEN[name]


async def test_a_vectorised_frame_of_weights_is_read_as_its_values() -> None:
    bars = flat_bars([10.0, 11.0, 12.0, 11.0], [5.0, 5.0, 6.0, 7.0])
    values = np.array([[0.5, math.nan], [math.nan, 0.3], [0.0, math.nan], [math.nan, math.nan]])
    plain = await finish(kt.BacktestingEngine(FREE, bars, ScriptedWeights(Rows(values))))
    index = pd.DatetimeIndex(bars.timestamps, tz="UTC")
    frame: Any = pd.DataFrame(values, index=index, columns=["A", "B"])
    assert (await finish(kt.BacktestingEngine(FREE, bars, ScriptedWeights(Rows(frame))))).digest == plain.digest
    with pytest.raises(kt.StrategyError, match="columns"):
        await finish(kt.BacktestingEngine(FREE, bars, ScriptedWeights(Rows(frame[["B", "A"]]))))
    with pytest.raises(kt.StrategyError, match="index"):
        await finish(kt.BacktestingEngine(FREE, bars, ScriptedWeights(Rows(frame.shift(freq="1h")))))
