"""R1: whatever a state holds comes back from PostgreSQL equal in every bit, or is refused by name before it is sent."""

from __future__ import annotations

import datetime
import decimal
import fractions
import itertools
import json
import math
import struct
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

import msgspec
import numpy as np
import pytest
from campaigns import Figures, sized
from checkpoint_samples import claimed, state
from numpy.typing import NDArray

import ktrdr_async as kt
from ktrdr_async.backtesting.checkpoint_builder import _spell, recorded_values
from ktrdr_async.backtesting.ledger import REASONS, LedgerEvent
from ktrdr_async.checkpoint.schemas import (
    BacktestCheckpointState,
    CheckpointType,
    Counters,
    EquitySample,
    PositionState,
    RecordedValue,
    WaitingOrder,
)
from ktrdr_async.checkpoint.service import CheckpointService
from ktrdr_async.errors import CheckpointError, UndeclaredStateError
from ktrdr_async.operations.lifecycle import Status
from ktrdr_async.storage.database import Database
from ktrdr_async.strategies.state import check_state, decode_state, encode_state

pytestmark = pytest.mark.anyio

RECORDS = 2_000  # of each kind a save: as many pieces as a segment has, and more than one piece
EDGES = [
    0.0, -0.0, 5e-324, -5e-324, 2.2250738585072014e-308, 2.225073858507201e-308, 1.7976931348623157e308, 0.1, -0.1,
    1e15, 1e16, -1e16, 9999999999999998.0, 10000000000000002.0, 1e22, 1e23, 2.0**53, 2.0**53 + 2, 2.0**63, 2.0**64,
    1.0, -1.0, 123456789.123456789,
]  # fmt: skip
INTS = [0, 1, -1, 2**31, 2**53, 2**53 + 1, 10**16, 2**63 - 1, -(2**63), 1_700_000_000_123_456_789]
TEXTS = [
    "", " ", "\t\r\n", "\x01\x1f\x7f", "\\u0000", "\\\\u0000", '"', "'", "\\", "/", "é", "e\u0301", "\u202eabc",
    "\u2028", "\ufeff", "\ufffd", "\uffff", "\ud7ff", "\ue000", "😀", "👩‍👩‍👧", "\U0010ffff", '{"$float": "1"}', "NaN",
    "$float", "null", "x" * 200, "日本語", "İ", "ß",
]  # fmt: skip
KINDS = "?bhilqBHILQefdgFDGSUMm"


class Inner(msgspec.Struct):
    number: float
    text: str | None
    raw: bytes


class Everything(msgspec.Struct):
    """A strategy's state with a field of each sort that may be kept."""

    floats: list[float]
    ints: list[int]
    texts: dict[str, float]
    nested: dict[str, list[Inner | None]]
    pair: tuple[int, float]
    arrays: list[NDArray[Any]]


