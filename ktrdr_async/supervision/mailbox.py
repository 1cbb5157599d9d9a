"""The mailbox of one running operation: what others ask of its supervisor, and what they may see of it."""

from __future__ import annotations

import asyncio
from enum import Enum

import msgspec


class Ending(Enum):
    """Why an operation's task was told to end; None of these is a cancellation by the caller's own task."""

    CANCEL = "cancel"  # somebody asked through the mailbox or from another process
    SHUTDOWN = "shutdown"  # the worker is leaving
    LOST = "lost"  # a newer owner holds the operation


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """Where an operation stands."""

    operation_id: str
    status: str
    bar_index: int = -1  # last bar of the last boundary; -1: none
    bars: int = 0
    timestamp: int | None = None  # of that bar, ns since the epoch, UTC
    equity: float | None = None  # account currency
    trades: int = 0
    bars_per_second: float | None = None
    seconds_left: float | None = None
    checkpoint_bar: int | None = None  # bar of the last acknowledged checkpoint
    paused: bool = False

    @property
    def fraction(self) -> float:
        """Share of the bars that are computed, 0..1."""
        return (self.bar_index + 1) / self.bars if self.bars else 0.0


class Mailbox:
    """Messages to one supervisor. Everything here is synchronous; the supervisor looks at each boundary.

    `end` also interrupts what the supervisor awaits, by cancelling its task once, with the reason written down before.
    """

    def __init__(self) -> None:
        self.ending: Ending | None = None
        self.paused = False
        self.checkpoint_requests: list[asyncio.Future[int]] = []
        self._task: asyncio.Task[object] | None = None
        self._closed: BaseException | None = None
        self._news = asyncio.Event()

    def attach(self, task: asyncio.Task[object]) -> None:
        """Names the task that an ending interrupts."""
        self._task = task

    @property
    def waiting(self) -> bool:
        """Whether there is something to look at."""
        return self.paused or bool(self.checkpoint_requests)

    def end(self, why: Ending) -> None:
        """Asks the operation to end; the first reason counts."""
        if self.ending is None and self._task is not None and not self._task.done():
            self.ending = why
            self._task.cancel()

    def pause(self) -> None:
        """Asks for a halt at the next boundary."""
        self.paused = True

    def go_on(self) -> None:
        """Ends a halt."""
        self.paused = False
        self._news.set()

    async def until_news(self) -> None:
        """Waits during a halt for its end, or for something to do in it; called with nothing else awaited before."""
        self._news.clear()
        await self._news.wait()

    def ask_checkpoint(self) -> asyncio.Future[int]:
        """Asks for a checkpoint at the next boundary; the future gives its bar once it is durable."""
        if self._closed is not None:
            raise self._closed
        asked: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.checkpoint_requests.append(asked)
        self._news.set()
        return asked

    def answer(self, asked: list[asyncio.Future[int]], bar_index: int | BaseException) -> None:
        """Tells those who asked the bar that is durable now, or why none is."""
        for future in asked:
            self.checkpoint_requests.remove(future)
            if future.done():
                continue
            if isinstance(bar_index, BaseException):
                future.set_exception(bar_index)
            else:
                future.set_result(bar_index)

    def close(self, error: BaseException) -> None:
        """Answers what is still asked for, and all that comes later, when the operation has ended."""
        self._closed = error
        self.answer(list(self.checkpoint_requests), error)
