"""Builds the checkpoint of an engine's last boundary, and reads one back. Nothing is saved here.

A state is built in small steps, so that a loop needn't wait for it. What they compute once and for all (the ledger's
records, the digests) stays computed where they are left off, and the next ones go on from there.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from ktrdr_async.backtesting import execution as ex
from ktrdr_async.backtesting.execution import notional
from ktrdr_async.backtesting.ledger import REASONS, LedgerEvent, Leg, PriceRange, TradeBook, trades_of
from ktrdr_async.backtesting.provenance import manifest_of
from ktrdr_async.checkpoint.schemas import (
    DEFAULT_EQUITY_SAMPLE_INTERVAL,
    SCHEMA_VERSION,
    BacktestCheckpointState,
    Counters,
    EquitySample,
    PositionState,
    RecordedValue,
    WaitingOrder,
)
from ktrdr_async.errors import CheckpointCorruptedError, UndeclaredStateError
from ktrdr_async.strategies.state import check_state, decode_state, encode_state

if TYPE_CHECKING:
    from ktrdr_async.backtesting.boundaries import Boundary
    from ktrdr_async.backtesting.engine import BacktestingEngine
    from ktrdr_async.backtesting.portfolio import Recorded

_RECORDS = 250  # that a step makes, or looks at
_PRICES = 8192  # bars that a step looks at
_SPELLED = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "-0.0": -0.0}


class Since(msgspec.Struct, frozen=True):
    """How much of each growing field is stored already; absolute counts."""

    ledger: int = 0
    samples: int = 0
    recorded: int = 0


def build_backtest_checkpoint_state(
    engine: BacktestingEngine,
    bar_index: int,
    current_timestamp: int | datetime,
    original_request: dict[str, Any] | None = None,
    equity_sample_interval: int = DEFAULT_EQUITY_SAMPLE_INTERVAL,
    *,
    since: Since | None = None,
) -> BacktestCheckpointState:
    """The engine's state at its last boundary, which must be at `bar_index`: `checkpoint_steps` at once.

    Args:
        engine: the engine; it stands at a boundary, or was interrupted after one.
        bar_index: absolute index of the boundary's bar.
        current_timestamp: that bar's timestamp: ns since the epoch, UTC, or a datetime (pandas' too).
        original_request: the request as plain values; None: the engine's own.
        equity_sample_interval: bars between two samples of the equity curve.
        since: what is stored already; the growing fields start there. None: the state is whole, trades included.

    Raises:
        ValueError: if the boundary isn't at that bar and time.
        UndeclaredStateError: if the strategy's state would come back as another value.
    """
    return at_once(
        checkpoint_steps(engine, bar_index, current_timestamp, original_request, equity_sample_interval, since=since)
    )


def checkpoint_steps(
    engine: BacktestingEngine,
    bar_index: int,
    current_timestamp: int | datetime,
    original_request: dict[str, Any] | None = None,
    equity_sample_interval: int = DEFAULT_EQUITY_SAMPLE_INTERVAL,
    *,
    since: Since | None = None,
) -> Iterator[BacktestCheckpointState | None]:
    """`build_backtest_checkpoint_state` in steps; None after each, the state at last. The engine stands meanwhile."""
    boundary, portfolio, bars = engine.boundary, engine.portfolio, engine.bars
    if boundary.bar_index != bar_index or bar_index < 0:
        raise ValueError(f"the engine's boundary is at bar {boundary.bar_index}, not {bar_index}")
    timestamp = _nanoseconds(current_timestamp)
    if int(bars.timestamps[bar_index]) != timestamp:
        raise ValueError(f"bar {bar_index} is at {bars.timestamps[bar_index]} ns, not {timestamp}")
    _prove_state(engine, boundary)
    yield None
    start = since or Since()
    events, ledger = portfolio.events, list[LedgerEvent]()
    for first in range(start.ledger, boundary.events, _RECORDS):
        ledger += events[first : min(boundary.events, first + _RECORDS)]
        yield None
    samples, every = list[EquitySample](), equity_sample_interval
    for first in range(start.samples * every, bar_index + 1, _RECORDS * every):
        part = slice(first, min(bar_index + 1, first + _RECORDS * every), every)
        rows = range(part.start, part.stop, every), bars.timestamps[part].tolist(), engine.equity[part].tolist()
        samples += map(EquitySample, *rows)
        yield None
    recorded = list[RecordedValue]()
    for first in range(start.recorded, boundary.recorded, _RECORDS):
        values = portfolio.recorded[first : min(boundary.recorded, first + _RECORDS)]
        recorded += (RecordedValue(b, name, _spell(v)) for b, name, v in values)
        yield None
    positions = yield from _positions(engine, boundary)
    yield from engine.decided.steps(bar_index)
    yield from portfolio.digest_steps(boundary)
    prices = PriceRange(bars.low, bars.high)
    yield BacktestCheckpointState(
        bar_index=bar_index,
        current_date=str(np.datetime64(timestamp, "ns")) + "Z",
        cash=boundary.book.money[ex.CASH],
        positions=positions,
        trades=trades_of(ledger, engine.request.lot_size, prices) if since is None else [],
        equity_samples=samples,
        original_request=engine.request.to_dict() if original_request is None else original_request,
        schema_version=SCHEMA_VERSION,
        ledger=ledger,
        recorded=recorded,
        ledger_from=start.ledger,
        samples_from=start.samples,
        recorded_from=start.recorded,
        waiting=[
            WaitingOrder(
                j, lots, REASONS[boundary.book.waiting_reason[j]], _tag(portfolio.tags, boundary.book.waiting_tag[j])
            )
            for j, lots in enumerate(boundary.book.waiting)
            if lots
        ],
        strategy_state=boundary.strategy_state,
        counters=counters_of(boundary.book),
        manifest=manifest_of(engine, bar_index),
        state_digest=portfolio.state_digest(boundary),
    )


def build_closing_state(engine: BacktestingEngine, since: Since) -> BacktestCheckpointState:
    """The last boundary's state with the records of the closing step: what completion adds to the ledger's segments."""
    return at_once(closing_steps(engine, since))


def closing_steps(engine: BacktestingEngine, since: Since) -> Iterator[BacktestCheckpointState | None]:
    """`build_closing_state` in steps, as `checkpoint_steps`."""
    boundary, portfolio = engine.boundary, engine.portfolio
    timestamp = int(engine.bars.timestamps[boundary.bar_index])
    for state in checkpoint_steps(engine, boundary.bar_index, timestamp, since=since):
        if state is not None:
            state.ledger += portfolio.events[boundary.events :]
            state.recorded += (RecordedValue(b, n, _spell(v)) for b, n, v in portfolio.recorded[boundary.recorded :])
        yield state


def final_steps(engine: BacktestingEngine) -> Iterator[BacktestCheckpointState | None]:
    """The last boundary's state, its growing fields empty: what an extension goes on from, with the stored ledger.

    In steps, as `checkpoint_steps`.
    """
    boundary = engine.boundary
    samples = boundary.bar_index // DEFAULT_EQUITY_SAMPLE_INTERVAL + 1
    since = Since(boundary.events, samples, boundary.recorded)
    timestamp = int(engine.bars.timestamps[boundary.bar_index])
    return checkpoint_steps(engine, boundary.bar_index, timestamp, since=since)


def at_once(steps: Iterator[BacktestCheckpointState | None]) -> BacktestCheckpointState:
    """Goes through steps of building a state; the state."""
    return next(state for state in steps if state is not None)


def counters_of(book: ex.Book) -> Counters:
    """The counts that the ledger doesn't tell."""
    tally = book.tally
    first = [
        (book.zero_target[j], book.zero_lot_value[j]) if book.zero_lots[j] else None for j in range(len(book.zero_lots))
    ]
    return Counters(
        tally[ex.CUT], tally[ex.CUT_TO_ZERO], list(book.zero_lots), first, tally[ex.REFUSED], tally[ex.ORDERED_ROWS],
        tally[ex.RUINED_AT],
    )  # fmt: skip


