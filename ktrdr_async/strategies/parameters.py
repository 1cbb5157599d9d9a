"""A strategy's parameters as text: what a person types, and what a listing shows."""

from __future__ import annotations

import inspect
import math
import re
import types
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import msgspec

from ktrdr_async.errors import ParameterError
from ktrdr_async.strategies.base import parameter_types

_NONE = ("none", "null")
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_INT = re.compile(r"[+-]?\d+", re.ASCII)
_BOUNDS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="), ("multiple_of", "multiple of"))
_LENGTHS = (("min_length", "at least"), ("max_length", "at most"))


class ParameterText(NamedTuple):
    """One parameter, as a listing shows it."""

    name: str
    type: str  # such as `int`, `float or none`, `weight | quantity`
    range: str  # such as `>= 1`; empty where every value of the type is good
    default: str  # as it would be typed; empty where one must be given


class _UnfitError(Exception):
    """This text is nothing of this type."""


def describe(kind: type) -> list[ParameterText]:
    """A strategy's parameters, in their order."""
    return [
        ParameterText(name, _type_text(hint), _range_text(hint), _default_text(default))
        for name, (hint, default) in parameter_types(kind).items()
    ]


def parse_parameter(kind: type, name: str, text: str) -> Any:
    """Turns what was typed for a parameter into its value, by its annotated type.

    Numbers are written as in Python without `_`; true and false also as yes, no, on, off, 1, 0; None as `none`; a
    tuple or list as `1,2,3`; other types as JSON. Without an annotation a text is taken for what it looks like.

    Raises:
        ParameterError: if there is no such parameter, or the text is nothing of its type and range.
    """
    label = kind.__dict__.get("name") or kind.__name__
    known = parameter_types(kind)
    if name not in known:
        raise ParameterError(f"{label} has no parameter {name!r}", hint=f"its parameters: {', '.join(known) or 'none'}")
    hint = known[name][0]
    try:
        value = _parsed(hint, text.strip())
        return value if hint is Any else msgspec.convert(value, hint)
    except (_UnfitError, ValueError, RecursionError):  # an int of too many digits, JSON that is nested too deep
        pass
    bounds = _range_text(hint)
    raise ParameterError(
        f"{label}: {name}={text!r} is not {_type_text(hint)}{f', {bounds}' if bounds else ''}",
    )


def _parsed(hint: Any, text: str) -> Any:
    origin = get_origin(hint)
    if origin is Annotated:
        return _parsed(get_args(hint)[0], text)
    if origin in (Union, types.UnionType):
        return _first_of(get_args(hint), text)
    if origin is Literal:
        for choice in get_args(hint):
            if text == str(choice) or (choice is None and text.lower() in _NONE):
                return choice
        raise _UnfitError
    if hint is str:
        return text
    if hint is bool:
        return _flag(text)
    if hint is int:
        if not _INT.fullmatch(text):
            raise _UnfitError
        return int(text)
    if hint is float:
        return _number(text)
    if hint is type(None):
        if text.lower() not in _NONE:
            raise _UnfitError
        return None
    if hint is Any:
        return _guessed(text)
    if origin in (tuple, list) and not text.startswith("["):
        return _items(hint, origin, text)
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text  # an enum's value, a date


def _first_of(arms: tuple[Any, ...], text: str) -> Any:
    # None and what is narrow come before str, which everything fits.
    for arm in sorted(arms, key=lambda each: (_bare(each) is str, each is not type(None), _bare(each) is float)):
        try:
            return msgspec.convert(_parsed(arm, text), arm)
        except (_UnfitError, msgspec.ValidationError):
            continue
    raise _UnfitError


def _items(hint: Any, origin: Any, text: str) -> Any:
    parts = [part.strip() for part in text.strip("()").split(",")]
    parts = parts[:-1] if parts[-1] == "" else parts
    kinds = get_args(hint)
    if origin is tuple and not (len(kinds) == 2 and kinds[1] is Ellipsis):
        if len(parts) != len(kinds):
            raise _UnfitError
        return tuple(_parsed(each, part) for each, part in zip(kinds, parts, strict=True))
    return origin(_parsed(kinds[0], part) for part in parts)


def _flag(text: str) -> bool:
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise _UnfitError


def _number(text: str) -> float:
    try:
        value = math.nan if "_" in text else float(text)
    except ValueError:
        raise _UnfitError from None
    if not math.isfinite(value):
        raise _UnfitError
    return value


def _guessed(text: str) -> Any:
    if _INT.fullmatch(text):
        return int(text)
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text.lower() in _NONE:
        return None
    try:
        return _number(text)
    except _UnfitError:
        return text


def _bare(hint: Any) -> Any:
    return _bare(get_args(hint)[0]) if get_origin(hint) is Annotated else hint


def _type_text(hint: Any) -> str:
    hint = _bare(hint)
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_text(arm) for arm in sorted(args, key=lambda arm: arm is type(None)))
    if origin is Literal:
        return " | ".join("none" if choice is None else str(choice) for choice in args)
    if hint is type(None):
        return "none"
    if hint is Any:
        return "any"
    if origin in (tuple, list):
        inner = ", ".join("..." if each is Ellipsis else _type_text(each) for each in args)
        return f"{origin.__name__}[{inner}]"
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _range_text(hint: Any) -> str:
    """The bounds of every part of a type, each once."""
    found: list[str] = []
    if get_origin(hint) is Annotated:
        for meta in get_args(hint)[1:]:
            if isinstance(meta, msgspec.Meta):
                found += [f"{sign} {getattr(meta, key)}" for key, sign in _BOUNDS if getattr(meta, key) is not None]
                lengths = [(word, getattr(meta, key)) for key, word in _LENGTHS]
                found += [f"{word} {length} long" for word, length in lengths if length is not None]
                found += [f"like {meta.pattern}"] if meta.pattern is not None else []
    if get_origin(hint) is not Literal:
        found += [text for arm in get_args(hint) if (text := _range_text(arm))]
    return ", ".join(dict.fromkeys(found))


def _default_text(default: Any) -> str:
    if default is inspect.Parameter.empty:
        return ""
    if default is None or isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, tuple | list):
        return ",".join(_default_text(each) for each in default)
    return str(default)
