"""The results of a run: ledger, equity, trades and metrics, as frames, as plain values, as files.

All of it follows from bars, request and ledger; metrics and digest are computed when they are asked for, and kept.
"""

from __future__ import annotations

import hashlib
import struct
from collections import deque
from functools import cached_property
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from ktrdr_async.backtesting import metrics as figures
from ktrdr_async.backtesting.execution import notional
from ktrdr_async.backtesting.ledger import LedgerDigest, LedgerEvent, PriceRange, Trade, trades_of
from ktrdr_async.backtesting.provenance import StrategyIdentity
from ktrdr_async.checkpoint.schemas import BacktestCheckpointState, Counters

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pandas as pd
    from numpy.typing import NDArray

    from ktrdr_async.backtesting.audit import Audit
    from ktrdr_async.backtesting.metrics import Metrics
    from ktrdr_async.backtesting.portfolio import Recorded
    from ktrdr_async.backtesting.request import BacktestRequest
    from ktrdr_async.market import Bars


class Unfilled(msgspec.Struct, frozen=True):
    """An order that still waited at the end."""

    symbol: int
    lots: int  # signed
    tag: str | None


class Lag(msgspec.Struct, frozen=True):
    """How late the loop was to others that it serves, ms."""

    p50: float
    p99: float
    max: float


class RunStatistics(msgspec.Struct, kw_only=True):
    """How the run went; none of it is part of the result's digest."""

    seconds: float = 0.0  # of the process that finished it, waiting included
    bars_computed: int = 0  # by that process
    resumed_from: list[int] = []  # bar indexes of the checkpoints that it went on from, all processes together
    checkpoints_saved: int = 0
    checkpoints_failed: int = 0
    save_seconds: float = 0.0
    loop_lag_ms: Lag | None = None  # while that process ran it; whoever else was on the loop is in it
    prepare_lag_ms: float | None = None  # the loop's largest during `prepare` or the targets
    long_calls: int = 0  # of the strategy, that held the loop for more than 50 ms each
    longest_call_ms: float = 0.0
    long_call: str = ""  # which was the first one

    def lag_text(self) -> str:
        """How late the loop was, in a few words; empty where nobody measured it."""
        lag, prepare = self.loop_lag_ms, self.prepare_lag_ms
        if lag is None:
            return ""
        largest = "" if prepare is None else f", {prepare:.1f} at most in prepare"
        return f"loop late by {lag.p50:.1f} ms, p99 {lag.p99:.1f}, at most {lag.max:.1f}{largest}"


class Outcome(msgspec.Struct, kw_only=True):
    """What is stored of a completed run beside its ledger."""

    digest: str
    symbols: list[str]
    bars: int
    first_timestamp: int  # ns since the epoch, UTC
    last_timestamp: int
    fingerprint: str
    strategy: StrategyIdentity
    counters: Counters
    unfilled: list[Unfilled]
    metrics: figures.Metrics
    events: int  # in the ledger
    open_positions: list[str] = []
    warnings: list[str] = []
    run: RunStatistics = msgspec.field(default_factory=RunStatistics)
    accepted_mismatches: list[str] = []  # differences under which somebody let it go on
    final_state: BacktestCheckpointState | None = None  # before the closing step, its growing fields empty; to extend


