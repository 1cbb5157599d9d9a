"""The engine and the built-in `sma_cross` against the package `backtesting`, on the data that it ships."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from engine_runs import finish

import ktrdr_async as kt

pytestmark = pytest.mark.anyio


def real_frame(name: str) -> pd.DataFrame:
    spec = importlib.util.find_spec("backtesting")
    assert spec is not None
    assert spec.origin is not None
    return pd.read_csv(Path(spec.origin).parent / "test" / name, index_col=0, parse_dates=True)


def theirs(frame: pd.DataFrame, fast: int, slow: int, *, short: bool) -> Any:
    """backtesting.py's statistics of its own means and orders of one unit.

    What makes its rules ours is said in tests/test_oracle.py: fills at the next open, exclusive orders, a commission
    at entry and exit, no spread, enough cash, no finalising. Its means are computed here anew at every bar, since an
    indicator of its own would delay its first bar.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TQDM_DISABLE", "1")
        import backtesting

    close = frame["Close"].to_numpy(np.float64)

    class Cross(backtesting.Strategy):  # type: ignore[misc]
        side = 0

        def init(self) -> None:
            pass

        def next(self) -> None:
            t = len(self.data)
            if t < slow:
                return
            mean_fast, mean_slow = close[t - fast : t].mean(), close[t - slow : t].mean()
            side = 1 if mean_fast > mean_slow else self.side if mean_fast == mean_slow else -1 if short else 0
            if side != self.side:
                self.side = side
                if side > 0:
                    self.buy(size=1)
                elif side < 0:
                    self.sell(size=1)
                else:
                    self.position.close()

    run = backtesting.Backtest(
        frame, Cross, cash=1_000_000, commission=0.001, spread=0.0, trade_on_close=False, exclusive_orders=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run.run()


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize(("fast", "slow"), [(10, 30), (3, 50)])
@pytest.mark.parametrize("name", ["EURUSD.csv", "GOOG.csv"])
async def test_sma_cross_fills_as_backtesting_py(name: str, fast: int, slow: int, short: bool) -> None:
    frame = real_frame(name)
    stats = theirs(frame, fast, slow, short=short)
    table = stats["_trades"]
    expected = [
        *zip(table["EntryBar"], table["Size"], table["EntryPrice"], strict=True),
        *zip(table["ExitBar"], -table["Size"], table["ExitPrice"], strict=True),
        *((t.entry_bar, t.size, t.entry_price) for t in stats["_strategy"].trades),
    ]
    request = kt.BacktestRequest(initial_capital=1_000_000.0, commission=0.001, slippage=0.0, force_close=False)
    bars = kt.Bars.from_pandas(frame, symbols=("X",))
    results = await finish(
        kt.BacktestingEngine(request, bars, kt.SmaCross(fast=fast, slow=slow, short=short, quantity=1.0))
    )
    fills = results.fills
    assert len(results.trade_records) > 30
    assert sorted(zip(fills["bar"], fills["quantity"], fills["price"], strict=True)) == sorted(expected)
    trades = results.trades
    assert trades["entry_bar"].tolist() == table["EntryBar"].tolist()
    assert trades["exit_bar"].tolist() == table["ExitBar"].tolist()
    assert (trades["side"] == "long").tolist() == (table["Size"] > 0).tolist()
    # Its P&L is before commission, which stands in a column of its own.
    assert (trades["net_pnl"] + trades["fees"]).to_numpy() == pytest.approx(_gross(table), rel=1e-9, abs=1e-9)
    assert trades["fees"].to_numpy() == pytest.approx(table["Commission"].to_numpy(), rel=1e-9)
    assert results.equity == pytest.approx(stats["_equity_curve"]["Equity"].to_numpy(), rel=1e-12)
    assert results.metrics.exposure > 0.3
    assert results.metrics.max_drawdown == pytest.approx(stats["Max. Drawdown [%]"] / 100, rel=1e-9)
    assert results.metrics.total_return == pytest.approx(stats["Return [%]"] / 100, rel=1e-9)


def _gross(table: pd.DataFrame) -> Any:
    return ((table["ExitPrice"] - table["EntryPrice"]) * table["Size"]).to_numpy()
