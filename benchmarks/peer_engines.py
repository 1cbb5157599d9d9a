"""The engines that `peers.py` compares, each at the same job; run as a script, one of them once, in a fresh process.

    python benchmarks/peer_engines.py ENGINE JOB ARRAYS.npz

Nothing but numpy is imported before an engine's own class is made: a fresh process pays for that engine alone.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import ktrdr_async as kt

FAST, SLOW = 10, 30
CAPITAL, COMMISSION = 1_000_000.0, 0.001
TERMS = {"initial_capital": CAPITAL, "commission": COMMISSION, "slippage": 0.0, "force_close": False}
US = "ktrdr_async"

Fill = tuple[int, float, float]  # bar, signed units, price
Array = np.ndarray[Any, np.dtype[Any]]


class Market(NamedTuple):
    """Columns of one symbol; timestamps int64, ns."""

    timestamps: Array
    open: Array
    high: Array
    low: Array
    close: Array
    volume: Array

    def frame(self, title: bool = False) -> Any:
        import pandas as pd

        columns = {name.capitalize() if title else name: getattr(self, name) for name in self._fields[1:]}
        return pd.DataFrame(columns, index=pd.DatetimeIndex(self.timestamps))


class Outcome(NamedTuple):
    """What an engine's run came to."""

    fills: list[Fill]
    equity: float  # after the last bar
    equities: int  # points of its equity curve


class Engine:
    """One engine at one job: `__init__` imports it and makes its container, `timed` runs it."""

    def __init__(self, market: Market, job: str) -> None:
        raise NotImplementedError

    def run(self) -> Any:
        """All that is timed."""
        raise NotImplementedError

    def timed(self) -> tuple[float, Any]:
        """Seconds, and what `outcome` takes."""
        started = time.perf_counter()
        ran = self.run()
        return time.perf_counter() - started, ran

    def outcome(self, ran: Any) -> Outcome:
        raise NotImplementedError


def our_strategy(job: str) -> Any:
    if job == "weights":
        import ktrdr_async as kt

        return kt.SmaCross(FAST, SLOW, quantity=1.0)
    from cross import Cross

    return Cross()


def our_bars(market: Market) -> kt.Bars:
    import ktrdr_async as kt

    return kt.Bars.from_arrays(*market, symbols=("A",))


class Ours(Engine):
    def __init__(self, market: Market, job: str) -> None:
        self.job, self.bars, self.runner = job, our_bars(market), asyncio.Runner()

    async def _timed(self) -> tuple[float, kt.BacktestResults]:
        import ktrdr_async as kt

        strategy = our_strategy(self.job)
        started = time.perf_counter()
        results = await kt.backtest(self.bars, strategy, **TERMS)
        return time.perf_counter() - started, results

    def timed(self) -> tuple[float, kt.BacktestResults]:
        return self.runner.run(self._timed())

    def outcome(self, ran: kt.BacktestResults) -> Outcome:
        return Outcome([(e.bar, float(e.lots), e.price) for e in ran.ledger], ran.final_equity, len(ran.equity))


class Vectorbt(Engine):
    def __init__(self, market: Market, job: str) -> None:
        import vectorbt

        self.vbt, self.market = vectorbt, market

    def run(self) -> Any:
        vbt, market = self.vbt, self.market
        fast, slow = (vbt.MA.run(market.close, window).ma.to_numpy() for window in (FAST, SLOW))
        enter, leave = np.zeros(len(fast), bool), np.zeros(len(fast), bool)
        np.greater(fast[:-1], slow[:-1], out=enter[1:])
        np.less(fast[:-1], slow[:-1], out=leave[1:])
        portfolio = vbt.Portfolio.from_signals(
            market.close, enter, leave, price=market.open, size=1.0, fees=COMMISSION, init_cash=CAPITAL
        )
        return portfolio.orders.records, portfolio.value()

    def outcome(self, ran: Any) -> Outcome:
        rows = ran[0].sort_values("id")
        units = np.where(rows["side"] == 0, rows["size"], -rows["size"])
        fills = list(zip(rows["idx"].tolist(), units.tolist(), rows["price"].tolist(), strict=True))
        return Outcome(fills, float(ran[1].iloc[-1]), len(ran[1]))


