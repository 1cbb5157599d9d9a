"""The only money arithmetic there is: sizing, fills, marks and equity, by the market's rules.

Written in the subset of Python that a compiler for numeric code takes: scalars and flat columns, + - * / floor and
comparisons; no power, no reductions, no builtin `sum`. The columns are lists where the source is interpreted and
may be arrays where it is compiled; a value of symbol j at row i stands at `i * k + j`. `ARITHMETIC_VERSION` rises
only when a golden digest changes.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

ARITHMETIC_VERSION = 1

# A column is a list of floats or ints (interpreted) or an array of them (compiled); indexing is all that is done with
# it.
Floats = Any
Ints = Any

CASH, EQUITY = 0, 1  # places in Book.money
WAITING, CUT, CUT_TO_ZERO, TRADES, RUINED_AT, REFUSED, ORDERED_ROWS = range(7)  # places in Book.tally
TALLIES = 7
OPENING, CLOSING = 0, 1  # parts of a fill
ORDER, RUIN, FORCED_CLOSE = 0, 1, 2  # reasons of a fill
BY_WEIGHT, TO_UNITS, MORE_LOTS = 0, 1, 2  # kinds of a decision: to a weight, to units, so many lots more (as in `Bar`)
NO_TAG = -1
NO_BAR = 2**62  # the bar of a decision that isn't there: after every other
MAX_LOTS = 2**53  # a count of lots is exact as a float64 up to here


class Terms(NamedTuple):
    """What trading costs; all of it is constant over a run."""

    commission: float  # fraction of notional, a side
    slippage: float  # fraction of price, against the order
    lot_size: float  # units in a lot
    min_trade: float  # fraction of equity below which a rebalance is skipped


class Book(NamedTuple):
    """The account: everything that execution changes. k symbols."""

    money: Floats  # [2] cash, equity at the last close; account currency
    tally: Ints  # [TALLIES] counts, and the bar of ruin (-1: none)
    lots: Ints  # [k] signed lots held
    mark: Floats  # [k] last close; NaN before the first
    waiting: Ints  # [k] signed lots ordered and not filled yet; 0: none
    waiting_reason: Ints  # [k] reason of the waiting order
    waiting_tag: Ints  # [k] tag's number of the waiting order; NO_TAG: none
    zero_lots: Ints  # [k] how often a weight other than zero came to zero lots
    zero_target: Floats  # [k] notional aimed at, the first time
    zero_lot_value: Floats  # [k] notional of one lot, the first time


class Decisions(NamedTuple):
    """What was decided, in the order of bars, before the run or bar by bar."""

    next: Ints  # [1] number of the first one that isn't carried out
    said: Ints  # [4 * m + 1] of each: at which bar's close, symbol, kind, tag's number; then NO_BAR
    value: Floats  # [m] a weight, signed units, or signed lots


class Fills(NamedTuple):
    """Room for the fills of a piece of bars, 2 * k a bar; the caller takes them out."""

    count: Ints  # [1] how many are in it
    bar: Ints
    symbol: Ints
    lots: Ints
    requested: Ints
    price: Floats
    fee: Floats
    cash: Floats  # after the fill
    part: Ints
    reason: Ints
    tag: Ints


def notional(lots: int, lot_size: float, price: float) -> float:
    """Value of signed lots at a price, multiplied in this order everywhere."""
    return lots * lot_size * price


def whole_lots(quotient: float) -> int:
    """Floor of a quotient >= 0; one within 1e-9 (relative) and half a lot of the next integer counts as that integer.

    Without the half lot an exact count from 1e9 on would be taken for one more. Returns MAX_LOTS where the quotient is
    beyond what counts exactly; the caller refuses it.
    """
    if not quotient < MAX_LOTS:
        return MAX_LOTS
    lots = math.floor(quotient)
    if (lots + 1) - quotient <= min(1e-9 * (lots + 1), 0.5):
        lots += 1
    return lots


def lots_of_weight(weight: float, equity: float, close: float, terms: Terms) -> int:
    """Signed lots that a weight of equity comes to, costs of the way in included."""
    size = abs(weight) * equity / (close * (1.0 + terms.slippage) * (1.0 + terms.commission) * terms.lot_size)
    lots = whole_lots(size)
    return lots if weight > 0.0 else -lots


def lots_of_quantity(quantity: float, lot_size: float) -> int:
    """Signed lots of a signed quantity in units, floored toward zero."""
    lots = whole_lots(abs(quantity) / lot_size)
    return lots if quantity > 0.0 else -lots


def put_order(book: Book, symbol: int, lots: int, reason: int, tag: int) -> None:
    """Makes `lots` the symbol's waiting order; 0 takes the waiting one back."""
    before = book.waiting[symbol]
    book.waiting[symbol] = lots
    book.waiting_reason[symbol] = reason if lots != 0 else ORDER
    book.waiting_tag[symbol] = tag if lots != 0 else NO_TAG
    if before == 0 and lots != 0:
        book.tally[WAITING] += 1
    elif before != 0 and lots == 0:
        book.tally[WAITING] -= 1


