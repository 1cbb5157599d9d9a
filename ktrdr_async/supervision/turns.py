"""Who may compute now: one token a worker goes round, so that the loop stays responsive beside any number of runs.

One operation computes per loop iteration, for at most `budget` seconds, looked at between bars. A token that is handed
on is
taken up in the next iteration, never in the same one: hundreds of operations that each give the loop a turn would
still starve it if they all computed between two of its turns.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar
from weakref import WeakKeyDictionary

from ktrdr_async.supervision.shielding import in_thread

T = TypeVar("T")

TURN_SECONDS = 0.0005


class Turns:
    """The token of one loop.

    Args:
        budget: seconds that a turn lasts.
        loop_share: share of the loop's time that all turns together may take, 0 < loop_share <= 1.
        clock: monotonic seconds.
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
    """One operation's turn; what an engine's `Turn` asks for."""

    __slots__ = ("_turns", "clock", "deadline", "since")

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self.clock = turns.clock
        self.deadline = 0.0
        self.since = 0.0

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
        if turns._holder is None and not turns._queue:
            if not turns._resting:
                turns._holder = self
                self._begin()
                return
            if turns._last is self and turns._pause_factor == 0 and not self.due():
                turns._holder = self  # lent out and back within one turn: nothing else wanted it
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
        """Lets everybody else have a turn, and returns when it is ours again."""
        self.leave()
        await self.enter()

    async def offload(self, work: Callable[[], T]) -> T:
        """Runs large one-off work in a thread, without the token. A cancellation waits: threads can't be ended."""
        self.leave()
        result = await in_thread(work)
        await self.enter()
        return result


_shared: WeakKeyDictionary[asyncio.AbstractEventLoop, Turns] = WeakKeyDictionary()


def turns_of_this_loop() -> Turns:
    """The token that runs without a worker share on the running loop."""
    loop = asyncio.get_running_loop()
    turns = _shared.get(loop)
    if turns is None:
        turns = _shared[loop] = Turns()
    return turns
