"""Plain trees (requests, results, errors, progress) to JSON text that JSONB gives back equal in every bit, and back.

JSONB keeps numbers as decimals: it returns 1e16 and above as integers, -0.0 as 0.0, and takes neither NaN nor
infinities. Such a float travels as `{"$float": "<repr>"}`; everything else is what it looks like. Nothing here reads or
writes a database.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

import msgspec

from ktrdr_async.errors import InputError

TAG = "$float"
MAX_DEPTH = 64  # levels of lists and objects
MAX_BYTES = 200_000_000  # of one JSON text; PostgreSQL's own limit for a JSONB value is 268,435,455
EXACT_BELOW = 1e16  # from here on JSON text of a float has no decimal point, and JSONB makes an integer of it


class ValueTooLargeError(InputError):
    """A value has more bytes than can be stored; the message says how many."""


_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")
_SURROGATE = re.compile("[\ud800-\udfff]")


def to_json(value: Any, *, repair: bool = False) -> str:
    """JSON text of a tree of dicts, lists, strings, numbers, booleans and None.

    Args:
        value: the tree; numpy's numbers become Python's, tuples become lists.
        repair: replace what PostgreSQL's text can't hold (NUL, lone surrogates) instead of refusing it; for messages
            only.

    Raises:
        InputError: if it holds something else, is too deep or too large; the message says where.
    """
    return encode_tree(tagged(value, repair=repair)).decode()


def from_json(text: str) -> Any:
    """The tree that `to_json` took.

    Raises:
        ValueError: if the text is too large, too deep or no JSON.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"{len(text)} bytes of JSON are more than the {MAX_BYTES} that are read")
    try:
        tree = msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise ValueError(f"no JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"JSON is nested deeper than {MAX_DEPTH} levels") from None
    return untagged(tree)


def encode_tree(tree: Any) -> bytes:
    """JSON of an already tagged tree, refused where JSONB would refuse it.

    Raises:
        InputError: on NUL or a lone surrogate.
    """
    try:
        text = msgspec.json.encode(tree)
    except UnicodeEncodeError as error:
        raise InputError(f"a text holds a lone surrogate, which can't be stored: {error.object[:80]!r}") from None
    if len(text) > MAX_BYTES:
        raise ValueTooLargeError(f"{len(text)} bytes of JSON are more than the {MAX_BYTES} that can be stored")
    if holds_nul(text):
        raise InputError("a text holds the character NUL (\\u0000), which PostgreSQL can't store")
    return text


def holds_nul(text: bytes) -> bool:
    """Whether JSON text has the escape of NUL, and not a backslash that is followed by these letters."""
    return b"\\u0000" in text and _NUL.search(text) is not None


def tagged(value: Any, *, repair: bool = False, where: str = "", depth: int = 0) -> Any:
    """The tree with each float tagged that JSONB wouldn't give back. :raises InputError: as `to_json`."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value.replace("\x00", "\ufffd")) if repair else value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        number = _double(value, where)
        exact = abs(number) < EXACT_BELOW and (number != 0.0 or math.copysign(1.0, number) > 0)
        return number if exact else {TAG: repr(number)}
    if depth >= MAX_DEPTH:
        raise InputError(f"{where or 'the value'} is nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, Mapping):
        made = {}
        for key, item in value.items():
            if not isinstance(key, str) or key == TAG:
                raise InputError(f"{where or 'the value'} has a key {key!r}: keys are texts, and {TAG!r} is reserved")
            name = tagged(key, repair=repair)
            made[name] = tagged(item, repair=repair, where=f"{where}.{key}" if where else key, depth=depth + 1)
        return made
    if isinstance(value, list | tuple):
        return [tagged(item, repair=repair, where=f"{where}[{n}]", depth=depth + 1) for n, item in enumerate(value)]
    raise InputError(f"{where or 'the value'} is of type {type(value).__name__}, which JSON can't hold")


def _double(value: Real, where: str) -> float:
    """The value as a float. :raises InputError: if that is another number, as of a long double or a fraction."""
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if number != value and not math.isnan(number):
        raise InputError(f"{where or 'the value'} is {value!r}, which no float holds exactly")
    return number


def untagged(value: Any, depth: int = 0) -> Any:
    """The tree with each tag replaced by its float. :raises ValueError: if it is too deep or a tag holds no float."""
    if depth > MAX_DEPTH:
        raise ValueError(f"JSON is nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, dict):
        if len(value) == 1 and TAG in value:
            if not isinstance(value[TAG], str):
                raise ValueError(f"a tagged float is a text, not a {type(value[TAG]).__name__}")
            return float(value[TAG])
        return {key: untagged(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [untagged(item, depth + 1) for item in value]
    return value


def canonical(value: Any) -> str:
    """A text that is equal for trees of equal meaning: key order, tuples, and 10 against 10.0 don't matter.

    Numbers enter as exact decimals, so that what JSONB or JSON did to them in between doesn't matter either.
    """
    return msgspec.json.encode(_canonical(tagged(value)), order="deterministic").decode()


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        if len(value) == 1 and TAG in value:
            number = float(value[TAG])
            return _decimal(number) if math.isfinite(number) else ["number", repr(number)]
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list):
        return ["list", *(_canonical(item) for item in value)]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return _decimal(value)


def _decimal(value: float) -> list[str]:
    sign, digits, exponent = Decimal(repr(value)).as_tuple()
    significant = "".join(map(str, digits)).lstrip("0")
    stripped = significant.rstrip("0")
    if not stripped:
        return ["number", "0"]
    return ["number", f"{'-' if sign else ''}{stripped}e{int(exponent) + len(significant) - len(stripped)}"]
