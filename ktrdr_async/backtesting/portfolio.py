"""The account of one run: all mutable state of the engine is named here, and a boundary carries all of it.

What a run changes is: the `Book` (cash, lots, marks, waiting orders, counts), the ledger's events, the recorded
values, the
table of tags, and the strategy's `state`. Everything else (equity, trades, excursions) follows from these and the bars.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from ktrdr_async.backtesting import execution as ex
from ktrdr_async.backtesting.ledger import PARTS, REASONS, LedgerDigest, LedgerEvent, PriceRange, Trade, TradeBook
from ktrdr_async.errors import CheckpointCorruptedError, OrderError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ktrdr_async.backtesting.request import BacktestRequest
    from ktrdr_async.checkpoint.schemas import BacktestCheckpointState
    from ktrdr_async.market import Bars

Recorded = tuple[int, str, float]  # bar, name, value


class Boundary(msgspec.Struct, frozen=True):
    """The engine's whole state at a yield; the ledger and the recorded values by their counts, as they only grow."""

    bar_index: int  # last bar that was computed; -1: none
    book: ex.Book
    events: int
    recorded: int
    strategy_state: bytes | None


def _new_book(cash: float, k: int) -> ex.Book:
    nan = float("nan")
    tally = [0] * ex.TALLIES
    tally[ex.RUINED_AT] = -1
    return ex.Book(
        money=[cash, cash], tally=tally, lots=[0] * k, mark=[nan] * k, waiting=[0] * k, waiting_reason=[0] * k,
        waiting_tag=[ex.NO_TAG] * k, zero_lots=[0] * k, zero_target=[0.0] * k, zero_lot_value=[0.0] * k,
    )  # fmt: skip


def _room(size: int) -> ex.Fills:
    ints, floats = [0] * size, [0.0] * size
    return ex.Fills(
        ints[:], ints[:], ints[:], ints[:], floats[:], floats[:], floats[:], ints[:], ints[:], ints[:]
    )  # fmt: skip