def recorded_values(records: Sequence[RecordedValue], operation: str) -> list[Recorded]:
    """The recorded values as floats. :raises CheckpointCorruptedError: if one is spelled in a way that isn't known."""
    found: list[Recorded] = []
    for record in records:
        value = _SPELLED.get(record.value) if isinstance(record.value, str) else record.value
        if value is None:
            raise CheckpointCorruptedError(
                operation, f"the recorded value {record.value!r} at bar {record.bar} can't be"
            )
        found.append((record.bar, record.name, value))
    return found


def _prove_state(engine: BacktestingEngine, boundary: Boundary) -> None:
    # The engine proves it at some boundaries only; a checkpoint may be of any.
    if boundary.strategy_state is None:
        return
    kind = type(engine.strategy.state)
    try:
        if encode_state(decode_state(boundary.strategy_state, kind)) == boundary.strategy_state:
            return
    except msgspec.MsgspecError:
        pass
    check_state(engine.strategy.state)  # names the field, unless a block was interrupted and the state has moved on
    raise UndeclaredStateError(
        f"{kind.__name__} would come back as another value than it had at bar {boundary.bar_index}",
        hint="give each field the type that its values have",
    )


def _nanoseconds(time: int | datetime) -> int:
    if not isinstance(time, datetime):
        return int(time)
    import pandas as pd

    stamp = pd.Timestamp(time)
    return int((stamp.tz_localize("UTC") if stamp.tz is None else stamp).as_unit("ns").value)