class Bt(Engine):
    def __init__(self, market: Market, job: str) -> None:
        import bt
        import pandas as pd

        class WithoutStatistics(bt.Backtest):  # type: ignore[misc]
            def _compute_stat_prices(self) -> Any:
                return self

            def calc_perf_stats(self) -> None:
                pass

        self.without_statistics = WithoutStatistics
        self.bt, self.market, index = bt, market, pd.DatetimeIndex(market.timestamps)
        self.close, self.open = pd.Series(market.close, index), pd.DataFrame({"A": market.open}, index)

    def run(self) -> Any:
        fast, slow = (self.close.rolling(window).mean().to_numpy() for window in (FAST, SLOW))
        side = np.zeros(len(fast), np.int64)
        side[1:] = (fast > slow)[:-1].astype(np.int64) - (fast < slow)[:-1]
        rows = iter(side.tolist())

        class Cross(self.bt.Algo):  # type: ignore[name-defined,misc]
            def __call__(self, target: Any) -> bool:
                wanted = next(rows)
                if wanted and (child := target["A"]).position != max(wanted, 0):
                    child.transact(wanted)
                return True

        strategy = self.bt.Strategy("cross", [Cross()], children=[self.bt.Security("A")])
        costs = lambda units, price: COMMISSION * abs(units) * price  # noqa: E731 - what bt asks for
        test = self.without_statistics(
            strategy, self.open, initial_capital=CAPITAL, commissions=costs, integer_positions=True, progress_bar=False
        )
        test.run()
        child = test.strategy["A"]
        return child.positions, child.outlays, test.strategy.values

    def outcome(self, ran: Any) -> Outcome:
        positions, outlays, values = (each.to_numpy()[1:] for each in ran)  # the first row is the day before
        units = np.diff(positions, prepend=0.0)
        at = np.flatnonzero(units)
        fills = list(zip(at.tolist(), units[at].tolist(), (outlays[at] / units[at]).tolist(), strict=True))
        at_close = positions[-1] * (self.market.close[-1] - self.market.open[-1])
        return Outcome(fills, float(values[-1] + at_close), len(values))


class BacktestingPy(Engine):
    def __init__(self, market: Market, job: str) -> None:
        from backtesting import Backtest, Strategy, backtesting

        def kept(trades: list[Any], equity: Array, strategy_instance: Any, **_: Any) -> Any:
            return trades, equity, strategy_instance

        backtesting.compute_stats = kept

        class Cross(Strategy):  # type: ignore[misc]
            def init(self) -> None:
                self.held, close = False, self.data.Close.s
                self.fast, self.slow = (close.rolling(window).mean().to_numpy() for window in (FAST, SLOW))

            def next(self) -> None:
                at = len(self.data) - 1
                fast, slow = self.fast[at], self.slow[at]
                if fast > slow and not self.held:
                    self.buy(size=1)
                    self.held = True
                elif fast < slow and self.held:
                    self.position.close()
                    self.held = False

        self.test = Backtest(market.frame(title=True), Cross, cash=CAPITAL, commission=COMMISSION)

    def run(self) -> Any:
        return self.test.run()

    def outcome(self, ran: Any) -> Outcome:
        closed, equity, strategy = ran
        fills = [(t.entry_bar, float(t.size), t.entry_price) for t in [*closed, *strategy.trades]]
        fills += [(t.exit_bar, -float(t.size), t.exit_price) for t in closed]
        return Outcome(sorted(fills), float(equity[-1]), len(equity))