class Portfolio:
    """Book, ledger and recorded values of one run over k symbols."""

    def __init__(self, request: BacktestRequest, bars: Bars, piece: int) -> None:
        self.k = len(bars.symbols)
        self.terms = ex.Terms(request.commission, request.slippage, request.lot_size, request.min_trade)
        self.book = _new_book(request.initial_capital, self.k)
        self.events: list[LedgerEvent] = []
        self.recorded: list[Recorded] = []
        self.tags: list[str] = []
        self.fills = _room(2 * self.k * piece)
        self._bars = bars
        self._initial_capital = request.initial_capital
        self._tag_numbers: dict[str, int] = {}
        self._trades = TradeBook(request.lot_size, PriceRange(bars.low, bars.high))
        self._followed = 0  # events that the trade book has taken in
        self._ledger_digest = LedgerDigest()
        self._recorded_hash = hashlib.sha256()
        self._recorded_hashed = 0

    def boundary(self, bar_index: int, strategy_state: bytes | None) -> Boundary:
        """A copy of everything that moves."""
        book = ex.Book(*(column[:] for column in self.book))
        return Boundary(bar_index, book, len(self.events), len(self.recorded), strategy_state)

    def tag_number(self, tag: str | None) -> int:
        """The number under which the book carries a tag."""
        if tag is None:
            return ex.NO_TAG
        number = self._tag_numbers.get(tag)
        if number is None:
            number = self._tag_numbers[tag] = len(self.tags)
            self.tags.append(tag)
        return number

    def take_fills(self, count: int) -> None:
        """Writes the first `count` fills of the room into the ledger."""
        f, tags = self.fills, self.tags
        for i in range(count):
            tag = f.tag[i]
            self.events.append(
                LedgerEvent(
                    f.bar[i], f.symbol[i], f.lots[i], f.requested[i], f.price[i], f.fee[i], f.cash[i],
                    PARTS[f.part[i]], REASONS[f.reason[i]], None if tag < 0 else tags[tag],
                )
            )  # fmt: skip

    def follow(self) -> list[tuple[int, Trade]]:
        """Takes the new events into the trade book; the trades that they ended, with the index of the ending event."""
        ended = []
        for index in range(self._followed, len(self.events)):
            trade = self._trades.apply(self.events[index])
            if trade is not None:
                ended.append((index, trade))
        self._followed = len(self.events)
        return ended

    def trades(self) -> TradeBook:
        """The open trades, followed up to the ledger's end."""
        self.follow()
        return self._trades

    def state_digest(self, boundary: Boundary) -> str:
        """SHA-256 over the canonical bytes of the whole state at a boundary; it costs what is new."""
        found = hashlib.sha256(b"ktrdr_async state 1")
        book = boundary.book
        found.update(struct.pack("<qqq", boundary.bar_index, self.k, boundary.events))
        found.update(struct.pack("<2d", *book.money))
        tally = list(book.tally)
        found.update(struct.pack(f"<{len(tally)}q", *tally))
        for ints in (book.lots, book.waiting, book.waiting_reason, book.zero_lots):
            found.update(struct.pack(f"<{self.k}q", *ints))
        for floats in (book.mark, book.zero_target, book.zero_lot_value):
            found.update(struct.pack(f"<{self.k}d", *floats))
        for number in book.waiting_tag:
            found.update(_text(None if number < 0 else self.tags[number]))
        found.update(self._ledger_digest.advance(self.events, boundary.events))
        for bar, name, value in self.recorded[self._recorded_hashed : boundary.recorded]:
            self._recorded_hash.update(struct.pack("<q", bar) + _text(name) + struct.pack("<d", value))
        self._recorded_hashed = max(self._recorded_hashed, boundary.recorded)
        found.update(self._recorded_hash.copy().digest())
        state = boundary.strategy_state
        found.update(b"\0" if state is None else b"\1" + state)
        return found.hexdigest()

    def restore(self, state: BacktestCheckpointState, recorded: list[Recorded], operation: str) -> None:
        """Puts the account where `state` says, everything derived computed anew.

        Raises:
            CheckpointCorruptedError: if the state contradicts itself.
        """
        book, k, upto = self.book, self.k, state.bar_index
        last = -1
        for event in state.ledger:
            if not (0 <= event.symbol < k and last <= event.bar <= upto and event.lots):
                raise CheckpointCorruptedError(operation, f"the ledger's event {event} can't be")
            last = event.bar
            book.lots[event.symbol] += event.lots
            book.tally[ex.TRADES] += book.lots[event.symbol] == 0
        self.events = list(state.ledger)
        self.recorded = recorded
        book.money[ex.CASH] = self.events[-1].cash_after if self.events else self._initial_capital
        if book.money[ex.CASH] != state.cash:
            raise CheckpointCorruptedError(operation, f"cash is {state.cash}, the ledger says {book.money[ex.CASH]}")
        marks = last_closes(self._bars.close[: upto + 1])
        book.mark[:] = marks
        equity = book.money[ex.CASH]
        for j in range(k):
            if book.lots[j] != 0:
                equity += ex.notional(book.lots[j], self.terms.lot_size, marks[j])
        book.money[ex.EQUITY] = equity
        for order in state.waiting:
            if not (0 <= order.symbol < k and order.lots and order.reason in REASONS):
                raise CheckpointCorruptedError(operation, f"the waiting order {order} can't be")
            ex.put_order(book, order.symbol, order.lots, _reason_number(order.reason), self.tag_number(order.tag))
        counters = state.counters
        book.tally[ex.CUT] = counters.cut
        book.tally[ex.CUT_TO_ZERO] = counters.cut_to_zero
        book.tally[ex.REFUSED] = counters.refused_after_ruin
        book.tally[ex.ORDERED_ROWS] = counters.ordered_rows
        book.tally[ex.RUINED_AT] = counters.ruined_at
        if len(counters.zero_lots) != k or len(counters.zero_lots_first) != k:
            raise CheckpointCorruptedError(operation, f"the counters aren't of {k} symbols")
        for j, first in enumerate(counters.zero_lots_first):
            book.zero_lots[j] = counters.zero_lots[j]
            if first is not None:
                book.zero_target[j], book.zero_lot_value[j] = first


def _reason_number(reason: str) -> int:
    return [str(known) for known in REASONS].index(reason)


def _text(text: str | None) -> bytes:
    if text is None:
        return bytes(4)
    data = text.encode()
    return (len(data) + 1).to_bytes(4, "little") + data


