"""What compiled code is called with: the account in one column of whole numbers and one of floats.

Each array that is passed costs a call a tenth of a microsecond. `execution` computes with views of them.

Whole numbers: the number of fills, `Book.tally`, `lots`, `waiting`, `waiting_reason`, `waiting_tag`, `zero_lots`, then
the fills' columns. Floats: `Terms`, `Book.money`, `mark`, `zero_target`, `zero_lot_value`, then the fills' columns.
"""

from __future__ import annotations

from ktrdr_async.backtesting import execution as ex

TERMS = 4  # floats before the account's own
INTS, FLOATS = 7, 3  # columns of fills


def ints_kept(k: int) -> int:
    """How many whole numbers an account of k symbols has, its number of fills among them."""
    return 1 + ex.TALLIES + 5 * k


def floats_kept(k: int) -> int:
    """How many floats an account of k symbols has, its terms among them."""
    return TERMS + 2 + 3 * k


def book_of(ints: ex.Ints, floats: ex.Floats, k: int) -> ex.Book:
    """The account, as views."""
    i = 1 + ex.TALLIES
    f = TERMS + 2
    return ex.Book(
        floats[TERMS:f],
        ints[1:i],
        ints[i : i + k],
        floats[f : f + k],
        ints[i + k : i + 2 * k],
        ints[i + 2 * k : i + 3 * k],
        ints[i + 3 * k : i + 4 * k],
        ints[i + 4 * k : i + 5 * k],
        floats[f + k : f + 2 * k],
        floats[f + 2 * k : f + 3 * k],
    )


def fills_of(ints: ex.Ints, floats: ex.Floats, k: int) -> ex.Fills:
    """The room for fills, as views."""
    i = ints_kept(k)
    f = floats_kept(k)
    size = (len(ints) - i) // INTS
    return ex.Fills(
        ints[0:1],
        ints[i : i + size],
        ints[i + size : i + 2 * size],
        ints[i + 2 * size : i + 3 * size],
        ints[i + 3 * size : i + 4 * size],
        floats[f : f + size],
        floats[f + size : f + 2 * size],
        floats[f + 2 * size : f + 3 * size],
        ints[i + 4 * size : i + 5 * size],
        ints[i + 5 * size : i + 6 * size],
        ints[i + 6 * size : i + 7 * size],
    )


def decisions_of(said: ex.Ints, values: ex.Floats) -> ex.Decisions:
    """Decisions, as views: `Decisions.next` and `said` in one column, and the values."""
    return ex.Decisions(said[0:1], said[1:], values)


def terms_of(floats: ex.Floats) -> ex.Terms:
    """What trading costs."""
    return ex.Terms(floats[0], floats[1], floats[2], floats[3])


def advance(
    ints: ex.Ints,
    floats: ex.Floats,
    k: int,
    opens: ex.Floats,
    closes: ex.Floats,
    bar: int,
    stop: int,
    whole: int,
    said: ex.Ints,
    values: ex.Floats,
    equity: ex.Floats,
) -> int:
    """Computes the bars bar..stop-1 of whole columns; where `whole` isn't 0, also what was decided at the last of them.

    Returns -1, or the bar where a decision comes to more lots than count exactly.
    """
    book, terms, decisions = book_of(ints, floats, k), terms_of(floats), decisions_of(said, values)
    fills = fills_of(ints, floats, k)
    failed = ex.run_bars(book, terms, k, opens, closes, bar, bar, stop - bar, decisions, equity, bar, fills)
    if failed < 0 and whole != 0:
        failed = ex.carry_out(book, terms, decisions, stop - 1)
    return failed


def quiet_bars(ints: ex.Ints, floats: ex.Floats, k: int, closes: ex.Floats, bar: int, count: int) -> int:
    """`execution.quiet_bars` of whole columns."""
    return ex.quiet_bars(book_of(ints, floats, k), floats[2], k, closes, bar, count)


def advance_blocks(
    ints: ex.Ints,
    floats: ex.Floats,
    k: int,
    opens: ex.Floats,
    closes: ex.Floats,
    bar: int,
    stop: int,
    said: ex.Ints,
    values: ex.Floats,
    equity: ex.Floats,
    ends: ex.Ints,
    kept_ints: ex.Ints,
    kept_floats: ex.Floats,
) -> int:
    """Computes the bars bar..stop-1 of whole columns, and keeps the account of each boundary: after the bars `ends`.

    The account of the m-th one goes to row m of `kept_ints` and `kept_floats`. Returns what `advance` does.
    """
    book, terms, decisions = book_of(ints, floats, k), terms_of(floats), decisions_of(said, values)
    fills = fills_of(ints, floats, k)
    for m in range(len(ends) + 1):
        end = ends[m] + 1 if m < len(ends) else stop
        failed = ex.run_bars(book, terms, k, opens, closes, bar, bar, end - bar, decisions, equity, bar, fills)
        if failed < 0:
            failed = ex.carry_out(book, terms, decisions, end - 1)
        if failed >= 0:
            return failed
        if m < len(ends):
            for i in range(ints_kept(k)):
                kept_ints[m, i] = ints[i]
            for i in range(floats_kept(k)):
                kept_floats[m, i] = floats[i]
        bar = end
    return -1