class Backtrader(Engine):
    def __init__(self, market: Market, job: str) -> None:
        import backtrader

        class Cross(backtrader.Strategy):  # type: ignore[misc]
            def __init__(self) -> None:
                self.fast = backtrader.indicators.SMA(self.data.close, period=FAST)
                self.slow = backtrader.indicators.SMA(self.data.close, period=SLOW)
                self.held = False
                self.fills: list[Any] = []
                self.equity: list[float] = []

            def next(self) -> None:
                fast, slow = self.fast[0], self.slow[0]
                if fast > slow and not self.held:
                    self.buy(size=1)
                    self.held = True
                elif fast < slow and self.held:
                    self.close()
                    self.held = False
                self.equity.append(self.broker.getvalue())

            def notify_order(self, order: Any) -> None:
                if order.status == order.Completed:
                    self.fills.append((len(self) - 1, order.executed.size, order.executed.price))

        class Columns(backtrader.feed.DataBase):  # type: ignore[misc]
            """Reads rows of numbers: its own PandasData takes longer than all the rest."""

            rows: Any = ()

            def start(self) -> None:
                super().start()
                self.left = iter(self.rows)

            def _load(self) -> bool:
                row = next(self.left, None)
                if row is None:
                    return False
                lines = self.lines
                lines.datetime[0], lines.open[0], lines.high[0], lines.low[0], lines.close[0], lines.volume[0] = row
                return True

        days = (market.timestamps / 86_400e9 + 719_163.0).tolist()  # its times: days since the year 1
        Columns.rows = list(zip(days, *(each.tolist() for each in market[1:]), strict=True))
        self.bt, self.strategy, self.feed = backtrader, Cross, Columns

    def run(self) -> Any:
        cerebro = self.bt.Cerebro(stdstats=False)
        cerebro.adddata(self.feed())
        cerebro.addstrategy(self.strategy)
        cerebro.broker.setcash(CAPITAL)
        cerebro.broker.setcommission(commission=COMMISSION)
        return cerebro.run()[0]

    def outcome(self, ran: Any) -> Outcome:
        return Outcome(ran.fills, ran.equity[-1], len(ran.equity) + SLOW - 1)


