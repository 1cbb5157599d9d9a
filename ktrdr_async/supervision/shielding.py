"""Finishing what was begun: a piece of I/O that no cancellation of its caller interrupts."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import anyio
import anyio._backends._asyncio  # else the first checkpoint of a process imports it, and its loop stands for 40 ms
import anyio.lowlevel

T = TypeVar("T")

OVERTAKING_SECONDS = 0.05

_ATTEMPTS = 5  # tasks that are made when each one before was cancelled itself

_lines: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()


class Finished(Generic[T]):
    """What came of it: `result` or `error`, and the cancellation of the caller that arrived meanwhile.

    `given_up`: it wasn't done in the time that was left to it then.
    """

    __slots__ = ("cancelled", "error", "given_up", "result")

    def __init__(
        self,
        result: T | None,
        error: BaseException | None,
        cancelled: asyncio.CancelledError | None,
        given_up: bool = False,
    ) -> None:
        self.result, self.error, self.cancelled, self.given_up = result, error, cancelled, given_up


async def finish(make: Callable[[], Coroutine[Any, Any, T]], *, patience: float | None = None) -> Finished[T]:
    """Runs a coroutine in a task of its own until it is done, however often the caller is cancelled.

    A native cancel pierces an anyio shield and ends a bare `asyncio.shield`, so the wait is repeated inside an anyio
    shield. The teardown of a loop cancels every task, this one too: then the work is made again in a new one. The work
    has a deadline of its own; where `patience` is given, it is ended that many seconds after its caller was cancelled.

    The caller must raise `cancelled` where it isn't None.
    """
    pending: asyncio.CancelledError | None = None
    for _ in range(_ATTEMPTS):
        task = asyncio.get_running_loop().create_task(make())
        cancelled, given_up = await _wait(task, patience, hurry=pending is not None)
        pending = cancelled or pending
        if not task.cancelled():
            break
        if given_up:
            late = TimeoutError(f"not done within {patience:.1f} s after a cancellation")
            return Finished(None, late, pending, given_up=True)
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
    return (await _wait(future, None))[0]


async def _wait(
    future: asyncio.Future[T], patience: float | None, *, hurry: bool = False
) -> tuple[asyncio.CancelledError | None, bool]:
    """As `until_done`; the future is cancelled `patience` seconds after the first cancellation, with `hurry` after now.

    Also gives whether it was.
    """
    clock = asyncio.get_running_loop().time
    pending: asyncio.CancelledError | None = None
    ends = clock() + patience if hurry and patience is not None else None
    given_up = False
    with anyio.CancelScope(shield=True):
        while not future.done():
            if ends is not None and clock() >= ends:
                given_up, ends = future.cancel(), None
            try:
                # Not `await shield(future)`: that raises alike where the future was cancelled and where its waiter was,
                # and a teardown cancels both in the same iteration.
                await asyncio.wait({future}, timeout=None if ends is None else ends - clock())
            except asyncio.CancelledError as error:
                if pending is None and patience is not None and not hurry:
                    ends = clock() + patience
                pending = error
    return pending, given_up


async def in_thread(work: Callable[[], T]) -> T:
    """Runs large one-off work in a thread; a cancellation waits for it, as a thread can't be ended.

    One at a time, until it has taken `OVERTAKING_SECONDS`: each thread that holds the interpreter makes the loop wait
    for it, and several of them do in turn.

    No task stands for the thread, so that no teardown of a loop takes it for ended and has the work done twice at once.
    """
    loop = asyncio.get_running_loop()
    line = _lines.get(loop)
    if line is None:
        line = _lines[loop] = asyncio.Lock()
    await line.acquire()
    with contextlib.ExitStack() as place:
        place.callback(line.release)
        place.callback(loop.call_later(OVERTAKING_SECONDS, place.close).cancel)
        context = contextvars.copy_context()
        future: asyncio.Future[T] = loop.run_in_executor(None, context.run, work)
        cancelled = await until_done(future)
    if cancelled is not None:
        if (error := future.exception()) is not None:
            cancelled.add_note(f"meanwhile: {type(error).__name__}: {error}")
        raise cancelled
    await anyio.lowlevel.checkpoint_if_cancelled()
    return future.result()
