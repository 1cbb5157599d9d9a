"""A strategy as users write them, in its own module so that fresh processes can import it: SMA 10/30, one unit."""

from __future__ import annotations

import msgspec

import ktrdr_async as kt


class Held(msgspec.Struct):
    """What was ordered last."""

    units: float = 0.0


class Cross(kt.Strategy):
    """Holds one unit while the mean of the last 10 closes is above that of 30, none while it is below."""

    warmup = 30

    def __init__(self) -> None:
        self.state = Held()

    def prepare(self, bars):
        return {"fast": kt.indicators.sma(bars.close, 10), "slow": kt.indicators.sma(bars.close, 30)}

    def on_bar(self, bar):
        fast, slow = bar.feature("fast")[0], bar.feature("slow")[0]
        if fast > slow and not self.state.units:
            bar.target_quantity(0, 1.0)
            self.state.units = 1.0
        elif fast < slow and self.state.units:
            bar.flatten(0)
            self.state.units = 0.0