def decide_target(book: Book, terms: Terms, symbol: int, target: int, tag: int) -> int:
    """Orders what leads from the lots held to `target`; a rebalance below `min_trade` is skipped. Returns the order."""
    order: int = target - book.lots[symbol]
    if target != 0 and terms.min_trade > 0.0:
        value = abs(notional(order, terms.lot_size, book.mark[symbol]))
        if value < terms.min_trade * book.money[EQUITY]:
            order = 0
    put_order(book, symbol, order, ORDER, tag)
    return order


def decide_weight(book: Book, terms: Terms, symbol: int, weight: float, tag: int) -> int:
    """Orders a rebalance to a weight of the equity at the last close. Returns the order, or MAX_LOTS: too many lots."""
    target = 0
    if weight != 0.0:
        target = lots_of_weight(weight, book.money[EQUITY], book.mark[symbol], terms)
        if target == MAX_LOTS or target == -MAX_LOTS:
            return MAX_LOTS
        if target == 0:
            if book.zero_lots[symbol] == 0:
                book.zero_target[symbol] = abs(weight) * book.money[EQUITY]
                book.zero_lot_value[symbol] = notional(1, terms.lot_size, book.mark[symbol])
            book.zero_lots[symbol] += 1
    return decide_target(book, terms, symbol, target, tag)


def decide_units(book: Book, terms: Terms, symbol: int, quantity: float, tag: int) -> int:
    """Orders what leads to a signed quantity. Returns the order, or MAX_LOTS: too many lots."""
    target = lots_of_quantity(quantity, terms.lot_size)
    if target == MAX_LOTS or target == -MAX_LOTS:
        return MAX_LOTS
    return decide_target(book, terms, symbol, target, tag)


def _fill(
    book: Book,
    terms: Terms,
    fills: Fills,
    bar: int,
    symbol: int,
    lots: int,
    requested: int,
    price: float,
    part: int,
    reason: int,
    tag: int,
) -> None:
    """Moves cash and lots by one fill at `price` (before slippage), and writes it down."""
    if lots > 0:
        paid = price * (1.0 + terms.slippage)
    else:
        paid = price * (1.0 - terms.slippage)
    value = notional(lots, terms.lot_size, paid)
    fee = terms.commission * abs(value)
    cash = book.money[CASH] - (value + fee)
    book.money[CASH] = cash
    book.lots[symbol] += lots
    if book.lots[symbol] == 0:
        book.tally[TRADES] += 1
    at = fills.count[0]
    fills.bar[at] = bar
    fills.symbol[at] = symbol
    fills.lots[at] = lots
    fills.requested[at] = requested
    fills.price[at] = paid
    fills.fee[at] = fee
    fills.cash[at] = cash
    fills.part[at] = part
    fills.reason[at] = reason
    fills.tag[at] = tag
    fills.count[0] = at + 1  # last, so that what was interrupted here isn't half a fill


