"""What a checkpoint holds: plain records, typed so that whatever a database returns is validated before it is used.

Nothing here computes, saves or loads. New fields get defaults; a field's type never changes (`SCHEMA_VERSION` says
which
shape a stored state has).
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import msgspec

from ktrdr_async.backtesting.ledger import LedgerEvent, Trade
from ktrdr_async.checkpoint.manifest import Manifest
from ktrdr_async.errors import SchemaVersionError

SCHEMA_VERSION = 1
DEFAULT_CHECKPOINT_BAR_INTERVAL = 10_000
DEFAULT_EQUITY_SAMPLE_INTERVAL = 100
SEGMENT_LIMIT = 5_000  # most records of each kind in one segment


class CheckpointType(StrEnum):
    """Why a checkpoint was made."""

    PERIODIC = "periodic"  # the policy found one due
    CANCELLATION = "cancellation"  # a task was cancelled, or somebody asked for it
    FAILURE = "failure"  # strategy or data raised
    SHUTDOWN = "shutdown"  # the worker is leaving


class EquitySample(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A point of the equity curve, for people: nothing reads it back."""

    bar: int
    timestamp: int  # ns since the epoch, UTC
    equity: float  # account currency


class RecordedValue(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One `bar.record(name=value)`; what JSON can't hold is spelled: "nan", "inf", "-inf", "-0.0"."""

    bar: int
    name: str
    value: float | str


class PositionState(msgspec.Struct, frozen=True):
    """One open position, as people want to see it; all of it follows from the ledger and the bars."""

    symbol: str
    lots: int  # signed
    entry_bar: int
    entry_price: float  # quantity-weighted mean of the opening fills
    fees: float  # account currency, paid so far
    mae: float  # account currency, smallest open P&L so far, before exit costs
    mfe: float  # account currency, largest open P&L so far, before exit costs


class WaitingOrder(msgspec.Struct, frozen=True):
    """An order that waits for its symbol's next bar."""

    symbol: int
    lots: int  # signed, never 0
    reason: str
    tag: str | None


class Counters(msgspec.Struct, frozen=True):
    """Counts that the ledger doesn't tell; each is a list with one entry a symbol, or a number."""

    cut: int = 0  # opening parts that buying power made smaller, cuts to zero included
    cut_to_zero: int = 0  # of these, the ones that left no fill
    zero_lots: list[int] = []  # weights other than zero that came to zero lots, a symbol each
    zero_lots_first: list[
        tuple[float, float] | None
    ] = []  # (target notional, notional of one lot) at the first of them
    refused_after_ruin: int = 0  # orders that came after equity had been lost
    ordered_rows: int = 0  # bars with at least one order
    ruined_at: int = -1  # bar whose close found equity <= 0; -1: never


def check_version(version: int) -> None:
    """Refuses a state that this code doesn't know, by what its version means.

    Raises:
        SchemaVersionError: if it is newer, or older than any that there was.
    """
    if not 1 <= version <= SCHEMA_VERSION:
        newer, known = version > SCHEMA_VERSION, "1" if SCHEMA_VERSION == 1 else f"1 to {SCHEMA_VERSION}"
        raise SchemaVersionError(
            f"the checkpoint has schema version {version}, this code knows {known}",
            hint="upgrade ktrdr_async" if newer else "no release wrote such a version: restore the database",
        )


class BacktestCheckpointState(msgspec.Struct, kw_only=True):
    """The whole state of a backtest at a boundary.

    The growing fields (`ledger`, `equity_samples`, `recorded`) hold what came from the absolute counts `ledger_from`,
    `samples_from` and `recorded_from` on; in a loaded state these are 0 and the fields are whole. `trades` follows
    from the ledger and is filled in whole states only.
    """

    bar_index: int  # absolute index of the last bar that was computed
    current_date: str  # that bar's timestamp, ISO 8601, UTC
    cash: float  # account currency
    operation_type: str = "backtesting"
    positions: list[PositionState] = []
    trades: list[Trade] = []
    equity_samples: list[EquitySample] = []
    original_request: dict[str, Any] = {}
    schema_version: int = 1  # SCHEMA_VERSION of the code that built it; the default is the first one's for ever
    ledger: list[LedgerEvent] = []
    recorded: list[RecordedValue] = []
    ledger_from: int = 0
    samples_from: int = 0
    recorded_from: int = 0
    waiting: list[WaitingOrder] = []
    strategy_state: bytes | None = None  # tagged msgpack of the strategy's `state`; base64 in JSON
    counters: Counters = Counters()
    manifest: Manifest | None = None
    resumed_from: list[int] = []  # bars of the checkpoints that the run went on from so far; no part of the state
    accepted_mismatches: list[str] = []  # differences under which somebody let it go on, in words; never forgotten
    state_digest: str = ""  # hex SHA-256 of the state at this bar, whatever was saved before it

    def to_dict(self) -> dict[str, Any]:
        """The state as plain JSON-ready values; `from_dict` gives it back, equal in every bit."""
        return dict(msgspec.to_builtins(self))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> BacktestCheckpointState:
        """Validates and rebuilds a state. :raises msgspec.ValidationError: if a field has another type."""
        return msgspec.convert(data, cls)
