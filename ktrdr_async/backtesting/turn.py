"""Who may compute now, as the engine asks it; the engine itself knows no clock and no loop."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from ktrdr_async.backtesting.engine import BacktestingEngine

T = TypeVar("T")


class Turn(Protocol):
    """Who may compute now; the engine asks between bars, and gives way when it is told to."""

    @property
    def clock(self) -> Callable[[], float]:
        """Monotonic seconds; read at every bar, so it is handed out once."""

    @property
    def deadline(self) -> float:
        """The turn is over when the clock says so much."""

    async def pass_on(self) -> None:
        """Lets everybody else have a turn, and returns when it is ours again."""

    async def enter(self) -> None:
        """Waits for a turn. Entering twice is once."""

    def leave(self) -> None:
        """Gives the turn up, before something else is awaited. Leaving twice is once."""

    async def offload(self, work: Callable[[], T]) -> T:
        """Runs a large piece of one-off work where it holds the loop least."""

    async def prepare(self, engine: BacktestingEngine, work: Callable[[], T] | Awaitable[T]) -> T:
        """As `offload`, for what a strategy computes over all bars at once: `prepare` or its targets, checked and kept.

        It may be computed elsewhere, and kept in `engine.decided` here; a coroutine is awaited without the turn.
        """


class NoTurn:
    """An engine that has the loop to itself."""

    deadline = float("inf")

    @staticmethod
    def clock() -> float:
        """Time doesn't pass."""
        return 0.0

    async def pass_on(self) -> None:
        """Nothing to wait for."""

    async def enter(self) -> None:
        """Nothing to wait for."""

    def leave(self) -> None:
        """Nothing to give up."""

    async def offload(self, work: Callable[[], T]) -> T:
        """Does it here."""
        return work()

    async def prepare(self, engine: BacktestingEngine, work: Callable[[], T] | Awaitable[T]) -> T:
        """Does it here."""
        return work() if callable(work) else await work