class Nautilus(Engine):
    def __init__(self, market: Market, job: str) -> None:
        from decimal import Decimal

        import pandas as pd
        from nautilus_trader.indicators import SimpleMovingAverage
        from nautilus_trader.model.currencies import USDT
        from nautilus_trader.model.data import BarType
        from nautilus_trader.model.enums import OrderSide
        from nautilus_trader.model.identifiers import InstrumentId, Symbol, Venue
        from nautilus_trader.model.instruments import Equity
        from nautilus_trader.model.objects import Price, Quantity
        from nautilus_trader.persistence.wranglers import BarDataWrangler, QuoteTickDataWrangler
        from nautilus_trader.trading.strategy import Strategy

        class Cross(Strategy):  # type: ignore[misc]
            def __init__(self, instrument: Any, bar_type: Any) -> None:
                super().__init__()
                self.instrument, self.bar_type, self.one = instrument, bar_type, instrument.make_qty(1)
                self.fast, self.slow = SimpleMovingAverage(FAST), SimpleMovingAverage(SLOW)
                self.held = 0
                self.fills: list[Any] = []
                self.equity: list[float] = []

            def on_start(self) -> None:
                self.register_indicator_for_bars(self.bar_type, self.fast)
                self.register_indicator_for_bars(self.bar_type, self.slow)
                self.subscribe_bars(self.bar_type)
                self.account = self.portfolio.account(self.instrument.id.venue)

            def on_bar(self, bar: Any) -> None:
                cash = self.account.balance_total(USDT).as_double()
                self.equity.append(cash + self.held * bar.close.as_double())
                if not self.slow.initialized:
                    return
                fast, slow = self.fast.value, self.slow.value
                if (fast > slow and not self.held) or (fast < slow and self.held):
                    side = OrderSide.SELL if self.held else OrderSide.BUY
                    self.submit_order(self.order_factory.market(self.instrument.id, side, self.one))

            def on_order_filled(self, event: Any) -> None:
                units = 1 if event.order_side == OrderSide.BUY else -1
                self.held += units
                self.fills.append((event.ts_event, units, event.last_px.as_double()))

        self.venue, self.strategy, self.times = Venue("SIM"), Cross, market.timestamps
        self.bar_type = BarType.from_str("A.SIM-1-HOUR-LAST-EXTERNAL")
        fee = Decimal(str(COMMISSION))
        self.instrument = Equity(
            InstrumentId(Symbol("A"), self.venue), Symbol("A"), USDT, 6, Price(1e-6, 6), Quantity.from_int(1),
            ts_event=0, ts_init=0, taker_fee=fee, maker_fee=fee,
        )  # fmt: skip
        frame = market.frame()
        frame.index += pd.Timedelta(
            int(market.timestamps[1] - market.timestamps[0])
        )  # its bars have their closing time
        frame["volume"] = 1e6
        self.bars = BarDataWrangler(self.bar_type, self.instrument).process(frame)
        quotes = pd.DataFrame({"bid_price": market.open, "ask_price": market.open})
        quotes.index = pd.DatetimeIndex(market.timestamps + 1)
        self.quotes = QuoteTickDataWrangler(self.instrument).process(quotes)

    def _made(self) -> tuple[Any, Any]:
        from nautilus_trader.backtest.engine import BacktestEngine, BacktestEngineConfig
        from nautilus_trader.backtest.models import LatencyModel
        from nautilus_trader.config import LoggingConfig, RiskEngineConfig
        from nautilus_trader.model.currencies import USDT
        from nautilus_trader.model.enums import AccountType, OmsType
        from nautilus_trader.model.objects import Money

        quiet, unchecked = LoggingConfig(bypass_logging=True), RiskEngineConfig(bypass=True)
        engine = BacktestEngine(BacktestEngineConfig(logging=quiet, risk_engine=unchecked, run_analysis=False))
        engine.add_venue(
            self.venue, OmsType.NETTING, AccountType.CASH, [Money(CAPITAL, USDT)], base_currency=USDT,
            bar_execution=False, latency_model=LatencyModel(base_latency_nanos=1),
        )  # fmt: skip
        engine.add_instrument(self.instrument)
        engine.add_data(self.bars, sort=False)
        engine.add_data(self.quotes)
        engine.add_strategy(strategy := self.strategy(self.instrument, self.bar_type))
        return engine, strategy

    def timed(self) -> tuple[float, Any]:
        engine, strategy = self._made()
        started = time.perf_counter()
        engine.run()
        seconds = time.perf_counter() - started
        ran = strategy.fills, strategy.equity
        engine.dispose()
        return seconds, ran

    def outcome(self, ran: Any) -> Outcome:
        bars = np.searchsorted(self.times, [stamp for stamp, _, _ in ran[0]])
        fills = [(int(bar) - 1, float(units), price) for bar, (_, units, price) in zip(bars, ran[0], strict=True)]
        return Outcome(fills, ran[1][-1], len(ran[1]))


ENGINES: dict[str, type[Engine]] = {
    US: Ours,
    "vectorbt": Vectorbt,
    "bt": Bt,
    "backtesting.py": BacktestingPy,
    "backtrader": Backtrader,
    "nautilus_trader": Nautilus,
}


def main() -> None:
    name, job, path = sys.argv[1:]
    with np.load(path) as arrays:
        market = Market(**arrays)
    if name != US:
        ENGINES[name](market, job).timed()
        return
    import ktrdr_async as kt

    kt.backtest_sync(our_bars(market), our_strategy(job), **TERMS)  # a script's way: it picks its tier by itself


if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"
    main()
