"""States, claims and a cutting proxy for the checkpoint tests."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from ktrdr_async.backtesting.ledger import LedgerEvent
from ktrdr_async.checkpoint.schemas import BacktestCheckpointState, EquitySample, RecordedValue
from ktrdr_async.checkpoint.service import CheckpointService
from ktrdr_async.operations.lifecycle import Claim, Owner
from ktrdr_async.operations.service import OperationsService
from ktrdr_async.storage.database import Database

REQUEST = {"strategy": "sma_cross", "lot_size": 1.0, "seed": 0}
DIGEST = "ab" * 32


def event(number: int, **changed: Any) -> LedgerEvent:
    """Event `number` of an endless ledger that opens and closes in turn; all have JSON of the same length."""
    opening = number % 2 == 0
    fields: dict[str, Any] = {
        "bar": 100_000 + number, "symbol": 0, "lots": 100 if opening else -100, "requested": 100 if opening else -100,
        "price": 101.25, "fee": 0.125, "cash_after": 90_000.5, "part": "open" if opening else "close", "reason":
        "order", "tag": None,
    }  # fmt: skip
    return LedgerEvent(**(fields | changed))


def state(bar: int, upto: int = 0, since: int = 0, **changed: Any) -> BacktestCheckpointState:
    """A state at `bar` whose ledger is events since..upto-1, with as many samples and recorded values."""
    fields: dict[str, Any] = {
        "bar_index": bar,
        "current_date": "2026-01-01T00:00:00+00:00",
        "cash": 90_000.5,
        "original_request": dict(REQUEST),
        "ledger": [event(n) for n in range(since, upto)],
        "equity_samples": [EquitySample(100_000 + n, 10**18 + n, 1.5) for n in range(since, upto)],
        "recorded": [RecordedValue(100_000 + n, "x", 2.5) for n in range(since, upto)],
        "ledger_from": since,
        "samples_from": since,
        "recorded_from": since,
        "strategy_state": b"\x00\x01state",
    }
    return BacktestCheckpointState(**(fields | changed))


async def claimed(database: Database, operation_id: str = "op") -> tuple[OperationsService, Claim, CheckpointService]:
    """A created and claimed operation, and its service."""
    operations = OperationsService(database)
    await operations.create(operation_id, REQUEST)
    claim = await operations.claim(operation_id, owner=Owner.this_process())
    return operations, claim, CheckpointService(database, claim)


async def head_of(database: Database, operation_id: str = "op") -> tuple[int, str, int] | None:
    """Revision, type and bar of the stored head."""
    async with database.connection() as connection:
        row = await connection.fetchrow(
            "SELECT revision, checkpoint_type, (state->>'bar_index')::int AS bar"
            " FROM ktrdr.operation_checkpoints WHERE operation_id = $1",
            operation_id,
        )
    return None if row is None else (row["revision"], row["checkpoint_type"], row["bar"])


async def segments_of(database: Database, operation_id: str = "op") -> list[tuple[int, int, int]]:
    """Sequence and ledger counts of the stored segments."""
    async with database.connection() as connection:
        rows = await connection.fetch(
            "SELECT sequence, ledger_from, ledger_to FROM ktrdr.ledger_segments WHERE operation_id = $1 ORDER BY 1",
            operation_id,
        )
    return [tuple(row) for row in rows]


async def waiting_on_a_lock(connection: Any, count: int = 1) -> None:
    """Returns once `count` sessions of this database wait for a lock."""
    for _ in range(1000):
        found = await connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        if found >= count:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("nobody waits")


async def until(condition: Callable[[], bool]) -> None:
    """Returns once the condition holds, giving turns meanwhile."""
    for _ in range(3_000_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never came")


async def until_idle(database: Database) -> None:
    """Returns once no other session of this database runs a statement."""
    async with database.connection() as connection:
        for _ in range(1000):
            if not await connection.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state = 'active'"
                " AND pid <> pg_backend_pid()"
            ):
                return
            await asyncio.sleep(0.01)
    raise AssertionError("a statement never ends")


class CuttingProxy:
    """Between a pool and the server; when the next guarded statement is executed it does once what `armed` says.

    "reply": the server gets the statement, the client is cut off before the answer. "request": the server doesn't get
    it. "late": the client is cut off, the server gets the statement when `release()` is called.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self.armed: str | None = None
        self.guarded = 0  # guarded statements that clients have sent
        self._late: list[tuple[bytes, asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def held(self) -> int:
        """How many statements wait for `release()`."""
        return len(self._late)

    async def release(self) -> None:
        """Let the held statements reach the server, and wait until it has answered."""
        for chunk, reader, writer in self._late:
            writer.write(chunk)
            answer = b""
            while not answer.endswith(b"Z\x00\x00\x00\x05I"):
                more = await reader.read(65536)
                if not more:
                    break
                answer += more
            writer.close()
        self._late.clear()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        up_reader, up_writer = await asyncio.open_unix_connection(self.target)
        answered = asyncio.Event()
        muted = False

        async def down() -> None:
            while chunk := await up_reader.read(65536):
                if muted:
                    if b"Z\x00\x00\x00\x05" in chunk:
                        break
                    continue
                writer.write(chunk)
            answered.set()
            if not muted:
                writer.close()

        back = asyncio.create_task(down())
        try:
            while chunk := await reader.read(1_000_000):
                if b"WITH own AS" in chunk and b"B" in message_types(chunk):
                    self.guarded += 1
                    what, self.armed = self.armed, None
                    if what == "late":
                        back.cancel()
                        await asyncio.wait({back})
                        self._late.append((chunk, up_reader, up_writer))
                        return
                    if what == "request":
                        return
                    if what == "reply":
                        muted = True
                        up_writer.write(chunk)
                        await answered.wait()
                        return
                up_writer.write(chunk)
        except ConnectionError:
            pass
        finally:
            writer.transport.abort()
            back.cancel()
            await asyncio.wait({back})
            if not any(held[2] is up_writer for held in self._late):
                up_writer.transport.abort()
            self._tasks.discard(task)


def message_types(chunk: bytes) -> set[bytes]:
    """Types of the protocol messages in what a client wrote at once."""
    found, place = set(), 0
    while place + 5 <= len(chunk):
        found.add(chunk[place : place + 1])
        place += 1 + int.from_bytes(chunk[place + 1 : place + 5], "big")
    return found


@asynccontextmanager
async def cutting_proxy(dsn: str) -> AsyncIterator[tuple[CuttingProxy, Database]]:
    """A database whose own connections go through a proxy."""
    query = parse_qs(urlsplit(dsn).query)
    port = query["port"][0]
    place = Path(tempfile.mkdtemp(prefix="cut-", dir="/tmp"))
    proxy = CuttingProxy(f"{query['host'][0]}/.s.PGSQL.{port}")
    server = await asyncio.start_unix_server(proxy.serve, place / f".s.PGSQL.{port}")
    try:
        async with Database.open(dsn.replace(query["host"][0], str(place))) as database:
            yield proxy, database
        await proxy.release()
    finally:
        server.close()
        await until(lambda: not proxy._tasks)
        shutil.rmtree(place)
