"""Checkpoints to what PostgreSQL stores and back, and the digests that bind them: pure, a piece at a time.

A head is the state without its growing fields and without trades; a segment is a stretch of the growing fields. Digests
cover canonical bytes of decoded, typed values, never JSON text: what is hashed at saving is what decoding will give at
loading. Fields that have their default don't enter a head's digest, so that a later version may add fields.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

from ktrdr_async.backtesting.ledger import LedgerEvent
from ktrdr_async.checkpoint.schemas import (
    SEGMENT_LIMIT,
    BacktestCheckpointState,
    EquitySample,
    RecordedValue,
    check_version,
)
from ktrdr_async.errors import InputError
from ktrdr_async.operations.jsonb import (
    MAX_BYTES,
    TAG,
    ValueTooLargeError,
    encode_tree,
    from_json,
    holds_nul,
    tagged,
    untagged,
)

GENESIS = "0" * 64  # what stands for the digest before the first segment
PIECE = 1_000  # records that are encoded or decoded without a turn: about half a millisecond
MAX_SEGMENT_BYTES = 64_000_000
APART = frozenset(
    {"trades", "ledger", "equity_samples", "recorded", "ledger_from", "samples_from", "recorded_from"}
)  # fields of a state that its head doesn't hold
HEAD_FIELDS = tuple(name for name in BacktestCheckpointState.__struct_fields__ if name not in APART)

R = TypeVar("R")
_canonical = msgspec.msgpack.Encoder(order="deterministic")
_MINUS_ZERO = re.compile(rb"-0\.0(?![0-9])")


class Counts(msgspec.Struct, frozen=True):
    """How many records of each kind lie before a point of the chain."""

    ledger: int = 0
    samples: int = 0
    recorded: int = 0


class Segment(msgspec.Struct, frozen=True):
    """One row of `ledger_segments`, ready to be sent."""

    sequence: int  # counts from 1
    start: Counts
    stop: Counts
    records: str  # JSON
    bytes: int  # of it
    prev_digest: str
    digest: str


class Head(msgspec.Struct, frozen=True):
    """What a head's digest binds together."""

    operation_id: str
    checkpoint_type: str
    revision: int  # counts saves
    last_segment: int
    tip: str  # the last segment's digest
    counts: Counts


class Kind(Generic[R]):
    """One kind of record of a segment: its type and its decoder."""

    def __init__(self, name: str, record: type[R]) -> None:
        self.name = name
        self._type: Any = list[record]  # type: ignore[valid-type]
        self._decoder: msgspec.json.Decoder[list[R]] = msgspec.json.Decoder(self._type)

    def encode(self, records: Sequence[R]) -> tuple[bytes, list[R]]:
        """JSON of some records, and the records as decoding will give them.

        Raises:
            InputError: if one holds what PostgreSQL can't store, or has another type than declared.
        """
        try:
            # msgspec writes NaN as null without a word: the typed decoder is what notices, and then floats are tagged.
            text = msgspec.json.encode(records)
            if not _MINUS_ZERO.search(text):
                if holds_nul(text):
                    raise InputError(f"a text in {self.name} holds the character NUL (\\u0000), which can't be stored")
                return text, self._decoder.decode(text)
        except UnicodeEncodeError as error:
            raise InputError(f"a text in {self.name} holds a lone surrogate, which can't be stored") from error
        except (msgspec.ValidationError, TypeError):
            pass
        try:
            text = encode_tree(tagged(msgspec.to_builtins(records), where=self.name))
            return text, self.decode(text.decode())
        except (msgspec.ValidationError, ValueError, TypeError) as error:
            raise InputError(f"{self.name} holds a record of another type: {error}") from None

    def decode(self, text: str) -> list[R]:
        """The records of a JSON list. :raises ValueError: if it isn't one, or one is of another type."""
        if f'"{TAG}"' not in text:
            return self._decoder.decode(text)
        converted: list[R] = msgspec.convert(untagged(msgspec.json.decode(text)), self._type)
        return converted


