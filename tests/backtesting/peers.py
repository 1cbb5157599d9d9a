"""The engine and two other backtesters behind one face: what became of the same decisions on the same bars.

A decider is handed each row's bars, as the peer sees them, and gives its wishes; the peer turns them into orders as its
users do: one market order a symbol, taken back where another one replaces it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import pytest
from engine_runs import SYMBOLS, bars_of, finish, request_of
from oracle import Market, Terms, whole_lots

import ktrdr_async as kt
from ktrdr_async.strategies.base import AnyStrategy

with warnings.catch_warnings(), pytest.MonkeyPatch.context() as _patch:
    warnings.simplefilter("ignore")
    _patch.setenv("TQDM_DISABLE", "1")
    import backtesting
    import backtrader

FIELDS = ("Open", "High", "Low", "Close")
Prices = tuple[float, float, float, float]  # open, high, low, close


class Wish(NamedTuple):
    """What a decider wants of one symbol."""

    symbol: int
    kind: Literal["weight", "quantity", "order"]
    value: float


Decider = Callable[[int, list[Prices | None]], Iterable[Wish]]


class Job(NamedTuple):
    """One backtest. Its strategy and its decider want the same, and are used once."""

    market: Market
    terms: Terms  # no min_trade, no warm-up: no peer has them
    strategy: AnyStrategy
    decider: Decider


class Fill(NamedTuple):
    bar: int
    symbol: int
    part: str
    quantity: float  # signed units
    price: float
    fee: float  # NaN where the peer doesn't tell it of a fill


class Trade(NamedTuple):
    symbol: int
    side: int
    entry_bar: int
    exit_bar: int
    quantity: float
    entry_price: float  # NaN where what the peer calls so is something else
    exit_price: float  # NaN where the peer doesn't tell it
    fees: float
    net_pnl: float


class Outcome(NamedTuple):
    fills: list[Fill]  # sorted; a bar's fills of one part and symbol are one
    trades: list[Trade]  # sorted, ended ones only
    equity: list[float]  # at each close
    waiting: dict[int, float]  # signed units that are ordered and never filled, by symbol
    refused: int  # orders that the account couldn't carry: cut here, refused there


def units_of(wish: Wish, equity: float, close: float, terms: Terms) -> float:
    """Signed units of a wish, in whole lots."""
    units = abs(wish.value)
    if wish.kind == "weight":
        units *= equity / (close * (1 + terms.slippage) * (1 + terms.commission))
    return math.copysign(whole_lots(units / terms.lot_size) * terms.lot_size, wish.value)


# The engine.


async def ours(job: Job, *, matched: bool = False) -> tuple[Outcome, kt.BacktestResults]:
    """Runs the engine; with `matched` the trades are FIFO lots, else from flat to flat."""
    engine = kt.BacktestingEngine(request_of(job.terms), bars_of(job.market), job.strategy)
    results = await finish(engine)
    fills, size = results.fills, job.terms.lot_size
    rows = (results.round_trips if matched else results.trades).itertuples()
    outcome = Outcome(
        sorted(
            Fill(f.bar, SYMBOLS.index(f.symbol), f.part, f.quantity, f.price, f.fee) for f in fills.itertuples()
        ),
        sorted(
            Trade(SYMBOLS.index(t.symbol), 1 if t.side == "long" else -1, t.entry_bar, t.exit_bar, t.quantity,
                  t.entry_price, t.exit_price, t.fees, t.net_pnl)
            for t in rows
        ),
        results.equity.tolist(),
        {o.symbol: o.lots * size for o in results.unfilled_orders},
        results.counters.cut,
    )  # fmt: skip
    return outcome, results


# backtesting.py: one symbol, whole units.


class _Asks(backtesting.Strategy):  # type: ignore[misc]
    decider: Any = None
    terms: Any = None
    seen = 0

    def init(self) -> None:
        pass

    def next(self) -> None:
        columns = (self.data.Open, self.data.High, self.data.Low, self.data.Close)
        # Its first `next` is at the second bar.
        for row in range(self.seen, len(self.data)):
            wishes = self.decider(row, [tuple(float(column[row]) for column in columns)])
            for wish in wishes:
                units = units_of(wish, self.equity, float(self.data.Close[-1]), self.terms)
                size = units - self.position.size
                if wish.kind == "order":
                    size = units + sum(order.size for order in self.orders)
                for order in self.orders:
                    order.cancel()
                if size:
                    (self.buy if size > 0 else self.sell)(size=abs(size))
        self.seen = len(self.data)


def backtesting_py(job: Job, **options: Any) -> tuple[Outcome, Any]:
    """Runs backtesting.py, whose trades are FIFO lots, and gives its own statistics as well.

    Its spread is charged at entries alone, so `slippage` must be 0 where all is to be equal.
    """
    index = pd.DatetimeIndex(job.market.timestamps)
    columns = dict(zip(FIELDS, (prices[:, 0] for prices in job.market[1:]), strict=True))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = backtesting.Backtest(
            pd.DataFrame(columns, index=index), _Asks, cash=job.terms.initial_capital,
            commission=job.terms.commission, spread=job.terms.slippage, **options,
        )  # fmt: skip
        stats = run.run(decider=job.decider, terms=job.terms)
    trades = [
        Trade(0, 1 if t.Size > 0 else -1, t.EntryBar, t.ExitBar, abs(t.Size), t.EntryPrice, t.ExitPrice, t.Commission,
              t.PnL)
        for t in stats["_trades"].itertuples()
    ]  # fmt: skip
    fills = [Fill(t.entry_bar, 0, "open", t.side * t.quantity, t.entry_price, math.nan) for t in trades]
    fills += [Fill(t.exit_bar, 0, "close", -t.side * t.quantity, t.exit_price, math.nan) for t in trades]
    fills += [Fill(t.entry_bar, 0, "open", t.size, t.entry_price, math.nan) for t in stats["_strategy"].trades]
    waiting = sum(order.size for order in stats["_strategy"].orders)
    outcome = Outcome(
        _joined(fills),
        sorted(trades),
        stats["_equity_curve"]["Equity"].tolist(),
        {0: waiting} if waiting else {},
        sum("canceled the order due to insufficient margin" in str(each.message) for each in caught),
    )
    return outcome, stats


def _joined(fills: list[Fill]) -> list[Fill]:
    """Fills of one bar, symbol, part and price as one."""
    sums: dict[tuple[int, int, str, float], float] = {}
    for fill in fills:
        key = (fill.bar, fill.symbol, fill.part, fill.price)
        sums[key] = sums.get(key, 0.0) + fill.quantity
    return sorted(Fill(*key[:3], quantity, key[3], math.nan) for key, quantity in sums.items())


# backtrader: any number of symbols.


class _Follows(backtrader.Strategy):  # type: ignore[misc]
    params = (("decider", None), ("terms", None), ("row_of", None), ("any_price", False))

    def __init__(self) -> None:
        self.orders: dict[int, Any] = {}
        self.fills: list[Fill] = []
        self.ended: list[Trade] = []
        self.equity: list[float] = []
        self.refused = 0

    def prenext(self) -> None:  # until every symbol has had a bar
        self.next()

    def next(self) -> None:
        now = self.datetime[0]
        there = [len(data) > 0 and data.datetime[0] == now for data in self.datas]
        bars = [
            (data.open[0], data.high[0], data.low[0], data.close[0]) if has else None
            for data, has in zip(self.datas, there, strict=True)
        ]
        sizes: dict[int, float] = {}
        for wish in self.p.decider(self.p.row_of[now], bars):
            data, before = self.datas[wish.symbol], self.orders.pop(wish.symbol, None)
            sizes.setdefault(wish.symbol, before.size if before is not None and before.alive() else 0.0)
            if before is not None:
                self.cancel(before)
            units = units_of(wish, self.broker.getvalue(), data.close[0], self.p.terms)
            if wish.kind != "order":
                sizes[wish.symbol] = -self.getposition(data).size
            sizes[wish.symbol] += units
        # It fills in the order of submission: what reduces a position goes first.
        for symbol in sorted(sizes, key=lambda j: self.getposition(self.datas[j]).size * sizes[j] >= 0):
            size = sizes[symbol]
            if size:
                trade = self.buy if size > 0 else self.sell
                self.orders[symbol] = trade(data=self.datas[symbol], size=abs(size))
        self.equity.append(self.broker.getvalue())

    def notify_order(self, order: Any) -> None:
        self.refused += order.status == order.Margin
        if order.status in (order.Partial, order.Completed):
            at = order.executed.exbits[-1]
            bar, symbol = self.p.row_of[at.dt], int(order.data._name)
            if at.closed:
                self.fills.append(Fill(bar, symbol, "close", at.closed, at.price, at.closedcomm))
            if at.opened:
                self.fills.append(Fill(bar, symbol, "open", at.opened, at.price, at.openedcomm))

    def notify_trade(self, trade: Any) -> None:
        if trade.isclosed:
            sizes = [abs(each.status.size) for each in trade.history]
            rises = [after > before for before, after in pairwise(sizes)]
            price = trade.price if self.p.any_price or rises == sorted(rises, reverse=True) else math.nan
            self.ended.append(
                Trade(int(trade.data._name), 1 if trade.long else -1, self.p.row_of[trade.dtopen],
                      self.p.row_of[trade.dtclose], max(sizes), price, math.nan, trade.commission, trade.pnlcomm)
            )  # fmt: skip


def backtrader_(job: Job, *, any_price: bool = False) -> Outcome:
    """Runs backtrader, with slippage at every open and beyond the bar's range, as ours.

    A trade's price is that of what is held. Once it was reduced and added to, this is no mean of what was bought any
    more, and left out without `any_price`.
    """
    times = pd.DatetimeIndex(job.market.timestamps)
    cerebro = backtrader.Cerebro(stdstats=False, tradehistory=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for j in range(job.market.close.shape[1]):
            columns = dict(zip(FIELDS, (prices[:, j] for prices in job.market[1:]), strict=True))
            frame = pd.DataFrame(columns, index=times).dropna()
            cerebro.adddata(backtrader.feeds.PandasData(dataname=frame), name=str(j))
        cerebro.addstrategy(
            _Follows,
            decider=job.decider,
            terms=job.terms,
            any_price=any_price,
            row_of={backtrader.date2num(time.to_pydatetime()): row for row, time in enumerate(times)},
        )
        cerebro.broker.setcash(job.terms.initial_capital)
        cerebro.broker.setcommission(commission=job.terms.commission)
        cerebro.broker.set_slippage_perc(job.terms.slippage, slip_out=True)
        cerebro.broker.set_checksubmit(False)
        run = cerebro.run()[0]
    waiting = {symbol: order.size for symbol, order in sorted(run.orders.items()) if order.alive()}
    return Outcome(sorted(run.fills), sorted(run.ended), run.equity, waiting, run.refused)


def differing(mine: Outcome, theirs: Outcome, capital: float) -> list[str]:
    """Every line in which two outcomes differ.

    Bars, sides, quantities and fill prices to the last bit; what is a sum or a product of them (fees, mean prices,
    P&L, equity) to 1e-9 of itself, and to 1e-12 of the capital that it went through.
    """
    found = []
    for name in ("fills", "trades"):
        a, b = getattr(mine, name), getattr(theirs, name)
        if len(a) != len(b):
            found.append(f"{len(a)} {name} and {len(b)}: {sorted({*a} ^ {*b})[:4]}")
        found += [f"{name}: {x} and {y}" for x, y in zip(a, b, strict=False) if not _same(x, y, capital)]
    if len(mine.equity) != len(theirs.equity):
        found.append(f"{len(mine.equity)} equities and {len(theirs.equity)}")
    rows = np.flatnonzero(~np.isclose(mine.equity, theirs.equity, rtol=1e-12, atol=1e-12 * capital)).tolist()
    found += [f"equity at {row}: {mine.equity[row]} and {theirs.equity[row]}" for row in rows]
    if mine.waiting != theirs.waiting:
        found.append(f"waiting: {mine.waiting} and {theirs.waiting}")
    if mine.refused or theirs.refused:
        found.append(f"refused: {mine.refused} and {theirs.refused}")
    return found


def _same(x: Fill | Trade, y: Fill | Trade, capital: float) -> bool:
    exact = 5
    return x[:exact] == y[:exact] and all(
        math.isnan(b) or math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12 * capital)
        for a, b in zip(x[exact:], y[exact:], strict=True)
    )