class BacktestResults:
    """Everything that a run came to.

    Attributes:
        equity: float64[n], account currency at each close; the last one is after the closing step.
        recorded_values: each (bar, name, value) of `bar.record`.
        run: how the run went; not part of the digest.
        accepted_mismatches: differences of data, code or numbers under which somebody let the run go on.
    """

    def __init__(
        self,
        *,
        request: BacktestRequest,
        bars: Bars,
        strategy: StrategyIdentity,
        ledger: Sequence[LedgerEvent],
        recorded: tuple[Recorded, ...],
        counters: Counters,
        unfilled: tuple[Unfilled, ...],
        equity: NDArray[np.float64],
        run: RunStatistics | None = None,
        accepted_mismatches: Sequence[str] = (),
        noticed: Sequence[str] = (),
    ) -> None:
        self.request = request
        self.bars = bars
        self.strategy = strategy
        self._events = ledger
        self.recorded_values = recorded
        self.counters = counters
        self.unfilled_orders = unfilled
        self.equity = equity
        self.equity.flags.writeable = False
        self.run = run or RunStatistics()
        self.accepted_mismatches = tuple(accepted_mismatches)
        self.noticed = tuple(noticed)  # of the resume that finished it

    @property
    def final_equity(self) -> float:
        """Account currency, after the closing step."""
        return float(self.equity[-1])

    @property
    def ruined_at(self) -> int | None:
        """The bar at whose close equity was gone; None: never."""
        return None if self.counters.ruined_at < 0 else self.counters.ruined_at

    @cached_property
    def ledger(self) -> tuple[LedgerEvent, ...]:
        """Every event, in order."""
        return tuple(self._events)

    @cached_property
    def trade_records(self) -> list[Trade]:
        """All trades that have ended, in the order in which they ended."""
        return trades_of(self.ledger, self.request.lot_size, PriceRange(self.bars.low, self.bars.high))

    @cached_property
    def metrics(self) -> Metrics:
        """All figures, at their default options."""
        return self.compute_metrics()

    def compute_metrics(self, *, risk_free: float = 0.0, bars_per_year: float | None = None) -> Metrics:
        """All figures. `risk_free` is a return a year, `bars_per_year` overrides (n - 1) / years."""
        return figures.compute(
            equity=self.equity,
            timestamps=self.bars.timestamps,
            opens=self.bars.open,
            closes=self.bars.close,
            timeframe=self.bars.timeframe,
            initial_capital=self.request.initial_capital,
            lot_size=self.request.lot_size,
            slippage=self.request.slippage,
            ledger=self.ledger,
            trades=self.trade_records,
            risk_free=risk_free,
            bars_per_year=bars_per_year,
        )

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of what the run means and what it came to: equal digests, equal results, in every bit.

        In: symbols, strategy and parameters, start, end, costs, seed, the bars, ledger, trades, equity. Not in: where
            the data
        came from, ids, checkpoints, metrics, how the run went.
        """
        r = self.request
        meaning = (
            list(self.bars.symbols), self.strategy.name, self.strategy.parameters, r.start, r.end, r.initial_capital,
            r.commission,
            r.slippage, r.lot_size, r.min_trade, r.force_close, r.seed, self.bars.fingerprint(),
        )  # fmt: skip
        found = hashlib.sha256(b"ktrdr_async result 1")
        found.update(msgspec.msgpack.encode(meaning, order="deterministic"))
        found.update(LedgerDigest().advance(self.ledger, len(self.ledger)))
        for t in self.trade_records:
            numbers = (t.entry_price, t.exit_price, t.fees, t.net_pnl, t.mae or 0.0, t.mfe or 0.0)
            found.update(struct.pack("<5q6d", t.symbol, t.side, t.entry_bar, t.exit_bar, t.lots, *numbers))
        found.update(self.equity.astype("<f8", copy=False).tobytes())
        return found.hexdigest()

    # Frames. Bars are named by index and by time; quantities are in units.

    def _times(self, bars: list[int]) -> pd.DatetimeIndex:
        import pandas as pd

        return pd.DatetimeIndex(self.bars.timestamps[np.asarray(bars, dtype=np.int64)], tz="UTC").as_unit("ns")

    @cached_property
    def fills(self) -> pd.DataFrame:
        """One row an event: bar, time, symbol, quantity, price, fee, cash_after, part, reason, tag, requested, lots."""
        import pandas as pd

        size, events = self.request.lot_size, self.ledger
        return pd.DataFrame(
            {
                "bar": np.array([e.bar for e in events], dtype=np.int64),
                "time": self._times([e.bar for e in events]),
                "symbol": pd.Series([self.bars.symbols[e.symbol] for e in events], dtype=str),
                "quantity": np.array([e.lots * size for e in events], dtype=np.float64),
                "price": np.array([e.price for e in events], dtype=np.float64),
                "fee": np.array([e.fee for e in events], dtype=np.float64),
                "cash_after": np.array([e.cash_after for e in events], dtype=np.float64),
                "part": pd.Series([e.part for e in events], dtype=str),
                "reason": pd.Series([e.reason for e in events], dtype=str),
                "tag": pd.Series([e.tag for e in events], dtype=object),
                "requested": np.array([e.requested * size for e in events], dtype=np.float64),
                "lots": np.array([e.lots for e in events], dtype=np.int64),
            }
        )

    @cached_property
    def trades(self) -> pd.DataFrame:
        """One row a trade, flat to flat: symbol, side, bars, times, quantity, prices, fees, P&L, excursions, tags."""
        import pandas as pd

        size, trades = self.request.lot_size, self.trade_records
        return pd.DataFrame(
            {
                "symbol": pd.Series([self.bars.symbols[t.symbol] for t in trades], dtype=str),
                "side": pd.Series(["long" if t.side > 0 else "short" for t in trades], dtype=str),
                "entry_bar": np.array([t.entry_bar for t in trades], dtype=np.int64),
                "exit_bar": np.array([t.exit_bar for t in trades], dtype=np.int64),
                "entry_time": self._times([t.entry_bar for t in trades]),
                "exit_time": self._times([t.exit_bar for t in trades]),
                "quantity": np.array([t.lots * size for t in trades], dtype=np.float64),
                "entry_price": np.array([t.entry_price for t in trades], dtype=np.float64),
                "exit_price": np.array([t.exit_price for t in trades], dtype=np.float64),
                "fees": np.array([t.fees for t in trades], dtype=np.float64),
                "net_pnl": np.array([t.net_pnl for t in trades], dtype=np.float64),
                "mae": np.array([t.mae for t in trades], dtype=np.float64),
                "mfe": np.array([t.mfe for t in trades], dtype=np.float64),
                "reason": pd.Series([t.reason for t in trades], dtype=str),
                "entry_tag": pd.Series([t.entry_tag for t in trades], dtype=object),
                "exit_tag": pd.Series([t.exit_tag for t in trades], dtype=object),
            }
        )

    @cached_property
    def round_trips(self) -> pd.DataFrame:
        """FIFO lots: each closing fill matched with the oldest open ones; fees are shared out by quantity."""
        import pandas as pd

        size = self.request.lot_size
        rows: list[dict[str, Any]] = []
        queues: dict[int, deque[tuple[LedgerEvent, int]]] = {}
        for event in self.ledger:
            queue = queues.setdefault(event.symbol, deque())
            if event.part == "open":
                queue.append((event, abs(event.lots)))
                continue
            left = abs(event.lots)
            while left:
                entry, lots = queue[0]
                taken = min(lots, left)
                left -= taken
                if taken == lots:
                    queue.popleft()
                else:
                    queue[0] = (entry, lots - taken)
                side = 1 if entry.lots > 0 else -1
                fees = entry.fee * taken / abs(entry.lots) + event.fee * taken / abs(event.lots)
                gross = notional(side * taken, size, event.price) - notional(side * taken, size, entry.price)
                rows.append(
                    {
                        "symbol": self.bars.symbols[event.symbol],
                        "side": "long" if side > 0 else "short",
                        "entry_bar": entry.bar,
                        "exit_bar": event.bar,
                        "quantity": taken * size,
                        "entry_price": entry.price,
                        "exit_price": event.price,
                        "fees": fees,
                        "net_pnl": gross - fees,
                    }
                )
        kinds = {
            "symbol": str, "side": str, "entry_bar": np.int64, "exit_bar": np.int64, "quantity": np.float64,
            "entry_price": np.float64, "exit_price": np.float64, "fees": np.float64, "net_pnl": np.float64,
        }  # fmt: skip
        return pd.DataFrame(rows, columns=list(kinds)).astype(kinds)

    @cached_property
    def equity_curve(self) -> pd.Series[float]:
        """`equity` as a Series over the bars' times."""
        import pandas as pd

        times = pd.DatetimeIndex(self.bars.timestamps, tz="UTC", name="time").as_unit("ns")
        return pd.Series(self.equity, index=times, name="equity")

    @cached_property
    def recorded(self) -> pd.DataFrame:
        """The values of `bar.record`: one row a bar that recorded, one column a name, NaN where a bar didn't."""
        import pandas as pd

        names = list(dict.fromkeys(name for _, name, _ in self.recorded_values))
        bars = sorted({bar for bar, _, _ in self.recorded_values})
        row, column = {bar: i for i, bar in enumerate(bars)}, {name: i for i, name in enumerate(names)}
        values = np.full((len(bars), len(names)), np.nan)
        for bar, name, value in self.recorded_values:
            values[row[bar], column[name]] = value
        frame = pd.DataFrame(values, columns=names)
        frame.insert(0, "bar", np.array(bars, dtype=np.int64))
        frame.insert(1, "time", self._times(bars))
        return frame

    @cached_property
    def unfilled(self) -> pd.DataFrame:
        """Orders that still waited at the end: symbol, quantity, tag."""
        import pandas as pd

        orders = self.unfilled_orders
        return pd.DataFrame(
            {
                "symbol": pd.Series([self.bars.symbols[o.symbol] for o in orders], dtype=str),
                "quantity": np.array([o.lots * self.request.lot_size for o in orders], dtype=np.float64),
                "tag": pd.Series([o.tag for o in orders], dtype=object),
            }
        )

    @property
    def open_positions(self) -> dict[str, float]:
        """Signed units that are held after the end; empty where the closing step closed everything."""
        lots: dict[int, int] = {}
        for event in self.ledger:
            lots[event.symbol] = lots.get(event.symbol, 0) + event.lots
        return {self.bars.symbols[j]: lots[j] * self.request.lot_size for j in sorted(lots) if lots[j]}

    @cached_property
    def stale_bars(self) -> dict[str, int]:
        """Bars at whose close a symbol was held without having a bar there."""
        found: dict[str, int] = {}
        for j, symbol in enumerate(self.bars.symbols):
            changes = [e for e in self.ledger if e.symbol == j and e.reason != "forced_close"]
            if not changes:
                continue
            gaps = np.concatenate([[0], np.cumsum(np.isnan(self.bars.close[:, j]))])
            lots, stale = 0, 0
            for number, event in enumerate(changes):
                lots += event.lots
                end = changes[number + 1].bar if number + 1 < len(changes) else len(self.bars)
                stale += int(gaps[end] - gaps[event.bar]) if lots else 0
            if stale:
                found[symbol] = stale
        return found

    # What a person, another program, another machine gets.

    @property
    def warnings(self) -> list[str]:
        """What a person should know before trusting the figures."""
        from ktrdr_async.backtesting.summary import warnings_of

        return warnings_of(self)

    def summary(self) -> str:
        """The figures that matter, for people, as plain text."""
        from ktrdr_async.backtesting.summary import summary_of

        return summary_of(self)

    def _repr_html_(self) -> str:
        from ktrdr_async.backtesting.summary import html_of

        return html_of(self)

    def __str__(self) -> str:
        return self.summary()

    def __repr__(self) -> str:
        return (
            f"BacktestResults({self.strategy.name}, bars={len(self.bars)}, fills={len(self._events)}, "
            f"final_equity={self.final_equity:.2f})"  # nothing that costs: asyncio.run() asks for it too
        )

    def audit(self) -> Audit:
        """Rebuilds cash, positions, equity and trades from fills and closes with pandas alone, and compares."""
        from ktrdr_async.backtesting.audit import audit

        return audit(self)

    def outcome(self) -> Outcome:
        """What is stored of the run beside its ledger."""
        return Outcome(
            digest=self.digest,
            symbols=list(self.bars.symbols),
            bars=len(self.bars),
            first_timestamp=int(self.bars.timestamps[0]),
            last_timestamp=int(self.bars.timestamps[-1]),
            fingerprint=self.bars.fingerprint(),
            strategy=self.strategy,
            counters=self.counters,
            unfilled=list(self.unfilled_orders),
            metrics=self.metrics,
            events=len(self.ledger),
            open_positions=list(self.open_positions),
            warnings=self.warnings,
            run=self.run,
            accepted_mismatches=list(self.accepted_mismatches),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values: digest, strategy, metrics, counts, and how the run went."""
        return dict(msgspec.to_builtins(self.outcome()))

    def export(self, directory: str | Path) -> list[Path]:
        """Writes every frame as CSV and Parquet, and `result.json`, into a directory. Returns the files."""
        from ktrdr_async.backtesting.export import export

        return export(self, directory)
