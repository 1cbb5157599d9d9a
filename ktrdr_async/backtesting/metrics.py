"""Performance figures, one function each: formula, unit, source and degenerate cases in its docstring.

Returns are ratios of consecutive equities less 1. A figure that can't be computed is None, and `Metrics.notes` says
why.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ktrdr_async.backtesting.ledger import LedgerEvent, Trade

    Floats = NDArray[np.float64]

DAY = 86_400_000_000_000  # ns
YEAR = 365.25 * DAY  # ns
SHORTEST_ANNUALISED = 30 * DAY


class Metrics(msgspec.Struct, frozen=True, kw_only=True):
    """What a run came to. Fractions are of 1, money is in account currency."""

    initial_capital: float
    final_equity: float
    net_pnl: float  # final_equity - initial_capital
    total_return: float
    buy_and_hold_return: float | None  # equal capital in each symbol, without costs
    annual_return: float | None
    volatility: float | None  # annualised
    sharpe: float | None  # annualised, of returns a UTC day (intraday bars) or a bar
    sortino: float | None  # annualised, as sharpe
    sharpe_per_bar: float | None  # annualised, of returns a bar
    max_drawdown: float  # <= 0, the peak starts at the initial capital
    longest_drawdown_bars: int
    exposure: float  # share of bars at whose close something is held
    trades: int
    win_rate: float | None
    profit_factor: float | None
    average_trade: float | None
    best_trade: float | None
    worst_trade: float | None
    fees: float
    slippage_paid: float  # fills' distance from the open (or close), in money
    costs_share: float  # (fees + slippage_paid) / initial_capital
    turnover: float  # traded notional / initial_capital
    bars: int
    periods_per_year: float | None  # bars a year
    notes: list[str] = []  # why a figure is None


def bar_returns(equity: Floats) -> Floats:
    """float64[n - 1]: ratios of consecutive equities less 1."""
    returns: NDArray[np.float64] = equity[1:] / equity[:-1] - 1.0
    return returns


def daily_equity(equity: Floats, timestamps: NDArray[np.int64]) -> Floats:
    """The last equity of each UTC day that has a bar."""
    days = timestamps // DAY
    last: Floats = equity[np.append(np.flatnonzero(days[1:] != days[:-1]), len(days) - 1)]
    return last


def periods_per_year(count: int, timestamps: NDArray[np.int64]) -> float | None:
    """(count - 1) / years between the first and the last bar; None for one bar."""
    span = int(timestamps[-1] - timestamps[0])
    return (count - 1) * YEAR / span if span > 0 else None


def sharpe(returns: Floats, risk_free: float = 0.0) -> float | None:
    """Mean excess return over its standard deviation, ddof 1 (Sharpe 1994). None: no deviation, or < 2 returns.

    A deviation below 1e-12 times the largest return is rounding, and counts as zero.
    """
    if len(returns) < 2:
        return None
    excess = returns - risk_free
    deviation = float(np.std(excess, ddof=1))
    if not deviation > 1e-12 * float(np.abs(excess).max()):
        return None
    return float(np.mean(excess)) / deviation


def sortino(returns: Floats, target: float = 0.0) -> float | None:
    """Mean excess return over its downside deviation (Sortino and Price 1994), ddof 1. None: no losses, < 2 returns."""
    if len(returns) < 2:
        return None
    excess = returns - target
    downside = math.sqrt(float(np.sum(np.minimum(excess, 0.0) ** 2)) / (len(excess) - 1))
    return float(np.mean(excess)) / downside if downside > 0 else None


def volatility(returns: Floats) -> float | None:
    """Standard deviation, ddof 1, a period. None for fewer than 2 returns."""
    return float(np.std(returns, ddof=1)) if len(returns) >= 2 else None


def max_drawdown(equity: Floats, initial_capital: float) -> float:
    """Smallest equity / peak - 1, <= 0; the peak starts at the initial capital. 0 where equity never falls."""
    peak = np.maximum(np.maximum.accumulate(equity), initial_capital)
    return min(0.0, float(np.min(equity / peak - 1.0)))


def longest_drawdown(equity: Floats, initial_capital: float) -> int:
    """Most consecutive bars below the peak before them."""
    peak = np.maximum(np.maximum.accumulate(equity), initial_capital)
    below = np.concatenate([[False], equity < peak, [False]])
    edges = np.flatnonzero(below[1:] != below[:-1])
    return int((edges[1::2] - edges[::2]).max()) if edges.size else 0


def annual_return(total: float, years: float) -> float | None:
    """(1 + total) ** (1 / years) - 1. None where everything was lost."""
    return (1.0 + total) ** (1.0 / years) - 1.0 if total > -1.0 else None


def buy_and_hold(opens: Floats, closes: Floats) -> float | None:
    """Mean over symbols of last close / open of the symbol's second bar - 1, without costs.

    The second bar is the first one at which an order could fill. A symbol with one bar counts 0; None: no symbol has
    two.
    """
    found = []
    for j in range(closes.shape[1]):
        present = np.flatnonzero(~np.isnan(closes[:, j]))
        if present.size >= 2:
            found.append(float(closes[present[-1], j] / opens[present[1], j]) - 1.0)
        else:
            found.append(0.0)
    return math.fsum(found) / len(found) if len(closes) >= 2 else None


def slippage_paid(ledger: Sequence[LedgerEvent], lot_size: float, slippage: float) -> float:
    """Sum over fills of |quantity| times the distance of the price from what it was before slippage."""
    return math.fsum(
        abs(e.lots) * lot_size * e.price * (slippage / (1.0 + slippage) if e.lots > 0 else slippage / (1.0 - slippage))
        for e in ledger
    )


def compute(
    *,
    equity: Floats,
    timestamps: NDArray[np.int64],
    opens: Floats,
    closes: Floats,
    timeframe: int,
    initial_capital: float,
    lot_size: float,
    slippage: float,
    ledger: Sequence[LedgerEvent],
    trades: Sequence[Trade],
    risk_free: float = 0.0,
    bars_per_year: float | None = None,
) -> Metrics:
    """All figures.

    Args:
        equity: float64[n], account currency at each close.
        timestamps: int64[n], ns since the epoch, UTC.
        opens: float64[n, k].
        closes: float64[n, k].
        timeframe: a bar's length, ns.
        initial_capital: account currency.
        lot_size: units in a lot.
        slippage: fraction of price.
        ledger: all events.
        trades: all trades that have ended.
        risk_free: return a year that the Sharpe ratio's excess is over.
        bars_per_year: overrides (n - 1) / years.
    """
    n = len(equity)
    span = int(timestamps[-1] - timestamps[0])
    notes: list[str] = []
    alive = bool(np.all(equity > 0))
    by_day = timeframe < DAY
    series = daily_equity(equity, timestamps) if by_day else equity
    periods = periods_per_year(len(series), timestamps)
    if not by_day and bars_per_year is not None:
        periods = bars_per_year
    total = float(equity[-1]) / initial_capital - 1.0
    yearly = deviation = ratio = downside = per_bar = None
    bar_periods = bars_per_year if bars_per_year is not None else periods_per_year(n, timestamps)
    if span < SHORTEST_ANNUALISED:
        notes.append(f"annualised figures need 30 days; the bars span {span / DAY:.1f}")
    elif not alive:
        notes.append("annualised figures and Sharpe ratios need an equity above zero throughout")
    elif periods is not None and bar_periods is not None:
        sampled = bar_returns(series)
        yearly = annual_return(total, span / YEAR)
        each = volatility(sampled)
        deviation = each * math.sqrt(periods) if each is not None else None
        plain = sharpe(sampled, risk_free / periods)
        ratio = plain * math.sqrt(periods) if plain is not None else None
        below = sortino(sampled, risk_free / periods)
        downside = below * math.sqrt(periods) if below is not None else None
        bare = sharpe(bar_returns(equity), risk_free / bar_periods)
        per_bar = bare * math.sqrt(bar_periods) if bare is not None else None
        if ratio is None:
            notes.append("the returns don't vary: no Sharpe ratio")
    pnl = [trade.net_pnl for trade in trades]
    won, lost = math.fsum(p for p in pnl if p > 0), -math.fsum(p for p in pnl if p < 0)
    fees = math.fsum(e.fee for e in ledger)
    slipped = slippage_paid(ledger, lot_size, slippage)
    return Metrics(
        initial_capital=initial_capital,
        final_equity=float(equity[-1]),
        net_pnl=float(equity[-1]) - initial_capital,
        total_return=total,
        buy_and_hold_return=buy_and_hold(opens, closes),
        annual_return=yearly,
        volatility=deviation,
        sharpe=ratio,
        sortino=downside,
        sharpe_per_bar=per_bar,
        max_drawdown=max_drawdown(equity, initial_capital),
        longest_drawdown_bars=longest_drawdown(equity, initial_capital),
        exposure=exposure(ledger, n),
        trades=len(trades),
        win_rate=sum(p > 0 for p in pnl) / len(pnl) if pnl else None,
        profit_factor=won / lost if lost > 0 else None,
        average_trade=math.fsum(pnl) / len(pnl) if pnl else None,
        best_trade=max(pnl) if pnl else None,
        worst_trade=min(pnl) if pnl else None,
        fees=fees,
        slippage_paid=slipped,
        costs_share=(fees + slipped) / initial_capital,
        turnover=math.fsum(abs(e.lots) * lot_size * e.price for e in ledger) / initial_capital,
        bars=n,
        periods_per_year=bar_periods,
        notes=notes,
    )


def exposure(ledger: Sequence[LedgerEvent], n: int) -> float:
    """Share of the n bars at whose close something is held; the closing step comes after the last close."""
    lots: dict[int, int] = {}
    held_bars, since = 0, -1
    for event in ledger:
        if event.reason == "forced_close":
            break
        before = any(lots.values())
        lots[event.symbol] = lots.get(event.symbol, 0) + event.lots
        after = any(lots.values())
        if after and not before:
            since = event.bar
        elif before and not after:
            held_bars += event.bar - since
    return (held_bars + (n - since if any(lots.values()) else 0)) / n
