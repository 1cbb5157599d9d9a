"""The independent oracle: a slow, plain backtester written from the market's rules alone.

It shares no code with the engine and imports nothing of it. One loop over the bars, Python floats and ints, no
cleverness: where the engine and this file disagree, one of them misreads the rules. The metrics stand at the end.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

DAY_NS = 86_400_000_000_000
YEAR_NS = 365.25 * DAY_NS


class Market(NamedTuple):
    """Bars of k symbols; NaN in all four price arrays where a symbol has no bar."""

    timestamps: NDArray[np.int64]  # int64[n], ns since the epoch, UTC, opening times, strictly increasing
    open: NDArray[np.float64]  # float64[n, k]
    high: NDArray[np.float64]  # float64[n, k]
    low: NDArray[np.float64]  # float64[n, k]
    close: NDArray[np.float64]  # float64[n, k]


class Decision(NamedTuple):
    """One wish for one symbol; a NaN weight or quantity means "keep"."""

    kind: Literal["weight", "quantity", "order"]
    value: float  # weight in -1..1, signed units of the target, or signed units to add
    tag: str = ""


# What is decided at one bar: symbol index -> one decision, or a list of them in the order they were made.
Decisions = Mapping[int, Decision | list[Decision]]


class Snapshot(NamedTuple):
    """What a decision callback is told at a bar's close."""

    bar: int
    cash: float  # account currency, after fees
    equity: float  # account currency, at the last closes
    lots: tuple[int, ...]  # signed, a symbol


@dataclass(frozen=True)
class Terms:
    """The terms of trade."""

    initial_capital: float = 100_000.0  # account currency
    commission: float = 0.0  # fraction of notional
    slippage: float = 0.0  # fraction of price
    lot_size: float = 1.0  # units in a lot
    min_trade: float = 0.0  # fraction of equity
    force_close: bool = True
    warmup: int = 0  # the first decision is at index warmup - 1


class Fill(NamedTuple):
    """One fill event, in the order of happening."""

    bar: int
    symbol: int
    lots: int  # signed
    requested: int  # signed; this part before a cut
    price: float
    fee: float
    cash: float  # after this fill
    part: Literal["open", "close"]
    reason: Literal["order", "ruin", "forced_close"]
    tag: str


class Trade(NamedTuple):
    """From flat to flat, or to a change of sign; of an open one exit_bar is -1."""

    symbol: int
    side: int  # +1 or -1
    entry_bar: int
    exit_bar: int
    lots: int  # the largest held, unsigned
    entry_price: float
    exit_price: float  # NaN where nothing was closed
    fees: float
    net_pnl: float  # of a trade that is still open: marked at the last close, before exit costs
    mae: float
    mfe: float


class Waiting(NamedTuple):
    """An order that waits for its symbol's next bar; lots 0: none."""

    lots: int
    reason: Literal["order", "ruin"]
    tag: str


class Unfilled(NamedTuple):
    """An order that still waits after the last bar."""

    symbol: int
    lots: int  # signed
    reason: Literal["order", "ruin"]
    tag: str


@dataclass
class Outcome:
    """Everything that a run gives."""

    equity: NDArray[np.float64]  # float64[n]; the last one after the closing step
    fills: list[Fill] = field(default_factory=list)
    trades: list[Trade] = field(default_factory=list)  # in order of ending
    open_trades: list[Trade] = field(default_factory=list)  # in symbol order; only without force_close
    unfilled: list[Unfilled] = field(default_factory=list)
    cuts: int = 0  # opening parts that filled in part
    cuts_to_zero: int = 0  # opening parts of which nothing filled (not in cuts)
    zero_lots: int = 0  # targets (weights, quantities) other than zero that came to zero lots
    zero_lot_orders: int = 0  # order() calls other than zero that came to zero lots
    skipped: int = 0  # rebalances below min_trade, those of zero lots not counted
    ruined_at: int | None = None  # bar at whose close equity was <= 0
    cash: float = 0.0
    lots: tuple[int, ...] = ()


@dataclass
class _OpenTrade:
    side: int
    entry_bar: int
    flow: float = 0.0  # -(sum of notional + fee) over the fills so far
    fees: float = 0.0
    largest: int = 0
    opened: int = 0  # lots, unsigned
    opened_value: float = 0.0  # sum of lots * price
    closed: int = 0
    closed_value: float = 0.0
    mae: float = math.inf
    mfe: float = -math.inf

    def see(self, pnl: float) -> None:
        self.mae = min(self.mae, pnl)
        self.mfe = max(self.mfe, pnl)

    def ended(self, symbol: int, exit_bar: int, net_pnl: float) -> Trade:
        entry_price = self.opened_value / self.opened
        exit_price = self.closed_value / self.closed if self.closed else math.nan
        return Trade(
            symbol, self.side, self.entry_bar, exit_bar, self.largest, entry_price, exit_price, self.fees, net_pnl,
            self.mae, self.mfe,
        )  # fmt: skip


