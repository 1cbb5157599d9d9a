"""Finishing what was begun: a piece of I/O that no cancellation of its caller interrupts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

import anyio

T = TypeVar("T")

_ATTEMPTS = 5  # tasks that are made when each one before was cancelled itself


class Finished(Generic[T]):
    """What came of it: `result` or `error`, and the cancellation of the caller that arrived meanwhile."""

    __slots__ = ("cancelled", "error", "result")

    def __init__(self, result: T | None, error: BaseException | None, cancelled: asyncio.CancelledError | None) -> None:
        self.result, self.error, self.cancelled = result, error, cancelled


async def finish(make: Callable[[], Coroutine[Any, Any, T]]) -> Finished[T]:
    """Runs a coroutine in a task of its own until it is done, however often the caller is cancelled.

    A native cancel pierces an anyio shield and ends a bare `asyncio.shield`, so the wait is repeated inside an anyio
    shield. The teardown of a loop cancels every task, this one too: then the work is made again in a new one. The work
    has
    a deadline of its own; nothing here ends it.

    The caller must raise `cancelled` where it isn't None.
    """
    pending: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):
        for attempt in range(_ATTEMPTS):
            task = asyncio.get_running_loop().create_task(make())
            while not task.done():
                try:
                    await asyncio.shield(task)
                except asyncio.CancelledError as error:
                    if not task.cancelled():
                        pending = error
                except BaseException:  # noqa: S110 - it is read from the task below
                    pass
            if not task.cancelled():
                break
            if attempt == _ATTEMPTS - 1:
                return Finished(None, asyncio.CancelledError(), pending)
    failure = task.exception()
    return Finished(None, failure, pending) if failure is not None else Finished(task.result(), None, pending)


async def finish_or_raise(make: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """As `finish`, for callers with nothing to add: the cancellation is raised, with a failure as a note on it."""
    done = await finish(make)
    if done.cancelled is not None:
        if done.error is not None:
            done.cancelled.add_note(f"meanwhile: {type(done.error).__name__}: {done.error}")
        raise done.cancelled
    if done.error is not None:
        raise done.error
    return done.result  # type: ignore[return-value]


async def until_done(task: asyncio.Task[T]) -> asyncio.CancelledError | None:
    """Waits for a task, however often the caller is cancelled; gives the last of these cancellations."""
    pending: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):
        while not task.done():
            try:
                await asyncio.wait({task})
            except asyncio.CancelledError as error:
                pending = error
    return pending
