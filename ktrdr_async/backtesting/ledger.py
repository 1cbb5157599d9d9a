"""The ledger: the append-only record of every change of cash or quantity, and the trades that follow from it.

Cash, positions, trades and equity are functions of the ledger and the bars. Nothing here decides or prices an order.
"""

from __future__ import annotations

import hashlib
import struct
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import msgspec

from ktrdr_async.backtesting.execution import notional

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Part = Literal["open", "close"]
Reason = Literal["order", "ruin", "forced_close"]
PARTS: tuple[Part, ...] = ("open", "close")
REASONS: tuple[Reason, ...] = ("order", "ruin", "forced_close")


class LedgerEvent(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One fill. A fill that crosses zero is two events, a closing and an opening part."""

    bar: int  # absolute index of the bar at whose open it filled; n - 1 for the closing step
    symbol: int  # position of the symbol in the bars
    lots: int  # signed
    requested: int  # signed lots that were ordered; differs from `lots` where buying power cut the fill
    price: float  # quote currency, slippage included
    fee: float  # account currency, >= 0
    cash_after: float  # account currency, after notional and fee
    part: Part
    reason: Reason
    tag: str | None  # the strategy's own mark of the order


class Ledger(Sequence[LedgerEvent]):
    """Events in order. They come in as columns, and become records when somebody looks at them."""

    __slots__ = ("_columns", "_count", "_events", "_tags")

    def __init__(self, events: Iterable[LedgerEvent] = (), tags: Sequence[str] = ()) -> None:
        self._events = list(events)
        self._columns = deque[tuple[int, list[Any]]]()  # index of the first event; as `execution.Fills`, without count
        self._count = len(self._events)
        self._tags = tags  # by number; it grows with the run

    def add(self, columns: list[Any]) -> None:
        """Takes rows in as ten columns, lists or arrays that nobody writes to any more."""
        self._columns.append((self._count, columns))
        self._count += len(columns[0])

    def _made(self, stop: int) -> list[LedgerEvent]:
        """The records, of which at least the first `stop` are made; those after them cost nothing yet."""
        tags = self._tags
        while len(self._events) < stop:
            first, columns = self._columns[0]
            done = len(self._events) - first  # more than 0 where this was interrupted before, or not all were wanted
            rests = (each[done : stop - first] for each in columns)
            rows = zip(*(each if isinstance(each, list) else each.tolist() for each in rests), strict=True)
            self._events.extend(
                LedgerEvent(
                    bar, symbol, lots, requested, price, fee, cash, PARTS[part], REASONS[reason],
                    None if tag < 0 else tags[tag],
                )
                for bar, symbol, lots, requested, price, fee, cash, part, reason, tag in rows
            )  # fmt: skip
            if len(self._events) == first + len(columns[0]):
                self._columns.popleft()
        return self._events

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, at: int) -> LedgerEvent: ...

    @overload
    def __getitem__(self, at: slice) -> list[LedgerEvent]: ...

    def __getitem__(self, at: int | slice) -> LedgerEvent | list[LedgerEvent]:
        if isinstance(at, slice):
            start, stop, step = at.indices(self._count)
            if step == 1:
                return self._made(stop)[start:stop]
        elif 0 <= at < self._count:
            return self._made(at + 1)[at]
        return self._made(self._count)[at]

    def __iter__(self) -> Iterator[LedgerEvent]:
        return iter(self._made(self._count))


class Trade(msgspec.Struct, frozen=True, gc=False):
    """A position's life from flat to flat, or to a change of sign."""

    symbol: int  # position of the symbol in the bars
    side: int  # 1 long, -1 short
    entry_bar: int
    exit_bar: int
    lots: int  # the largest held, > 0
    entry_price: float  # quantity-weighted mean of the opening fills
    exit_price: float  # quantity-weighted mean of the closing fills
    fees: float  # account currency
    net_pnl: float  # account currency: minus the sum of quantity * price + fee over its fills
    reason: Reason  # of the last fill
    entry_tag: str | None
    exit_tag: str | None
    mae: float | None = None  # account currency, smallest open P&L before exit costs; None where no bars were at hand
    mfe: float | None = None  # account currency, largest open P&L before exit costs


class Leg(msgspec.Struct, frozen=True, gc=False):
    """A stretch of bars with one position: the open P&L at a price is `flow + position * price`."""

    bar: int  # first bar of the stretch
    lots: int  # signed, held from here on
    flow: float  # account currency, what the trade's fills have brought in so far


class OpenTrade(msgspec.Struct):
    """A trade that isn't over yet."""

    entry_bar: int
    entry_tag: str | None
    lots: int = 0  # signed, held now
    largest: int = 0  # lots, > 0
    flow: float = 0.0  # account currency, minus the sum of quantity * price + fee so far
    fees: float = 0.0
    opened: int = 0  # lots, > 0
    opened_value: float = 0.0  # sum of lots * price over the opening fills
    closed: int = 0
    closed_value: float = 0.0
    legs: list[Leg] = []

    @property
    def entry_price(self) -> float:
        """Quantity-weighted mean price of the opening fills."""
        return self.opened_value / self.opened


class PriceRange(msgspec.Struct, frozen=True):
    """The columns that excursions are read from."""

    low: NDArray[np.float64]  # float64[n, k]
    high: NDArray[np.float64]  # float64[n, k]

    def extremes(self, symbol: int, first: int, stop: int) -> tuple[float, float] | None:
        """Lowest low and highest high of the bars first..stop-1, or None where the symbol has none of them."""
        import numpy as np

        low = np.fmin.reduce(self.low[first:stop, symbol], initial=np.inf)
        high = np.fmax.reduce(self.high[first:stop, symbol], initial=-np.inf)
        return (float(low), float(high)) if low <= high else None


class _Held(NamedTuple):
    """What the excursions of a trade that has ended are computed from."""

    symbol: int
    legs: list[Leg]
    stop: int  # the bar after the last one that counts
    exit_pnl: float


class TradeBook:
    """Follows the ledger event by event and tells which trades are open and which have ended.

    Excursions (MAE, MFE) are the smallest and largest open P&L before exit costs, in account currency, over the lows
    and highs of each bar held from the entry bar on; on the exit bar the exit price alone counts. They need
    `prices`; without them they are None.
    """

    def __init__(self, lot_size: float, prices: PriceRange | None = None, *, ended: list[_Held] | None = None) -> None:
        self.open: dict[int, OpenTrade] = {}
        self._lot_size = lot_size
        self._prices = prices
        self._ended = ended  # takes what the excursions of all trades together are computed from, later

    def apply(self, event: LedgerEvent) -> Trade | None:
        """Takes the next event in; the trade that it ends, if it ends one."""
        trade = self.open.get(event.symbol)
        if trade is None:
            trade = self.open[event.symbol] = OpenTrade(event.bar, event.tag)
        size = abs(event.lots)
        before = trade.flow
        trade.flow -= notional(event.lots, self._lot_size, event.price) + event.fee
        trade.fees += event.fee
        held = trade.lots
        trade.lots += event.lots
        if event.part == "open":
            trade.opened += size
            trade.opened_value += size * event.price
        else:
            trade.closed += size
            trade.closed_value += size * event.price
        if trade.lots:
            trade.largest = max(trade.largest, abs(trade.lots))
            trade.legs.append(Leg(event.bar, trade.lots, trade.flow))
            return None
        del self.open[event.symbol]
        mae = mfe = None
        if self._prices is not None:
            exit_pnl = before + notional(held, self._lot_size, event.price)
            stop = event.bar + 1 if event.reason == "forced_close" else event.bar
            if self._ended is not None:
                self._ended.append(_Held(event.symbol, trade.legs, stop, exit_pnl))
            else:
                low, high = self._excursions(trade, event.symbol, stop)
                mae, mfe = min(low, exit_pnl), max(high, exit_pnl)
        return Trade(
            event.symbol,
            1 if held > 0 else -1,
            trade.entry_bar,
            event.bar,
            trade.largest,
            trade.entry_price,
            trade.closed_value / trade.closed,
            trade.fees,
            trade.flow,
            event.reason,
            trade.entry_tag,
            event.tag,
            mae,
            mfe,
        )

    def _excursions(self, trade: OpenTrade, symbol: int, stop: int) -> tuple[float, float]:
        # Rounding is monotone: over a stretch with one position the extremes of flow + position * price are at the
        # extremes of the price, to the last bit.
        assert self._prices is not None  # noqa: S101 - callers hold it
        low, high = float("inf"), float("-inf")
        for number, leg in enumerate(trade.legs):
            end = trade.legs[number + 1].bar if number + 1 < len(trade.legs) else stop
            found = self._prices.extremes(symbol, leg.bar, end)
            if found is None:
                continue
            at = [leg.flow + notional(leg.lots, self._lot_size, price) for price in found]
            low, high = min(low, *at), max(high, *at)
        return low, high


def trades_of(events: Iterable[LedgerEvent], lot_size: float, prices: PriceRange | None = None) -> list[Trade]:
    """All trades of a ledger that have ended, in the order in which they ended."""
    ended: list[_Held] = []
    book = TradeBook(lot_size, prices, ended=ended)
    trades = [trade for event in events if (trade := book.apply(event)) is not None]
    if prices is None or not trades:
        return trades
    maes, mfes = _excursions(ended, lot_size, prices)
    return [
        msgspec.structs.replace(trade, mae=mae, mfe=mfe) for trade, mae, mfe in zip(trades, maes, mfes, strict=True)
    ]


def _excursions(trades: list[_Held], lot_size: float, prices: PriceRange) -> tuple[list[float], list[float]]:
    """MAE and MFE of many trades, a column at a time: the same operations as one by one, and the same bits."""
    import numpy as np

    first = np.array([leg.bar for trade in trades for leg in trade.legs], np.int64)
    lots = np.array([leg.lots for trade in trades for leg in trade.legs], np.float64)
    flow = np.array([leg.flow for trade in trades for leg in trade.legs])
    counts = np.array([len(trade.legs) for trade in trades])
    starts = np.cumsum(counts) - counts
    symbol = np.repeat([trade.symbol for trade in trades], counts)
    stop = np.append(first[1:], 0)
    stop[starts + counts - 1] = [trade.stop for trade in trades]
    low, high = np.full(len(first), np.nan), np.full(len(first), np.nan)
    for j in sorted(set(symbol.tolist())):
        # The legs of one symbol follow each other in time, so their spans and what lies between alternate.
        there = np.flatnonzero((symbol == j) & (first < stop))
        if there.size:
            edges = np.column_stack([first[there], stop[there]]).ravel()
            edges = edges[:-1] if edges[-1] == len(prices.low) else edges
            low[there] = np.fmin.reduceat(prices.low[:, j], edges)[::2]
            high[there] = np.fmax.reduceat(prices.high[:, j], edges)[::2]
    at_low, at_high = flow + lots * lot_size * low, flow + lots * lot_size * high
    known = low <= high  # else the symbol has no bar there
    least = np.minimum.reduceat(np.where(known, np.minimum(at_low, at_high), np.inf), starts)
    most = np.maximum.reduceat(np.where(known, np.maximum(at_low, at_high), -np.inf), starts)
    exit_pnl = np.array([trade.exit_pnl for trade in trades])
    return np.minimum(least, exit_pnl).tolist(), np.maximum(most, exit_pnl).tolist()


class LedgerDigest:
    """SHA-256 over the canonical bytes of each event in turn: what is old is never hashed again.

    Canonical bytes of an event: bar, symbol, lots, requested as int64, price, fee, cash as float64 (all little-endian),
    part and reason as one byte each, then the tag as its UTF-8 length + 1 in four bytes and its UTF-8 text, or 0.
    """

    _record = struct.Struct("<qqqqdddBB")

    def __init__(self) -> None:
        self.count = 0
        self._hash = hashlib.sha256()

    def advance(self, events: Sequence[LedgerEvent], count: int) -> bytes:
        """The digest of the first `count` events. :raises ValueError: if more than `count` were taken in already."""
        if count < self.count:
            raise ValueError(f"the digest stands at event {self.count}, it can't go back to {count}")
        pack, found = self._record.pack, self._hash.copy()
        for e in events[self.count : count]:
            head = pack(
                e.bar,
                e.symbol,
                e.lots,
                e.requested,
                e.price,
                e.fee,
                e.cash_after,
                PARTS.index(e.part),
                REASONS.index(e.reason),
            )
            tag = b"" if e.tag is None else e.tag.encode()
            length = 0 if e.tag is None else len(tag) + 1
            found.update(head + length.to_bytes(4, "little") + tag)
        self.count, self._hash = count, found  # together: what is interrupted before has changed nothing
        return found.copy().digest()
