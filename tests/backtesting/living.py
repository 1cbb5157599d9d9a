"""Strategies with real state: what the interruption tests run."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

import ktrdr_async as kt


class Living(msgspec.Struct):
    """Floats, a list, an array, a dict, a nested struct: all of it decides."""

    mean: float = 0.0
    seen: int = 0
    recent: list[float] = []
    ring: NDArray[np.float64] = msgspec.field(default_factory=lambda: np.zeros(8))
    counts: dict[str, float] = {}
    last: Last | None = None


class Last(msgspec.Struct):
    bar: int
    price: float
    tag: str | None


class Busy(kt.Strategy):
    """Longs, shorts, flips, tags, orders, records; what it does depends on all of its state, its fills and trades."""

    warmup = 5

    def __init__(self, every: int = 3) -> None:
        self.every = every
        self.state = Living()

    def on_fill(self, bar: kt.Bar, fill: kt.Fill) -> None:
        self.state.counts[fill.symbol] = self.state.counts.get(fill.symbol, 0.0) + fill.quantity * 0.1
        self.state.last = Last(bar.index, fill.price, fill.tag)

    def on_trade(self, bar: kt.Bar, trade: kt.TradeClosed) -> None:
        self.state.counts["pnl"] = self.state.counts.get("pnl", 0.0) + trade.net_pnl + trade.mae - trade.mfe
        if trade.net_pnl < 0 and bar.index % 4 == 0:
            bar.target_weight(0, 0.2, tag="again")

    def on_bar(self, bar: kt.Bar) -> None:
        state, close = self.state, bar.close[0]
        state.seen += 1
        state.mean += (close - state.mean) * 0.07
        state.recent.append(close)
        if len(state.recent) > 9:
            del state.recent[0]
        state.ring[bar.index % 8] = close / state.mean
        if bar.index % self.every:
            return
        score = float(state.ring[3]) - 1.0 + (state.recent[0] / close - 1.0) * 0.3
        if bar.index % 17 == 0:
            score += (bar.rng.random() - 0.5) * 0.01
        if bar.index % 30 == 0:
            bar.record(score=score, mean=state.mean, pnl=state.counts.get("pnl", -0.0))
        second = len(bar.close) > 1 and bar.close[1] == bar.close[1]
        if bar.index % 60 == 0 and second:
            bar.order(1, 3.0 if score > 0 else -2.0, tag=f"t{bar.index % 7}")
        if bar.index % 21 == 0:
            weight = 0.4 if score > 0 else -0.3
            if state.last is not None and state.last.price > close:
                weight += 0.1
            bar.target_weight(0, weight, tag="long" if weight > 0 else "short")
        elif bar.index % 45 == 0:
            bar.flatten(0, tag="out")


class BusyAsync(kt.AsyncStrategy):
    """`Busy` behind awaits."""

    warmup = 5

    def __init__(self) -> None:
        self.state = Living()

    async def prepare(self, bars: kt.Bars) -> dict[str, NDArray[np.float64]]:
        await asyncio.sleep(0)
        return {"past": np.concatenate([bars.close[:1], bars.close[:-1]])}

    async def on_fill(self, bar: kt.Bar, fill: kt.Fill) -> None:
        await asyncio.sleep(0)
        self.state.counts[fill.symbol] = self.state.counts.get(fill.symbol, 0.0) + fill.quantity * 0.1

    async def on_bar(self, bar: kt.Bar) -> None:
        state = self.state
        state.seen += 1
        state.recent = [*state.recent[-5:], bar.close[0]]
        if bar.index % 4 == 0:
            await asyncio.sleep(0)
        state.mean += (bar.feature("past")[0] - state.mean) * 0.1
        if bar.index % 6 == 0:
            side = 1 if state.mean < state.recent[0] + state.counts.get("A", 0.0) * 1e-4 else -1
            bar.target_weight(0, 0.5 * side, tag=str(side))
            bar.record(side=side)


class Crossing(kt.WeightStrategy):
    """Plain weights of two means, all of it vectorised."""

    warmup = 20

    def target_weights(self, bars: kt.Bars) -> NDArray[np.float64]:
        close = bars.close
        fast, slow = kt.indicators.sma(close, 5), kt.indicators.sma(close, 20)
        with np.errstate(invalid="ignore"):
            side = np.where(fast > slow, 0.45, -0.3)
        side[np.isnan(slow)] = np.nan
        return kt.on_change(side)


def kinds() -> list[Any]:
    """One of each kind."""
    return [Busy(), BusyAsync(), Crossing()]
