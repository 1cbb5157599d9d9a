"""X2: every piece of mutable state is in the checkpoint. The live objects are walked, not a list that someone keeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import msgspec
import pytest
from engine_runs import cancel_at, checkpoint, finish, hourly
from living import Busy, BusyAsync, Crossing
from walking import DERIVED, differences, walk

import ktrdr_async as kt
from ktrdr_async.backtesting import checkpoint_builder
from ktrdr_async.backtesting import execution as ex
from ktrdr_async.backtesting.checkpoint_builder import Since
from ktrdr_async.backtesting.ledger import trades_of
from ktrdr_async.errors import KtrdrError
from ktrdr_async.strategies.base import AnyStrategy

pytestmark = pytest.mark.anyio

BARS = hourly(900)
REQUEST = kt.BacktestRequest(initial_capital=30_000.0, seed=5)
KINDS = (Busy, BusyAsync, Crossing)


def seen(engine: kt.BacktestingEngine) -> dict[str, Any]:
    """All of an engine that stands at a boundary, what it computes by need included."""
    portfolio = engine.portfolio
    portfolio.trades()
    extra = {
        "state_digest": portfolio.state_digest(engine.boundary),
        "decisions": engine.decided.digest(engine.boundary.bar_index),
        "tags": [None if t < 0 else portfolio.tags[t] for t in portfolio.book.waiting_tag],
        "boundary tags": [None if t < 0 else portfolio.tags[t] for t in engine.boundary.book.waiting_tag],
        "queued": portfolio._decisions.said if portfolio._targets is None else None,
        "index": None if engine._bar is None else engine._bar.index,
    }
    return walk(engine) | extra


async def stop_at(engine: kt.BacktestingEngine, bar: int, state: kt.BacktestCheckpointState | None = None) -> Any:
    """What is seen of an engine at the boundary of a bar, while its generator stands there."""
    async with aclosing(engine.run(state)) as blocks:
        async for block in blocks:
            if block.bar_index == bar:
                return seen(engine)
    raise AssertionError(f"no boundary at bar {bar}")


def engine_of(strategy: AnyStrategy) -> kt.BacktestingEngine:
    return kt.BacktestingEngine(REQUEST, BARS, strategy, block_bars=11)


async def restored_from(kind: type[AnyStrategy], state: kt.BacktestCheckpointState) -> kt.BacktestingEngine:
    """An engine right after the restore, before a bar is computed."""
    restored = engine_of(kind())
    restored._started = True
    await restored._prepare()
    assert await restored._restore(state) == state.bar_index + 1
    return restored


@pytest.mark.parametrize("kind", KINDS)
async def test_at_each_yield_a_restored_engine_is_the_live_one(kind: type[AnyStrategy]) -> None:
    live, yields = engine_of(kind()), 0
    async with aclosing(live.run()) as blocks:
        async for block in blocks:
            restored = await restored_from(kind, checkpoint(live))
            unmoved = [path for path in differences(seen(live), seen(restored)) if path != "index"]
            assert unmoved == [], f"bar {block.bar_index}"
            yields += 1
    assert yields == -(-len(BARS) // 11)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_resumed_engine_stays_the_live_one(kind: type[AnyStrategy]) -> None:
    """At every later boundary, up to the closing step."""
    for bar in (54, 252, 483, 714):
        live = engine_of(kind())
        await stop_at(live, bar)
        state = checkpoint(live)
        for later in range(bar + 66, 890, 132):
            expected = await stop_at(engine_of(kind()), later)
            assert differences(expected, await stop_at(engine_of(kind()), later, state)) == []
        done, again = engine_of(kind()), engine_of(kind())
        await finish(done, audited=False)
        await finish(again, state, audited=False)
        assert differences(seen(done), seen(again)) == []


async def test_the_walk_reaches_what_moves() -> None:
    """Between two boundaries these change; a walk that misses one of them would prove nothing."""
    early, late = await stop_at(engine_of(Busy()), 252), await stop_at(engine_of(Busy()), 318)
    moved = differences(early, late)
    for path in (
        "engine._portfolio.book.money[0]", "engine._portfolio.book.mark[0]", "engine._portfolio.book.tally[3]",
        "engine._portfolio.book.lots[0]", "engine._portfolio._ledger#", "engine._portfolio.recorded#",
        "engine._portfolio._trades.open[0].flow", "engine._portfolio._ledger_digest._hash",
        "engine._portfolio._recorded_hash", "engine._portfolio._followed", "engine._equity",
        "engine.strategy.state.mean", "engine.strategy.state.ring", "engine.strategy.state.recent[0]",
        "engine.strategy.state.counts['A']", "engine.strategy.state.last.bar", "engine._boundary.strategy_state",
        "engine._boundary.bar_index", "state_digest", "index",
    ):  # fmt: skip
        assert path in moved, path


async def test_what_is_called_derived_exists() -> None:
    reached = set()
    for kind in KINDS:
        engine = engine_of(kind())
        await finish(engine, audited=False)
        for path in DERIVED:
            value: Any = engine
            try:
                for name in path.split(".")[1:]:
                    value = getattr(value, name)
            except AttributeError:
                continue
            reached.add(path)
    assert reached == set(DERIVED)


Change = Callable[[ex.Book], None]
HIDDEN: dict[str, Change] = {
    "cash": lambda book: book.money.__setitem__(ex.CASH, book.money[ex.CASH] + 1e-9),
    "equity": lambda book: book.money.__setitem__(ex.EQUITY, book.money[ex.EQUITY] + 1e-9),
    "lots": lambda book: book.lots.__setitem__(0, book.lots[0] + 1),
    "mark": lambda book: book.mark.__setitem__(0, book.mark[0] + 1e-9),
    "waiting": lambda book: book.waiting.__setitem__(0, book.waiting[0] + 1),
    "waiting_reason": lambda book: book.waiting_reason.__setitem__(0, ex.RUIN),
    "waiting_tag": lambda book: book.waiting_tag.__setitem__(0, 0 if book.waiting_tag[0] < 0 else ex.NO_TAG),
    "zero_lots": lambda book: book.zero_lots.__setitem__(0, 9),
    "zero_target": lambda book: book.zero_target.__setitem__(0, 9.0),
    "zero_lot_value": lambda book: book.zero_lot_value.__setitem__(0, 9.0),
} | {
    f"tally[{place}]": lambda book, place=place: book.tally.__setitem__(place, book.tally[place] + 1)  # type: ignore[misc]
    for place in range(ex.TALLIES)
}  # fmt: skip


@pytest.mark.parametrize("name", HIDDEN)
async def test_every_value_of_the_book_is_in_the_state_digest(name: str) -> None:
    engine = engine_of(Busy())
    await cancel_at(engine, 5)
    before = engine.portfolio.state_digest(engine.boundary)
    HIDDEN[name](engine.boundary.book)
    assert engine.portfolio.state_digest(engine.boundary) != before


# Each field of the checkpoint's state.

# For people, or for storage: nothing reads them back, and a resume doesn't depend on them.
NOT_READ_BACK = {
    "current_date", "operation_type", "positions", "trades", "equity_samples", "original_request", "samples_from",
    "resumed_from",
    "accepted_mismatches",
}  # fmt: skip
CHANGED: dict[str, Callable[[Any], Any]] = {
    "bar_index": lambda v: v - 1,
    "current_date": lambda v: "1999-01-01T00:00:00Z",
    "cash": lambda v: v + 0.5,
    "operation_type": lambda v: "training",
    "positions": lambda v: [],
    "trades": lambda v: v[:-1],
    "equity_samples": lambda v: v[1:],
    "original_request": lambda v: {},
    "schema_version": lambda v: v + 1,
    "ledger": lambda v: [*v[:-2], v[-1]],
    "recorded": lambda v: v[:-1],
    "ledger_from": lambda v: 3,
    "samples_from": lambda v: 3,
    "recorded_from": lambda v: 3,
    "waiting": lambda v: [{**v[0], "lots": v[0]["lots"] + 1}, *v[1:]],
    "strategy_state": lambda v: None,
    "counters": lambda v: {**v, "ordered_rows": v["ordered_rows"] + 1},
    "manifest": lambda v: {**v, "bars": v["bars"][::-1]},
    "resumed_from": lambda v: [17],
    "accepted_mismatches": lambda v: ["bar 3: something"],
    "state_digest": lambda v: v[::-1],
}  # fmt: skip


async def _busy() -> tuple[kt.BacktestingEngine, kt.BacktestCheckpointState]:
    """An engine at a boundary with something in every field, and its checkpoint."""
    for bar in (252, 483, 714):
        engine = engine_of(Busy())
        await stop_at(engine, bar)
        state = checkpoint(engine)
        if state.waiting and state.positions and state.recorded:
            return engine, state
    raise AssertionError("no boundary with a waiting order and a position")


async def _cut() -> tuple[kt.BacktestCheckpointState, str]:
    """A checkpoint with something in every field, and where it leads."""
    _, state = await _busy()
    return state, (await finish(engine_of(Busy()), state)).digest


async def _lead(tree: dict[str, Any]) -> str:
    """Where a changed state leads: refused, or a digest."""
    try:
        state = kt.BacktestCheckpointState.from_dict(json.loads(json.dumps(tree)))
        return (await finish(engine_of(Busy()), state, audited=False)).digest
    except (KtrdrError, msgspec.ValidationError) as error:
        return f"refused: {type(error).__name__}: {error}"


async def test_every_field_is_known_here() -> None:
    assert set(CHANGED) == set(kt.BacktestCheckpointState.__struct_fields__)
    supervisors = {"resumed_from", "accepted_mismatches"}  # tests/supervision looks at them
    constant, demanded = {"operation_type"}, {"current_date"}
    shown = NOT_READ_BACK | {"schema_version", "ledger_from", "recorded_from"}
    assert set(LOOKS) == shown - supervisors - constant - demanded


@pytest.mark.parametrize("field", CHANGED)
async def test_a_removed_or_changed_field_is_noticed(field: str) -> None:
    state, expected = await _cut()
    tree = state.to_dict()
    removed = {name: value for name, value in tree.items() if name != field}
    changed = {**tree, field: CHANGED[field](tree[field])}
    assert await _lead(tree) == expected
    if field in NOT_READ_BACK:
        assert await _lead(changed) == expected
        if field != "current_date":
            assert await _lead(removed) == expected
        return
    assert (await _lead(changed)).startswith("refused"), field
    if field not in ("schema_version", "ledger_from", "recorded_from"):  # their defaults are the values here
        assert (await _lead(removed)).startswith("refused"), field


# What nothing reads back, looked at in a whole state and in one from event 3, sample 2 and recorded value 1 on.
Look = Callable[[kt.BacktestingEngine, kt.BacktestCheckpointState, kt.BacktestCheckpointState], bool]
LOOKS: dict[str, Look] = {
    "positions": lambda engine, whole, part: (
        [(p.symbol, p.lots) for p in whole.positions]
        == [(engine.bars.symbols[j], lots) for j, lots in enumerate(engine.boundary.book.lots) if lots]
    ),
    "trades": lambda engine, whole, part: (
        [msgspec.structs.replace(t, mae=None, mfe=None) for t in whole.trades] == trades_of(whole.ledger, 1.0)
    ),
    "equity_samples": lambda engine, whole, part: (
        [(s.bar, s.timestamp, s.equity) for s in whole.equity_samples]
        == [(i, engine.bars.timestamps[i], engine.equity[i]) for i in range(0, whole.bar_index + 1, 100)]
    ),
    "original_request": lambda engine, whole, part: whole.original_request == engine.request.to_dict(),
    "schema_version": lambda engine, whole, part: whole.schema_version == 7,
    "ledger_from": lambda engine, whole, part: part.ledger == whole.ledger[part.ledger_from :] != whole.ledger,
    "samples_from": lambda engine, whole, part: part.equity_samples == whole.equity_samples[part.samples_from :],
    "recorded_from": lambda engine, whole, part: part.recorded == whole.recorded[part.recorded_from :],
}  # fmt: skip


@pytest.mark.parametrize("field", LOOKS)
async def test_a_removed_field_that_a_resume_doesnt_read_is_missed(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_builder, "SCHEMA_VERSION", 7)
    engine, whole = await _busy()
    states = [whole, checkpoint(engine, since=Since(3, 2, 1))]
    removed = [{name: value for name, value in state.to_dict().items() if name != field} for state in states]
    assert LOOKS[field](engine, *states)
    assert not LOOKS[field](engine, *map(kt.BacktestCheckpointState.from_dict, removed))


async def test_every_value_inside_the_fields_that_are_read_back_is_noticed() -> None:
    state, _ = await _cut()
    tree = state.to_dict()
    tried = 0
    for field in ("ledger", "recorded", "waiting", "counters"):
        for path in _leaves(tree[field]):
            other = json.loads(json.dumps(tree))
            _bump(other[field], path)
            assert (await _lead(other)).startswith("refused"), (field, path)
            tried += 1
    assert tried > 30
    raw = bytearray(msgspec.convert(tree["strategy_state"], bytes))
    for at in range(len(raw)):
        other = raw.copy()
        other[at] ^= 1
        got = await _lead(tree | {"strategy_state": msgspec.to_builtins(bytes(other))})
        assert got.startswith("refused"), at


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of the values in a tree; of a long list the first, a middle and the last entry."""
    if isinstance(value, dict):
        return [leaf for key, child in value.items() for leaf in _leaves(child, (*path, key))]
    if isinstance(value, list):
        places = sorted({0, len(value) // 2, len(value) - 1}) if len(value) > 12 else range(len(value))
        return [leaf for i in places for leaf in _leaves(value[i], (*path, i))]
    return [path]


def _bump(value: Any, path: tuple[Any, ...]) -> None:
    for step in path[:-1]:
        value = value[step]
    old = value[path[-1]]
    if isinstance(old, float):
        new: Any = old * 1.0000000001 + 1e-12
    elif isinstance(old, int):
        new = old + 1
    elif old is None:
        new = [1.0, 1.0] if path[0] == "zero_lots_first" else "x"
    else:
        new = {"open": "close", "close": "open", "order": "ruin"}.get(old, f"{old}x")
    value[path[-1]] = new
