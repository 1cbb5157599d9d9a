"""The audit: thirty lines of pandas that rebuild a run from its fills and the closes, with no code of the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ktrdr_async.backtesting.results import BacktestResults


class Audit(msgspec.Struct, frozen=True):
    """The largest absolute differences between what was rebuilt and what the engine says, in account currency."""

    cash: float
    equity: float
    trades: float
    pnl: float  # sum of net P&L and of the open trades' flow against final equity less initial capital
    tolerance: float  # 1e-9 of the traded notional and the initial capital

    @property
    def ok(self) -> bool:
        """Whether everything agrees."""
        # One by one: the largest of several would let a NaN through.
        return all(each <= self.tolerance for each in (self.cash, self.equity, self.trades, self.pnl))


def audit(results: BacktestResults) -> Audit:
    """Rebuilds cash, positions, equity and trades of a run, and compares."""
    fills, bars, capital = results.fills, results.bars, results.request.initial_capital
    value = fills["quantity"] * fills["price"]
    cash = capital - (value + fills["fee"]).cumsum()
    changes = fills.pivot_table(index="bar", columns="symbol", values="lots", aggfunc="sum")
    lots = changes.reindex(index=range(len(bars)), columns=list(bars.symbols)).fillna(0).cumsum()
    marks = pd.DataFrame(bars.close, columns=list(bars.symbols)).ffill().fillna(0.0)
    held = (lots * results.request.lot_size * marks).sum(axis=1)
    at_bar = cash.groupby(fills["bar"]).last().reindex(range(len(bars))).ffill().fillna(capital)
    equity = at_bar + held
    flow = -(value + fills["fee"])
    position = fills.groupby("symbol")["lots"].cumsum()
    ended = (position == 0).astype(int)
    number = ended.groupby(fills["symbol"]).cumsum() - ended
    pnl = flow.groupby([fills["symbol"], number]).sum()
    closed = pnl[position.groupby([fills["symbol"], number]).last() == 0]
    order = fills.assign(number=number)[position == 0].set_index(["symbol", "number"]).index
    expected = results.trades["net_pnl"].to_numpy()
    rebuilt = closed.reindex(order).to_numpy()
    return Audit(
        cash=_largest(cash.to_numpy() - fills["cash_after"].to_numpy()),
        equity=_largest(equity.to_numpy() - results.equity),
        trades=_largest(rebuilt - expected) if len(rebuilt) == len(expected) else float("inf"),
        pnl=abs(float(flow.sum() + held.iloc[-1]) - (results.final_equity - capital)),
        tolerance=1e-9 * (float(value.abs().sum()) + capital),
    )


def _largest(differences: NDArray[np.float64]) -> float:
    return float(np.abs(differences).max()) if len(differences) else 0.0