class Draw:
    """Values at random, and their number. `odd`: 0 is what JSON can hold, 1 also -0.0, 2 also NaN and infinities."""

    def __init__(self, seed: int) -> None:
        self.chance = np.random.default_rng(seed)
        self.values = 0

    def doubles(self, count: int, *, odd: int = 1) -> list[float]:
        """Random bit patterns, subnormals, large whole numbers, short decimals, edges."""
        chance = self.chance
        self.values += count
        bits = chance.integers(0, 2**64, count, dtype=np.uint64)
        some = bits.view(np.float64).copy()
        small = (bits & np.uint64(0x800FFFFFFFFFFFFF)).view(np.float64)
        large = np.floor(chance.uniform(-1, 1, count) * 10.0 ** chance.integers(0, 300, count))
        short = np.round(chance.uniform(-1e6, 1e6, count), 3)
        edges = chance.choice(np.array(EDGES), count)
        found = np.choose(chance.integers(0, 5, count), [some, small, large, short, edges])
        found = np.where(np.isfinite(found), found, short)
        if odd == 0:
            found += 0.0  # of -0.0 as well
        if odd == 2:
            found = np.where(chance.random(count) < 0.02, chance.choice([np.nan, np.inf, -np.inf], count), found)
        return [float(value) for value in found]

    def ints(self, count: int) -> list[int]:
        self.values += count
        found = self.chance.integers(-(2**63), 2**63, count) >> self.chance.integers(0, 63, count)
        return [int(self.chance.choice(INTS)) if n % 7 == 0 else int(value) for n, value in enumerate(found)]

    def texts(self, count: int) -> list[str]:
        self.values += count
        chance = self.chance
        points = chance.integers(1, 0x110000, (count, 6))
        lengths = chance.integers(0, 7, count)
        made = [
            "".join(chr(p) for p in row[:n] if not 0xD800 <= p < 0xE000) for row, n in zip(points, lengths, strict=True)
        ]
        return [str(chance.choice(TEXTS)) if n % 3 == 0 else text for n, text in enumerate(made)]

    def array(self) -> NDArray[Any]:
        """Any permitted kind, byte order, shape and layout, and every bit pattern in it."""
        chance = self.chance
        letter = str(chance.choice(list(KINDS)))
        unit = f"[{chance.choice(['ns', 'us', 's', 'D', 'M', 'Y'])}]" if letter in "Mm" else ""
        size = str(chance.integers(1, 9)) if letter in "SU" else "8" if letter in "Mm" else ""
        if letter == "m":  # a duration has no place among the kinds
            letter = "M"
        dtype = np.dtype(f"{letter}{size}{unit}").newbyteorder(str(chance.choice(["<", ">"])))
        shape = tuple(int(side) for side in chance.integers(0, 5, chance.integers(0, 4)))
        length = math.prod(shape) * dtype.itemsize
        content = chance.integers(0, 256, length, dtype=np.uint8).tobytes()
        if letter == "U":
            content = np.array(self.texts(math.prod(shape) or 1)[: math.prod(shape)], dtype).tobytes()
        made = np.frombuffer(content, dtype).reshape(shape).transpose(chance.permutation(len(shape))).copy(order="K")
        made.flags.writeable = bool(chance.integers(0, 2))
        self.values += made.size
        return made

    def tree(self, depth: int = 0) -> Any:
        """A request's value: anything that JSON's types can nest."""
        kind = int(self.chance.integers(0, 7 if depth < 4 else 5))
        if kind < 5:
            self.values += kind > 2
            return [None, True, self.doubles(1, odd=2)[0], self.ints(1)[0], self.texts(1)[0]][kind]
        inner = [self.tree(depth + 1) for _ in range(self.chance.integers(0, 5))]
        return inner if kind == 5 else {f"{n}{self.texts(1)[0].replace('$', '')}": v for n, v in enumerate(inner)}

    def kept(self) -> Everything:
        """A strategy's state: its floats may be NaN of any bits."""
        payloads = [
            struct.unpack("<d", struct.pack("<Q", 0x7FF8000000000000 | int(n)))[0] for n in self.ints(3) if n >= 0
        ]
        inner = Inner(self.doubles(1)[0], self.texts(1)[0], self.texts(1)[0].encode())
        return Everything(
            [*self.doubles(20, odd=2), *payloads], self.ints(20),
            dict(zip(self.texts(5), self.doubles(5), strict=True)),
            {text: [msgspec.structs.replace(inner), None] for text in self.texts(2)},
            (self.ints(1)[0], self.doubles(1)[0]),
            [self.array() for _ in range(20)],
        )  # fmt: skip

    def state(self, bar: int, since: int, *, odd: int) -> BacktestCheckpointState:
        """A state whose every field is drawn. Lots stay positive: a trade that closes has prices to be divided."""
        n = RECORDS
        numbers, money = [self.ints(n) for _ in range(4)], [self.doubles(n, odd=odd) for _ in range(5)]
        tags = [text if at % 2 else None for at, text in enumerate(self.texts(n))]
        lots = [abs(one) or 1 for one in numbers[2]]
        recorded = [_spell(value) for value in money[4]]
        chosen = self.chance.integers(0, 3, n)
        return state(
            bar, cash=self.doubles(1)[0], ledger_from=since, samples_from=since, recorded_from=since,
            original_request={"lot_size": 1.0, "tree": [self.tree() for _ in range(20)]},
            ledger=[
                LedgerEvent(bar_, symbol, held, asked, price, fee, cash, "open", REASONS[reason], tag)
                for bar_, symbol, held, asked, price, fee, cash, reason, tag in zip(
                    numbers[0], numbers[1], lots, numbers[3], money[0], money[1], money[2], chosen, tags, strict=True)
            ],
            equity_samples=[EquitySample(*each) for each in zip(numbers[3], numbers[0], money[3], strict=True)],
            recorded=[RecordedValue(*each) for each in zip(numbers[0], self.texts(n), recorded, strict=True)],
            positions=[PositionState(self.texts(1)[0], *self.ints(2), *self.doubles(4)) for _ in range(5)],
            waiting=[WaitingOrder(*self.ints(2), "order", self.texts(1)[0]) for _ in range(5)],
            counters=Counters(zero_lots=self.ints(2), zero_lots_first=[None, (self.doubles(1)[0], self.doubles(1)[0])]),
            strategy_state=check_state(self.kept()),
        )  # fmt: skip


