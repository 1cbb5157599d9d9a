"""Plain trees through JSONB: exact, canonical, bounded."""

from __future__ import annotations

import json
import math
import random
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktrdr_async.errors import InputError
from ktrdr_async.operations import jsonb
from ktrdr_async.operations.jsonb import canonical, from_json, to_json
from ktrdr_async.storage.database import Database

texts = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x00"), max_size=8)
leaves = st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | texts
trees = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=12
)


def exact(value: Any) -> Any:
    if isinstance(value, float):
        return ("nan",) if math.isnan(value) else struct.pack("<d", value)
    if isinstance(value, list):
        return [exact(item) for item in value]
    if isinstance(value, dict):
        return {key: exact(item) for key, item in value.items()}
    return (type(value).__name__, value)


@given(trees)
def test_json_gives_every_tree_back(tree: Any) -> None:
    assert exact(from_json(to_json(tree))) == exact(tree)


@given(trees)
def test_canonical_is_the_same_after_a_round_trip(tree: Any) -> None:
    assert canonical(from_json(to_json(tree))) == canonical(tree)


@pytest.mark.anyio
async def test_jsonb_gives_every_tree_back(database: Database) -> None:
    generator = random.Random(3)
    numbers = [struct.unpack("<d", generator.randbytes(8))[0] for _ in range(3_000)]
    numbers += [
        0.0,
        -0.0,
        1e15,
        1e16,
        1e17,
        1e22,
        1e300,
        5e-324,
        0.1,
        math.inf,
        -math.inf,
        1.0,
        100.0,
        9007199254740993.0,
    ]
    tree = {
        "numbers": numbers,
        "whole": [0, 1, -1, 2**63, 10**40],
        "b": {"z": None, "a": [True, False, "\u20ac\\u0000"]},
    }
    async with database.connection() as connection:
        text = await connection.fetchval("SELECT ($1::text::jsonb)::text", to_json(tree))
    assert exact(from_json(text)) == exact(tree)
    assert canonical(from_json(text)) == canonical(tree)


def test_canonical_sees_meaning_and_not_spelling() -> None:
    base = {"fast": 10, "costs": [0.001, 1e16], "x": {"a": 1, "b": None}}
    assert canonical(base) == canonical({"x": {"b": None, "a": 1.0}, "costs": (1e-3, 10**16), "fast": 10.0})
    different = [
        base | {"fast": 11}, base | {"fast": True}, base | {"fast": "10"},
        base | {"costs": [1e16, 0.001]}, base | {"y": None},
        base | {"fast": 10.000000000000002}, base | {"fast": None}, base | {"fast": [10]},
    ]  # fmt: skip
    texts = {canonical(value) for value in [base, *different]}
    assert len(texts) == len(different) + 1
    assert canonical({"seed": 2**63 - 1}) != canonical({"seed": 2**63 - 2})
    assert canonical(["number", "1e0"]) != canonical(1)


def test_numpys_numbers_become_pythons() -> None:
    text = to_json({"a": np.float64(1.5), "b": np.int64(3), "c": np.float32(0.5), "d": np.float64("nan")})
    assert json.loads(text) == {"a": 1.5, "b": 3, "c": 0.5, "d": {"$float": "nan"}}


@pytest.mark.parametrize(
    ("tree", "what"),
    [
        ({"a": object()}, "a is of type object"),
        ({"a": [{"b": {1, 2}}]}, r"a\[0\].b is of type set"),
        ({1: 2}, "has a key 1"),
        ({"$float": "1"}, "reserved"),
        ({"a": "\x00"}, "NUL"),
        ({"\x00": 1}, "NUL"),
        ({"a": "\ud800"}, "surrogate"),
    ],
)
def test_what_cant_be_stored_is_refused_with_its_place(tree: Any, what: str) -> None:
    with pytest.raises(InputError, match=what):
        to_json(tree)


def test_messages_are_repaired() -> None:
    assert json.loads(to_json({"\x00": ["a\x00\ud800"]}, repair=True)) == {"\ufffd": ["a\ufffd\ufffd"]}


def test_size_and_depth_are_bounded_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    deep: Any = 1
    for _ in range(65):
        deep = [deep]
    with pytest.raises(InputError, match="deeper"):
        to_json(deep)
    for text in ("[" * 66 + "]" * 66, "[" * 100_000):
        with pytest.raises(ValueError, match="deeper"):
            from_json(text)
    with pytest.raises(ValueError, match="no JSON"):
        from_json("{")
    monkeypatch.setattr(jsonb, "MAX_BYTES", 10)
    with pytest.raises(jsonb.ValueTooLargeError, match="13 bytes"):
        to_json("a" * 11)
    with pytest.raises(ValueError, match="13 bytes"):
        from_json('"' + "a" * 11 + '"')
