"""Parameters, requests, names and ids of any kind: taken, or one error of ours; nothing else, nothing imported."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
from campaigns import Figures, sized
from fuzzing import NUMBERS, STRINGS, Tried, any_value, attempt, mutated_tree, nested

from ktrdr_async.backtesting.request import BacktestRequest
from ktrdr_async.errors import InputError, KtrdrError, ParameterError
from ktrdr_async.operations.jsonb import from_json, to_json
from ktrdr_async.operations.service import validated_id
from ktrdr_async.storage.connect import label_of
from ktrdr_async.storage.queries import validated_schema
from ktrdr_async.strategies.base import parameter_types
from ktrdr_async.strategies.registry import BUILT_IN, make, parse_parameter, resolve


def some_parameters(rng: Random) -> tuple[str, dict[str, Any]]:
    """A built-in strategy, and any value for some of its parameters and for what is none."""
    name = rng.choice(sorted(BUILT_IN))
    known = list(parameter_types(BUILT_IN[name]))
    chosen = rng.sample(known, rng.randrange(len(known) + 1))
    values = {key: any_value(rng) if rng.random() < 0.6 else rng.choice(NUMBERS) for key in chosen}
    if rng.random() < 0.05:
        values[rng.choice(("self", "cls", "args", "state", "_sealed", "__class__", *STRINGS))] = any_value(rng)
    return name, values


@sized("trials", ci=1_000, whole=12_000, minutes=5)
def test_any_value_of_any_parameter_is_taken_or_refused(trials: int, campaign_seed: int, figures: Figures) -> None:
    tried = Tried()
    for number in range(trials):
        rng = Random(f"parameters {campaign_seed} {number}")
        name, values = some_parameters(rng)
        try:
            made, error = attempt(make, name, values)
            tried.note("values", error)
            if error is None:
                assert type(made) is BUILT_IN[name]
                json.dumps(made.parameters)
            else:
                assert isinstance(error, ParameterError)
        except BaseException as failure:
            failure.add_note(f"input {number}: {name} {values!r:.600}")
            raise
    assert tried.taken > trials // 50
    figures.add("values of parameters", str(tried))


def some_text(rng: Random) -> str:
    """What a person may type for a parameter, or a program may hand over."""
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice(STRINGS)
    if kind == 1:
        return rng.choice(("9" * 5000, "-" + "9" * 5000, "1e" + "9" * 30, "[" * 100_000, '{"a":' * 2000, "1," * 3000))
    if kind == 2:
        return str(rng.randrange(-10, 500))
    if kind == 3:
        return "".join(rng.choices('0123456789.,-+eE_xXnaifTrue()[]{}" ', k=rng.randrange(12)))
    if kind == 4:
        return repr(rng.uniform(-5, 300))
    return rng.choice(
        ("true", "no", "None", "weight", "quantity", "close", "1_000", "\uff10", "²", "1;2", "(1,2)", "+5", "1.")
    )


@sized("trials", ci=800, whole=10_000, minutes=5)
def test_any_text_for_any_parameter_is_taken_or_refused(trials: int, campaign_seed: int, figures: Figures) -> None:
    tried = Tried()
    for number in range(trials):
        rng = Random(f"texts {campaign_seed} {number}")
        kind = BUILT_IN[rng.choice(sorted(BUILT_IN))]
        name = rng.choice([*parameter_types(kind), *STRINGS[:5]])
        text = some_text(rng)
        try:
            _, error = attempt(parse_parameter, kind, name, text)
            tried.note("texts", error)
            assert error is None or isinstance(error, ParameterError)
        except BaseException as failure:
            failure.add_note(f"input {number}: {kind.__name__} {name!r:.80} {text!r:.600}")
            raise
    assert tried.taken > trials // 20
    figures.add("texts of parameters", str(tried))


REQUEST = BacktestRequest(
    data="synthetic:?bars=50", symbols=("A", "B"), start="2020-01-01", end="2020-02-01", timeframe="1h", tz="UTC",
    date_format="%Y", features=("x",), strategy="sma_cross", parameters={"fast": 3, "slow": 9, "deep": {"a": [1, 2.5]}},
).to_dict()  # fmt: skip


@sized("trials", ci=1_000, whole=12_000, minutes=5)
def test_any_request_is_taken_or_refused(trials: int, campaign_seed: int, figures: Figures) -> None:
    """As values, and as the JSON that a database stores."""
    tried = Tried()
    for number in range(trials):
        rng = Random(f"request {campaign_seed} {number}")
        tree = mutated_tree(rng, REQUEST) if rng.random() < 0.95 else any_value(rng)
        try:
            made, error = attempt(BacktestRequest.from_dict, tree)
            tried.note("values", error)
            if error is None:
                text, error = attempt(to_json, made.to_dict())
                tried.note("taken ones, to be stored", error)
                if error is None:
                    assert BacktestRequest.from_dict(from_json(text)) == made
        except BaseException as failure:
            failure.add_note(f"input {number}: {tree!r:.600}")
            raise
    assert tried.taken > trials // 5
    figures.add("requests", str(tried))


NAMES = ("sma_cross", "os:system", "builtins:eval", "ktrdr_async.strategies.sma_cross:SmaCross", "antigravity:fly")


@sized("trials", ci=120, whole=5_000, minutes=5)
def test_no_name_of_a_strategy_imports_or_breaks_anything(
    trials: int, campaign_seed: int, figures: Figures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Untrusted, whatever it is spelled like; and a list of what is allowed that is itself anything."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    attempt(resolve, "first:Call")  # loads what it takes to look
    tried, before, path = Tried(), set(sys.modules), list(sys.path)
    for number in range(trials):
        rng = Random(f"name {campaign_seed} {number}")
        name = rng.choice(NAMES)
        at = rng.randrange(len(name) + 1)
        if rng.random() < 0.8:
            piece = rng.choice((*STRINGS, ":", ".", "..", "this", "antigravity", " ", "\n", "/tmp/x.py"))
            name = name[:at] + piece + name[at + rng.choice((0, 0, 1, 3)) :]
        allow = rng.choice(((), (), (rng.choice(STRINGS),), "not.this", ("os.path:system",)))
        try:
            _, error = attempt(resolve, name, allow=allow)
            tried.note("names", error)
        except BaseException as failure:
            failure.add_note(f"input {number}: {name!r:.300}, allow {allow!r:.300}")
            raise
    assert sys.path == path
    assert {
        module for module in set(sys.modules) - before if not module.startswith(("ktrdr_async", "encodings"))
    } == set()
    figures.add("names of strategies", str(tried))


DSNS = (
    "postgresql://user:Geheim77@db.example:5432/app?sslmode=require", "postgres://u:Geheim77@[::1]:1,h2:2/a",
    "postgresql:///app?host=/tmp&user=u&password=Geheim77", "postgresql://h/app", "mysql://u:Geheim77@h/x",
    "host=db user=u password=Geheim77", "postgresql://u:Ge%20heim77@h/app",
)  # fmt: skip


@sized("trials", ci=800, whole=6_000, minutes=5)
def test_a_dsn_of_any_kind_is_named_without_its_password_or_refused(
    trials: int, campaign_seed: int, figures: Figures
) -> None:
    tried = Tried()
    for number in range(trials):
        rng = Random(f"dsn {campaign_seed} {number}")
        dsn = rng.choice(DSNS)
        for _ in range(rng.choice((0, 1, 1, 2, 5))):
            at = rng.randrange(len(dsn) + 1)
            if "Geheim77" in dsn[max(0, at - 8) : at + 8]:
                continue  # the password stays whole, or it couldn't be looked for
            piece = rng.choice((*STRINGS, "@", ":", "/", "//", "?", "#", "&", "=", "%", "[", "]", ",", " "))
            dsn = dsn[:at] + piece + dsn[at + rng.choice((0, 0, 1)) :]
        try:
            label, error = attempt(label_of, dsn)
            tried.note("DSNs", error)
            assert "heim77" not in (label if error is None else f"{error} {error.hint}")
        except BaseException as failure:
            failure.add_note(f"input {number}: {dsn!r:.300}")
            raise
    assert 0 < tried.taken < trials
    figures.add("DSNs", str(tried))


@sized("trials", ci=500, whole=4_000, minutes=5)
def test_ids_and_names_of_schemas_are_plain_words(trials: int, campaign_seed: int, figures: Figures) -> None:
    tried = Tried()
    for number in range(trials):
        rng = Random(f"id {campaign_seed} {number}")
        value = any_value(rng) if rng.random() < 0.4 else "".join(rng.choices("aB3_.- /\n\0é'\"", k=rng.randrange(140)))
        for kind, check in (("ids", validated_id), ("schemas", validated_schema)):
            if kind == "schemas" and not isinstance(value, str):
                continue
            _, error = attempt(check, value)
            tried.note(kind, error)
            assert error is None or isinstance(error, InputError)
            assert error is not None or (value.isascii() and value.isprintable() and not set(value) & set("/ '\""))
    figures.add("ids and schemas", str(tried))


@sized("trials", ci=800, whole=6_000, minutes=5)
def test_json_of_any_kind_is_read_whole_or_refused(trials: int, campaign_seed: int, figures: Figures) -> None:
    """`from_json` promises ValueError and nothing else: that is what its callers turn into errors of ours."""
    tried = Tried()
    for number in range(trials):
        rng = Random(f"json {campaign_seed} {number}")
        text = json.dumps(any_value(rng))
        if rng.random() < 0.6:
            at = rng.randrange(len(text) + 1)
            text = (
                text[:at] + rng.choice((*STRINGS, "[" * 5000, '{"$float":', "1" * 5000)) + text[at + rng.randrange(3) :]
            )
        try:
            _, error = attempt(read, text)
            tried.note("JSON", error)
        except BaseException as failure:
            failure.add_note(f"input {number}: {text!r:.300}")
            raise
    for deep in (66, 1_000, 100_000):
        with pytest.raises(ValueError, match="deeper"):
            from_json("[" * deep + "]" * deep)
    assert tried.taken > trials // 20
    assert from_json(to_json({"a": nested(Random(1), 60)}))
    figures.add("JSON texts", str(tried))


def read(text: str) -> Any:
    try:
        return from_json(text)
    except ValueError as error:
        raise KtrdrError(str(error)) from error