def leaves(value: Any) -> Iterator[Any]:
    """Every value of a tree in order, floats and arrays as their bytes; of containers their kind and size."""
    if isinstance(value, float):
        yield struct.pack("<d", value)
    elif isinstance(value, np.ndarray):
        strides = [step for step, side in zip(value.strides, value.shape, strict=True) if side > 1 and value.size]
        yield value.dtype.str, value.shape, strides, value.flags.writeable, value.tobytes()
    elif isinstance(value, msgspec.Struct):
        yield type(value)
        yield from itertools.chain.from_iterable(leaves(getattr(value, name)) for name in value.__struct_fields__)
    elif isinstance(value, dict):
        yield dict, len(value)
        yield from itertools.chain.from_iterable(leaves(each) for key in sorted(value) for each in (key, value[key]))
    elif isinstance(value, list | tuple):
        yield type(value), len(value)
        yield from itertools.chain.from_iterable(map(leaves, value))
    else:
        yield type(value), value


def differences(one: Any, other: Any) -> list[tuple[Any, Any]]:
    return [(a, b) for a, b in itertools.zip_longest(leaves(one), leaves(other)) if a != b]


@sized("values", ci=30_000, whole=1_000_000, minutes=30)
async def test_every_bit_comes_back(database: Database, campaign_seed: int, figures: Figures, values: int) -> None:
    draw, number = Draw(campaign_seed), 0
    while draw.values < values:
        operations, claim, service = await claimed(database, f"round-{number}")
        saved = [draw.state(bar, RECORDS * bar, odd=bar) for bar in range(3)]
        for one in saved:
            await service.save_checkpoint(claim.operation_id, CheckpointType.PERIODIC, one)
        found = await CheckpointService(database).load_checkpoint(claim.operation_id)
        assert found is not None
        where = f"--seed {campaign_seed}, round {number}"
        for name in ("ledger", "equity_samples", "recorded"):
            whole = [record for one in saved for record in getattr(one, name)]
            assert differences(getattr(found, name), whole) == [], f"{where}: {name}"
        for name in ("cash", "positions", "waiting", "counters", "original_request", "strategy_state"):
            assert differences(getattr(found, name), getattr(saved[-1], name)) == [], f"{where}: {name}"
        kept, again = (decode_state(one.strategy_state, Everything) for one in (saved[-1], found))
        assert differences(again, kept) == [], f"{where}: strategy state"
        assert encode_state(again) == found.strategy_state
        spelled = [value for *_, value in recorded_values(found.recorded, "")]
        assert [_spell(value) for value in spelled] == [record.value for one in saved for record in one.recorded]
        await service.finish(
            Status.COMPLETED, state=None, result={"tree": found.original_request}, result_digest="ab" * 32
        )
        result = (await operations.get(claim.operation_id)).result
        assert differences(result, {"tree": found.original_request}) == [], f"{where}: result"
        number += 1
    figures.add("values through codec, PostgreSQL and back", f"{draw.values:,}, {number} operations, 0 lost bits")


