"""Strategies with one fault each, and some without: a module, so that other processes can import them."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import time
from typing import Any

import msgspec
import numpy as np
import pandas as pd
from numpy.typing import NDArray

import ktrdr_async as kt

AT = 130  # the bar at which a hidden value decides
HALF = 3  # bars that a centred mean sees of the future
WORDS = {"alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"}
EVERY = 40


class Kept(msgspec.Struct):
    mean: float = 0.0
    recent: list[float] = []
    ring: NDArray[np.float64] = msgspec.field(default_factory=lambda: np.zeros(5))
    seen: dict[str, int] = {}


class Sound(kt.Strategy):
    """Everything that may be used: state of all kinds, features, random numbers, records, tags, fills, trades."""

    warmup = 5

    def __init__(self, every: int = 7) -> None:
        self.every, self.state = every, Kept()

    def prepare(self, bars: kt.Bars) -> dict[str, NDArray[np.float64]]:
        return {"mean": kt.indicators.sma(bars.close, 5)}

    def on_fill(self, bar: kt.Bar, fill: kt.Fill) -> None:
        self.state.seen[fill.part] = self.state.seen.get(fill.part, 0) + 1

    def on_trade(self, bar: kt.Bar, trade: kt.TradeClosed) -> None:
        self.state.mean += trade.net_pnl * 1e-9

    def on_bar(self, bar: kt.Bar) -> None:
        state, close = self.state, bar.close[0]
        state.mean += (close - state.mean) * 0.1
        state.recent = [*state.recent[-3:], close]
        state.ring[bar.index % 5] = close
        if bar.index % self.every == 0:
            up = close > state.mean and float(state.ring.min()) < bar.feature("mean")[0]
            bar.target_weight(0, (0.5 if up else -0.5) * bar.rng.random(), tag=f"t{bar.index % 3}")
            bar.record(mean=state.mean)


class SoundAsync(kt.AsyncStrategy):
    def __init__(self) -> None:
        self.state = Kept()

    async def prepare(self, bars: kt.Bars) -> dict[str, NDArray[np.float64]]:
        await asyncio.sleep(0)
        return {"past": np.concatenate([bars.close[:1], bars.close[:-1]])}

    async def on_bar(self, bar: kt.Bar) -> None:
        self.state.recent = [*self.state.recent[-3:], bar.close[0]]
        await asyncio.sleep(0)
        self.state.mean += (bar.feature("past")[0] - self.state.mean) * 0.1
        if bar.index % 9 == 0:
            bar.target_weight(0, 0.5 if self.state.mean < self.state.recent[0] else 0.0)


class Once(kt.Strategy):
    """Orders at one bar, or where its hidden count says so."""

    def decide(self, bar: kt.Bar, weight: float) -> None:
        bar.target_weight(0, weight, tag="hidden")


# It looks ahead.


class CentredMean(kt.Strategy):
    def prepare(self, bars: kt.Bars) -> dict[str, NDArray[np.float64]]:
        closes = pd.Series(bars.close[:, 0])
        return {"smooth": closes.rolling(2 * HALF + 1, center=True).mean().to_numpy()}

    def on_bar(self, bar: kt.Bar) -> None:
        if bar.index % 10 == 0:
            bar.target_weight(0, 0.5 if bar.close[0] < bar.feature("smooth") else -0.5)


class CentredMeanAsync(kt.AsyncStrategy):
    async def prepare(self, bars: kt.Bars) -> dict[str, NDArray[np.float64]]:
        return CentredMean().prepare(bars)

    async def on_bar(self, bar: kt.Bar) -> None:
        pass


class NextReturn(kt.WeightStrategy):
    def target_weights(self, bars: kt.Bars) -> NDArray[np.float64]:
        close = pd.DataFrame(bars.close)
        return np.where(close.shift(-1) > close, 0.5, -0.5)


class NextQuantity(kt.WeightStrategy):
    def target_quantities(self, bars: kt.Bars) -> NDArray[np.float64]:
        close = pd.DataFrame(bars.close)
        return np.where(close.shift(-1) > close, 100.0, -100.0)


class Normalised(kt.WeightStrategy):
    def target_weights(self, bars: kt.Bars) -> NDArray[np.float64]:
        whole: NDArray[np.float64] = np.clip(bars.close / bars.close.mean() - 1, -1, 1)
        return whole


class PastBase(kt.Strategy):
    """Gets from the read-only past to the whole array that it is a view of."""

    def on_bar(self, bar: kt.Bar) -> None:
        whole: Any = bar.past.close
        while whole.base is not None and len(whole) == len(bar.past):
            whole = whole.base
        whole = np.asarray(whole).reshape(-1, len(bar.close))
        if bar.index % 3 == 0 and bar.index + 1 < len(whole):
            bar.target_weight(0, 0.5 if whole[bar.index + 1, 0] > bar.close[0] else -0.5)


class OwnBars(kt.Strategy):
    """Keeps the bars that `prepare` saw, and breaks where there is no next one."""

    resources = ("own",)

    def __init__(self) -> None:
        self.own: dict[str, Any] = {}

    def prepare(self, bars: kt.Bars) -> dict[str, NDArray[np.float64]]:
        self.own["close"] = bars.close
        return {}

    def on_bar(self, bar: kt.Bar) -> None:
        close = self.own["close"]
        if bar.index < 990 and close[bar.index + 1, 0] == close[bar.index, 0]:
            bar.record(same=1.0)


# It hides state.

COUNT = [0]


class ModuleGlobal(Once):
    def on_bar(self, bar: kt.Bar) -> None:
        COUNT[0] += 1
        if COUNT[0] == AT + 1:
            self.decide(bar, 0.5)


def _ticker() -> Any:
    count = itertools.count()
    return lambda: next(count)


class Closure(Once):
    tick = staticmethod(_ticker())

    def on_bar(self, bar: kt.Bar) -> None:
        if self.tick() == AT:
            self.decide(bar, 0.5)


class ClassAttribute(Once):
    count = 0

    def on_bar(self, bar: kt.Bar) -> None:
        type(self).count += 1
        if type(self).count == AT + 1:
            self.decide(bar, 0.5)


class Resource(Once):
    """A count in a dict that its object keeps."""

    resources = ("cache",)

    def __init__(self) -> None:
        self.cache: dict[str, int] = {"count": 0}

    def on_bar(self, bar: kt.Bar) -> None:
        self.cache["count"] += 1
        if self.cache["count"] == AT + 1:
            self.decide(bar, 0.5)


class Inner:
    def __init__(self) -> None:
        self.model = {"count": 0}


class NestedResource(Once):
    """The same deeper, and cleared before each run: only a resumed run shows it."""

    resources = ("inner",)

    def __init__(self) -> None:
        self.inner = Inner()

    def prepare(self, bars: kt.Bars) -> dict[str, NDArray[np.float64]]:
        self.inner.model["count"] = 0
        return {}

    def on_bar(self, bar: kt.Bar) -> None:
        self.inner.model["count"] += 1
        if self.inner.model["count"] % EVERY == 0:
            self.decide(bar, self.inner.model["count"] / 1e5)


class Memo(Once):
    """A cache that isn't there after a resume."""

    resources = ("seen",)

    def __init__(self) -> None:
        self.seen: dict[int, float] = {}

    def on_bar(self, bar: kt.Bar) -> None:
        self.seen[bar.index] = bar.close[0]
        if bar.index and self.seen[bar.index - 1] > 1e9:
            self.decide(bar, 0.5)


