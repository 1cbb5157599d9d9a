"""A strategy's state: what may be in it, how it becomes bytes and comes back equal, and the search for state elsewhere.

Bytes are msgpack of the struct's fields; numpy arrays go as tagged bytes (dtype, shape, content), checked before
anything is
allocated. Nothing is ever unpickled.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import fractions
import inspect
import logging
import math
import pathlib
import re
import types
import uuid
from typing import Any, get_origin

import msgspec
import numpy as np

from ktrdr_async.errors import StrategyError, UndeclaredStateError
from ktrdr_async.strategies.base import OWN_ATTRIBUTES, AsyncStrategy, Strategy, StrategyBase, WeightStrategy

_ARRAY = 1  # code of the msgpack extension that holds an array
_DTYPE_KINDS = "biufcMSU"
MAX_STATE_BYTES = 64 * 1024 * 1024


class _Array(msgspec.Struct, array_like=True, frozen=True):
    """What the extension holds."""

    dtype: str
    shape: list[int]
    writeable: bool
    content: bytes
    axes: list[int] | None = None  # from the slowest to the fastest in `content`; None: as they are, C order


def _encode_array(value: Any) -> msgspec.msgpack.Ext:
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in _DTYPE_KINDS or value.dtype.names is not None:
            raise UndeclaredStateError(f"an array of dtype {value.dtype} can't be saved; kinds {_DTYPE_KINDS} can")
        header = (value.dtype.str, list(value.shape), bool(value.flags.writeable))
        if value.flags.c_contiguous:
            return msgspec.msgpack.Ext(_ARRAY, msgspec.msgpack.encode((*header, value.tobytes())))
        # The layout is kept: `mean(axis=0)`, for one, adds in another order in another layout.
        sides = [-stride if side > 1 else -math.inf for side, stride in zip(value.shape, value.strides, strict=True)]
        axes = sorted(range(value.ndim), key=sides.__getitem__)  # the stride of a side of 1 means nothing
        content = value.transpose(axes)
        if not content.flags.c_contiguous:
            raise UndeclaredStateError(
                f"an array of shape {value.shape} and strides {value.strides} is a view with gaps, which wouldn't come"
                " back as one",
                hint="store np.ascontiguousarray(...) instead",
            )
        return msgspec.msgpack.Ext(_ARRAY, msgspec.msgpack.encode((*header, content.tobytes(), axes)))
    if isinstance(value, np.generic):
        plain = {"f": "float", "i": "int", "u": "int", "b": "bool"}.get(value.dtype.kind, "item")
        raise UndeclaredStateError(
            f"the value {value!r} is a numpy scalar ({type(value).__name__}), which doesn't come back as one",
            hint=f"store {plain}(...) instead",
        )
    raise UndeclaredStateError(f"a {type(value).__name__} can't be saved", hint="keep plain values, structs and arrays")


def _decode_array(code: int, data: memoryview) -> Any:
    if code != _ARRAY:
        raise msgspec.ValidationError(f"unknown extension {code}")
    header = msgspec.msgpack.decode(data, type=_Array)
    dtype_text, shape, content = header.dtype, header.shape, header.content
    if not re.fullmatch(r"[<>|=][a-zA-Z]\d*(\[\d*[a-zA-Z]+\])?", dtype_text):
        raise msgspec.ValidationError(f"array dtype {dtype_text!r} isn't permitted")
    try:
        dtype = np.dtype(dtype_text)
    except TypeError as error:
        raise msgspec.ValidationError(f"array dtype {dtype_text!r} is none: {error}") from None
    if dtype.kind not in _DTYPE_KINDS or len(shape) > 32 or any(side < 0 for side in shape):
        raise msgspec.ValidationError(f"array of dtype {dtype_text!r} and shape {shape} isn't permitted")
    size = dtype.itemsize
    for side in shape:
        size *= side
    if size != len(content):
        raise msgspec.ValidationError(f"array of shape {shape} needs {size} bytes and has {len(content)}")
    axes = list(range(len(shape))) if header.axes is None else header.axes
    if sorted(axes) != list(range(len(shape))):
        raise msgspec.ValidationError(f"array of shape {shape} and axes {axes} isn't permitted")
    stored = np.frombuffer(content, dtype).reshape([shape[axis] for axis in axes])
    values = stored.transpose(sorted(axes, key=axes.__getitem__))
    return values.copy(order="K") if header.writeable else values


def _as_array(kind: type, value: Any) -> Any:
    # Fields annotated NDArray[...] arrive here with the array that the extension hook already made.
    if isinstance(value, np.ndarray) and (get_origin(kind) or kind) is np.ndarray:
        return value
    raise msgspec.ValidationError(f"expected {kind}, got {type(value).__name__}")


_encoder = msgspec.msgpack.Encoder(enc_hook=_encode_array)


def encode_state(state: msgspec.Struct | None) -> bytes | None:
    """The state as bytes. :raises UndeclaredStateError: if it holds what can't come back equal."""
    if state is None:
        return None
    try:
        return _encoder.encode(state)
    except UndeclaredStateError as error:
        raise UndeclaredStateError(
            f"{type(state).__name__}: {_path_of(state)}{error.message}", hint=error.hint
        ) from None
    except (TypeError, OverflowError, ValueError) as error:
        raise UndeclaredStateError(f"{type(state).__name__} can't be saved: {error}") from error


