"""Notices a strategy that holds the loop: everybody else on it waits for as long as one call of it computes."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, TypeVar

from ktrdr_async.strategies.base import AsyncStrategy, Strategy
from ktrdr_async.supervision.turns import LONG_CALL_SECONDS

if TYPE_CHECKING:
    from ktrdr_async.backtesting.results import RunStatistics
    from ktrdr_async.strategies.base import AnyStrategy
    from ktrdr_async.supervision.turns import OperationTurn

T = TypeVar("T")

logger = logging.getLogger("ktrdr_async.supervision")


def watched(
    blocks: AsyncGenerator[T, None],
    turn: OperationTurn,
    strategy: AnyStrategy,
    statistics: RunStatistics,
    name: str,
    *,
    alone: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> AsyncIterator[T]:
    """An engine's blocks; what its strategy holds the loop for meanwhile is counted, and said the first time.

    A turn is looked at between bars, so that one which took long ended with a long call. Coroutines run without the
    turn: what they do between two suspensions is timed. Targets that are known before the first bar are computed in a
    thread. A call in which the garbage of the whole process was collected isn't counted: it may have had no part in it.

    Args:
        blocks: of the engine's run.
        turn: the engine's.
        strategy: the engine's.
        statistics: takes the counts.
        name: of the operation, for the log.
        alone: nobody else is on the loop, so that nothing is said.
        clock: monotonic seconds.
    """

    def held(seconds: float) -> None:
        if turn.lag.collected():
            return
        statistics.long_calls += 1
        statistics.longest_call_ms = max(statistics.longest_call_ms, round(seconds * 1e3, 1))
        if not statistics.long_call and not alone:
            bar = strategy._bar
            where = "prepare" if bar is None else f"its call at bar {bar.index}"
            statistics.long_call = f"{type(strategy).__name__} held the loop for {seconds * 1e3:.0f} ms in {where}"
            logger.warning(
                "%s: %s, and everybody else on it waited; more calls like that are only counted",
                name,
                statistics.long_call,
            )

    if isinstance(strategy, AsyncStrategy):
        return _Steps(blocks, held, clock)
    if isinstance(strategy, Strategy):
        turn.held = held
    return blocks


class _Steps(AsyncIterator[T]):
    """Awaits each item in its place, and times what runs between two suspensions."""

    __slots__ = ("_clock", "_held", "_items", "_step")

    def __init__(
        self, items: AsyncGenerator[T, None], held: Callable[[float], None], clock: Callable[[], float]
    ) -> None:
        self._items, self._held, self._clock = items, held, clock
        self._step: Any = None

    def __anext__(self) -> Any:
        self._step = self._items.__anext__()
        return self

    def __await__(self) -> Any:
        return self

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        return self.send(None)

    def send(self, value: Any) -> Any:
        clock = self._clock
        began = clock()
        try:
            return self._step.send(value)
        finally:
            if clock() - began > LONG_CALL_SECONDS:
                self._held(clock() - began)

    def throw(self, *error: Any) -> Any:
        return self._step.throw(*error)

    def close(self) -> None:
        self._step.close()