def _spell(value: float) -> float | str:
    if math.isfinite(value) and (value or math.copysign(1.0, value) > 0):
        return value
    return next(text for text, special in _SPELLED.items() if repr(special) == repr(value))


def _tag(tags: list[str], number: int) -> str | None:
    return None if number < 0 else tags[number]


def _positions(engine: BacktestingEngine, boundary: Boundary) -> Generator[None, None, list[PositionState]]:
    bars, events = engine.bars, engine.portfolio.events
    held = {j: lots for j, lots in enumerate(boundary.book.lots) if lots}
    own: list[LedgerEvent] = []
    at = boundary.events
    while held:  # back to where each open trade began: what ended before doesn't matter, however much it is
        at -= 1
        event = events[at]
        if event.symbol in held:
            own.append(event)
            held[event.symbol] -= event.lots
            if not held[event.symbol]:
                del held[event.symbol]
        if at % _RECORDS == 0:
            yield
    book = TradeBook(engine.request.lot_size)
    for number, event in enumerate(reversed(own)):
        book.apply(event)
        if number % _RECORDS == 0:
            yield
    found = []
    for symbol in sorted(book.open):
        trade = book.open[symbol]
        mae, mfe = yield from _excursions(engine, symbol, trade.legs, boundary.bar_index + 1)
        found.append(
            PositionState(bars.symbols[symbol], trade.lots, trade.entry_bar, trade.entry_price, trade.fees, mae, mfe)
        )
    return found


def _excursions(
    engine: BacktestingEngine, symbol: int, legs: list[Leg], stop: int
) -> Generator[None, None, tuple[float, float]]:
    """MAE and MFE of an open trade over its bars before `stop`; the extremes of parts are those of the whole."""
    prices, low, high = PriceRange(engine.bars.low, engine.bars.high), math.inf, -math.inf
    for leg, end in zip(legs, [*(later.bar for later in legs[1:]), stop], strict=True):
        for first in range(leg.bar, end, _PRICES):
            for price in prices.extremes(symbol, first, min(end, first + _PRICES)) or ():
                at = leg.flow + notional(leg.lots, engine.request.lot_size, price)
                low, high = min(low, at), max(high, at)
            yield
    return low, high