def decode_state(data: bytes | None, kind: type | None) -> Any:
    """The state that `encode_state` made. :raises msgspec.ValidationError: if the bytes aren't one of this type."""
    if data is None or kind is None:
        if data is not None or kind is not None:
            raise msgspec.ValidationError("the checkpoint and the strategy disagree on whether there is a state")
        return None
    if len(data) > MAX_STATE_BYTES:
        raise msgspec.ValidationError(f"the state has {len(data)} bytes, more than {MAX_STATE_BYTES}")
    try:
        return msgspec.msgpack.decode(data, type=kind, ext_hook=_decode_array, dec_hook=_as_array)
    except RecursionError:
        raise msgspec.ValidationError("the state is nested too deep") from None


def check_state(state: msgspec.Struct | None) -> bytes | None:
    """The state's bytes, after proving that they come back as the same bytes.

    Raises:
        UndeclaredStateError: if a field would come back as another value or type, an int in a float's field for
            example.
    """
    data = encode_state(state)
    if data is None or state is None:
        return None
    if len(data) > MAX_STATE_BYTES:
        raise UndeclaredStateError(f"{type(state).__name__} has {len(data)} bytes, more than {MAX_STATE_BYTES}")
    try:
        again = decode_state(data, type(state))
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise UndeclaredStateError(f"{type(state).__name__} doesn't come back from its bytes: {error}") from error
    for name in type(state).__struct_fields__:
        before, after = getattr(state, name), getattr(again, name)
        if not _same(before, after):
            kinds = f" (a {type(before).__name__} and a {type(after).__name__})" if repr(before) == repr(after) else ""
            raise UndeclaredStateError(
                f"{type(state).__name__}.{name} holds {before!r} and would come back as {after!r}{kinds}",
                hint="give the field the type that its values have",
            )
    seen: set[int] = set()
    for name in type(state).__struct_fields__:
        if _reaches_twice(getattr(state, name), seen):
            raise UndeclaredStateError(
                f"{type(state).__name__}.{name} holds an object that the state holds elsewhere too; it would come "
                "back as two",
                hint="copy it",
            )
    return data


def _reaches_twice(value: Any, seen: set[int]) -> bool:
    """Whether something that can change is reached that `seen` has already; adds what is reached."""
    if isinstance(value, list | dict | set | bytearray | np.ndarray) or (
        isinstance(value, msgspec.Struct) and not value.__struct_config__.frozen
    ):
        whole: Any = value
        while isinstance(whole, np.ndarray) and whole.base is not None:  # a view: what counts is whose memory it is
            whole = whole.base
        if id(whole) in seen:
            return True
        seen.add(id(whole))
    if isinstance(value, dict):
        return any(_reaches_twice(each, seen) for each in value.values())
    if isinstance(value, list | tuple):
        return any(_reaches_twice(each, seen) for each in value)
    if isinstance(value, msgspec.Struct):
        return any(_reaches_twice(getattr(value, name), seen) for name in value.__struct_fields__)
    return False