def last_closes(closes: NDArray[np.float64]) -> list[float]:
    """Each symbol's last close in float64[m, k] that isn't missing; NaN where it has none."""
    found: list[float] = []
    for j in range(closes.shape[1]):
        present = np.flatnonzero(~np.isnan(closes[:, j]))
        found.append(float(closes[present[-1], j]) if present.size else float("nan"))
    return found


def equity_curve(
    events: Sequence[LedgerEvent], closes: NDArray[np.float64], initial_capital: float, lot_size: float
) -> NDArray[np.float64]:
    """Equity at each close, float64[m], from ledger and float64[m, k] closes alone.

    The additions are those of `execution.mark_close`, in the same order, a whole column at a time: cash, then the
    symbols that are held, in symbol order. Forced closes belong to the closing step and count at the last bar.
    """
    m = len(closes)
    cash: NDArray[np.float64] = _forward(
        [e.bar for e in events], [e.cash_after for e in events], initial_capital, m, np.float64
    )
    steps: dict[int, tuple[list[int], list[int]]] = {}
    for event in events:
        bars, held = steps.setdefault(event.symbol, ([], [0]))
        bars.append(event.bar)
        held.append(held[-1] + event.lots)
    for j in sorted(steps):
        bars, held = steps[j]
        lots = _forward(bars, held[1:], 0, m, np.int64)
        marks = _filled(closes[:, j])
        open_ = lots != 0
        cash[open_] += lots[open_] * lot_size * marks[open_]
    return cash


def _forward(bars: list[int], values: list[Any], first: Any, m: int, dtype: Any) -> Any:
    """The last value at or before each bar; of several at one bar the last."""
    index = np.searchsorted(np.asarray(bars, dtype=np.int64), np.arange(m), side="right")
    return np.concatenate([np.asarray([first], dtype), np.asarray(values, dtype)])[index]


def _filled(column: NDArray[np.float64]) -> NDArray[np.float64]:
    """A column whose gaps repeat the value before them."""
    present = ~np.isnan(column)
    if present.all():
        return column
    last = np.maximum.accumulate(np.where(present, np.arange(len(column)), 0))
    return column[last]


class PositionOf:
    """One symbol's position at this bar's close; read-only."""

    __slots__ = ("_portfolio", "_symbol")

    def __init__(self, portfolio: Portfolio, symbol: int) -> None:
        self._portfolio, self._symbol = portfolio, symbol

    @property
    def quantity(self) -> float:
        """Signed units held."""
        return float(self._portfolio.book.lots[self._symbol] * self._portfolio.terms.lot_size)

    @property
    def price(self) -> float:
        """Last close; NaN before the symbol's first bar."""
        return float(self._portfolio.book.mark[self._symbol])

    @property
    def value(self) -> float:
        """Signed notional at the last close, account currency."""
        lots = self._portfolio.book.lots[self._symbol]
        return ex.notional(lots, self._portfolio.terms.lot_size, self.price) if lots else 0.0

    @property
    def entry_price(self) -> float:
        """Mean price of the open trade's opening fills; NaN where flat."""
        trade = self._portfolio.trades().open.get(self._symbol)
        return trade.entry_price if trade is not None else float("nan")


class AccountView:
    """The account at this bar's close, for strategies; read-only."""

    __slots__ = ("_index_of", "_portfolio")

    def __init__(self, portfolio: Portfolio, symbols: Sequence[str]) -> None:
        self._portfolio = portfolio
        self._index_of = {name: position for position, name in enumerate(symbols)}

    @property
    def cash(self) -> float:
        """Account currency."""
        return float(self._portfolio.book.money[ex.CASH])

    @property
    def equity(self) -> float:
        """Account currency: cash and what is held at the last closes."""
        return float(self._portfolio.book.money[ex.EQUITY])

    def __getitem__(self, symbol: int | str) -> PositionOf:
        position = self._index_of.get(symbol) if isinstance(symbol, str) else symbol
        if position is None or not 0 <= position < self._portfolio.k:
            raise OrderError(f"there is no symbol {symbol!r}; there are: {', '.join(self._index_of)}")
        return PositionOf(self._portfolio, position)
