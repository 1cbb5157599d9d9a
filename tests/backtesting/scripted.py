"""One decision script as a strategy of each of the three kinds."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from oracle import Decision, Decisions

import ktrdr_async as kt


class Script:
    """A list of decisions, one mapping a bar; as a parameter it goes by its type's name."""

    def __init__(self, decisions: list[Decisions]) -> None:
        self.decisions = decisions


class Rows:
    """Targets as an array, as a parameter."""

    def __init__(self, values: NDArray[np.float64]) -> None:
        self.values = values


class ScriptedWeights(kt.WeightStrategy):
    resources = ("rows",)

    def __init__(self, rows: Any, warmup: int = 0) -> None:
        self.rows, self.warmup = rows, warmup

    def target_weights(self, bars: kt.Bars) -> NDArray[np.float64]:
        return self.rows.values


class ScriptedQuantities(kt.WeightStrategy):
    resources = ("rows",)

    def __init__(self, rows: Any, warmup: int = 0) -> None:
        self.rows, self.warmup = rows, warmup

    def target_quantities(self, bars: kt.Bars) -> NDArray[np.float64]:
        return self.rows.values


def _decide(bar: kt.Bar, made: Decisions) -> None:
    for symbol, of_symbol in made.items():
        for kind, value, tag in of_symbol if isinstance(of_symbol, list) else [of_symbol]:
            if math.isnan(value):
                continue
            if kind == "weight":
                bar.target_weight(symbol, value, tag=tag or None)
            elif kind == "quantity":
                bar.target_quantity(symbol, value, tag=tag or None)
            else:
                bar.order(symbol, value, tag=tag or None)


class Scripted(kt.Strategy):
    resources = ("script",)

    def __init__(self, script: Any, warmup: int = 0) -> None:
        self.script, self.warmup = script, warmup

    def on_bar(self, bar: kt.Bar) -> None:
        _decide(bar, self.script.decisions[bar.index])


class ScriptedAsync(kt.AsyncStrategy):
    resources = ("script",)

    def __init__(self, script: Any, warmup: int = 0) -> None:
        self.script, self.warmup = script, warmup

    async def on_bar(self, bar: kt.Bar) -> None:
        if bar.index % 5 == 0:
            await asyncio.sleep(0)
        _decide(bar, self.script.decisions[bar.index])


def weight(value: float, tag: str = "") -> Decision:
    return Decision("weight", value, tag)


def quantity(value: float, tag: str = "") -> Decision:
    return Decision("quantity", value, tag)


def order(value: float, tag: str = "") -> Decision:
    return Decision("order", value, tag)


def scripted(n: int, at: dict[int, Decisions], **kwargs: Any) -> Scripted:
    """A strategy that decides at a few bars."""
    return Scripted(Script([at.get(t, {}) for t in range(n)]), **kwargs)