LOST: dict[str, Any] = {
    "a text with NUL": {"ledger": {"tag": "\x00"}},
    "a lone surrogate": {"ledger": {"tag": "\ud800"}},
    "another type": {"ledger": {"price": "1.0"}},
    "an unknown part": {"ledger": {"part": "half"}},
    "a numpy scalar": {"ledger": {"price": np.float64(-0.0)}},
    "a numpy integer": {"ledger": {"bar": np.int64(3)}},
    "more than 64 bits": {"ledger": {"bar": 2**64}},
    "a float for an integer": {"ledger": {"bar": 1.0}},
    "a request with bytes": {"head": {"original_request": {"a": b"b"}}},
    "a request with a set": {"head": {"original_request": {"a": {1}}}},
    "a request with a date": {"head": {"original_request": {"a": datetime.date(2020, 1, 1)}}},
    "a request with a decimal": {"head": {"original_request": {"a": decimal.Decimal("0.1")}}},
    "a request with a third": {"head": {"original_request": {"a": fractions.Fraction(1, 3)}}},
    "a request with a long double": {"head": {"original_request": {"a": np.longdouble(1) / 3}}},
    "a request with numbered keys": {"head": {"original_request": {1: 2}}},
    "a request with a tag of ours": {"head": {"original_request": {"a": {"$float": "1"}}}},
    "a request with a large integer": {"head": {"original_request": {"a": 2**70}}},
    "a request with an object": {"head": {"original_request": {"a": object()}}},
    "a state that is no bytes": {"head": {"strategy_state": "x"}},
}  # fmt: skip


@pytest.mark.parametrize("what", LOST)
async def test_what_would_lose_a_bit_is_refused_by_name(database: Database, what: str) -> None:
    _, _, service = await claimed(database)
    changes = LOST[what]
    event = {**msgspec.structs.asdict(state(0, 1).ledger[0]), **changes.get("ledger", {})}
    with pytest.raises(CheckpointError, match="can't be stored"):
        await service.save_checkpoint(
            "op", CheckpointType.PERIODIC, state(0, ledger=[LedgerEvent(**event)], **changes.get("head", {}))
        )  # fmt: skip
    assert await service.load_checkpoint("op") is None
    assert not service.in_doubt


class One(msgspec.Struct):
    x: Any


@pytest.mark.parametrize("value", [
    np.array([None]), np.zeros(2, "m8[s]"), np.zeros(2, "i4,f8"), np.float64(1.0), np.arange(9.0)[::2],
    np.arange(9.0)[::-1], np.ones((3, 3))[:, 1:], np.broadcast_to(np.float64(1.0), (3,)), {1, 2}, 2**70, object(),
])  # fmt: skip
def test_a_state_that_would_lose_a_bit_is_refused_by_name(value: Any) -> None:
    with pytest.raises(UndeclaredStateError):
        check_state(One(value))


class Ring(msgspec.Struct):
    ring: NDArray[np.float64]
    odd: float = 0.0


class Layouts(kt.Strategy):
    """Sums over an array that stands in memory column by column: in rows it would add in another order."""

    def __init__(self) -> None:
        self.state = Ring(np.zeros((90, 3)))

    def on_bar(self, bar: kt.Bar) -> None:
        if bar.index == 10:
            self.state.ring = np.asfortranarray(self.state.ring)
        self.state.ring[bar.index % 90] = bar.close[0], bar.high[0], bar.low[0]
        mean = float(self.state.ring.mean(axis=0)[0])
        self.state.odd = struct.unpack("<d", struct.pack("<Q", 0xFFF8000000000123))[0]
        bar.record(mean=mean)
        if bar.index % 7 == 0:
            bar.target_weight(0, 0.1 + 0.5 * ((mean * 1e6) % 1))


class Nans(kt.Strategy):
    """Records the NaN of infinity minus infinity, whose sign on some machines isn't that of `math.nan`."""

    def on_bar(self, bar: kt.Bar) -> None:
        bar.record(nan=struct.unpack("<d", struct.pack("<Q", 0xFFF8000000000000))[0])


@pytest.mark.parametrize("kind", [Layouts, Nans])
async def test_what_a_strategy_sees_is_the_same_after_a_resume(kind: type[kt.Strategy]) -> None:
    bars = kt.Bars.read("synthetic:?bars=500&seed=7&timeframe=1h")
    clean = await kt.backtest(bars, kind())
    engine = kt.BacktestingEngine(kt.BacktestRequest(), bars, kind())
    async with aclosing(engine.run()) as blocks:
        async for block in blocks:
            if block.bar_index == 199:
                break
    saved = kt.build_backtest_checkpoint_state(engine, 199, int(bars.timestamps[199])).to_dict()
    again = kt.BacktestingEngine(kt.BacktestRequest(), bars, kind())
    async with aclosing(again.run(BacktestCheckpointState.from_dict(json.loads(json.dumps(saved))))) as blocks:
        async for _ in blocks:
            pass
    assert again.results().digest == clean.digest
    assert differences(again.results().recorded_values, clean.recorded_values) == []