class Attribute(kt.Strategy):
    def on_bar(self, bar: kt.Bar) -> None:
        if bar.index == AT:
            self.last = bar.close[0]


class Static(kt.Strategy):
    """May not even start."""

    def __init__(self) -> None:
        self.cache: list[float] = []

    def on_bar(self, bar: kt.Bar) -> None:
        pass


# It isn't a function of its bars.


class Unseeded(Once):
    def on_bar(self, bar: kt.Bar) -> None:
        if bar.index == AT:
            self.decide(bar, random.random())


class UnseededFeature(kt.Strategy):
    """Nothing is made of it, and no digest of a state shows it."""

    def prepare(self, bars: kt.Bars) -> dict[str, NDArray[np.float64]]:
        noise = np.zeros(len(bars))
        noise[AT:] = np.random.default_rng().random(len(bars) - AT)
        return {"noise": noise}

    def on_bar(self, bar: kt.Bar) -> None:
        pass


class Clock(Once):
    def on_bar(self, bar: kt.Bar) -> None:
        if bar.index == AT:
            self.decide(bar, time.time_ns() % 1_000_003 / 1_000_003)


class HashOrder(Once):
    def on_bar(self, bar: kt.Bar) -> None:
        if bar.index == AT:
            bar.target_weight(0, 0.5, tag="-".join(set(WORDS)))


class ProcessId(Once):
    def on_bar(self, bar: kt.Bar) -> None:
        if bar.index == AT:
            bar.record(pid=os.getpid())


class LastWords(kt.Strategy):
    """Differs in its very end alone, which no boundary shows."""

    def on_bar(self, bar: kt.Bar) -> None:
        pass

    def on_end(self, bar: kt.Bar) -> None:
        bar.record(end=random.random())


class Cancels(kt.AsyncStrategy):
    """Awaits what is cancelled."""

    async def on_bar(self, bar: kt.Bar) -> None:
        if bar.index == 50:
            never = asyncio.get_running_loop().create_future()
            never.cancel()
            await never
