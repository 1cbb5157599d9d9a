"""Where two runs part, and in what: rows of decisions, states by their digests, endings; down to the named value."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ktrdr_async.backtesting import execution as ex
from ktrdr_async.backtesting.ledger import REASONS
from ktrdr_async.strategies.state import decode_state
from ktrdr_async.verification.certificate import MOST_FIELDS, Field
from ktrdr_async.verification.legs import Ending, Ran, Snapshot

_MISSING = object()
_LONGEST = 100  # characters of a value that are shown
_TALLY = {
    "orders.waiting": ex.WAITING,
    "orders.cut": ex.CUT,
    "orders.cut_to_zero": ex.CUT_TO_ZERO,
    "trades": ex.TRADES,
    "ruined_at": ex.RUINED_AT,
    "orders.refused_after_ruin": ex.REFUSED,
    "bars_with_orders": ex.ORDERED_ROWS,
}


class Parting(msgspec.Struct, frozen=True):
    """Two runs part here."""

    bar: int  # -1: before the first bar
    what: str  # "rows", "state", "error" or "ending"
    fields: tuple[Field, ...]
    exact: bool = True  # no boundary lies between it and the last bar at which they were equal


def differing_rows(
    reference: dict[str, NDArray[np.float64]],
    found: dict[str, NDArray[np.float64]],
    symbols: Sequence[str],
    upto: int,
) -> Parting | None:
    """The first row 0..upto in which what `prepare` or the targets gave isn't the same in every bit."""
    first: int | None = None
    for name in sorted(reference.keys() | found.keys()):
        if name not in reference or name not in found:
            there = [f"{len(rows.get(name, ()))} rows" if name in rows else "none" for rows in (reference, found)]
            return Parting(-1, "rows", (Field(name, *there),))
        bar = _first_differing(reference[name], found[name], upto)
        if bar is not None and (first is None or bar < first):
            first = bar
    if first is None:
        return None
    fields = []
    for name in sorted(reference):
        a, b = np.atleast_1d(reference[name][first]), np.atleast_1d(found[name][first])
        for column, (one, other) in enumerate(zip(a.tolist(), b.tolist(), strict=False)):
            if _leaf(one) != _leaf(other):
                which = symbols[column] if len(a) == len(symbols) else column
                of = f"[{which}]" if reference[name].ndim == 2 else ""
                fields.append(Field(f"{name}{of}", _leaf(one), _leaf(other)))
    return Parting(first, "rows", tuple(fields[:MOST_FIELDS]))


def _first_differing(a: NDArray[np.float64], b: NDArray[np.float64], upto: int) -> int | None:
    a, b = a[: upto + 1], b[: upto + 1]
    if a.shape[1:] != b.shape[1:]:
        return 0
    differs = np.ascontiguousarray(a).view(np.int64) != np.ascontiguousarray(b).view(np.int64)
    differs &= ~(np.isnan(a) & np.isnan(b))
    rows = np.flatnonzero(differs.reshape(len(a), -1).any(axis=1))
    return int(rows[0]) if rows.size else None


def differing_state(
    reference: Snapshot, found: Snapshot, symbols: Sequence[str], state_type: type | None, *, grown: bool
) -> Parting:
    """What differs between two states of one bar; `grown`: both tell what this very bar added to ledger and record."""
    a, b = (_tree(each, symbols, state_type, grown=grown) for each in (reference, found))
    fields = tuple(field for field, _ in zip(_walk("", a, b), range(MOST_FIELDS), strict=False))
    if not fields:
        fields = (Field("state_digest", reference.digest, found.digest),)
    return Parting(found.bar, "state", fields)


def differing_ending(reference: Ending, found: Ending, bars: int) -> Parting | None:
    """What differs between two endings whose states were equal at every boundary."""
    if reference.equity != found.equity:
        a, b = (np.frombuffer(each.equity, "<f8") for each in (reference, found))
        bar = _first_differing(a, b, bars - 1) or 0
        return Parting(bar, "ending", (Field("equity", repr(float(a[bar])), repr(float(b[bar]))),))
    parts = ("ledger", "recorded", "counters", "unfilled", "digest")
    a_, b_ = ({name: getattr(each, name) for name in parts} for each in (reference, found))
    fields = tuple(field for field, _ in zip(_walk("", a_, b_), range(MOST_FIELDS), strict=False))
    return Parting(bars - 1, "ending", fields) if fields else None


def broken(ran: Ran, at: int) -> Parting:
    """A run that raised what the uninterrupted one didn't."""
    return Parting(
        ran.error_bar if ran.error_bar >= 0 else at, "error", (Field("error", "none", ran.error[: 4 * _LONGEST]),)
    )


def _tree(snapshot: Snapshot, symbols: Sequence[str], state_type: type | None, *, grown: bool) -> dict[str, Any]:
    book = ex.Book(*snapshot.book)
    tree: dict[str, Any] = {"cash": book.money[ex.CASH], "equity": book.money[ex.EQUITY]}
    for j, symbol in enumerate(symbols):
        waits = book.waiting[j] != 0
        tree[symbol] = {
            "position.lots": book.lots[j],
            "last_close": book.mark[j],
            "waiting.lots": book.waiting[j],
            "waiting.reason": str(REASONS[book.waiting_reason[j]]) if waits else None,
            "waiting.tag": snapshot.tags[j] if waits else None,
            "zero_lots": (book.zero_lots[j], book.zero_target[j], book.zero_lot_value[j]),
        }
    tree |= {name: book.tally[place] for name, place in _TALLY.items()}
    if grown:
        tree |= {"fills": snapshot.events, "recorded": {name: value for _, name, value in snapshot.recorded}}
    try:
        tree["state"] = decode_state(snapshot.state, state_type)
    except msgspec.MsgspecError:
        tree["state"] = snapshot.state
    return tree


def _walk(path: str, a: Any, b: Any) -> Iterator[Field]:
    """Each value in which two trees differ, by its path."""
    if a is _MISSING or b is _MISSING or type(a) is not type(b):
        yield Field(path, _leaf(a), _leaf(b))
    elif isinstance(a, dict):
        for key in dict.fromkeys((*a, *b)):
            name = f"{path}.{key}" if path else str(key)
            yield from _walk(name, a.get(key, _MISSING), b.get(key, _MISSING))
        if a.keys() == b.keys() and list(a) != list(b):
            yield Field(f"{path} (order of keys)", _leaf(list(a)), _leaf(list(b)))
    elif isinstance(a, msgspec.Struct):
        for name in a.__struct_fields__:
            yield from _walk(f"{path}.{name}", getattr(a, name), getattr(b, name))
    elif isinstance(a, list | tuple):
        for index in range(max(len(a), len(b))):
            one, other = (each[index] if index < len(each) else _MISSING for each in (a, b))
            yield from _walk(f"{path}[{index}]", one, other)
    elif isinstance(a, np.ndarray):
        if a.dtype != b.dtype or a.shape != b.shape:
            yield Field(path, f"{a.dtype}{list(a.shape)}", f"{b.dtype}{list(b.shape)}")
        else:
            for place in np.ndindex(a.shape):
                yield from _walk(f"{path}[{', '.join(map(str, place))}]", a[place].item(), b[place].item())
    elif _leaf(a) != _leaf(b):
        yield Field(path, _leaf(a), _leaf(b))


def _leaf(value: Any) -> str:
    """The value as text; a float's gives every bit of it back."""
    if value is _MISSING:
        return "-"
    text = value if isinstance(value, str) else "none" if value is None else repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
