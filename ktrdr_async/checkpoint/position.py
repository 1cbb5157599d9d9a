"""Where a service stands in an operation's checkpoints, and what it has sent without hearing of it. Plain records."""

from __future__ import annotations

from typing import Any

import msgspec

from ktrdr_async.backtesting.ledger import LedgerEvent
from ktrdr_async.checkpoint.codec import GENESIS, Counts
from ktrdr_async.checkpoint.schemas import EquitySample, RecordedValue
from ktrdr_async.operations.lifecycle import Status


class Position(msgspec.Struct, frozen=True):
    """The last save that the database acknowledged (or that was loaded); a new save begins at its counts."""

    revision: int = 0  # counts saves; 0: none yet
    digest: str = ""  # hex, of the head; "" where there is none
    ledger: int = 0  # events saved
    samples: int = 0  # equity samples saved
    recorded: int = 0  # recorded values saved
    segments: int = 0  # the last segment's sequence number
    bar_index: int = -1  # absolute; -1: none yet
    tip: str = GENESIS  # hex, digest of the last segment

    @property
    def counts(self) -> Counts:
        """The three counts."""
        return Counts(self.ledger, self.samples, self.recorded)


class SaveReceipt(msgspec.Struct, frozen=True):
    """What a save wrote."""

    revision: int
    bytes: int  # of head and segments, as JSON
    segments: int
    seconds: float  # from the call on, encoding and waiting included


class LoadedLedger(msgspec.Struct, frozen=True):
    """The growing fields of an operation, whole."""

    ledger: list[LedgerEvent]
    recorded: list[RecordedValue]
    equity_samples: list[EquitySample]


class Write(msgspec.Struct, frozen=True):
    """One guarded statement, ready to be sent, and sent again with the same bytes; large ones with a part before."""

    query: str
    arguments: tuple[Any, ...]
    before: Position
    after: Position  # where the service stands once it is durable
    bytes: int
    segments: int
    status: Status | None = None  # what the operation ends as; None: a save
    result_digest: str | None = None
    before_it: tuple[tuple[Any, ...], ...] = ()  # segments that are sent before, each as the columns of one row