LEDGER = Kind("ledger", LedgerEvent)
SAMPLES = Kind("equity_samples", EquitySample)
RECORDED = Kind("recorded", RecordedValue)


class SegmentTexts(msgspec.Struct, forbid_unknown_fields=True):
    """A segment's records, each kind still JSON."""

    ledger: list[msgspec.Raw]
    equity_samples: list[msgspec.Raw]
    recorded: list[msgspec.Raw]


_texts = msgspec.json.Decoder(SegmentTexts)


class SegmentWork:
    """Makes one segment, or reads one, in pieces of which none takes longer than about half a millisecond."""

    def __init__(self, operation_id: str, sequence: int, start: Counts, prev_digest: str) -> None:
        self.sequence = sequence
        self.start = start
        self.prev_digest = prev_digest
        self.ledger: list[LedgerEvent] = []
        self.samples: list[EquitySample] = []
        self.recorded: list[RecordedValue] = []
        self._operation_id = operation_id
        self._hash = hashlib.sha256()

    @property
    def stop(self) -> Counts:
        """Where the segment ends, by the records that were taken in."""
        return Counts(
            self.start.ledger + len(self.ledger),
            self.start.samples + len(self.samples),
            self.start.recorded + len(self.recorded),
        )

    def digest(self) -> str:
        """The storage chain's digest: over the one before it, the segment's place, and its records."""
        place = (
            "ktrdr segment 1", self._operation_id, self.sequence, self.prev_digest,
            *msgspec.structs.astuple(self.start), *msgspec.structs.astuple(self.stop), self._hash.hexdigest(),
        )  # fmt: skip
        return hashlib.sha256(_canonical.encode(place)).hexdigest()

    def encode(
        self, ledger: Sequence[LedgerEvent], samples: Sequence[EquitySample], recorded: Sequence[RecordedValue]
    ) -> Iterator[Segment | None]:
        """Yields None after each piece, and last the segment. :raises InputError: if a record can't be stored."""
        parts: list[bytes] = []
        for kind, records, into in self._kinds(ledger, samples, recorded):
            texts: list[bytes] = []
            for first in range(0, len(records), PIECE):
                text, values = kind.encode(records[first : first + PIECE])
                texts.append(text[1:-1])
                try:
                    self._take(into, values)
                except ValueError as error:
                    raise InputError(f"{kind.name}: {error}") from None
                yield None
            parts.append(b'"' + kind.name.encode() + b'":[' + b",".join(texts) + b"]")
        whole = b"{" + b",".join(parts) + b"}"
        if len(whole) > MAX_SEGMENT_BYTES:
            raise ValueTooLargeError(
                f"a segment of {len(whole)} bytes is larger than the {MAX_SEGMENT_BYTES} that can be stored"
            )
        yield Segment(self.sequence, self.start, self.stop, whole.decode(), len(whole), self.prev_digest, self.digest())

    def decode(self, text: str) -> Iterator[None]:
        """Reads a segment's records; yields after each piece.

        Raises:
            ValueError: if they are too large or of another type.
        """
        if len(text) > MAX_SEGMENT_BYTES:
            raise ValueError(f"{len(text)} bytes are more than the {MAX_SEGMENT_BYTES} that are read")
        texts = _texts.decode(text)
        yield None
        for kind, raws, into in self._kinds(texts.ledger, texts.equity_samples, texts.recorded):
            if len(raws) > SEGMENT_LIMIT:
                raise ValueError(f"{len(raws)} records in {kind.name} are more than {SEGMENT_LIMIT}")
            for first in range(0, len(raws), PIECE):
                joined = b"[" + b",".join(map(bytes, raws[first : first + PIECE])) + b"]"
                self._take(into, kind.decode(joined.decode()))
                yield None

    def _kinds(self, *three: Sequence[Any]) -> Iterator[tuple[Kind[Any], Sequence[Any], list[Any]]]:
        into: tuple[list[Any], ...] = (self.ledger, self.samples, self.recorded)
        yield from zip((LEDGER, SAMPLES, RECORDED), three, into, strict=True)

    def _take(self, into: list[Any], values: list[Any]) -> None:
        # Each piece enters as a list of its own: a length in front of every one keeps two splits from hashing alike.
        try:
            self._hash.update(_canonical.encode(values))
        except OverflowError:
            raise ValueError("an integer has more than 64 bits") from None
        into.extend(values)