def _same(a: Any, b: Any) -> bool:
    """Whether two values are alike in type, order and every bit, all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return (a == b and math.copysign(1.0, a) == math.copysign(1.0, b)) or (a != a and b != b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return len(a) == len(b) and all(map(_same, a, b)) and all(map(_same, a.values(), b.values()))
    if isinstance(a, msgspec.Struct):
        return all(_same(getattr(a, name), getattr(b, name)) for name in a.__struct_fields__)
    if isinstance(a, np.ndarray):
        alike = (a.dtype, a.shape, a.flags.writeable) == (b.dtype, b.shape, b.flags.writeable)
        return alike and a.flags.c_contiguous == b.flags.c_contiguous and a.tobytes() == b.tobytes()
    return bool(a == b)


def _path_of(state: msgspec.Struct) -> str:
    for name in type(state).__struct_fields__:
        try:
            _encoder.encode(getattr(state, name))
        except UndeclaredStateError:
            return f"field {name}: "
    return ""


_PLAIN = (
    type(None), bool, int, float, complex, str, bytes, decimal.Decimal, fractions.Fraction, datetime.date,
    datetime.time,
    datetime.timedelta, datetime.tzinfo, enum.Enum, uuid.UUID, pathlib.PurePath, re.Pattern, range, np.generic,
    np.dtype,
    type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType, logging.Logger,
)  # fmt: skip


def _is_constant(value: Any) -> bool:
    if isinstance(value, _PLAIN):
        return True
    if isinstance(value, tuple | frozenset):
        return all(_is_constant(item) for item in value)
    if isinstance(value, np.ndarray):
        return not value.flags.writeable
    if isinstance(value, types.MappingProxyType):
        return all(_is_constant(item) for item in value.values())
    if isinstance(value, msgspec.Struct):
        return type(value).__struct_config__.frozen and all(
            _is_constant(getattr(value, name)) for name in type(value).__struct_fields__
        )
    parameters = getattr(type(value), "__dataclass_params__", None)
    if parameters is not None and parameters.frozen:
        return all(_is_constant(item) for item in vars(value).values())
    return type(value).__module__ == "pandas._libs.tslibs.timestamps"


def check_declared(strategy: StrategyBase) -> None:
    """Refuses a strategy that could change outside its `state`.

    Raises:
        UndeclaredStateError: if an attribute of the object or of its class could change, and isn't named in
            `resources`.
    """
    _check_methods(strategy)
    name_of = type(strategy).__name__
    bases = (StrategyBase, WeightStrategy, Strategy, AsyncStrategy, object)
    found: dict[str, Any] = {}
    for cls in type(strategy).__mro__:
        if cls in bases:
            continue
        for name in getattr(cls, "__slots__", ()):
            if hasattr(strategy, name):
                found.setdefault(name, getattr(strategy, name))
        for name, value in vars(cls).items():
            if not (name.startswith("__") or name == "_abc_impl" or callable(value) or hasattr(type(value), "__get__")):
                found.setdefault(name, value)
    found.update(vars(strategy))
    for name, value in found.items():
        if name in OWN_ATTRIBUTES or name in strategy.resources or _is_constant(value):
            continue
        raise UndeclaredStateError(
            f"{name_of}.{name} is a {type(value).__name__}, which can change unseen by a checkpoint",
            hint="keep what changes in `state` (a msgspec.Struct), make constants tuples or read-only arrays, "
            "and name models in `resources`",
        )
    if strategy.state is not None:
        if not isinstance(strategy.state, msgspec.Struct):
            raise UndeclaredStateError(
                f"{name_of}.state is a {type(strategy.state).__name__}", hint="`state` is a msgspec.Struct"
            )
        _refuse_sets(type(strategy.state))


def _check_methods(strategy: StrategyBase) -> None:
    """Refuses methods of the other kind: a coroutine that nobody awaits would do nothing, and say nothing."""
    kind = type(strategy)
    if not isinstance(strategy.warmup, int) or strategy.warmup < 0:
        raise StrategyError(f"{kind.__name__}.warmup is {strategy.warmup!r}; it must be an int of 0 or more")
    names = ("prepare", "on_bar", "on_fill", "on_trade", "on_end", "target_weights", "target_quantities")
    waits = isinstance(strategy, AsyncStrategy)
    for name in names:
        method = getattr(kind, name, None)
        if method is None or (inspect.iscoroutinefunction(method) is waits and not _generates(method)):
            continue
        is_, wanted = ("a coroutine", "AsyncStrategy") if not waits else ("no coroutine", "Strategy")
        if _generates(method):
            raise StrategyError(
                f"{kind.__name__}.{name} is a generator, which would do nothing", hint="don't yield in it"
            )
        raise StrategyError(f"{kind.__name__}.{name} is {is_}", hint=f"derive from kt.{wanted}")


def _generates(method: Any) -> bool:
    return inspect.isgeneratorfunction(method) or inspect.isasyncgenfunction(method)


def _refuse_sets(kind: type) -> None:
    # A set's order depends on its history and the process's hash seed; a dict keeps its order in the bytes.
    seen: set[int] = set()
    waiting: list[Any] = [msgspec.inspect.type_info(kind)]
    while waiting:
        info = waiting.pop()
        if isinstance(info, msgspec.inspect.SetType | msgspec.inspect.FrozenSetType):
            raise UndeclaredStateError(
                f"{kind.__name__} holds a set, whose order isn't the same in another process",
                hint="use a dict or a sorted list",
            )
        if id(info) in seen or not isinstance(info, msgspec.Struct):
            continue
        seen.add(id(info))
        for name in type(info).__struct_fields__:
            value = getattr(info, name)
            waiting.extend(value if isinstance(value, tuple) else [value])
