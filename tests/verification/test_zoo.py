"""`verify` finds each fault in the zoo: the kind, the first bar, and what differs there."""

from __future__ import annotations

import re

import pytest
import zoo
from verification_runs import EURUSD

import ktrdr_async as kt
from ktrdr_async.strategies.base import AnyStrategy
from ktrdr_async.verification.certificate import Difference

pytestmark = pytest.mark.anyio

BARS = EURUSD.head(1_000)


async def found(kind: type[AnyStrategy], **options: object) -> Difference:
    """The difference that a strategy is convicted with."""
    certificate = await kt.verify(BARS, kind, **options)  # type: ignore[arg-type]
    assert not certificate
    assert not certificate.ok
    assert certificate.difference is not None
    return certificate.difference


def after(difference: Difference) -> int:
    match = re.match(r"the bars after ([\d,]+) ", difference.trial)
    assert match, difference
    return int(match[1].replace(",", ""))


def resumed_from(difference: Difference) -> int:
    match = re.search(r"resumed from bar ([\d,]+) by", difference.trial)
    assert match, difference
    return int(match[1].replace(",", ""))


QUICK = {"kills": 0, "hash_seeds": 0, "interruptions": 0}


@pytest.mark.parametrize("kind", [zoo.CentredMean, zoo.CentredMeanAsync])
async def test_a_centred_mean_in_prepare(kind: type[AnyStrategy]) -> None:
    difference = await found(kind, **QUICK)
    assert difference.kind == "look_ahead"
    assert difference.exact
    assert difference.bar == after(difference) - zoo.HALF + 1
    assert [field.name for field in difference.fields] == ["smooth"]
    assert "`prepare`" in difference.reason


@pytest.mark.parametrize(
    ("kind", "method"), [(zoo.NextReturn, "target_weights"), (zoo.NextQuantity, "target_quantities")]
)
async def test_shifted_targets(kind: type[AnyStrategy], method: str) -> None:
    difference = await found(kind, **QUICK)
    assert (difference.kind, difference.exact) == ("look_ahead", True)
    assert difference.bar == after(difference)
    assert [field.name for field in difference.fields] == [f"{method}[EURUSD]"]
    values = {difference.fields[0].reference, difference.fields[0].found}
    assert values == ({"0.5", "-0.5"} if method == "target_weights" else {"100.0", "-100.0"})
    assert f"`{method}`" in difference.reason


async def test_a_mean_of_the_whole_history() -> None:
    difference = await found(zoo.Normalised, **QUICK)
    assert (difference.kind, difference.bar) == ("look_ahead", 0)
    assert "mean or scale of the whole history" in difference.hint


async def test_the_array_behind_the_past() -> None:
    difference = await found(zoo.PastBase, **QUICK)
    assert (difference.kind, difference.exact) == ("look_ahead", True)
    assert difference.bar == after(difference)
    assert difference.bar % 3 == 0
    assert "EURUSD.waiting.lots" in {field.name for field in difference.fields}
    assert "`on_bar`" in difference.reason


async def test_a_strategy_that_breaks_without_a_next_bar() -> None:
    difference = await found(zoo.OwnBars, **QUICK)
    assert difference.kind == "look_ahead"
    assert difference.trial.endswith("cut off")
    assert difference.bar == after(difference)
    assert difference.fields[0].found.startswith("IndexError: index")


@pytest.mark.parametrize("kind", [zoo.ModuleGlobal, zoo.Closure, zoo.ClassAttribute])
async def test_what_outlives_a_run(kind: type[AnyStrategy]) -> None:
    difference = await found(kind)
    assert (difference.kind, difference.bar, difference.exact) == ("hidden_state", zoo.AT, True)
    assert difference.trial == "again, a new object"
    fields = {field.name: (field.reference, field.found) for field in difference.fields}
    assert fields["EURUSD.waiting.tag"] == ("hidden", "none")
    assert fields["bars_with_orders"] == ("1", "0")
    assert "global of a module" in difference.reason


