"""What is refused before a run starts, or where it is said: methods and objects of other kinds, tags, names."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ktrdr_async as kt

pytestmark = pytest.mark.anyio
MARKET = "synthetic:?bars=300&seed=2"


class Coroutine(kt.Strategy):
    async def on_bar(self, bar: kt.Bar) -> None:  # type: ignore[override]
        bar.target_weight(0, 1.0)


class Generator(kt.Strategy):
    def on_bar(self, bar: kt.Bar) -> Iterator[int]:  # type: ignore[override]
        yield bar.index


class Plain(kt.AsyncStrategy):
    def on_bar(self, bar: kt.Bar) -> None:  # type: ignore[override]
        bar.target_weight(0, 1.0)


class Early(kt.Strategy):
    warmup = -3

    def on_bar(self, bar: kt.Bar) -> None: ...


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Coroutine, "on_bar is a coroutine"), (Generator, "on_bar is a generator"), (Plain, "on_bar is no coroutine"),
        (Early, "warmup is -3"),
    ],
)  # fmt: skip
async def test_methods_of_the_other_kind_are_refused(kind: type[Any], message: str) -> None:
    with pytest.raises(kt.StrategyError, match=message):
        await kt.backtest(MARKET, kind())


class Says(kt.Strategy):
    def __init__(self, tag: Any = None, name: Any = None, value: Any = 1.0) -> None:
        self.tag, self.name, self.value = tag, name, value

    def on_bar(self, bar: kt.Bar) -> None:
        if bar.index == 150:
            bar.order(0, 1.0, tag=self.tag)
            if self.name is not None:
                bar.record(**{self.name: self.value})


@pytest.mark.parametrize(
    "said", [{"tag": 5}, {"tag": ""}, {"tag": "a\0b"}, {"tag": "\ud800"}, {"tag": "x" * 201}, {"name": "\ud800"},
             {"name": "x", "value": "much"}],
)  # fmt: skip
async def test_a_text_that_cannot_be_stored_is_refused_where_it_is_said(said: dict[str, Any]) -> None:
    with pytest.raises(kt.OrderError) as caught:
        await kt.backtest(MARKET, Says(**said))
    assert caught.value.bar_index == 150


class Raises(kt.Strategy):
    def __init__(self, kind: Any = None) -> None:
        self.kind = kind

    def on_bar(self, bar: kt.Bar) -> None:
        if bar.index == 150:
            raise self.kind


@pytest.mark.parametrize("kind", [StopIteration, StopAsyncIteration, GeneratorExit, SystemExit, KeyboardInterrupt])
async def test_what_would_end_more_than_the_run_is_a_strategys_error(kind: type[BaseException]) -> None:
    with pytest.raises(kt.StrategyError, match=kind.__name__) as caught:
        await kt.backtest(MARKET, Raises(kind))
    assert caught.value.bar_index == 150
    assert isinstance(caught.value.__cause__, kind)


async def test_one_object_serves_one_run_at_a_time_and_many_after_each_other() -> None:
    strategy = kt.RsiReversion()
    first = (await kt.backtest(MARKET, strategy)).digest
    assert (await kt.backtest(MARKET, strategy)).digest == first
    found = await asyncio.gather(*(kt.backtest(MARKET, strategy) for _ in range(3)), return_exceptions=True)
    for each in found:  # one after the other, or refused: never a third thing
        assert each.digest == first if isinstance(each, kt.BacktestResults) else isinstance(each, kt.StrategyError)
    bars = kt.Bars.read(MARKET)
    running = kt.BacktestingEngine(kt.BacktestRequest(), bars, strategy).run()
    await anext(running)
    with pytest.raises(kt.StrategyError, match="in another run"):
        await anext(kt.BacktestingEngine(kt.BacktestRequest(), bars, strategy).run())
    await running.aclose()
    assert (await kt.backtest(MARKET, strategy)).digest == first


async def test_other_kinds_of_object_are_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(kt.InputError, match="the class SmaCross"):
        await kt.backtest(MARKET, kt.SmaCross)  # type: ignore[arg-type]
    with pytest.raises(kt.ParameterError, match="parameters"):
        await kt.backtest(MARKET, kt.SmaCross(), parameters={"fast": 3})
    path = tmp_path / "a.csv"
    kt.Bars.read(MARKET).to_pandas()["ASSET"].rename_axis("time").to_csv(path)
    expected = await kt.backtest(str(path), "buy_and_hold")
    assert (await kt.backtest(path, "buy_and_hold")).digest == expected.digest
