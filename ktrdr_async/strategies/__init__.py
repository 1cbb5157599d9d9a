"""Strategies: the three kinds, the indicators, the built-ins, and how one is found by its name.

Nothing here knows of running or saving.
"""

from ktrdr_async.strategies import indicators
from ktrdr_async.strategies.async_reversion import AsyncReversion
from ktrdr_async.strategies.bar import Bar, Fill, TradeClosed
from ktrdr_async.strategies.base import AnyStrategy, AsyncStrategy, Strategy, WeightStrategy
from ktrdr_async.strategies.buy_and_hold import BuyAndHold
from ktrdr_async.strategies.changes import on_change
from ktrdr_async.strategies.donchian_breakout import DonchianBreakout
from ktrdr_async.strategies.momentum_rotation import MomentumRotation
from ktrdr_async.strategies.parameters import describe, parse_parameter
from ktrdr_async.strategies.registry import make, resolve, strategies, summary_of
from ktrdr_async.strategies.rsi_reversion import RsiReversion
from ktrdr_async.strategies.signals import Signals
from ktrdr_async.strategies.sma_cross import SmaCross

__all__ = [
    "AnyStrategy", "AsyncStrategy", "Bar", "Fill", "Strategy", "TradeClosed", "WeightStrategy",
    "AsyncReversion", "BuyAndHold", "DonchianBreakout", "MomentumRotation", "RsiReversion", "Signals", "SmaCross",
    "describe", "indicators", "make", "on_change", "parse_parameter", "resolve", "strategies", "summary_of",
]  # fmt: skip
