"""Reads heads and ledgers, whole or not at all: one snapshot, every digest and every joint of the chain checked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import msgspec

from ktrdr_async.backtesting.ledger import Trade, TradeBook
from ktrdr_async.checkpoint.codec import (
    GENESIS,
    PIECE,
    Counts,
    Head,
    SegmentWork,
    canonical_head,
    decode_head,
    head_digest,
)
from ktrdr_async.checkpoint.pieces import in_pieces
from ktrdr_async.checkpoint.position import LoadedLedger, Position
from ktrdr_async.checkpoint.schemas import BacktestCheckpointState
from ktrdr_async.errors import CheckpointCorruptedError, OperationNotFoundError
from ktrdr_async.operations.lifecycle import Status
from ktrdr_async.storage.database import Database

ROWS_AT_ONCE = 4  # segments that one statement returns


class Chain(msgspec.Struct):
    """A ledger while it is being read."""

    ledger: list[Any] = []
    samples: list[Any] = []
    recorded: list[Any] = []
    segments: int = 0
    tip: str = GENESIS

    @property
    def counts(self) -> Counts:
        """What was read so far."""
        return Counts(len(self.ledger), len(self.samples), len(self.recorded))


async def read_checkpoint(
    database: Database, connection: Any, operation_id: str
) -> tuple[BacktestCheckpointState, Position] | None:
    """An operation's checkpoint with its ledger, and where it stands; None where there is none.

    Raises:
        OperationNotFoundError: if there is no such operation.
        CheckpointCorruptedError: if a digest, a joint or a type is wrong; it says which.
        SchemaVersionError: if newer code wrote it.
    """
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        row = await _head(database, connection, operation_id)
        if row["revision"] is None:
            if row["segments"] and row["status"] != Status.COMPLETED:
                _corrupted(operation_id, f"there are {row['segments']} segments of a ledger and no checkpoint")
            return None
        try:
            state = decode_head(row["state"])
            canonical = canonical_head(state)
        except (ValueError, msgspec.DecodeError) as error:
            _corrupted(operation_id, f"the head can't be read: {error}")
        chain = await _read_chain(database, connection, operation_id, row["last_segment"])
    counts = Counts(row["ledger_count"], row["samples_count"], row["recorded_count"])
    _compare(operation_id, row, chain, counts)
    head = Head(operation_id, row["checkpoint_type"], row["revision"], chain.segments, chain.tip, counts)
    if head_digest(head, canonical) != row["digest"]:
        _corrupted(operation_id, f"the head of revision {row['revision']} fails its digest")
    state.ledger, state.equity_samples, state.recorded = chain.ledger, chain.samples, chain.recorded
    state.trades = await _trades(state)
    position = Position(
        row["revision"],
        row["digest"],
        counts.ledger,
        counts.samples,
        counts.recorded,
        chain.segments,
        state.bar_index,
        chain.tip,
    )
    return state, position


async def read_ledger(database: Database, connection: Any, operation_id: str) -> LoadedLedger:
    """An operation's ledger: of a completed one all of it, of another one up to its checkpoint.

    Raises:
        OperationNotFoundError: if there is no such operation.
        CheckpointCorruptedError: if a digest, a joint or a type is wrong; it says which.
    """
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        row = await _head(database, connection, operation_id)
        completed = row["status"] == Status.COMPLETED
        last = row["final_segment"] if completed else row["last_segment"] or 0
        chain = await _read_chain(database, connection, operation_id, last)
    if row["segments"] != chain.segments:
        _corrupted(operation_id, f"there are {row['segments']} segments, its ledger ends at {chain.segments}")
    if completed and chain.segments and chain.tip != row["final_digest"]:
        _corrupted(operation_id, f"segment {chain.segments} isn't the one that it was completed with")
    return LoadedLedger(chain.ledger, chain.recorded, chain.samples)


async def _head(database: Database, connection: Any, operation_id: str) -> Any:
    row = await connection.fetchrow(database.sql("load_head"), operation_id)
    if row is None:
        raise OperationNotFoundError(operation_id, f"there is no operation {operation_id!r}")
    return row


async def _read_chain(database: Database, connection: Any, operation_id: str, last: int) -> Chain:
    chain = Chain()
    while chain.segments < last:
        rows = await connection.fetch(database.sql("load_segments"), operation_id, chain.segments, last, ROWS_AT_ONCE)
        if not rows:
            _corrupted(operation_id, f"segment {chain.segments + 1} of {last} is missing")
        for row in rows:
            await _take(operation_id, chain, row)
    return chain


async def _take(operation_id: str, chain: Chain, row: Any) -> None:
    sequence = row["sequence"]
    if sequence != chain.segments + 1:
        _corrupted(operation_id, f"segment {chain.segments + 1} is missing")
    start = Counts(row["ledger_from"], row["samples_from"], row["recorded_from"])
    if start != chain.counts:
        _corrupted(
            operation_id,
            f"segment {sequence} begins at {_said(start)}, the one before it ends at {_said(chain.counts)}",
        )
    if row["prev_digest"] != chain.tip:
        _corrupted(operation_id, f"segment {sequence} doesn't continue the digest of the one before it")
    work = SegmentWork(operation_id, sequence, start, chain.tip)
    try:
        await in_pieces(work.decode(row["records"]))
    except (ValueError, RecursionError, msgspec.DecodeError) as error:
        _corrupted(operation_id, f"segment {sequence} can't be read: {error}")
    stop = Counts(row["ledger_to"], row["samples_to"], row["recorded_to"])
    if stop != work.stop:
        _corrupted(
            operation_id,
            f"segment {sequence} says that it ends at {_said(stop)}, its records end at {_said(work.stop)}",
        )
    if work.digest() != row["digest"]:
        _corrupted(operation_id, f"segment {sequence} fails its digest")
    chain.ledger.extend(work.ledger)
    chain.samples.extend(work.samples)
    chain.recorded.extend(work.recorded)
    chain.segments, chain.tip = sequence, row["digest"]


def _compare(operation_id: str, row: Any, chain: Chain, counts: Counts) -> None:
    if row["segments"] != chain.segments:
        _corrupted(
            operation_id,
            f"there are {row['segments']} segments, the checkpoint's last one is segment {row['last_segment']}",
        )
    if chain.counts != counts:
        _corrupted(operation_id, f"the checkpoint stands at {_said(counts)}, its segments end at {_said(chain.counts)}")


async def _trades(state: BacktestCheckpointState) -> list[Trade]:
    book = TradeBook(float(state.original_request.get("lot_size", 1.0)))
    trades: list[Trade] = []

    def follow() -> Iterator[None]:
        for first in range(0, len(state.ledger), PIECE):
            ended = map(book.apply, state.ledger[first : first + PIECE])
            trades.extend(trade for trade in ended if trade is not None)
            yield None

    await in_pieces(follow())
    return trades


def _said(counts: Counts) -> str:
    return f"(ledger {counts.ledger}, samples {counts.samples}, recorded {counts.recorded})"


def _corrupted(operation_id: str, what: str) -> NoReturn:
    raise CheckpointCorruptedError(
        operation_id,
        f"the checkpoint of operation {operation_id} is corrupted: {what}",
        hint="delete the checkpoint to start again at bar 0, or restore the database",
    )
