"""P1's mechanism: one token goes round, one operation computes per loop iteration, and the token is never lost."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from supervision_runs import NEVER, REQUEST, Count, Counter, Gate, Held, market, until

import ktrdr_async as kt
from ktrdr_async.supervision import shielding
from ktrdr_async.supervision.heart import BEATS_AT_ONCE
from ktrdr_async.supervision.turns import OperationTurn, Turns, turns_of_this_loop
from ktrdr_async.supervision.worker import BacktestWorker

pytestmark = pytest.mark.anyio


class Clock:
    """Seconds that pass only when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def at_rest(turns: Turns) -> bool:
    """Whether nobody has the token or waits for it."""
    return turns._holder is None and not turns._queue


async def iterate(times: int = 1) -> None:
    for _ in range(times):
        await asyncio.sleep(0)


async def test_one_operation_computes_per_iteration() -> None:
    clock = Clock()
    turns = Turns(clock=clock)
    order: list[tuple[int, str]] = []
    iteration = 0
    running = True

    async def count() -> None:
        nonlocal iteration
        while running:
            iteration += 1
            await asyncio.sleep(0)

    async def operation(name: str) -> None:
        turn = turns.turn()
        await turn.enter()
        for _ in range(20):
            order.append((iteration, name))
            clock.now += turns.budget
            await turn.pass_on()
        turn.leave()

    counting = asyncio.create_task(count())
    first = turns.turn()
    await first.enter()
    operations = [asyncio.create_task(operation(name)) for name in "abcde"]
    await iterate()  # all of them wait
    first.leave()
    await asyncio.gather(*operations)
    running = False
    await counting
    at = [when for when, _ in order]
    assert len(set(at)) == len(at) == 100, "two of them computed between two turns of the loop"
    assert [name for _, name in order] == list("abcde") * 20, "each gets its turn in its order"


async def test_a_waiting_turn_that_is_cancelled_passes_the_token_on() -> None:
    turns = Turns()
    first, second, third = turns.turn(), turns.turn(), turns.turn()
    await first.enter()
    waiting = asyncio.create_task(second.enter())
    last = asyncio.create_task(third.enter())
    await iterate()
    waiting.cancel()
    await asyncio.wait({waiting})
    first.leave()
    await last
    assert turns._holder is third


async def test_a_turn_that_is_cancelled_while_it_is_being_woken_passes_the_token_on() -> None:
    turns = Turns()
    first, second, third = turns.turn(), turns.turn(), turns.turn()
    await first.enter()
    waiting = asyncio.create_task(second.enter())
    last = asyncio.create_task(third.enter())
    await iterate()
    first.leave()
    while turns._holder is not second:
        await iterate()
    waiting.cancel()  # it holds the token and doesn't know it yet
    await asyncio.wait({waiting})
    assert waiting.cancelled()
    await last
    assert turns._holder is third


async def test_entering_and_leaving_twice_are_once() -> None:
    turns = Turns()
    first, second = turns.turn(), turns.turn()
    await first.enter()
    await first.enter()
    second.leave()
    assert turns._holder is first
    first.leave()
    first.leave()
    await second.enter()
    assert turns._holder is second


async def test_a_turn_is_due_after_its_budget() -> None:
    clock = Clock()
    turns = Turns(budget=0.5, clock=clock)
    turn = turns.turn()
    await turn.enter()
    assert not turn.due()
    clock.now = 0.5
    assert turn.due()


