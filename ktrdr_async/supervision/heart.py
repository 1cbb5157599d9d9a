"""The heart of a worker: one task that tells the database what this process still runs, and hears what others ask."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import asyncpg
import msgspec

from ktrdr_async.operations.bounded import bounded
from ktrdr_async.operations.lifecycle import CHANNEL, Beat, Claim
from ktrdr_async.storage.database import is_transient
from ktrdr_async.supervision.mailbox import Ending, Mailbox, Progress

if TYPE_CHECKING:
    from ktrdr_async.operations.service import OperationsService
    from ktrdr_async.storage.database import Database, Reserved
    from ktrdr_async.supervision.debts import Debts

T = TypeVar("T")

logger = logging.getLogger("ktrdr_async.supervision")

BEAT_SECONDS = 5.0
BUSY_SECONDS = 0.25  # until the next beat where a save held a row: what it would have told mustn't wait
GATHER_SECONDS = 0.02
ENDED_BEATS = 20
BEATS_AT_ONCE = 50  # operations in one statement: making it takes a millisecond of the loop's time


class Running(msgspec.Struct):
    """One claimed operation of this worker, as the heart sees it."""

    claim: Claim
    mailbox: Mailbox
    progress: Callable[[], Progress]
    row_paused: bool = False  # what the row said last: a pause from elsewhere is told once
    ended: int = 0  # beats in a row that found it ended under our own claim


class LastLine:
    """Where final saves go: the pool, and where that gives no connection any more, the reserved one.

    A server that is shutting down takes no new connections and goes on serving the ones that are held.
    """

    def __init__(self, database: Database, reserved: Reserved) -> None:
        self._database, self._reserved = database, reserved

    async def retrying(self, work: Callable[[Any], Awaitable[T]], *, seconds: float) -> T:
        """Does `work` on one of the two, each for half of the time, and again while its errors are transient."""
        try:
            return await self._database.retrying(work, seconds=seconds / 2)
        except Exception as error:
            if not is_transient(error):
                raise
        return await self._reserved.retrying(work, seconds=seconds / 2)


class Heart:
    """Beats every `seconds`, and at once where somebody was notified.

    Args:
        reserved: the connection that is kept for this, and for final saves.
        operations: writes the beats.
        running: what is claimed now, by id; read anew at each beat.
        debts: ends that are still to be written, once the database answers.
    """

    def __init__(
        self,
        reserved: Reserved,
        operations: OperationsService,
        running: dict[str, Running],
        debts: Debts,
        seconds: float = BEAT_SECONDS,
    ) -> None:
        self._reserved = reserved
        self._operations = operations
        self._running = running
        self._debts = debts
        self._busy = False
        self._seconds = seconds
        self._woken = asyncio.Event()
        self._listening: Any = None

    def wake(self) -> None:
        """Asks for a beat now: something has begun, and others want to see it."""
        self._woken.set()

    async def beat_for_ever(self) -> None:
        """Beats until it is cancelled. A beat that fails is logged and made again; the lease outlives several."""
        try:
            while True:
                self._woken.clear()
                try:
                    await bounded(self._reserved, self._beat, seconds=2 * self._seconds)
                    await self._debts.pay()
                except Exception as error:
                    logger.warning("a heartbeat failed (%s: %s); it is made again", type(error).__name__, error)
                with anyio.move_on_after(BUSY_SECONDS if self._busy else self._seconds):
                    await self._woken.wait()
                    await anyio.sleep(GATHER_SECONDS)  # many may begin at once: one beat serves them all
        finally:
            with anyio.move_on_after(1.0, shield=True), contextlib.suppress(asyncpg.InterfaceError, OSError):
                if self._listening is not None and not self._listening.is_closed():
                    await self._listening.remove_listener(CHANNEL, self._hear)

    async def _beat(self, connection: Any) -> None:
        await self._listen(connection)
        self._busy = False
        everybody = list(self._running.items())
        for first in range(0, len(everybody), BEATS_AT_ONCE):
            await self._beat_for(connection, dict(everybody[first : first + BEATS_AT_ONCE]))

    async def _beat_for(self, connection: Any, asked: dict[str, Running]) -> None:
        beats = [Beat(running.claim, msgspec.to_builtins(running.progress())) for running in asked.values()]
        for answer in await self._operations.heartbeat(connection, beats):
            running = asked[answer.operation_id]
            if self._running.get(answer.operation_id) is not running:
                continue  # it has ended meanwhile, and may run again under another claim, which this isn't about
            self._busy |= answer.kind in ("busy", "ended")
            running.ended = running.ended + 1 if answer.kind == "ended" else 0
            # Its own end is a moment ahead of its leaving `running`; where it stays there, somebody else ended it.
            if answer.kind == "lost" or running.ended > ENDED_BEATS:
                running.mailbox.end(Ending.LOST)
            elif answer.cancel:
                running.mailbox.end(Ending.CANCEL)
            elif answer.kind == "ours" and answer.paused != running.row_paused:
                running.row_paused = answer.paused
                running.mailbox.pause() if answer.paused else running.mailbox.go_on()

    async def _listen(self, connection: Any) -> None:
        # Only faster than polling: behind a transaction pooler nothing is ever heard, and nothing depends on it.
        if self._listening is connection:
            return
        try:
            await connection.add_listener(CHANNEL, self._hear)
            self._listening = connection
        except (asyncpg.InterfaceError, asyncpg.PostgresError) as error:
            logger.debug("no LISTEN on this connection: %s", error)

    def _hear(self, _connection: object, _pid: int, _channel: str, payload: object) -> None:
        if payload in self._running:
            self._woken.set()
