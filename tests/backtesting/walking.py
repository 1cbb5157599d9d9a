"""Walks everything that can be reached from an engine, so that no state hides."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from types import FunctionType, MethodType
from typing import Any

import msgspec
import numpy as np

import ktrdr_async as kt
from ktrdr_async.backtesting.ledger import Ledger

# What is reachable and not compared as it stands, and why that is no state.
DERIVED = {
    "engine.resumed_from": "says that it was resumed",
    "engine.accepted": "what was accepted of the checkpoint's differences; nothing here",
    "engine.strategy._running": "that it is in a run, which `run()` sets",
    "engine.strategy._bar": "the engine's own bar, which is walked there",
    "engine._window": "which rows are cached as floats; follows from the bar that is computed next",
    "engine._portfolio.quiet_until": "how far a look into the bars ahead found that lots and cash stay what they are",
    "engine._portfolio.lots": "the book's lots, which are compared, as of that look",
    "engine._portfolio._window": "which rows the account has cached as floats",
    "engine._portfolio._opens": "cached rows of the bars",
    "engine._portfolio._closes": "cached rows of the bars",
    "engine._portfolio._piece_equity": "room for the equity of one piece",
    "engine._portfolio._decisions": "cached rows of known targets; what was said at bars is compared as `queued`",
    "engine._bar._start": "where the cached rows begin; index = _start + _i is compared",
    "engine._bar._stop": "where the cached rows end",
    "engine._bar._i": "index = _start + _i is compared",
    "engine._bar._open": "cached rows of the bars",
    "engine._bar._high": "cached rows of the bars",
    "engine._bar._low": "cached rows of the bars",
    "engine._bar._close": "cached rows of the bars",
    "engine._bar._volume": "cached rows of the bars",
    "engine._bar._feature_rows": "cached rows of the features",
    "engine._bar._texts": "texts that were found good; one that isn't there is looked at again",
    "engine._bar._rng": "keyed by (seed, bar), made when a bar asks",
    "engine._portfolio._fills": "room for the fills of one piece, taken out before a boundary",
    "engine._portfolio._room_bars": "how much room there is left",
    "engine._portfolio.tags": "numbers of tags in the order of their first use; compared as the tags they stand for",
    "engine._portfolio._tag_numbers": "the same table the other way round",
    "engine._portfolio.book.waiting_tag": "numbers of tags; compared as the tags they stand for",
    "engine._boundary.book.waiting_tag": "numbers of tags; compared as the tags they stand for",
}  # fmt: skip
INPUTS = (kt.Bars, kt.BacktestRequest, type)  # immutable, or code
CONTAINERS = (Mapping, msgspec.Struct, list, tuple, Ledger)


def walk(root: Any) -> dict[str, Any]:
    """Every value that can be reached from an object, by its path; floats as bits, arrays as bytes.

    What it can't see into (a set, a generator, a closure) is an error: state could hide there.
    """
    found: dict[str, Any] = {}
    paths: dict[int, str] = {}
    keep: list[Any] = []  # so that no id is used twice

    def visit(path: str, value: Any) -> None:
        if path in DERIVED or isinstance(value, INPUTS):
            return
        if isinstance(value, bool | int | str | bytes | None):
            found[path] = value
        elif isinstance(value, float):
            found[path] = struct.pack("<d", value)
        elif isinstance(value, np.ndarray):
            found[path] = (value.dtype.str, value.shape, value.tobytes())
        elif hasattr(value, "hexdigest"):
            found[path] = value.hexdigest()
        elif id(value) in paths:
            found[path] = f"-> {paths[id(value)]}"
        else:
            paths[id(value)] = path
            keep.append(value)
            assert is_open(value), f"{path}: who knows what is in a {type(value).__name__}"
            for name, child in children(value):
                visit(f"{path}{name}", child)

    visit("engine", root)
    return found


def is_open(value: Any) -> bool:
    """Whether all that an object holds can be seen."""
    own = hasattr(value, "__dict__") or any("__slots__" in vars(cls) for cls in type(value).__mro__)
    return own or isinstance(value, (*CONTAINERS, MethodType))


def children(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [("#", len(value)), *((f"[{key!r}]", child) for key, child in value.items())]
    if isinstance(value, msgspec.Struct):
        return [(f".{name}", getattr(value, name)) for name in value.__struct_fields__]
    if hasattr(value, "_asdict"):
        return [(f".{name}", child) for name, child in value._asdict().items()]
    if isinstance(value, list | tuple | Ledger):
        return [("#", len(value)), *((f"[{i}]", child) for i, child in enumerate(value))]
    if isinstance(value, MethodType):
        return [(".__func__", value.__func__), (".__self__", value.__self__)]
    if isinstance(value, FunctionType):
        return [
            (".code", value.__qualname__),
            *((f".{n}", cell.cell_contents) for n, cell in enumerate(value.__closure__ or ())),
        ]
    names = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ())]
    names += list(getattr(value, "__dict__", {}))
    return [(f".{name}", getattr(value, name)) for name in names if hasattr(value, name)]


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return sorted(path for path in one.keys() | other.keys() if one.get(path, ...) != other.get(path, ...))
