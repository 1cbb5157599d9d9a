"""The book's columns in either tier, and copies of them at a boundary."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from ktrdr_async.backtesting import execution as ex

if TYPE_CHECKING:
    from ktrdr_async.backtesting.tiers import Tier


class Boundary(msgspec.Struct, frozen=True):
    """The engine's whole state at a yield; the ledger and the recorded values by their counts, as they only grow."""

    bar_index: int  # last bar that was computed; -1: none
    book: ex.Book
    events: int
    recorded: int
    strategy_state: bytes | None


class Ahead:
    """The boundaries of a piece that was computed at once; a `Boundary` is made of one when somebody looks at it."""

    def __init__(self, ends: list[int], kept: ex.Book, fills: list[int], events: int, widths: list[int]) -> None:
        self.ends = ends  # bars
        self.fills = [events + count for count in fills]  # ledger events, at each
        self._kept, self._widths = kept, widths

    def money(self, which: int) -> list[float]:
        """Cash or equity at each."""
        return self._kept.money[which :: self._widths[0]].tolist()[: len(self.ends)]  # type: ignore[no-any-return]

    def trades(self) -> list[int]:
        """Trades that have ended, at each."""
        return self._kept.tally[ex.TRADES :: ex.TALLIES].tolist()[: len(self.ends)]  # type: ignore[no-any-return]

    def boundary(self, m: int, strategy_state: bytes | None) -> Boundary:
        """The m-th one, whole."""
        columns = zip(self._kept, self._widths, strict=True)
        book = ex.Book(*(column[m * width : (m + 1) * width].tolist() for column, width in columns))
        return Boundary(self.ends[m], book, self.fills[m], 0, strategy_state)


def new_book(tier: Tier, cash: float, k: int) -> ex.Book:
    """An account of k symbols before the first bar."""
    nan = float("nan")
    tally = [0] * ex.TALLIES
    tally[ex.RUINED_AT] = -1
    ints, floats = tier.ints, tier.floats
    return ex.Book(
        money=floats([cash, cash]), tally=ints(tally), lots=ints([0] * k), mark=floats([nan] * k),
        waiting=ints([0] * k), waiting_reason=ints([0] * k), waiting_tag=ints([ex.NO_TAG] * k),
        zero_lots=ints([0] * k), zero_target=floats([0.0] * k), zero_lot_value=floats([0.0] * k),
    )  # fmt: skip


def room(tier: Tier, size: int) -> ex.Fills:
    """Room for `size` fills."""
    count, whole = tier.ints([0]), [tier.int_room(size) for _ in range(7)]
    return ex.Fills(count, *whole[:4], *(tier.float_room(size) for _ in range(3)), *whole[4:])
