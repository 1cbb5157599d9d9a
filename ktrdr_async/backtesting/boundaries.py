"""The book's columns in either tier, and copies of them at a boundary."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np

from ktrdr_async.backtesting import execution as ex
from ktrdr_async.backtesting import packed

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Boundary(msgspec.Struct, frozen=True):
    """The engine's whole state at a yield; the ledger and the recorded values by their counts, as they only grow."""

    bar_index: int  # last bar that was computed; -1: none
    book: ex.Book
    events: int
    recorded: int
    strategy_state: bytes | None


class Kept:
    """The account at some boundaries, as compiled code left it; a `Boundary` is made of one when somebody looks."""

    def __init__(self, ends: list[int], ints: NDArray[np.int64], floats: NDArray[np.float64], events: int) -> None:
        self.ends = ends  # bars
        self.ints, self.floats = ints, floats  # a row a boundary, as in `packed`
        self._events = events  # ledger events before the first row of `ints[:, 0]`

    def fills(self) -> list[int]:
        """Ledger events, at each."""
        return (self.ints[:, 0] + self._events).tolist()  # type: ignore[no-any-return]

    def money(self, which: int) -> list[float]:
        """Cash or equity, at each."""
        return self.floats[:, packed.TERMS + which].tolist()  # type: ignore[no-any-return]

    def trades(self) -> list[int]:
        """Trades that have ended, at each."""
        return self.ints[:, 1 + ex.TRADES].tolist()  # type: ignore[no-any-return]

    def boundary(self, m: int, recorded: int, strategy_state: bytes | None) -> Boundary:
        """The m-th one, whole."""
        ints = self.ints[m]
        book = packed.book_of(ints, self.floats[m], (len(ints) - packed.ints_kept(0)) // 5)
        lists = ex.Book(*(column.tolist() for column in book))
        return Boundary(self.ends[m], lists, self._events + int(ints[0]), recorded, strategy_state)


class Memory:
    """The account and room for `size` fills, as compiled code is called with them; `book` and `fills` are views."""

    def __init__(self, terms: ex.Terms, cash: float, k: int, size: int) -> None:
        self.ints = np.zeros(packed.ints_kept(k) + packed.INTS * size, np.int64)
        self.floats = np.zeros(packed.floats_kept(k) + packed.FLOATS * size)
        self.floats[: packed.TERMS] = terms
        self.book = packed.book_of(self.ints, self.floats, k)
        self.fills = packed.fills_of(self.ints, self.floats, k)
        self._kept_ints = self.ints[None, : packed.ints_kept(k)]
        self._kept_floats = self.floats[None, : packed.floats_kept(k)]
        for mine, column in zip(self.book, new_book(cash, k), strict=True):
            mine[:] = column

    def kept(self, bar: int, events: int) -> Kept:
        """A copy of the account at the boundary after `bar`; `events` are in the ledger already."""
        return Kept([bar], self._kept_ints.copy(), self._kept_floats.copy(), events)


def new_book(cash: float, k: int) -> ex.Book:
    """An account of k symbols before the first bar."""
    nan = float("nan")
    tally = [0] * ex.TALLIES
    tally[ex.RUINED_AT] = -1
    return ex.Book(
        money=[cash, cash], tally=tally, lots=[0] * k, mark=[nan] * k, waiting=[0] * k, waiting_reason=[0] * k,
        waiting_tag=[ex.NO_TAG] * k, zero_lots=[0] * k, zero_target=[0.0] * k, zero_lot_value=[0.0] * k,
    )  # fmt: skip


def room(size: int) -> ex.Fills:
    """Room for `size` fills."""
    bar, symbol, lots, requested, part, reason, tag = ([0] * size for _ in range(packed.INTS))
    price, fee, cash = ([0.0] * size for _ in range(packed.FLOATS))
    return ex.Fills([0], bar, symbol, lots, requested, price, fee, cash, part, reason, tag)