def _free(book: Book, terms: Terms, k: int, opens: Floats, row: int) -> float:
    """Buying power: cash plus positions less their gross, at the open where there is a bar, else at the last close."""
    total = book.money[CASH]
    gross = 0.0
    for j in range(k):
        lots = book.lots[j]
        if lots != 0:
            price = opens[row + j]
            if price != price:
                price = book.mark[j]
            total += notional(lots, terms.lot_size, price)
            gross += notional(abs(lots), terms.lot_size, price)
    return float(total - gross)


def fill_waiting(book: Book, terms: Terms, k: int, opens: Floats, row: int, bar: int, fills: Fills) -> None:
    """Fills what waits at one open: all closing parts, never cut, then the opening parts; each in symbol order."""
    for j in range(k):
        order = book.waiting[j]
        price = opens[row + j]
        if order != 0 and price == price:
            held = book.lots[j]
            part = 0
            if held > 0 and order < 0:
                part = max(order, -held)
            elif held < 0 and order > 0:
                part = min(order, -held)
            if part != 0:
                reason, tag = book.waiting_reason[j], book.waiting_tag[j]
                _fill(book, terms, fills, bar, j, part, part, price, CLOSING, reason, tag)
                if part == order:
                    put_order(book, j, 0, ORDER, NO_TAG)
                else:
                    book.waiting[j] = order - part
    for j in range(k):
        order = book.waiting[j]
        price = opens[row + j]
        if order != 0 and price == price:
            wanted = abs(order)
            free = _free(book, terms, k, opens, row)
            limit = 0
            if free > 0.0:
                limit = whole_lots(free / (price * (1.0 + terms.slippage) * (1.0 + terms.commission) * terms.lot_size))
            if limit < wanted:
                book.tally[CUT] += 1
                wanted = limit
            if wanted == 0:
                book.tally[CUT_TO_ZERO] += 1
            else:
                reason, tag = book.waiting_reason[j], book.waiting_tag[j]
                lots = wanted if order > 0 else -wanted
                _fill(book, terms, fills, bar, j, lots, order, price, OPENING, reason, tag)
            put_order(book, j, 0, ORDER, NO_TAG)


def mark_close(money: Floats, mark: Floats, lots: Ints, lot_size: float, k: int, closes: Floats, row: int) -> float:
    """Marks every symbol that has a bar at its close. Returns equity: cash, then what is held, in symbol order.

    It takes the book's columns one by one: it is called at every bar, and looking them up would cost more than its
    sums.
    """
    equity: float = money[CASH]
    for j in range(k):
        close = closes[row + j]
        if close == close:
            mark[j] = close
        if lots[j] != 0:
            equity += lots[j] * lot_size * mark[j]
    money[EQUITY] = equity
    return equity


def mark_bars(
    book: Book, lot_size: float, k: int, closes: Floats, row: int, equity: Floats, at: int, count: int
) -> int:
    """Marks bars from `row` on, up to `count` of them at which nothing is filled; writes equity[at..].

    Stops after a bar whose equity isn't above 0. Returns how many bars it took.
    """
    if k != 1:
        for i in range(count):
            value = mark_close(book.money, book.mark, book.lots, lot_size, k, closes, (row + i) * k)
            equity[at + i] = value
            if value <= 0.0:
                return i + 1
        return count
    cash: float = book.money[CASH]
    held = book.lots[0]
    units = held * lot_size
    mark = book.mark[0]
    value = cash
    taken = count
    for i in range(count):
        close = closes[row + i]
        if close == close:
            mark = close
        if held != 0:
            value = cash + units * mark
        equity[at + i] = value
        if value <= 0.0:
            taken = i + 1
            break
    book.mark[0] = mark
    book.money[EQUITY] = value
    return taken