async def test_what_the_object_keeps() -> None:
    difference = await found(zoo.Resource)
    assert (difference.kind, difference.bar, difference.exact) == ("hidden_state", zoo.AT, True)
    assert difference.trial == "again, the same object"
    assert "`cache`" in difference.reason


async def test_what_only_a_resume_loses() -> None:
    difference = await found(zoo.NestedResource, hash_seeds=0)
    first = resumed_from(difference)
    bars = range(first + 1, len(BARS))
    expected = next(i for i in bars if (i + 1) % zoo.EVERY == 0 or (i - first) % zoo.EVERY == 0)
    assert (difference.kind, difference.bar, difference.exact) == ("lost_on_resume", expected, True)
    assert "`inner`" in difference.reason


async def test_what_only_a_kill_loses() -> None:
    difference = await found(zoo.NestedResource, hash_seeds=0, interruptions=0)
    first = resumed_from(difference)
    bars = range(first + 1, len(BARS))
    expected = next(i for i in bars if (i + 1) % zoo.EVERY == 0 or (i - first) % zoo.EVERY == 0)
    assert (difference.kind, difference.bar, difference.exact) == ("lost_on_resume", expected, True)
    assert difference.trial.startswith("kill -9 in bar ")


async def test_a_cache_that_is_missing_after_a_resume() -> None:
    difference = await found(zoo.Memo, hash_seeds=0, kills=0)
    assert (difference.kind, difference.bar) == ("lost_on_resume", resumed_from(difference) + 1)
    assert difference.fields[0].name == "error"
    assert difference.fields[0].found == f"KeyError: {resumed_from(difference)}"


async def test_an_attribute_that_is_set_while_running() -> None:
    difference = await found(zoo.Attribute)
    assert (difference.kind, difference.bar, difference.trial) == ("undeclared_state", zoo.AT, "uninterrupted")
    assert "Attribute.last was set" in difference.reason
    with pytest.raises(kt.UndeclaredStateError, match=r"Static\.cache is a list"):
        await kt.verify(BARS, zoo.Static)


@pytest.mark.parametrize("kind", [zoo.Unseeded, zoo.Clock])
async def test_chance_and_the_clock(kind: type[AnyStrategy]) -> None:
    difference = await found(kind)
    assert (difference.kind, difference.bar, difference.exact) == ("nondeterministic", zoo.AT, True)
    assert {field.name for field in difference.fields} == {"EURUSD.waiting.lots"}
    assert "bar.rng" in difference.hint


async def test_chance_in_prepare_that_decides_nothing() -> None:
    difference = await found(zoo.UnseededFeature)
    assert (difference.kind, difference.bar) == ("nondeterministic", zoo.AT)
    assert [field.name for field in difference.fields] == ["noise"]


async def test_chance_after_the_last_boundary() -> None:
    difference = await found(zoo.LastWords)
    assert (difference.kind, difference.bar) == ("nondeterministic", len(BARS) - 1)
    assert difference.fields[0].name == "recorded[0][2]"


async def test_the_order_of_a_set() -> None:
    difference = await found(zoo.HashOrder)
    assert (difference.kind, difference.bar, difference.exact) == ("hash_order", zoo.AT, True)
    assert "PYTHONHASHSEED=" in difference.trial
    assert [field.name for field in difference.fields] == ["EURUSD.waiting.tag"]


async def test_what_is_of_the_process() -> None:
    difference = await found(zoo.ProcessId)
    assert (difference.kind, difference.bar, difference.exact) == ("process", zoo.AT, True)
    assert [field.name for field in difference.fields] == ["recorded.pid"]


async def test_a_class_that_no_other_process_can_import_is_told_from_nothing_but_this_one() -> None:
    class Local(zoo.Unseeded):
        pass

    difference = await found(Local)
    assert difference.kind == "hidden_state_or_nondeterministic"
    assert "in a module" in difference.hint
