"""Who may compute now: one token a worker goes round, so that the loop stays responsive beside any number of runs.

One operation computes per loop iteration, for at most `budget` seconds, looked at between bars. A token that is handed
on is taken up in the next iteration, never in the same one: hundreds of operations that each give the loop a turn would
still starve it if they all computed between two of its turns.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from ktrdr_async.supervision.lag import LoopLag
from ktrdr_async.supervision.shielding import in_thread

if TYPE_CHECKING:
    from ktrdr_async.backtesting.engine import BacktestingEngine

T = TypeVar("T")

TURN_SECONDS = 0.0005
LONG_CALL_SECONDS = 0.05  # from which on a call of a strategy is said to hold the loop


class Turns:
    """The token of one loop.

    Args:
        budget: seconds that a turn lasts.
        loop_share: share of the loop's time that all turns together may take, 0 < loop_share <= 1.
        clock: monotonic seconds.

    Attributes:
        lag: how late the loop is, for those who watch.
    """

    def __init__(
        self, *, budget: float = TURN_SECONDS, loop_share: float = 1.0, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        if not 0 < loop_share <= 1:
            raise ValueError(f"loop_share is {loop_share}; it must be above 0 and at most 1")
        self.budget = budget
        self.clock = clock
        self._pause_factor = 1.0 / loop_share - 1.0
        self._holder: OperationTurn | None = None
        self._last: OperationTurn | None = None
        self._resting = False  # given up in this iteration: nobody takes it before the next one
        self._queue: deque[tuple[OperationTurn, asyncio.Future[None]]] = deque()
        self._away = 0  # pieces of work in threads, or in other processes
        self.lag = LoopLag(self._computing)

    def _computing(self) -> bool:
        return self._holder is not None or self._resting or bool(self._queue) or self._away > 0

    def turn(self) -> OperationTurn:
        """The turn of one operation."""
        return OperationTurn(self)

    def _release(self, turn: OperationTurn) -> None:
        self._holder, self._last = None, turn
        if not self._resting:
            self._resting = True
            loop = asyncio.get_running_loop()
            pause = self._pause_factor * (self.clock() - turn.since)
            if pause > 0:
                loop.call_later(pause, self._next)
            else:
                loop.call_soon(self._next)

    def _next(self) -> None:
        self._resting = False
        if self._holder is not None:
            return
        while self._queue:
            turn, woken = self._queue.popleft()
            if not woken.done():
                self._holder = turn
                woken.set_result(None)
                return


class OperationTurn:
    """One operation's turn; what an engine's `Turn` asks for.

    Attributes:
        elsewhere: computes in another process what a strategy computes over all bars; None: it is computed here.
        prepare_lag: ms, the largest lateness of the loop during that; None: it hasn't begun.
        held: is told of turns that an engine has had for longer than `LONG_CALL_SECONDS`.
    """

    __slots__ = ("_turns", "clock", "deadline", "elsewhere", "held", "prepare_lag", "since")

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self.clock = turns.clock
        self.deadline = 0.0
        self.since = 0.0
        self.elsewhere: Callable[[BacktestingEngine], Awaitable[Any]] | None = None
        self.prepare_lag: float | None = None
        self.held: Callable[[float], None] | None = None

    @property
    def lag(self) -> LoopLag:
        """How late the loop is, for those who watch."""
        return self._turns.lag

    def due(self) -> bool:
        """Whether this turn is over."""
        return self._turns.clock() >= self.deadline

    def _begin(self) -> None:
        self.since = self._turns.clock()
        self.deadline = self.since + self._turns.budget

    async def enter(self) -> None:
        """Waits for the token. Entering twice is once."""
        turns = self._turns
        if turns._holder is self:
            return
        if turns._holder is None:
            if turns._resting and turns._last is self and turns._pause_factor == 0 and not self.due():
                turns._holder = self  # lent out and back within one turn, in one iteration: nobody else could have it
                return
            if not turns._resting and not turns._queue:
                turns._holder = self
                self._begin()
                return
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        turns._queue.append((self, woken))
        try:
            await woken
        except BaseException:
            woken.cancel()
            self.leave()
            raise
        self._begin()

    def leave(self) -> None:
        """Gives the token up. Leaving twice is once."""
        if self._turns._holder is self:
            self._turns._release(self)

    async def pass_on(self) -> None:
        """Lets everybody else have a turn, and returns when it is ours again; for an engine, between two bars."""
        if self.held is not None and (seconds := self.clock() - self.since) > LONG_CALL_SECONDS:
            self.held(seconds)
        await self.give_way()

    async def give_way(self) -> None:
        """As `pass_on`, for others than the engine."""
        self.leave()
        await self.enter()

    async def once(self) -> None:
        """Waits for a turn for what follows up to the next await: of hundreds that begin, one in an iteration."""
        await self.enter()
        self.leave()

    async def offload(self, work: Callable[[], T]) -> T:
        """Runs large one-off work in a thread, without the token. A cancellation waits: threads can't be ended."""
        self.leave()
        self._turns._away += 1
        try:
            result = await in_thread(work)
        finally:
            self._turns._away -= 1
        await self.enter()
        return result

    async def prepare(self, engine: BacktestingEngine, work: Callable[[], T] | Awaitable[T]) -> T:
        """As `offload`, in a thread or another process; a coroutine is awaited here, without the token."""
        with self._turns.lag.watch() as watch:
            try:
                if not callable(work):
                    waited = work
                elif self.elsewhere is not None:
                    waited = self.elsewhere(engine)
                else:
                    return await self.offload(work)
                self.leave()
                result = await waited
                await self.enter()
                return result
            finally:
                seen = watch.figures()
                self.prepare_lag = max(self.prepare_lag or 0.0, 0.0 if seen is None else seen.max)


_shared: WeakKeyDictionary[asyncio.AbstractEventLoop, Turns] = WeakKeyDictionary()


def turns_of_this_loop() -> Turns:
    """The token that runs without a worker share on the running loop."""
    loop = asyncio.get_running_loop()
    turns = _shared.get(loop)
    if turns is None:
        turns = _shared[loop] = Turns()
    return turns
