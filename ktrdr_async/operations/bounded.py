"""Database work that ends at its deadline and at a cancellation, whatever the server does.

Cancelling a statement on a stopped server doesn't end: asyncpg waits for the server to hear of it. Cutting the
connection does. So the work runs in a task of its own, and what stops it is `terminate()`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

import asyncpg

T = TypeVar("T")
SLACK = 0.5  # seconds after the deadline before the task is stopped from here
GRACE = 2.0  # seconds that a task whose connection was cut gets to end


class Source(Protocol):
    """What lends connections and tries again what is transient: a Database, or its reserved connection."""

    async def retrying(self, work: Callable[[Any], Awaitable[T]], *, seconds: float) -> T:
        """Do `work` on a connection, and again while its errors are transient and time is left."""
        ...


class _Stopped(Exception):  # noqa: N818 - never leaves this module
    """Takes the place of the transient error that cutting the connection makes, so that nobody tries again."""


async def bounded(source: Source, work: Callable[[Any], Awaitable[T]], *, seconds: float) -> T:
    """Do `work(connection)` within `seconds`, waiting for a connection and all tries included.

    A cancellation cuts the connection, waits until the work has ended, and is raised: what the work was doing is then
    undecided.

    Raises:
        TimeoutError: if the time is over; also where the last try ended in a connection that was cut.
    """
    held: list[Any] = []
    stopped = False

    async def on(connection: Any) -> T:
        if stopped:
            raise _Stopped
        held.append(connection)
        try:
            return await work(connection)
        except Exception as error:
            if stopped:
                raise _Stopped from error
            raise
        finally:
            held.clear()

    task = asyncio.create_task(source.retrying(on, seconds=seconds))
    try:
        # The source cuts the connection at the deadline; this is for one that doesn't get to it.
        await asyncio.wait({task}, timeout=seconds + SLACK)
    except BaseException:
        stopped = True
        await _stop(task, held)
        raise
    if not task.done():
        stopped = True
        await _stop(task, held)
        if not task.done() or task.cancelled() or isinstance(task.exception(), _Stopped):
            raise TimeoutError(f"not done within {seconds:.1f} s")
    return task.result()


async def _stop(task: asyncio.Task[Any], held: list[Any]) -> None:
    """End the task. More cancellations may come while it ends; the one that is being handled is raised afterwards."""
    loop = asyncio.get_running_loop()
    started = loop.time()
    while not task.done() and (waited := loop.time() - started) < 2 * GRACE:
        if held:
            # A pool's connection that is closed already says that it was given back.
            with contextlib.suppress(asyncpg.InterfaceError):
                held[0].terminate()
        if not held or waited >= GRACE:
            task.cancel()
        try:
            await asyncio.wait({task}, timeout=GRACE)
        except asyncio.CancelledError:
            continue
    if task.done() and not task.cancelled():
        task.exception()  # looked at, so that asyncio doesn't report it as never retrieved
    elif not task.done():
        task.add_done_callback(lambda late: late.cancelled() or late.exception())
