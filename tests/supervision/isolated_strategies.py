"""Strategies that another process imports."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd

import ktrdr_async as kt


class Scale(msgspec.Struct):
    mean: float = 0.0
    seen: int = 0


class Features(kt.Strategy):
    """Its `prepare` also sets its state, and tells its process."""

    def __init__(self, span: int = 20, spans: tuple[int, ...] = (5, 50), where: str | None = None) -> None:
        self.span, self.spans, self.where = span, spans, where
        self.state = Scale()

    def prepare(self, bars: kt.Bars) -> dict[str, Any]:
        if self.where is not None:
            Path(self.where).write_text(str(os.getpid()))
        self.state.mean = float(np.exp(bars.close).std())
        wide = [np.log(kt.indicators.sma(bars.close[:, 0], span)) for span in self.spans]
        return {
            "mean": pd.Series(bars.close[:, 0]).rolling(self.span).mean(),
            "wide": np.asfortranarray(np.column_stack(wide)),
            "same": bars.close[::1, 0],
        }

    def on_bar(self, bar: kt.Bar) -> None:
        self.state.seen += 1
        low, high = bar.feature("wide")
        if self.state.seen % 10 == 0 and self.state.mean > 0:
            bar.target_weight(0, 0.9 if low > high and bar.close[0] > bar.feature("mean") else -0.3)


class Weights(kt.WeightStrategy):
    """Weights as an array."""

    warmup = 7

    def __init__(self, span: int = 20) -> None:
        self.span = span

    def target_weights(self, bars: kt.Bars) -> Any:
        noise = np.random.Generator(np.random.Philox(key=3)).standard_normal(bars.close.shape)
        return np.where(np.tanh(noise) * bars.close > self.span / 1000 * bars.close, 0.4, np.nan)


class Frame(kt.WeightStrategy):
    """Weights as a frame."""

    def target_weights(self, bars: kt.Bars) -> Any:
        index = pd.DatetimeIndex(bars.timestamps, tz="UTC")
        values = np.where(bars.close > bars.open, 0.5, 0.1)
        return kt.on_change(pd.DataFrame(values, index=index, columns=list(bars.symbols)))


class Quantities(kt.WeightStrategy):
    """Quantities."""

    def target_quantities(self, bars: kt.Bars) -> Any:
        return np.where(bars.close > bars.open, 3.0, -2.0)


class TwoPartsError(Exception):
    """It can be pickled, and not unpickled."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


class Failing(kt.Strategy):
    """Raises in `prepare`, in one way or another."""

    def __init__(self, how: str = "value") -> None:
        self.how = how

    def prepare(self, bars: kt.Bars) -> dict[str, Any]:
        if self.how == "exit":
            raise SystemExit(3)
        if self.how == "gone":
            os._exit(3)
        if self.how == "shape":
            return {"short": np.zeros(3)}
        error: Exception = {
            "value": ValueError("no number"),
            "two": TwoPartsError("this", "that"),
            "stop": StopIteration(5),
        }[self.how]
        error.add_note("as the strategy noted")
        raise error

    def on_bar(self, bar: kt.Bar) -> None:
        """Never comes to it."""


class TooLarge(kt.WeightStrategy):
    """A weight that can't be."""

    def target_weights(self, bars: kt.Bars) -> Any:
        weights = np.zeros(bars.close.shape)
        weights[345] = 1.5
        return weights


class Endless(kt.WeightStrategy):
    """Holds its process; tells which one."""

    def __init__(self, where: str) -> None:
        self.where = where

    def target_weights(self, bars: kt.Bars) -> Any:
        Path(self.where).write_text(str(os.getpid()))
        while True:
            time.sleep(0.01)


class Untyped(kt.WeightStrategy):
    """Gets a list where a tuple was given."""

    resources = ("model",)

    def __init__(self, spans: Any = (), model: Any = None) -> None:
        self.spans, self.model = spans, model

    def target_weights(self, bars: kt.Bars) -> Any:
        return np.zeros(bars.close.shape)