class EncodedHead(NamedTuple):
    """A head ready to be sent."""

    state: str  # JSON
    canonical: bytes


def encode_head(state: BacktestCheckpointState) -> EncodedHead:
    """The head of a state. :raises InputError: if it holds what can't be stored, or is too large; with its size."""
    try:
        fields = msgspec.to_builtins({name: getattr(state, name) for name in HEAD_FIELDS if name != "original_request"})
    except (ValueError, TypeError) as error:
        raise InputError(f"the state holds what JSON can't hold: {error}") from None
    # As it is: what JSON can't hold is refused, not turned into something that it can.
    text = encode_tree(tagged({**fields, "original_request": state.original_request})).decode()
    try:
        return EncodedHead(text, canonical_head(decode_head(text)))
    except (ValueError, msgspec.ValidationError) as error:
        raise InputError(f"the state holds a value of another type: {error}") from None


def decode_head(text: str) -> BacktestCheckpointState:
    """The state of a head, its growing fields empty.

    Raises:
        SchemaVersionError: if its version isn't known here: to be handed back, not to be marked as failed.
        ValueError: if it is too large, too deep, no JSON, or a field has another type.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"{len(text)} bytes are more than the {MAX_BYTES} that are read")
    tree = from_json(text)
    version = tree.get("schema_version") if isinstance(tree, dict) else None
    if isinstance(version, int):
        check_version(version)
    return msgspec.convert(tree, BacktestCheckpointState)


def canonical_head(state: BacktestCheckpointState) -> bytes:
    """Canonical bytes of a head's state. :raises ValueError: if an integer has more than 64 bits."""
    try:
        return _canonical.encode({name: value for name, value in _plain(state).items() if name not in APART})
    except OverflowError:
        raise ValueError("an integer has more than 64 bits") from None


def head_digest(head: Head, canonical: bytes) -> str:
    """Digest of a head row: its state, its place among the saves, and through `tip` the whole ledger."""
    place = (
        "ktrdr head 1", head.operation_id, head.checkpoint_type, head.revision, head.last_segment, head.tip,
        *msgspec.structs.astuple(head.counts), hashlib.sha256(canonical).hexdigest(),
    )  # fmt: skip
    return hashlib.sha256(_canonical.encode(place)).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, msgspec.Struct):
        items = ((name, getattr(value, name), default) for name, default in _defaults(type(value)))
        # -0.0 equals 0.0 and isn't it: what is a default is told by its bytes.
        return {name: _plain(item) for name, item, default in items if _canonical.encode(item) != default}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


@functools.cache
def _defaults(kind: type[msgspec.Struct]) -> tuple[tuple[str, bytes | None], ...]:
    """Each field's name and the canonical bytes of its default, None where it has none."""
    found: list[tuple[str, bytes | None]] = []
    for field in msgspec.structs.fields(kind):
        default = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
        found.append((field.name, None if default is msgspec.NODEFAULT else _canonical.encode(default)))
    return tuple(found)


def segment_rows(segments: Sequence[Segment]) -> tuple[list[Any], ...]:
    """The segments as the columns that the statements unnest."""
    return (
        [s.sequence for s in segments],
        [s.start.ledger for s in segments],
        [s.stop.ledger for s in segments],
        [s.start.samples for s in segments],
        [s.stop.samples for s in segments],
        [s.start.recorded for s in segments],
        [s.stop.recorded for s in segments],
        [s.records for s in segments],
        [s.prev_digest for s in segments],
        [s.digest for s in segments],
    )
