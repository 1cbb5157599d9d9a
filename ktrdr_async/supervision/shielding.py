"""Finishing what was begun: a piece of I/O that no cancellation of its caller interrupts."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

import anyio
import anyio.lowlevel

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
    has a deadline of its own; nothing here ends it.

    The caller must raise `cancelled` where it isn't None.
    """
    pending: asyncio.CancelledError | None = None
    for _ in range(_ATTEMPTS):
        task = asyncio.get_running_loop().create_task(make())
        pending = await until_done(task) or pending
        if not task.cancelled():
            break
    else:
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


async def until_done(future: asyncio.Future[T]) -> asyncio.CancelledError | None:
    """Waits for a future, however often the caller is cancelled; gives the last of these cancellations."""
    pending: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):
        while not future.done():
            try:
                # Not `await shield(future)`: that raises alike where the future was cancelled and where its waiter was,
                # and a teardown cancels both in the same iteration.
                await asyncio.wait({future})
            except asyncio.CancelledError as error:
                pending = error
    return pending


async def in_thread(work: Callable[[], T]) -> T:
    """Runs large one-off work in a thread; a cancellation waits for it, as a thread can't be ended.

    No task stands for the thread, so that no teardown of a loop takes it for ended and has the work done twice at once.
    """
    context = contextvars.copy_context()
    future: asyncio.Future[T] = asyncio.get_running_loop().run_in_executor(None, context.run, work)
    cancelled = await until_done(future)
    if cancelled is not None:
        if (error := future.exception()) is not None:
            cancelled.add_note(f"meanwhile: {type(error).__name__}: {error}")
        raise cancelled
    await anyio.lowlevel.checkpoint_if_cancelled()
    return future.result()