def quiet_bars(book: Book, lot_size: float, k: int, closes: Floats, row: int, count: int) -> int:
    """How many bars from `row` on, up to `count`, leave cash and lots alone where nothing waits: all but after ruin."""
    for i in range(count):
        equity: float = book.money[CASH]
        held = False
        for j in range(k):
            if book.lots[j] != 0:
                held = True
                equity += book.lots[j] * lot_size * _close_before(book, k, closes, row, i, j)
        if not held:
            return count
        if equity <= 0.0:
            return i + 1
    return count


def _close_before(book: Book, k: int, closes: Floats, row: int, i: int, j: int) -> float:
    """Symbol j's last close, of the rows row..row+i or before."""
    while i >= 0:
        close: float = closes[(row + i) * k + j]
        if close == close:
            return close
        i -= 1
    return float(book.mark[j])


def go_bust(book: Book, k: int, bar: int) -> None:
    """Equity is gone at this close: everything held is closed at its next open, and nothing opens again."""
    book.tally[RUINED_AT] = bar
    for j in range(k):
        put_order(book, j, -book.lots[j], RUIN, NO_TAG)


def carry_out(book: Book, terms: Terms, decisions: Decisions, upto: int) -> int:
    """Makes orders of what was decided at the close that was marked last, bar `upto`.

    Returns -1, or the bar where a decision comes to more lots than count exactly.
    """
    at = decisions.next[0]
    ordered = False
    while decisions.said[4 * at] <= upto:
        symbol, kind, tag = decisions.said[4 * at + 1], decisions.said[4 * at + 2], decisions.said[4 * at + 3]
        value = decisions.value[at]
        if book.tally[RUINED_AT] >= 0:
            book.tally[REFUSED] += 1
        else:
            if kind == BY_WEIGHT:
                order = decide_weight(book, terms, symbol, value, tag)
            elif kind == TO_UNITS:
                order = decide_units(book, terms, symbol, value, tag)
            else:
                order = book.waiting[symbol] + int(value)
                if order >= MAX_LOTS or order <= -MAX_LOTS:
                    order = MAX_LOTS
                else:
                    put_order(book, symbol, order, ORDER, tag)
            if order == MAX_LOTS:
                return int(decisions.said[4 * at])
            ordered = ordered or order != 0
        at += 1
    decisions.next[0] = at
    if ordered:
        book.tally[ORDERED_ROWS] += 1
    return -1


def run_bars(
    book: Book,
    terms: Terms,
    k: int,
    opens: Floats,
    closes: Floats,
    row: int,
    bar: int,
    count: int,
    decisions: Decisions,
    equity: Floats,
    at: int,
    fills: Fills,
) -> int:
    """Computes `count` bars: bar `bar` on, which stands at `row` of the columns. Writes equity[at..at+count-1].

    At each: what was decided at the bar before becomes orders, what waits is filled at the open, all is marked at the
    close. Returns -1, or the bar where a decision comes to more lots than count exactly.
    """
    following = decisions.said[4 * decisions.next[0]]
    i = 0
    while i < count:
        if following < bar + i:
            failed = carry_out(book, terms, decisions, bar + i - 1)
            if failed >= 0:
                return failed
            following = decisions.said[4 * decisions.next[0]]
        if book.tally[WAITING] != 0:
            fill_waiting(book, terms, k, opens, (row + i) * k, bar + i, fills)
        quiet = 1  # bars up to the next one at which something may be filled
        if book.tally[WAITING] == 0:
            quiet = min(count - i, following - (bar + i) + 1)
        i += mark_bars(book, terms.lot_size, k, closes, row + i, equity, at + i, quiet)
        if book.money[EQUITY] <= 0.0 and book.tally[RUINED_AT] < 0:
            go_bust(book, k, bar + i - 1)
    return -1


def close_all(book: Book, terms: Terms, k: int, bar: int, fills: Fills) -> None:
    """The closing step after the last bar: closes what is open at the last close, with costs, never cut."""
    for j in range(k):
        lots = book.lots[j]
        if lots != 0:
            _fill(book, terms, fills, bar, j, -lots, -lots, book.mark[j], CLOSING, FORCED_CLOSE, NO_TAG)
