"""How a run is interrupted: at a yield, between two bars, in an await, by an error in a bar, by `kill -9`."""

from __future__ import annotations

import asyncio
import math
import os
import signal
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec

from ktrdr_async.strategies.base import AnyStrategy, AsyncStrategy, WeightStrategy

if TYPE_CHECKING:
    from ktrdr_async.backtesting.engine import BacktestingEngine
    from ktrdr_async.backtesting.turn import Turn

T = TypeVar("T")

How = Literal["yield", "between", "await", "raise", "kill"]


class InjectedError(Exception):
    """What a run is interrupted with where a strategy's own error is played."""


class Strike(msgspec.Struct, frozen=True):
    """One interruption. A `yield` is struck at the boundary of this bar, the others inside it."""

    bar: int
    how: How

    def __str__(self) -> str:
        return f"{_WORDS[self.how]} bar {self.bar:,}"


_WORDS: dict[How, str] = {
    "yield": "cancelled at the boundary of",
    "between": "cancelled inside a block after",
    "await": "cancelled in an await of",
    "raise": "ended by an error in",
    "kill": "kill -9 in",
}


def suited(how: How, strategy: AnyStrategy, bar: int) -> How:
    """The way of interrupting that this strategy can be interrupted in at this bar."""
    called = not isinstance(strategy, WeightStrategy) and bar >= strategy.warmup - 1
    if how == "await":
        return "await" if called and isinstance(strategy, AsyncStrategy) else "between"
    return how if how != "raise" or called else "between"


def raise_at(strategy: AnyStrategy, bar_index: int) -> None:
    """Lets a strategy's `on_bar` raise at a bar, after it did its work: nothing of that work may be left.

    On the object, not in a subclass: its identity stays what it is.
    """
    own: Any = strategy.on_bar  # type: ignore[union-attr]

    def struck(bar: Any) -> None:
        own(bar)
        if bar.index == bar_index:
            raise InjectedError(f"bar {bar_index}")

    async def struck_async(bar: Any) -> None:
        await own(bar)
        if bar.index == bar_index:
            raise InjectedError(f"bar {bar_index}")

    object.__setattr__(strategy, "on_bar", struck_async if isinstance(strategy, AsyncStrategy) else struck)


class StrikingTurn:
    """A turn that strikes: the engine looks at its clock after each bar, or piece of bars where targets are known.

    Args:
        inner: who else may compute.
        strike: where.
        strategy: whose awaits may be struck.
        blow: cancels the task that runs the engine.
    """

    def __init__(self, inner: Turn, strike: Strike, *, strategy: AnyStrategy, blow: Callable[[], None]) -> None:
        self._inner = inner
        self._strike = strike
        self._strategy = strategy
        self._blow = blow
        self._looks_left: int | None = None  # until the bar's own; None: it isn't in this block
        self._struck = False

    def begin(self, first: int, stop: int) -> None:
        """The bars first..stop-1 are the next block."""
        bar = self._strike.bar
        there = first <= bar < stop and self._strike.how not in ("yield", "raise")
        self._looks_left = None
        if there:
            self._looks_left = 0 if isinstance(self._strategy, WeightStrategy) else bar - first

    @property
    def deadline(self) -> float:
        """The inner turn's."""
        return self._inner.deadline

    def clock(self) -> float:
        """The inner turn's, and infinitely late after the bar that is struck."""
        if self._looks_left is None:
            return self._inner.clock()
        if self._looks_left:
            self._looks_left -= 1
            return self._inner.clock()
        if self._strike.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return math.inf

    async def pass_on(self) -> None:
        """Strikes, where it is time; the cancellation arrives while the turn is waited for."""
        if self._looks_left == 0:
            self._strike_once()
        await self._inner.pass_on()
        if self._struck:
            await asyncio.sleep(0)

    async def enter(self) -> None:
        """The inner turn's."""
        await self._inner.enter()

    def leave(self) -> None:
        """Before an await of the strategy's: the cancellation arrives in it."""
        in_bar = self._strategy._bar is not None  # it isn't `prepare` that is awaited
        if self._strike.how == "await" and self._looks_left == 0 and in_bar:
            self._strike_once()
        self._inner.leave()

    async def offload(self, work: Callable[[], T]) -> T:
        """The inner turn's."""
        return await self._inner.offload(work)

    async def prepare(self, engine: BacktestingEngine, work: Callable[[], T] | Awaitable[T]) -> T:
        """The inner turn's."""
        return await self._inner.prepare(engine, work)

    def _strike_once(self) -> None:
        if not self._struck:
            self._struck = True
            self._blow()
