"""What a strategy may keep, and what it sees: undeclared state, the read-only past, randomness, logs, hooks."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from running import bars_of, run

from ktrdr_async.backtesting.engine import BacktestingEngine
from ktrdr_async.backtesting.request import BacktestRequest
from ktrdr_async.errors import OrderError, ParameterError, StrategyError, UndeclaredStateError
from ktrdr_async.market import Bars
from ktrdr_async.strategies import AsyncStrategy, Bar, Fill, Strategy, TradeClosed, WeightStrategy

pytestmark = pytest.mark.anyio


class Idle(Strategy):
    def on_bar(self, bar: Bar) -> None:
        pass


class Counted(msgspec.Struct):
    bars: int = 0


class Anything(msgspec.Struct):
    value: Any = None


class Typed(msgspec.Struct):
    level: float = 0.0
    levels: dict[str, float] = {}
    window: NDArray[np.float64] | None = None


class WithSet(msgspec.Struct):
    inner: dict[str, set[int]] = {}


# What would change unseen by a checkpoint.


async def test_an_attribute_that_is_set_after_init_is_refused_and_the_error_names_bar_and_time() -> None:
    class Late(Strategy):
        def __init__(self) -> None:
            self.count = 0

        def on_bar(self, bar: Bar) -> None:
            if bar.index == 3:
                self.count += 1

    with pytest.raises(UndeclaredStateError, match=r"Late\.count was set after __init__") as caught:
        await run(Late(), bars_of([1.0] * 6))
    assert caught.value.bar_index == 3
    assert caught.value.timestamp.startswith("2020-01-01T03:00:00")
    assert "in Late at bar 3" in caught.value.__notes__[0]
    with pytest.raises(UndeclaredStateError, match="deleted"):
        del Late().count


@pytest.mark.parametrize(
    "value", [[], {}, set(), bytearray(), np.zeros(3), (1, [2]), msgspec.Raw, Counted(), iter(()), logging]
)
def test_what_can_change_on_self_is_refused_before_the_run(value: Any) -> None:
    class Keeps(Idle):
        def __init__(self, kept: Any = None) -> None:
            self.kept = value

    if value is msgspec.Raw or value is logging:  # a class and a module are constants
        BacktestingEngine(BacktestRequest(), bars_of([1.0]), Keeps())
        return
    with pytest.raises(UndeclaredStateError, match=r"Keeps.kept is a .*, which can change unseen"):
        BacktestingEngine(BacktestRequest(), bars_of([1.0]), Keeps())


def test_constants_and_resources_are_permitted() -> None:
    table = np.arange(3.0)
    table.flags.writeable = False

    class Keeps(Idle):
        resources = ("model",)

        def __init__(self) -> None:
            self.table, self.names, self.model = table, ("a", 1, None, frozenset({1})), {"weights": [1.0]}

    BacktestingEngine(BacktestRequest(), bars_of([1.0]), Keeps())


@pytest.mark.parametrize("value", [[], {}, set(), np.zeros(2)])
def test_a_mutable_class_attribute_is_refused(value: Any) -> None:
    class Base(Idle):
        shared: ClassVar[Any] = value

    class Child(Base):
        pass

    with pytest.raises(UndeclaredStateError, match=r"Child\.shared"):
        BacktestingEngine(BacktestRequest(), bars_of([1.0]), Child())


@pytest.mark.parametrize("kind", [WeightStrategy, Strategy, AsyncStrategy])
def test_all_kinds_are_looked_at(kind: type) -> None:
    def init(self: Any) -> None:
        self.kept = []

    keeps: Any = type(kind)("Keeps", (kind,), {"__init__": init})
    with pytest.raises(UndeclaredStateError, match=r"Keeps\.kept"):
        BacktestingEngine(BacktestRequest(), bars_of([1.0]), keeps())


def starting_with(kept: Any) -> Strategy:
    class Starts(Idle):
        def __init__(self) -> None:
            self.state = kept

    return Starts()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (Anything(np.float64(1.0)), r"Anything: field value: the value np.float64\(1.0\) is a numpy scalar"),
        (Anything(object()), "Anything: field value: a object can't be saved"),
        (Anything(2**70), "can't be saved"),
        (Typed(level=1), "Typed.level holds 1 and would come back as 1.0"),
        (Typed(levels={"a": 1}), r"Typed.levels holds \{'a': 1\} and would come back as \{'a': 1.0\}"),
        (Typed(level="x"), "Typed doesn't come back from its bytes"),  # type: ignore[arg-type]
        (WithSet(), "WithSet holds a set"),
        ({"a": 1}, "Starts.state is a dict"),
    ],
)
async def test_a_state_that_would_not_come_back_equal_is_refused_before_the_run(state: Any, message: str) -> None:
    with pytest.raises(UndeclaredStateError, match=message):
        await run(starting_with(state), bars_of([1.0] * 3))


async def test_a_numpy_scalar_that_enters_the_state_in_a_run_is_refused() -> None:
    class Sums(Strategy):
        def __init__(self) -> None:
            self.state = Typed()

        def on_bar(self, bar: Bar) -> None:
            self.state.level = bar.past.close.mean()

    with pytest.raises(UndeclaredStateError, match=r"field level: the value .* is a numpy scalar") as caught:
        await run(Sums(), bars_of([1.0] * 3))
    assert caught.value.hint == "store float(...) instead"


async def test_arrays_in_the_state_come_back_whole() -> None:
    class Window(Strategy):
        def __init__(self) -> None:
            self.state = Typed(window=np.zeros((2, 1)))

        def on_bar(self, bar: Bar) -> None:
            self.state.window = np.vstack([self.state.window[1:], [bar.close]])

    strategy = Window()
    await run(strategy, bars_of([1.0, 2.0, 3.0]))
    assert strategy.state.window.tolist() == [[2.0], [3.0]]


async def test_a_strategy_object_is_in_one_run_at_a_time() -> None:
    strategy, bars = Idle(), bars_of([1.0] * 250)
    first = BacktestingEngine(BacktestRequest(), bars, strategy).run()
    await anext(first)
    with pytest.raises(StrategyError, match="this Idle is in another run"):
        await run(strategy, bars)
    await first.aclose()
    await run(strategy, bars)


# What a strategy sees.


async def test_the_past_is_read_only_c_ordered_and_ends_at_the_bar() -> None:
    seen: list[int] = []

    class Looks(Strategy):
        def prepare(self, bars: Bars) -> dict[str, Any]:
            return {"feature": np.arange(float(len(bars)))}

        def on_bar(self, bar: Bar) -> None:
            past = bar.past
            assert len(past) == bar.index + 1
            for name in ("open", "high", "low", "close", "volume"):
                column = getattr(past, name)
                assert column.shape == (bar.index + 1, 2)
                assert column.flags.c_contiguous
                np.testing.assert_array_equal(column[-1], getattr(bar, name))
                with pytest.raises(ValueError, match="read-only"):
                    column[0, 0] = 1.0
            assert past.timestamps[-1] == bar.timestamp
            with pytest.raises(ValueError, match="read-only"):
                past.timestamps[0] = 1
            with pytest.raises(AttributeError):
                bar.close = (1.0, 2.0)  # type: ignore[misc]
            assert bar.feature("feature") == bar.index
            assert bar["B"].close == bar.close[1] == bar[1].close
            seen.append(bar.index)

    await run(Looks(), bars_of(np.arange(1.0, 501.0).reshape(250, 2), symbols=("A", "B")))
    assert seen == list(range(250))


async def drawn(seed: int, bars: int, *, skip: int = 0) -> dict[int, list[float]]:
    """Random numbers by bar; at every `skip`-th bar none are drawn."""
    found: dict[int, list[float]] = {}

    class Draws(Strategy):
        def on_bar(self, bar: Bar) -> None:
            if not skip or bar.index % skip:
                found[bar.index] = [*bar.rng.random(3).tolist(), bar.rng.normal()]

    await run(Draws(), bars_of([1.0] * bars), seed=seed)
    return found


async def test_a_bars_random_numbers_are_of_seed_and_index_alone() -> None:
    whole = await drawn(7, 12)
    assert await drawn(7, 12) == whole
    assert await drawn(7, 30) | whole == await drawn(7, 30)
    assert all(whole[index] == values for index, values in (await drawn(7, 12, skip=3)).items())
    assert len({tuple(values) for values in whole.values()}) == 12
    other = await drawn(8, 12)
    assert all(other[index] != whole[index] for index in whole)
    assert whole[3][:3] == np.random.Generator(np.random.Philox(key=[7, 3])).random(3).tolist()


async def test_a_log_message_carries_bar_and_time(caplog: pytest.LogCaptureFixture) -> None:
    class Says(Strategy):
        def on_bar(self, bar: Bar) -> None:
            if bar.index == 2:
                self.log.warning("close %s", bar.close[0])

    with caplog.at_level(logging.INFO, logger="ktrdr_async.strategy"):
        strategy = Says()
        strategy.log.info("before")
        await run(strategy, bars_of([1.0, 2.0, 3.0]))
    assert [record.getMessage() for record in caplog.records] == [
        "before",
        "bar 2, 2020-01-01T02:00:00+00:00: close 3.0",
    ]
    assert caplog.records[1].bar_index == 2  # type: ignore[attr-defined]
    assert caplog.records[1].name == "ktrdr_async.strategy"


# Hooks.


class Heard(msgspec.Struct):
    calls: list[str] = []


def turning(kind: type) -> Any:
    """A strategy that turns round at bars 1, 3 and 5, and writes down everything that it is told."""

    class Sync(Strategy):
        def __init__(self) -> None:
            self.state = Heard()

        def on_fill(self, bar: Bar, fill: Fill) -> None:
            self.state.calls.append(f"{bar.index} fill {fill.symbol} {fill.part} {fill.quantity:g} {fill.reason}")

        def on_trade(self, bar: Bar, trade: TradeClosed) -> None:
            self.state.calls.append(f"{bar.index} trade {trade.symbol} {trade.side} {trade.entry_bar} {trade.exit_bar}")

        def on_bar(self, bar: Bar) -> None:
            self.state.calls.append(f"{bar.index} bar")
            if bar.index in (1, 3):
                for symbol in range(2):
                    bar.target_quantity(symbol, 2.0 if bar.index == 1 else -1.0)

        def on_end(self, bar: Bar) -> None:
            self.state.calls.append(f"{bar.index} end")
            with pytest.raises(OrderError, match="nothing can be ordered after the last bar"):
                bar.order(0, 1.0)

    if kind is Strategy:
        return Sync()

    class Async(AsyncStrategy):
        def __init__(self) -> None:
            self.state = Heard()

        async def on_fill(self, bar: Bar, fill: Fill) -> None:
            Sync.on_fill(self, bar, fill)  # type: ignore[arg-type]

        async def on_trade(self, bar: Bar, trade: TradeClosed) -> None:
            Sync.on_trade(self, bar, trade)  # type: ignore[arg-type]

        async def on_bar(self, bar: Bar) -> None:
            Sync.on_bar(self, bar)  # type: ignore[arg-type]

        async def on_end(self, bar: Bar) -> None:
            Sync.on_end(self, bar)  # type: ignore[arg-type]

    return Async()


@pytest.mark.parametrize("kind", [Strategy, AsyncStrategy])
async def test_fills_and_trades_come_in_ledger_order_before_the_bar(kind: type) -> None:
    strategy = turning(kind)
    await run(strategy, bars_of([[10.0, 20.0]] * 6, symbols=("A", "B")))
    assert strategy.state.calls == [
        "0 bar",
        "1 bar",
        "2 fill A open 2 order",
        "2 fill B open 2 order",
        "2 bar",
        "3 bar",
        "4 fill A close -2 order",
        "4 trade A 1 2 4",
        "4 fill B close -2 order",
        "4 trade B 1 2 4",
        "4 fill A open -1 order",
        "4 fill B open -1 order",
        "4 bar",
        "5 bar",
        "5 fill A close 1 forced_close",
        "5 trade A -1 4 5",
        "5 fill B close 1 forced_close",
        "5 trade B -1 4 5",
        "5 end",
    ]


async def test_what_on_fill_orders_belongs_to_the_same_decision() -> None:
    class Doubles(Strategy):
        def __init__(self) -> None:
            self.state = Counted()

        def on_fill(self, bar: Bar, fill: Fill) -> None:
            if self.state.bars == 0:
                self.state.bars = 1
                bar.order(0, 3.0)

        def on_bar(self, bar: Bar) -> None:
            if bar.index in (0, 1):
                bar.order(0, 1.0)

    results = await run(Doubles(), bars_of([10.0] * 4))
    assert results.fills["quantity"].tolist() == [1.0, 4.0, -5.0]


@pytest.mark.parametrize(
    ("decide", "message"),
    [
        (lambda bar: bar.target_weight(0, 1.01), r"weight 1.01 of S0 is outside -1..1"),
        (lambda bar: bar.target_weight(0, float("nan")), "weight nan of S0"),
        (lambda bar: bar.order(0, float("inf")), "quantity inf of S0 is not a finite number"),
        (lambda bar: bar.order("X", 1.0), "there is no symbol 'X'; there are: S0"),
        (lambda bar: bar.order(1, 1.0), "there is no symbol 1; positions are 0 to 0"),
        (lambda bar: (bar.order(0, 1.0), bar.target_weight(0, 1.0)), "S0 has a target and an order in one bar"),
        (lambda bar: (bar.flatten(), bar.order(0, 1.0)), "S0 has a target and an order in one bar"),
        (lambda bar: bar.feature("rsi"), "there is no feature 'rsi'; there are: none"),
    ],
)
async def test_a_bad_decision_names_bar_and_symbol(decide: Any, message: str) -> None:
    class Decides(Strategy):
        def on_bar(self, bar: Bar) -> None:
            if bar.index == 2:
                decide(bar)

    with pytest.raises(OrderError, match=message) as caught:
        await run(Decides(), bars_of([10.0] * 4))
    assert caught.value.bar_index == 2
    assert "in Decides at bar 2, 2020-01-01T02:00:00Z, symbols S0" in caught.value.__notes__


async def test_deciding_on_a_symbol_before_its_first_bar_is_an_error() -> None:
    nan = float("nan")
    bars = bars_of([[1.0, nan], [1.0, nan], [1.0, 2.0]])

    class Early(Strategy):
        def on_bar(self, bar: Bar) -> None:
            bar.flatten()  # leaves out what hasn't begun
            if bar.index == 1:
                bar.target_weight(1, 0.5)

    with pytest.raises(OrderError, match=r"S1 has no bar yet: .* bar 2, this is 1"):
        await run(Early(), bars)


# A class with both methods.


class Both(WeightStrategy):
    def __init__(self, weights: bool | None = None) -> None:
        self.weights = weights

    @property
    def by_weight(self) -> bool | None:
        return self.weights

    def target_weights(self, bars: Bars) -> NDArray[np.float64]:
        return np.full((len(bars), bars.k), 0.5)

    def target_quantities(self, bars: Bars) -> NDArray[np.float64]:
        return np.full((len(bars), bars.k), 3.0)


async def test_a_class_with_both_methods_says_which_counts() -> None:
    bars = bars_of([10.0] * 3)
    assert (await run(Both(weights=False), bars)).fills["quantity"].tolist() == [3.0, -3.0]
    assert (await run(Both(weights=True), bars)).fills["quantity"].tolist()[0] > 1000
    with pytest.raises(StrategyError, match="Both implements both of target_weights and target_quantities"):
        await run(Both(), bars)
    with pytest.raises(StrategyError, match="implements none of"):
        await run(WeightStrategy(), bars)


async def test_warmup_is_the_number_of_closes_before_the_first_decision() -> None:
    for warmup, first in ((0, 0), (1, 0), (2, 1), (5, 4)):
        seen: list[int] = []

        class Sees(Strategy):
            warmup = 0

            def on_bar(self, bar: Bar) -> None:
                seen.append(bar.index)  # noqa: B023

        Sees.warmup = warmup
        await run(Sees(), bars_of([1.0] * 8))
        assert seen == list(range(first, 8))


class Pair(msgspec.Struct):
    one: list[float] = []
    other: list[float] = []
    nested: dict[str, list[float]] = {}


@pytest.mark.parametrize("where", ["beside", "inside"])
async def test_one_object_at_two_places_of_a_state_is_refused(where: str) -> None:
    """It would come back as two, and what is appended to one of them would be missing in the other."""

    class Aliased(Strategy):
        def __init__(self) -> None:
            self.state = Pair()

        def on_bar(self, bar: Bar) -> None:
            if bar.index == 3 and where == "beside":
                self.state.other = self.state.one
            elif bar.index == 3:
                self.state.nested["a"] = self.state.one

    with pytest.raises(UndeclaredStateError, match=r"Pair\.(other|nested) holds an object that the state holds"):
        await run(Aliased(), bars_of([100.0 + i for i in range(30)]))


class Memory(msgspec.Struct):
    whole: NDArray[np.float64] = msgspec.field(default_factory=lambda: np.zeros(9))
    part: NDArray[np.float64] = msgspec.field(default_factory=lambda: np.zeros(3))
    raw: bytearray = msgspec.field(default_factory=bytearray)
    more: bytearray = msgspec.field(default_factory=bytearray)


@pytest.mark.parametrize("share", ["view", "bytearray"])
def test_memory_that_two_fields_share_is_refused_before_the_first_bar(share: str) -> None:
    class Sharing(Strategy):
        def __init__(self) -> None:
            self.state = Memory()
            if share == "view":
                self.state.part = self.state.whole[-3:]
            else:
                self.state.more = self.state.raw

        def on_bar(self, bar: Bar) -> None:
            pass

    with pytest.raises(UndeclaredStateError, match=r"Memory\.(part|more) holds an object that the state holds"):
        BacktestingEngine(BacktestRequest(), bars_of([100.0] * 5), Sharing())


@pytest.mark.parametrize("value", [float("inf"), float("nan"), [1.0, float("-inf")], {"a": float("inf")}, 2**63])
def test_a_parameter_that_could_not_be_stored_is_refused(value: Any) -> None:
    class Free(Strategy):
        def __init__(self, value: Any = None) -> None:
            self.value = value if not isinstance(value, list | dict) else None

        def on_bar(self, bar: Bar) -> None:
            pass

    with pytest.raises(ParameterError, match=r"Free: value=.* couldn't be stored"):
        Free(value=value)