def whole_lots(quotient: float) -> int:
    """Floor, but a quotient within 1e-9 (relative), and half a lot, of the next integer counts as that integer."""
    lots = math.floor(quotient)
    if (lots + 1) - quotient <= min(1e-9 * (lots + 1), 0.5):
        lots += 1
    return lots


def sign(x: float) -> int:
    return 1 if x > 0 else -1 if x < 0 else 0


def run(
    market: Market, decisions: Sequence[Decisions] | Callable[[Snapshot], Decisions], terms: Terms | None = None
) -> Outcome:
    """Run the decisions (one mapping a bar, or a callback) over the market.

    Raises:
        ValueError: A decision before its symbol's first bar, a target and an order for one symbol in one bar, or a
            weight outside -1..1.
    """
    terms = terms or Terms()
    opens, highs, lows, closes = (a.tolist() for a in (market.open, market.high, market.low, market.close))
    n, k = market.close.shape
    lot_size = terms.lot_size
    out = Outcome(equity=np.full(n, math.nan))
    cash = float(terms.initial_capital)
    lots = [0] * k
    waiting = [Waiting(0, "order", "")] * k
    last_close = [math.nan] * k
    trades: list[_OpenTrade | None] = [None] * k

    def fill(
        bar: int, symbol: int, quantity: int, requested: int, price: float, part: Literal["open", "close"],
        reason: Literal["order", "ruin", "forced_close"], tag: str,
    ) -> None:  # fmt: skip
        nonlocal cash
        notional = quantity * lot_size * price
        fee = terms.commission * abs(notional)
        cash -= notional + fee
        out.fills.append(Fill(bar, symbol, quantity, requested, price, fee, cash, part, reason, tag))
        trade = trades[symbol]
        if trade is None:
            trade = trades[symbol] = _OpenTrade(sign(quantity), bar)
        if lots[symbol] + quantity == 0:
            trade.see(trade.flow + lots[symbol] * lot_size * price)
        trade.flow -= notional + fee
        trade.fees += fee
        lots[symbol] += quantity
        trade.largest = max(trade.largest, abs(lots[symbol]))
        if part == "open":
            trade.opened += abs(quantity)
            trade.opened_value += abs(quantity) * price
        else:
            trade.closed += abs(quantity)
            trade.closed_value += abs(quantity) * price
        if lots[symbol] == 0:
            out.trades.append(trade.ended(symbol, bar, trade.flow))
            trades[symbol] = None

    def slipped(price: float, quantity: int) -> float:
        return price * (1 + terms.slippage) if quantity > 0 else price * (1 - terms.slippage)

    for t in range(n):
        has_bar = [not math.isnan(closes[t][s]) for s in range(k)]

        # The open: every waiting order of a symbol with a bar is split at zero; closing parts, then opening parts.
        due = [waiting[s] if has_bar[s] else Waiting(0, "order", "") for s in range(k)]
        closing, opening = [0] * k, [0] * k
        for s in range(k):
            if lots[s] * due[s].lots < 0:
                closing[s] = sign(due[s].lots) * min(abs(due[s].lots), abs(lots[s]))
            opening[s] = due[s].lots - closing[s]
            if has_bar[s]:
                waiting[s] = Waiting(0, "order", "")
        for s in range(k):
            if closing[s] != 0:
                price = slipped(opens[t][s], closing[s])
                fill(t, s, closing[s], closing[s], price, "close", due[s].reason, due[s].tag)
        for s in range(k):
            if opening[s] == 0:
                continue
            total, gross = cash, 0.0
            for h in range(k):
                if lots[h] != 0:
                    notional = lots[h] * lot_size * (opens[t][h] if has_bar[h] else last_close[h])
                    total += notional
                    gross += abs(notional)
            free = total - gross
            limit = 0
            if free > 0:
                limit = whole_lots(free / (opens[t][s] * (1 + terms.slippage) * (1 + terms.commission) * lot_size))
            quantity = sign(opening[s]) * min(abs(opening[s]), limit)
            if quantity == 0:
                out.cuts_to_zero += 1
                continue
            if quantity != opening[s]:
                out.cuts += 1
            fill(t, s, quantity, opening[s], slipped(opens[t][s], quantity), "open", due[s].reason, due[s].tag)

        # The bar: excursions of what is held through it.
        for s in range(k):
            held = trades[s]
            if held is not None and has_bar[s]:
                held.see(held.flow + lots[s] * lot_size * lows[t][s])
                held.see(held.flow + lots[s] * lot_size * highs[t][s])

        # The close: equity, ruin, decisions.
        for s in range(k):
            if has_bar[s]:
                last_close[s] = closes[t][s]
        equity = cash
        for s in range(k):
            if lots[s] != 0:
                equity += lots[s] * lot_size * last_close[s]
        out.equity[t] = equity
        if out.ruined_at is None and equity <= 0:
            out.ruined_at = t
            waiting = [Waiting(-lots[s], "ruin", "") for s in range(k)]
        if out.ruined_at is not None or t < terms.warmup - 1:
            continue
        made = decisions(Snapshot(t, cash, equity, tuple(lots))) if callable(decisions) else decisions[t]
        for s in sorted(made):
            of_symbol = made[s]
            listed = [Decision(*d) for d in (of_symbol if isinstance(of_symbol, list) else [of_symbol])]
            listed = [d for d in listed if not math.isnan(d.value)]
            if not listed:
                continue
            if math.isnan(last_close[s]):
                raise ValueError(f"bar {t}: a decision on symbol {s} before its first bar")
            if len({d.kind == "order" for d in listed}) == 2:
                raise ValueError(f"bar {t}: a target and an order for symbol {s}")
            if listed[-1].kind == "order":
                for d in listed:
                    size = whole_lots(abs(d.value) / lot_size)
                    if size == 0 and d.value != 0:
                        out.zero_lot_orders += 1
                    waiting[s] = Waiting(waiting[s].lots + sign(d.value) * size, "order", d.tag)
                continue
            kind, value, tag = listed[-1]
            if kind == "weight" and abs(value) > 1:
                raise ValueError(f"bar {t}: weight {value} of symbol {s} is outside -1..1")
            if kind == "weight":
                price = last_close[s]
                size = whole_lots(
                    abs(value) * equity / (price * (1 + terms.slippage) * (1 + terms.commission) * lot_size)
                )
            else:
                size = whole_lots(abs(value) / lot_size)
            if size == 0 and value != 0:
                out.zero_lots += 1
            order = sign(value) * size - lots[s]
            if size != 0 and abs(order) * lot_size * last_close[s] < terms.min_trade * equity:
                out.skipped += order != 0
                order = 0
            waiting[s] = Waiting(order, "order", tag)

    # The end: a step of its own, at the last closes.
    out.unfilled = [Unfilled(s, *waiting[s]) for s in range(k) if waiting[s].lots != 0]
    for s in range(k):
        held = trades[s]
        if held is None:
            continue
        if terms.force_close:
            fill(n - 1, s, -lots[s], -lots[s], slipped(last_close[s], -lots[s]), "close", "forced_close", "")
        else:
            out.open_trades.append(held.ended(s, -1, held.flow + lots[s] * lot_size * last_close[s]))
    if terms.force_close and n:
        out.equity[n - 1] = cash
    out.cash, out.lots = cash, tuple(lots)
    return out


