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
NO_TAG = -1
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


class Fills(NamedTuple):
    """Room for the fills of a piece of bars, 2 * k a bar; the caller takes them out."""

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


def _fill(
    book: Book,
    terms: Terms,
    fills: Fills,
    at: int,
    bar: int,
    symbol: int,
    lots: int,
    requested: int,
    price: float,
    part: int,
    reason: int,
    tag: int,
) -> None:
    """Moves cash and lots by one fill at `price` (before slippage), and writes it down at place `at`."""
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


def fill_waiting(book: Book, terms: Terms, k: int, opens: Floats, row: int, bar: int, fills: Fills, count: int) -> int:
    """Fills what waits at one open: all closing parts, never cut, then the opening parts; each in symbol order.

    `count` fills stand in `fills` already; returns how many do afterwards.
    """
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
                _fill(book, terms, fills, count, bar, j, part, part, price, CLOSING, reason, tag)
                count += 1
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
                _fill(book, terms, fills, count, bar, j, lots, order, price, OPENING, reason, tag)
                count += 1
            put_order(book, j, 0, ORDER, NO_TAG)
    return count


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


def mark_one(money: Floats, mark: Floats, lots: Ints, lot_size: float, k: int, closes: Floats, row: int) -> float:
    """`mark_close` for one symbol, where an interpreted loop over one costs more than what it does."""
    close = closes[row]
    if close == close:
        mark[0] = close
    equity: float = money[CASH]
    held = lots[0]
    if held != 0:
        equity += held * lot_size * mark[0]
    money[EQUITY] = equity
    return equity


def go_bust(book: Book, k: int, bar: int) -> None:
    """Equity is gone at this close: everything held is closed at its next open, and nothing opens again."""
    book.tally[RUINED_AT] = bar
    for j in range(k):
        put_order(book, j, -book.lots[j], RUIN, NO_TAG)


def run_targets(
    book: Book,
    terms: Terms,
    k: int,
    opens: Floats,
    closes: Floats,
    targets: Floats,
    decides: Ints,
    by_weight: bool,
    row: int,
    bar: int,
    count: int,
    equity: Floats,
    fills: Fills,
) -> int:
    """Computes `count` bars of a strategy whose targets are known: bar `bar` on, which stands at `row` of the columns.

    `targets` are weights, or lots already, one a symbol and row; NaN keeps. `decides` says of each row whether it
    holds any.
    Writes equity[0..count-1]. Returns the number of fills, or -1 - bar where a weight comes to more lots than count
    exactly.
    """
    filled = 0
    money, tally, lots, mark, lot_size = book.money, book.tally, book.lots, book.mark, terms.lot_size
    for i in range(count):
        at = (row + i) * k
        if tally[WAITING] != 0:
            filled = fill_waiting(book, terms, k, opens, at, bar + i, fills, filled)
        if k == 1:
            value = mark_one(money, mark, lots, lot_size, k, closes, at)
        else:
            value = mark_close(money, mark, lots, lot_size, k, closes, at)
        equity[i] = value
        if value <= 0.0 and tally[RUINED_AT] < 0:
            go_bust(book, k, bar + i)
        if decides[row + i]:
            ordered = False
            for j in range(k):
                target = targets[at + j]
                if target == target:
                    if tally[RUINED_AT] >= 0:
                        tally[REFUSED] += 1
                        continue
                    if by_weight:
                        order = decide_weight(book, terms, j, target, NO_TAG)
                        if order == MAX_LOTS:
                            return -1 - (bar + i)
                    else:
                        order = decide_target(book, terms, j, int(target), NO_TAG)
                    ordered = ordered or order != 0
            if ordered:
                tally[ORDERED_ROWS] += 1
    return filled


def close_all(book: Book, terms: Terms, k: int, bar: int, fills: Fills) -> int:
    """The closing step after the last bar: closes what is open at the last close, with costs, never cut."""
    count = 0
    for j in range(k):
        lots = book.lots[j]
        if lots != 0:
            _fill(book, terms, fills, count, bar, j, -lots, -lots, book.mark[j], CLOSING, FORCED_CLOSE, NO_TAG)
            count += 1
    return count
