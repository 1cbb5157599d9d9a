"""The account of one run: all mutable state of the engine is named here, and a boundary carries all of it.

What a run changes is: the `Book` (cash, lots, marks, waiting orders, counts), the ledger's events, the recorded
values, the table of tags, and the strategy's `state`. Everything else (equity, trades, excursions) follows from these
and the bars.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ktrdr_async.backtesting import execution as ex
from ktrdr_async.backtesting import packed
from ktrdr_async.backtesting.boundaries import Boundary, Kept, Memory, new_book, room
from ktrdr_async.backtesting.curve import last_closes
from ktrdr_async.backtesting.decisions import Targets
from ktrdr_async.backtesting.ledger import REASONS, Ledger, LedgerDigest, PriceRange, Trade, TradeBook
from ktrdr_async.backtesting.tiers import INTERPRETED, Tier
from ktrdr_async.errors import CheckpointCorruptedError, OrderError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ktrdr_async.backtesting.request import BacktestRequest
    from ktrdr_async.checkpoint.schemas import BacktestCheckpointState
    from ktrdr_async.market import Bars

Recorded = tuple[int, str, float]  # bar, name, value
_WINDOW_VALUES = 4096  # values of a column that are turned into Python floats at a time
_HASHED_RECORDS = 250  # that a step takes into a digest
_QUIET_BARS = 32  # that plain Python looks ahead
_NOTHING_SAID = np.array([0, ex.NO_BAR]), np.zeros(0)


class Portfolio:
    """Book, ledger and recorded values of one run over k symbols, and how far they were computed.

    What was decided is carried out when the account is brought up to a bar, at the latest at the block's end.
    """

    def __init__(
        self, request: BacktestRequest, bars: Bars, equity: NDArray[np.float64], tier: Tier, block_bars: int
    ) -> None:
        self.k = len(bars.symbols)
        self.terms = ex.Terms(request.commission, request.slippage, request.lot_size, request.min_trade)
        self.piece = max(1, tier.piece_values // self.k)  # bars that are computed at a time
        size = 2 * self.k * min(self.piece, len(bars) + 1)
        self._memory = None if tier is INTERPRETED else Memory(self.terms, request.initial_capital, self.k, size)
        self.book = new_book(request.initial_capital, self.k) if self._memory is None else self._memory.book
        self._fills = room(size) if self._memory is None else self._memory.fills
        self._room = self._room_bars = size // (2 * self.k)  # bars whose fills there is room for, in all and now
        self.tags: list[str] = []
        self._ledger = Ledger(tags=self.tags)
        self.recorded: list[Recorded] = []
        self.next_bar = 0  # the account stands at the close of the bar before
        self.lots: list[int] = self.book.lots[:]  # signed, held at the close of `quiet_until`
        self.quiet_until = -1  # the last bar at whose close cash and lots are known to be what they are now
        self.tier = tier
        self._bars = bars
        self._block_bars = block_bars
        self._equity = equity
        self._targets: Targets | None = None
        self._by_weight = True
        self._decisions = ex.Decisions([0], [ex.NO_BAR], [])
        self._window = (0, 0)
        whole = self._memory is not None
        self._opens: Any = bars.open.ravel() if whole else []  # flat; whole columns, or the window's
        self._closes: Any = bars.close.ravel() if whole else []
        self._piece_equity = [0.0] * max(1, INTERPRETED.piece_values // self.k)
        self._initial_capital = request.initial_capital
        self._tag_numbers: dict[str, int] = {}
        self._trades = TradeBook(request.lot_size, PriceRange(bars.low, bars.high))
        self._followed = 0  # events that the trade book has taken in
        self._ledger_digest = LedgerDigest()
        self._recorded_hash = hashlib.sha256()
        self._recorded_hashed = 0

    # Computing.

    def know(self, targets: Targets, *, by_weight: bool) -> None:
        """Takes the decisions of a whole run at once, weights or signed units."""
        self._targets, self._by_weight = targets, by_weight

    def decide(self, bar: int, symbol: int, kind: int, value: float, tag: int) -> None:
        """Takes one decision at the close of `bar`; they come in the order of bars."""
        self.quiet_until = min(self.quiet_until, bar)
        self._decisions.value.append(value)
        self._decisions.said[-1:] = (bar, symbol, kind, tag, ex.NO_BAR)

    def advance(self, stop: int, *, whole: bool = False) -> None:
        """Brings the account up to the close of bar stop - 1, and `whole` to the boundary after it.

        What was decided at that close is made orders of only where it is whole.

        Raises:
            OrderError: if a decision comes to more lots than count exactly; it names the bar.
        """
        if self._memory is not None:
            self._advance_compiled(self._memory, stop, whole)
            return
        while self.next_bar < stop:
            at = self.next_bar
            if not self._window[0] <= at < self._window[1]:
                self.carry_out()
                self._load_window(at)
            start, end = self._window
            count = min(stop, end, at + self.piece) - at
            equity = self._piece_equity
            failed = ex.run_bars(
                self.book, self.terms, self.k, self._opens, self._closes, at - start, at, count, self._decisions,
                equity, 0, self._fills,
            )  # fmt: skip
            if failed >= 0:
                raise self.too_many_lots(failed)
            self._equity[at : at + count] = equity[:count]
            self.take_fills()
            self.next_bar = at + count
        if whole:
            self.carry_out()

    def _advance_compiled(self, memory: Memory, stop: int, whole: bool) -> None:
        said, values = self._said()
        at = self.next_bar
        while True:
            end = stop if at < stop <= at + self.piece else min(max(at, stop), at + self.piece)
            if end - at > self._room_bars:
                self.take_fills()
            failed = self.tier.kernel.advance(
                memory.ints, memory.floats, self.k, self._opens, self._closes, at, end,
                1 if whole and end >= stop else 0, said, values, self._equity,
            )  # fmt: skip
            if failed >= 0:
                raise self.too_many_lots(failed)
            self._room_bars -= end - at
            self.next_bar = at = end
            if end >= stop:
                break
        if len(said) > 2:
            self._forget_said(int(said[0]))

    def settle(self, bar: int) -> None:
        """`advance` to the close of `bar`, and a look ahead: up to `quiet_until` cash and lots stay what they are."""
        if self.next_bar <= bar:
            self.advance(bar + 1)
        self.quiet_until = bar
        self.lots = self.book.lots if self._memory is None else self.book.lots.tolist()
        decisions = self._decisions
        if self.book.tally[ex.WAITING] or decisions.said[4 * decisions.next[0]] != ex.NO_BAR:
            return
        stop = min(len(self._bars), (bar // self._block_bars + 1) * self._block_bars)
        if self._memory is not None:
            quiet = self.tier.kernel.quiet_bars(
                self._memory.ints, self._memory.floats, self.k, self._closes, bar + 1, stop - bar - 1
            )
        else:
            start, end = self._window
            count = min(stop, end, bar + _QUIET_BARS) - bar - 1 if start <= bar + 1 else 0
            quiet = ex.quiet_bars(self.book, self.terms.lot_size, self.k, self._closes, bar + 1 - start, count)
        self.quiet_until = bar + quiet

    def carry_out(self) -> None:
        """Makes orders of what was decided up to the close that the account stands at. Raises what `advance` does."""
        if self._memory is not None:
            self._advance_compiled(self._memory, self.next_bar, True)
            return
        failed = ex.carry_out(self.book, self.terms, self._decisions, self.next_bar - 1)
        if failed >= 0:
            raise self.too_many_lots(failed)
        if self._targets is None:
            self._forget_said(self._decisions.next[0])

    def _said(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """What was said bar by bar and isn't carried out, as arrays."""
        decisions = self._decisions
        if not decisions.value:
            return _NOTHING_SAID
        return np.array(decisions.next + decisions.said), np.array(decisions.value, np.float64)

    def _forget_said(self, carried_out: int) -> None:
        if carried_out < len(self._decisions.value):
            self._decisions.next[0] = carried_out
        elif carried_out:
            self._decisions = ex.Decisions([0], [ex.NO_BAR], [])

    def advance_blocks(self, stop: int) -> Kept:
        """Computes in the compiled tier up to bar stop - 1, past the boundaries before. Raises what `advance` does."""
        memory = self._memory
        assert memory is not None  # noqa: S101 - callers know the tier
        first, n, size = self.next_bar, len(self._bars), self._block_bars
        ends = list(range((first // size + 1) * size - 1, stop, size))
        if stop == n and (not ends or ends[-1] != n - 1):
            ends.append(n - 1)
        ints = np.empty((len(ends), packed.ints_kept(self.k)), np.int64)
        floats = np.empty((len(ends), packed.floats_kept(self.k)))
        self.take_fills()
        known = self._known(first, stop)
        failed = self.tier.kernel.advance_blocks(
            memory.ints, memory.floats, self.k, self._opens, self._closes, first, stop,
            np.append(known.next, known.said), known.value, self._equity,
            np.array(ends, np.int64), ints, floats,
        )  # fmt: skip
        if failed >= 0:
            raise self.too_many_lots(failed)
        kept = Kept(ends, ints, floats, len(self._ledger))
        self.take_fills()
        self.next_bar = stop
        return kept

    def too_many_lots(self, at: int) -> OrderError:
        """What an order of more lots than count exactly is refused with."""
        error = OrderError(
            f"an order at bar {at} comes to more than 2**53 lots of {self.terms.lot_size}",
            hint="use a larger lot_size",
        )
        error.bar_index = at
        error.timestamp = str(np.datetime64(int(self._bars.timestamps[at]), "ns").astype("datetime64[s]")) + "Z"
        return error

    def _load_window(self, at: int) -> None:
        """Turns the next bars into flat lists: numpy's own numbers cost ten times as much to compute with."""
        stop = min(len(self._bars), at + max(1, min(512, _WINDOW_VALUES // self.k)))
        self._opens = self._bars.open[at:stop].ravel().tolist()
        self._closes = self._bars.close[at:stop].ravel().tolist()
        self._window = (at, stop)
        if self._targets is not None:
            self._decisions = ex.Decisions(*(column.tolist() for column in self._known(at, stop)))

    def _known(self, start: int, stop: int) -> ex.Decisions:
        """The targets of these bars, as columns."""
        assert self._targets is not None  # noqa: S101 - callers know
        bars, symbols, values = self._targets.between(start, stop)
        said = np.full(4 * len(bars) + 1, ex.NO_BAR)
        said[:-1:4], said[1::4], said[3::4] = bars, symbols, ex.NO_TAG
        said[2::4] = ex.BY_WEIGHT if self._by_weight else ex.TO_UNITS
        return ex.Decisions(np.zeros(1, np.int64), said, values)

    def close_all(self) -> int:
        """The closing step of the market: closes what is open at the last close. Returns how many fills that took."""
        self.take_fills()
        self.quiet_until = -1
        ex.close_all(self.book, self.terms, self.k, self.next_bar - 1, self._fills)
        count = int(self._fills.count[0])
        self.take_fills()
        closes = self._bars.close[-1].tolist()
        book = self.book
        self._equity[-1] = ex.mark_close(book.money, book.mark, book.lots, self.terms.lot_size, self.k, closes, 0)
        return count

    def boundary(self, bar_index: int, strategy_state: bytes | None) -> Boundary:
        """A copy of everything that moves."""
        book = ex.Book(*(column[:] if isinstance(column, list) else column.tolist() for column in self.book))
        return Boundary(bar_index, book, self.event_count, len(self.recorded), strategy_state)

    def kept(self, bar_index: int) -> Kept | None:
        """What `boundary` is made of when it is looked at; None where that is no cheaper."""
        return None if self._memory is None else self._memory.kept(bar_index, len(self._ledger))

    def tag_number(self, tag: str | None) -> int:
        """The number under which the book carries a tag."""
        if tag is None:
            return ex.NO_TAG
        number = self._tag_numbers.get(tag)
        if number is None:
            number = self._tag_numbers[tag] = len(self.tags)
            self.tags.append(tag)
        return number

    @property
    def events(self) -> Ledger:
        """The ledger, up to the last fill."""
        self.take_fills()
        return self._ledger

    @property
    def event_count(self) -> int:
        """How many events the ledger has."""
        return len(self._ledger) + int(self._fills.count[0])

    def take_fills(self) -> None:
        """Moves the fills out of their room into the ledger."""
        count = self._fills.count[0]
        if count:
            columns = [column[:count] for column in self._fills[1:]]
            self._ledger.add(columns if isinstance(columns[0], list) else [column.copy() for column in columns])
            self._fills.count[0] = 0
        self._room_bars = self._room

    def follow(self) -> list[tuple[int, Trade]]:
        """Takes the new events into the trade book; the trades that they ended, with the index of the ending event."""
        ended = []
        for index, event in enumerate(self.events[self._followed :], self._followed):
            trade = self._trades.apply(event)
            if trade is not None:
                ended.append((index, trade))
        self._followed = len(self.events)
        return ended

    def trades(self) -> TradeBook:
        """The open trades, followed up to the ledger's end."""
        self.follow()
        return self._trades

    def state_digest(self, boundary: Boundary) -> str:
        """SHA-256 over the canonical bytes of the whole state at a boundary; it costs what `digest_steps` has left."""
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
        self._hash_recorded(boundary.recorded)
        found.update(self._recorded_hash.copy().digest())
        state = boundary.strategy_state
        found.update(b"\0" if state is None else b"\1" + state)
        return found.hexdigest()

    def digest_steps(self, boundary: Boundary) -> Iterator[None]:
        """Takes what is new up to a boundary into its digest, a bounded number of records a step."""
        events, ledger = self.events, self._ledger_digest
        while ledger.count < boundary.events:
            ledger.advance(events, min(boundary.events, ledger.count + _HASHED_RECORDS))
            yield
        while self._recorded_hashed < boundary.recorded:
            self._hash_recorded(min(boundary.recorded, self._recorded_hashed + _HASHED_RECORDS))
            yield

    def _hash_recorded(self, upto: int) -> None:
        found = self._recorded_hash.copy()
        for bar, name, value in self.recorded[self._recorded_hashed : upto]:
            found.update(struct.pack("<q", bar) + _text(name) + struct.pack("<d", value))
        hashed = max(self._recorded_hashed, upto)
        self._recorded_hash, self._recorded_hashed = found, hashed  # together, as an interruption may come

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
        self._ledger = Ledger(state.ledger, self.tags)
        self.recorded = recorded
        self.next_bar = upto + 1
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