def metrics(
    timestamps: NDArray[np.int64], equity: NDArray[np.float64], initial_capital: float, *, timeframe: int | None = None
) -> dict[str, float | None]:
    """Metrics of section 6, risk-free 0. `timeframe` in ns; without it the most common step (the smallest of several).

    `max_drawdown` is <= 0. Of intraday bars a UTC day's return is between the last equities of consecutive days that
    have bars, so the first day has none, and a year has (days - 1) / years of them. `sharpe_per_bar` is annualised with
    `periods_per_year`. Sortino's downside deviation is sqrt(sum(min(r, 0)^2) / (count - 1)). None: under 30 days, fewer
    than two returns, no deviation, or a return on an equity <= 0.
    """
    n = len(equity)
    values = equity.tolist()
    times = timestamps.tolist()
    peak, drawdown = initial_capital, 0.0
    for value in values:
        peak = max(peak, value)
        drawdown = min(drawdown, value / peak - 1)
    out: dict[str, float | None] = {"total_return": values[-1] / initial_capital - 1, "max_drawdown": drawdown}
    out |= dict.fromkeys(("periods_per_year", "sharpe", "sortino", "volatility", "sharpe_per_bar"))
    if n < 2:
        return out
    span = times[-1] - times[0]
    years = span / YEAR_NS
    out["periods_per_year"] = (n - 1) / years
    if span < 30 * DAY_NS:
        return out
    steps = np.diff(timestamps)
    if timeframe is None:
        kinds, counts = np.unique(steps, return_counts=True)
        timeframe = int(kinds[np.argmax(counts)])
    sampled = values
    if timeframe < DAY_NS:
        sampled = [values[i] for i in range(n) if i == n - 1 or times[i] // DAY_NS != times[i + 1] // DAY_NS]
    out["sharpe_per_bar"] = _ratios(values, (n - 1) / years)[0]
    out["sharpe"], out["sortino"], out["volatility"] = _ratios(sampled, (len(sampled) - 1) / years)
    return out


def _ratios(values: list[float], a_year: float) -> tuple[float | None, float | None, float | None]:
    """Sharpe, Sortino and volatility, annualised by `a_year` returns a year."""
    if len(values) < 3 or min(values[:-1]) <= 0:
        return None, None, None
    returns = [after / before - 1 for before, after in pairwise(values)]
    count = len(returns)
    mean = math.fsum(returns) / count
    deviation = math.sqrt(math.fsum((r - mean) ** 2 for r in returns) / (count - 1))
    downside = math.sqrt(math.fsum(min(r, 0.0) ** 2 for r in returns) / (count - 1))
    root = math.sqrt(a_year)
    sharpe = mean / deviation * root if deviation > 0 else None
    sortino = mean / downside * root if downside > 0 else None
    return sharpe, sortino, deviation * root