@pytest.mark.parametrize("share", [1.0, 0.5, 0.25])
async def test_the_share_of_the_loop_bounds_all_of_them_together(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a turn of t seconds nobody computes for t * (1 / share - 1)."""
    loop = asyncio.get_running_loop()
    pauses: list[float] = []
    later = loop.call_later

    def call_later(delay: float, *args: Any, **keywords: Any) -> Any:
        pauses.append(delay)
        return later(0, *args, **keywords)

    monkeypatch.setattr(loop, "call_later", call_later)
    clock = Clock()
    turns = Turns(loop_share=share, clock=clock)
    first, second = turns.turn(), turns.turn()
    await first.enter()
    clock.now += 0.002
    first.leave()
    await second.enter()
    expected = 0.002 * (1 / share - 1)
    assert pauses == ([] if share == 1.0 else [pytest.approx(expected)])


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5])
async def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="loop_share"):
        Turns(loop_share=share)


Step = tuple[str, int]
STEPS = st.lists(
    st.tuples(st.sampled_from(["enter", "leave", "pass_on", "cancel", "iterate"]), st.integers(0, 3)), max_size=60
)


@settings(max_examples=300, deadline=None)
@given(STEPS, st.sampled_from([1.0, 0.9]))
def test_never_two_holders_never_a_lost_token(steps: list[Step], share: float) -> None:
    """Whatever four operations do, in whatever order: at the end a fifth one still gets the token."""
    asyncio.run(_play(steps, share))


async def _play(steps: list[Step], share: float) -> None:
    clock = Clock()
    turns = Turns(loop_share=share, clock=clock)
    operations = [turns.turn() for _ in range(4)]
    doing: list[asyncio.Task[None] | None] = [None] * 4
    inside: set[int] = set()

    async def act(number: int, what: str) -> None:
        inside.discard(number)
        turn = operations[number]
        await (turn.enter() if what == "enter" else turn.pass_on())
        inside.add(number)

    def check() -> None:
        assert len(inside) <= 1, "two of them compute"
        for number in inside:
            assert turns._holder is operations[number]

    for what, number in steps:
        clock.now += 0.0001
        task = doing[number]
        busy = task is not None and not task.done()
        if what == "iterate":
            await iterate(number + 1)
        elif what == "cancel" and task is not None:
            task.cancel()
        elif busy:
            await iterate()
        elif what == "leave":
            inside.discard(number)
            operations[number].leave()
        elif what in ("enter", "pass_on"):
            doing[number] = asyncio.create_task(act(number, what))
        check()
    for task in doing:
        if task is not None:
            task.cancel()
    await asyncio.gather(*(task for task in doing if task is not None), return_exceptions=True)
    for turn in operations:
        turn.leave()
    fifth = turns.turn()
    await asyncio.wait_for(fifth.enter(), 5)
    assert turns._holder is fifth
    fifth.leave()
    await asyncio.sleep(0.001)
    assert at_rest(turns)


async def test_an_async_strategy_awaits_without_the_token(worker: BacktestWorker) -> None:
    holders: list[OperationTurn | None] = []

    class Looking(kt.AsyncStrategy):
        async def on_bar(self, bar: kt.Bar) -> None:
            holders.append(worker._turns._holder)

    handle = worker.start(REQUEST, "held", bars=market(), strategy=Held(gate := Gate(345)), policy=NEVER)
    await gate.reached.wait()
    # One that waits for its model keeps nobody from computing.
    await worker.run(REQUEST, "op", bars=market(), strategy=Looking(), policy=NEVER)
    assert set(holders) == {None}
    gate.open.set()
    await handle.result()


async def test_operations_go_on_side_by_side(worker: BacktestWorker) -> None:
    """None of ten runs to its end before another one has begun."""
    bars = kt.Bars.read("synthetic:?bars=40000&seed=7&timeframe=1h")
    handles = [worker.start(REQUEST, f"op{n}", bars=bars, strategy=Counter(), policy=NEVER) for n in range(10)]
    done, _ = await asyncio.wait(
        {asyncio.create_task(handle.result()) for handle in handles}, return_when=asyncio.FIRST_COMPLETED
    )
    assert done
    others = [handle.inspect().bar_index for handle in handles if not handle.done]
    assert len(others) >= 5
    assert min(others) > 10_000
    await asyncio.gather(*(handle.result() for handle in handles))


async def test_large_work_runs_in_a_thread_without_the_token() -> None:
    turns = Turns()
    turn, other = turns.turn(), turns.turn()
    here, go_on = threading.get_ident(), threading.Event()

    def work() -> int:
        assert go_on.wait(20)
        return threading.get_ident()

    await turn.enter()
    working = asyncio.create_task(turn.offload(work))
    await iterate(3)
    await other.enter()
    other.leave()
    go_on.set()
    assert await working != here
    assert turns._holder is turn


async def test_a_cancelled_offload_waits_for_its_thread_and_does_not_work_twice() -> None:
    turns = Turns()
    turn = turns.turn()
    go_on, calls = threading.Event(), []

    def work() -> None:
        calls.append(1)
        assert go_on.wait(20)

    working = asyncio.create_task(turn.offload(work))
    for _ in range(5):
        await iterate(3)
        working.cancel()
    await iterate(3)
    assert not working.done()
    go_on.set()
    await asyncio.wait({working})
    assert working.cancelled()
    assert calls == [1]
    assert turns._holder is None


def test_a_torn_down_loop_does_not_have_the_work_done_twice() -> None:
    begun, go_on, calls = threading.Event(), threading.Event(), []

    def work() -> None:
        calls.append(1)
        begun.set()
        assert go_on.wait(20)

    async def main() -> None:
        keep.append(asyncio.create_task(Turns().turn().offload(work)))
        await asyncio.to_thread(begun.wait)
        asyncio.get_running_loop().call_later(0.05, go_on.set)  # by then the teardown waits for the thread

    keep: list[asyncio.Task[None]] = []
    asyncio.run(main())
    assert calls == [1]
    assert keep[0].cancelled()


async def test_a_callback_that_raises_does_not_keep_the_loops_token() -> None:
    """The original's shape of it: the generator stayed open as long as its error was looked at."""
    kept: list[BaseException] = []

    def stop(block: kt.Block) -> None:
        raise KeyError("enough")

    try:
        await kt.backtest(market(), Counter(), request=REQUEST, on_block=stop)
    except KeyError as error:
        kept.append(error)
    assert kept
    assert turns_of_this_loop()._holder is None
    await asyncio.wait_for(kt.backtest(market(), Counter(), request=REQUEST), 20)


class Iterations:
    """Counts the loop's iterations."""

    def __init__(self) -> None:
        self.count = 0
        self._handle: asyncio.Handle | None = None

    def _next(self) -> None:
        self.count += 1
        self._handle = asyncio.get_running_loop().call_soon(self._next)

    def __enter__(self) -> Iterations:
        self._next()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._handle is not None
        self._handle.cancel()


async def test_coroutines_that_do_not_wait_keep_their_turn() -> None:
    """Fifty of them at once took ten times as long as one after the other: each bar was a turn."""

    class Never(kt.AsyncStrategy):
        async def on_bar(self, bar: kt.Bar) -> None:
            pass

    turns = Turns(clock=Clock())

    async def run() -> None:
        async for _ in kt.BacktestingEngine(REQUEST, market(), Never(), turn=turns.turn()).run():
            pass

    with Iterations() as iterations:
        await asyncio.gather(*(run() for _ in range(10)))
    assert iterations.count < 200, "of 10,000 bars"


async def test_of_many_that_begin_one_does_in_an_iteration(worker: BacktestWorker) -> None:
    begun: list[int] = []

    class Named(Counter):
        @property
        def parameters(self) -> dict[str, Any]:
            if self not in seen:
                seen.append(self)
                begun.append(iterations.count)
            return super().parameters

    seen: list[Named] = []
    with Iterations() as iterations:
        await asyncio.gather(*(kt.backtest(market(), Named(), request=REQUEST) for _ in range(30)))
        handles = [worker.start(REQUEST, f"op{n}", bars=market(), strategy=Named(), policy=NEVER) for n in range(30)]
        for handle in handles:
            await handle.result()
    assert len(begun) == len(set(begun)) == 60


async def test_the_heart_beats_for_fifty_at_a_time(worker: BacktestWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    """One statement for a thousand would hold the loop for fifteen milliseconds while it is made."""
    gates = [Gate(5) for _ in range(230)]
    for n, gate in enumerate(gates):
        worker.start(REQUEST, f"op{n}", bars=market(), strategy=Held(gate), policy=NEVER)
    for gate in gates:
        await gate.reached.wait()
    told: list[list[str]] = []
    heartbeat = worker.operations.heartbeat

    async def count(connection: Any, beats: Any) -> Any:
        told.append([beat.claim.operation_id for beat in beats])
        return await heartbeat(connection, beats)

    monkeypatch.setattr(worker.operations, "heartbeat", count)
    assert worker.heart is not None
    worker.heart.wake()
    everybody = {f"op{n}" for n in range(230)}

    async def all_told() -> bool:
        return {named for each in told for named in each} == everybody

    await until(all_told, "a beat for each of them")
    assert max(map(len, told)) == BEATS_AT_ONCE


async def test_threads_work_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shielding, "OVERTAKING_SECONDS", 1_000.0)
    go_on, order = threading.Event(), []

    def first() -> None:
        order.append("first begins")
        assert go_on.wait(20)
        order.append("first ends")

    both = [
        asyncio.create_task(shielding.in_thread(first)),
        asyncio.create_task(shielding.in_thread(lambda: order.append("second"))),
    ]
    third = asyncio.create_task(shielding.in_thread(lambda: order.append("third")))

    async def begun() -> bool:
        return bool(order)

    await until(begun, "the first one begins")
    await iterate(20)
    third.cancel()  # who waits for its place doesn't begin
    go_on.set()
    await asyncio.gather(*both)
    await asyncio.wait({third})
    assert order == ["first begins", "first ends", "second"]
    assert third.cancelled()


async def test_a_thread_that_takes_long_is_overtaken() -> None:
    go_on = threading.Event()
    long = asyncio.create_task(shielding.in_thread(lambda: go_on.wait(20)))
    await asyncio.wait_for(shielding.in_thread(lambda: None), 20)
    assert not long.done()
    await asyncio.wait_for(shielding.in_thread(lambda: None), 20)  # and its place isn't given back twice
    go_on.set()
    await long
    await asyncio.wait_for(shielding.in_thread(lambda: None), 20)


async def test_a_plain_state_is_not_shared_by_turns(worker: BacktestWorker) -> None:
    """Two operations of one class interleave bar by bar and keep their own counts."""
    one, two = await asyncio.gather(
        worker.run(REQUEST, "one", bars=market(), strategy=Counter(), policy=NEVER),
        worker.run(REQUEST, "two", bars=market(), strategy=Counter(), policy=NEVER),
    )
    assert one.digest == two.digest
    assert Count() == Count()
