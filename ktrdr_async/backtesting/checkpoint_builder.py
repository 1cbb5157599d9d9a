"""Builds the checkpoint of an engine's last boundary, and reads one back. Nothing is saved here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from ktrdr_async.backtesting import execution as ex
from ktrdr_async.backtesting.ledger import REASONS, LedgerEvent, PriceRange, TradeBook, trades_of
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
    """The engine's state at its last boundary, which must be at `bar_index`.

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
    boundary, portfolio, bars = engine.boundary, engine.portfolio, engine.bars
    if boundary.bar_index != bar_index or bar_index < 0:
        raise ValueError(f"the engine's boundary is at bar {boundary.bar_index}, not {bar_index}")
    timestamp = _nanoseconds(current_timestamp)
    if int(bars.timestamps[bar_index]) != timestamp:
        raise ValueError(f"bar {bar_index} is at {bars.timestamps[bar_index]} ns, not {timestamp}")
    _prove_state(engine, boundary)
    start = since or Since()
    ledger = portfolio.events[start.ledger : boundary.events]
    samples = range(start.samples * equity_sample_interval, bar_index + 1, equity_sample_interval)
    prices = PriceRange(bars.low, bars.high)
    return BacktestCheckpointState(
        bar_index=bar_index,
        current_date=str(np.datetime64(timestamp, "ns")) + "Z",
        cash=boundary.book.money[ex.CASH],
        positions=_positions(engine, boundary),
        trades=trades_of(ledger, engine.request.lot_size, prices) if since is None else [],
        equity_samples=[EquitySample(i, int(bars.timestamps[i]), float(engine.equity[i])) for i in samples],
        original_request=engine.request.to_dict() if original_request is None else original_request,
        schema_version=SCHEMA_VERSION,
        ledger=ledger,
        recorded=[
            RecordedValue(b, name, _spell(v)) for b, name, v in portfolio.recorded[start.recorded : boundary.recorded]
        ],
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
    last = engine.boundary.bar_index
    state = build_backtest_checkpoint_state(engine, last, int(engine.bars.timestamps[last]), since=since)
    state.ledger = engine.portfolio.events[since.ledger :]
    state.recorded = [RecordedValue(b, name, _spell(v)) for b, name, v in engine.portfolio.recorded[since.recorded :]]
    return state


def build_final_state(engine: BacktestingEngine) -> BacktestCheckpointState:
    """The last boundary's state, its growing fields empty: what an extension goes on from, with the stored ledger."""
    boundary = engine.boundary
    samples = boundary.bar_index // DEFAULT_EQUITY_SAMPLE_INTERVAL + 1
    since = Since(boundary.events, samples, boundary.recorded)
    timestamp = int(engine.bars.timestamps[boundary.bar_index])
    return build_backtest_checkpoint_state(engine, boundary.bar_index, timestamp, since=since)


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


def _positions(engine: BacktestingEngine, boundary: Boundary) -> list[PositionState]:
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
    book = TradeBook(engine.request.lot_size, PriceRange(bars.low, bars.high))
    for event in reversed(own):
        book.apply(event)
    found = []
    for symbol in sorted(book.open):
        trade = book.open[symbol]
        mae, mfe = book.open_excursions(symbol, boundary.bar_index)
        found.append(
            PositionState(bars.symbols[symbol], trade.lots, trade.entry_bar, trade.entry_price, trade.fees, mae, mfe)
        )
    return found
