"""A proxy before PostgreSQL that cuts a conversation after its byte k, and operations put back between trials."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit

import asyncpg
from supervision_runs import until

from ktrdr_async.backtesting.ledger import LedgerEvent
from ktrdr_async.checkpoint.position import Position
from ktrdr_async.checkpoint.schemas import BacktestCheckpointState, EquitySample
from ktrdr_async.checkpoint.service import CheckpointService
from ktrdr_async.operations.lifecycle import Claim
from ktrdr_async.operations.service import OperationsService
from ktrdr_async.storage.database import Database

UP, DOWN = "to the server", "from the server"
LINGER_NOT = struct.pack("ii", 1, 0)  # closing resets the connection: the peer gets an error, not an end
KEY = b"K\x00\x00\x00\x0c"  # how the message begins in which a server tells a session's pid
TABLES = ("operations", "operation_checkpoints", "ledger_segments")

STORED = {"strategy": "sma_cross", "seed": 0}  # a request
ARRAYS = "SELECT $1::bigint[], $2::text[]"
# Everything that is stored of an operation but the times and the claim's random token, which comes apart.
ROWS = """
SELECT jsonb_build_array(
    (SELECT to_jsonb(o) - '{owner_token,created_at,started_at,heartbeat_at,finished_at}'::text[]
        FROM ktrdr.operations o WHERE operation_id = $1),
    (SELECT to_jsonb(c) - 'created_at' FROM ktrdr.operation_checkpoints c WHERE operation_id = $1),
    (SELECT jsonb_agg(to_jsonb(s) ORDER BY sequence) FROM ktrdr.ledger_segments s WHERE operation_id = $1))::text
"""


@dataclass
class Cut:
    """When a conversation is cut: after so many bytes more in a direction."""

    way: str
    after: int
    reset: bool = False  # with an RST instead of a FIN
    greeting: bool = False  # what is said while a connection is made counts too


class Conversation:
    """One client and its session: what is known of it from what was said."""

    def __init__(self) -> None:
        self.began = False  # the client has said more than its greeting
        self.pid: int | None = None  # of the session; None: the server hasn't told it
        self.last: tuple[Cut, bytes] | None = None  # a cut, and what still belongs before it

    def hear(self, way: str, chunk: bytes) -> None:
        if way == DOWN and self.pid is None and (at := chunk.find(KEY)) >= 0:
            self.pid = int.from_bytes(chunk[at + 5 : at + 9], "big")
        elif way == UP and self.pid is not None:
            self.began = True


class CuttingProxy:
    """Forwards what clients and the server say to each other, counts it, and cuts one conversation where it is told.

    After the cut the server first does all that it was sent, and `settled` is awaited; then the client hears of it.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self.settled: Callable[[int | None], Awaitable[None]] | None = None
        self.cut: Cut | None = None
        self.said = {UP: 0, DOWN: 0}  # bytes, without greetings
        self.cuts = 0
        self.cut_at = 0.0  # loop's time of the last cut
        self.tasks: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        up_reader, up_writer = await asyncio.open_unix_connection(self.target)
        try:
            talk = Conversation()
            ways = [(UP, reader, up_writer), (DOWN, up_reader, writer)]
            pumps = [asyncio.create_task(self._pump(talk, *way)) for way in ways]
            self.tasks.update(pumps)
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            for pump in pumps:
                pump.cancel()
            await asyncio.wait(pumps)
            self.tasks.difference_update(pumps)
            if talk.last is not None:
                cut, last = talk.last
                up_writer.write(last if cut.way == UP else b"")
                up_writer.close()
                if self.settled is not None:
                    await self.settled(talk.pid)
                self.cut_at = asyncio.get_running_loop().time()
                writer.write(last if cut.way == DOWN else b"")
                if cut.reset:
                    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NOT)
                    writer.transport.abort()
        finally:
            up_writer.close()
            writer.close()
            self.tasks.discard(task)

    async def _pump(
        self, talk: Conversation, way: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while chunk := await reader.read(65536):
                talk.hear(way, chunk)
                self.said[way] += len(chunk) * talk.began
                cut = self.cut
                if cut is not None and cut.way == way and (talk.began or cut.greeting):
                    if len(chunk) >= cut.after:
                        self.cut, talk.last = None, (cut, chunk[: cut.after])
                        self.cuts += 1
                        return
                    cut.after -= len(chunk)
                if talk.last is None:
                    writer.write(chunk)

    async def idle(self) -> None:
        """Waits until no connection is left."""

        async def none() -> bool:
            return not self.tasks

        await until(none, "every connection through the proxy is over")


def event(number: int) -> LedgerEvent:
    lots, part = (100, "open") if number % 2 == 0 else (-100, "close")
    return LedgerEvent(
        bar=number, symbol=0, lots=lots, requested=lots, price=101.25, fee=0.125, cash_after=90_000.5, part=part,
        reason="order", tag=None,
    )  # fmt: skip


def state(bar: int, since: int, upto: int) -> BacktestCheckpointState:
    """At `bar`, with the ledger's events since..upto-1."""
    return BacktestCheckpointState(
        bar_index=bar, current_date="2026-01-01T00:00:00+00:00", cash=90_000.5, original_request=STORED,
        ledger=[event(n) for n in range(since, upto)], ledger_from=since,
        equity_samples=[EquitySample(100 * n, n, 1.5) for n in range(since, upto)], samples_from=since,
        strategy_state=b"\x00state",
    )  # fmt: skip


@asynccontextmanager
async def cutting_proxy(dsn: str, name: str = "ktrdr_async") -> AsyncIterator[tuple[CuttingProxy, str]]:
    """A proxy on a TCP port, and the DSN of the database behind it; sessions through it bear the name."""
    parts = urlsplit(dsn)
    query = parse_qs(parts.query)
    proxy = CuttingProxy(os.path.join(query["host"][0], f".s.PGSQL.{query['port'][0]}"))
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield proxy, f"postgresql://ktrdr_async@127.0.0.1:{port}{parts.path}?sslmode=disable&application_name={name}"
        await proxy.idle()
    finally:
        server.close()
        await server.wait_closed()


class Lane:
    """One operation, a pool of its own through a proxy of its own, and a superuser's connection beside it.

    Attributes:
        claim: of the operation as `keep` found it.
        acknowledged: what the service had saved then.
        kept: its rows then.
    """

    def __init__(self, name: str, database: Database, proxy: CuttingProxy, admin: Any) -> None:
        self.name, self.database, self.proxy, self.admin = name, database, proxy, admin
        self.claim: Claim | None = None
        self.acknowledged = Position()
        self.kept = ""
        self._looking = asyncio.Lock()
        self.operations = OperationsService(database)
        self.checkpoints = CheckpointService(database)

    async def keep(self, claim: Claim | None, acknowledged: Position) -> None:
        """Remembers how the operation stands."""
        self.claim, self.acknowledged = claim, acknowledged
        for table in TABLES:
            await self.admin.execute(
                f"INSERT INTO kept.{table} SELECT * FROM ktrdr.{table} WHERE operation_id = '{self.name}'"
            )
        self.kept, _ = await self.rows()

    async def forget(self) -> None:
        """There is no operation, and nothing is kept."""
        self.claim, self.acknowledged = None, Position()
        await self.admin.execute(
            ";".join(f"DELETE FROM kept.{table} WHERE operation_id = '{self.name}'" for table in TABLES)
        )
        await self.put_back()

    async def put_back(self) -> None:
        """Makes the operation as it was kept, with services that know no more, and sees the pool work."""
        mine = f"WHERE operation_id = '{self.name}'"
        steps = [f"DELETE FROM ktrdr.{table} {mine}" for table in TABLES]
        steps += [f"INSERT INTO ktrdr.{table} SELECT * FROM kept.{table} {mine}" for table in TABLES]
        async with self._looking:
            await self.admin.execute(";".join(steps))
        self.operations = OperationsService(self.database)
        self.checkpoints = CheckpointService(self.database, self.claim)
        self.checkpoints.acknowledged = self.acknowledged
        # asyncpg asks each new connection once what an array is; that isn't part of what is said for a verb.
        await self.database.retrying(lambda connection: connection.fetchval(ARRAYS, [], []), seconds=5.0)

    async def rows(self) -> tuple[str, str | None]:
        """Everything that is stored of the operation but times, and its token."""
        row = await self._look(
            f"SELECT ({ROWS}), (SELECT owner_token::text FROM ktrdr.operations WHERE operation_id = $1)", self.name
        )
        return row[0], row[1]

    async def gone(self, pid: int | None) -> None:
        """Waits until the server has ended a session, and so has done all that it was sent."""

        async def none() -> bool:
            return not (await self._look("SELECT count(*) FROM pg_stat_activity WHERE pid = $1", pid))[0]

        await until(none, f"session {pid} of {self.name} is over")

    async def _look(self, query: str, argument: object) -> Any:
        async with self._looking:  # a cut may be settled while its trial goes on
            return await self.admin.fetchrow(query, argument)


@asynccontextmanager
async def lanes(dsn: str, administrator: Any, count: int) -> AsyncIterator[list[Lane]]:
    """Lanes side by side in one database; triggers don't see what their superuser does."""
    name = urlsplit(dsn).path[1:]
    async with AsyncExitStack() as stack:

        async def connect() -> Any:
            connection = await asyncpg.connect(
                host=administrator.host, port=administrator.port, user=administrator.user, database=name, ssl=False,
                server_settings={"session_replication_role": "replica", "application_name": "test"},
            )  # fmt: skip
            stack.push_async_callback(connection.close)
            return connection

        made = []
        for number in range(count):
            proxy, through = await stack.enter_async_context(cutting_proxy(dsn, f"lane{number:02}"))
            database = await stack.enter_async_context(Database.open(through))
            made.append(Lane(f"lane{number:02}", database, proxy, await connect()))
        await made[0].admin.execute(
            "CREATE SCHEMA kept;" + ";".join(f"CREATE TABLE kept.{table} (LIKE ktrdr.{table})" for table in TABLES)
        )
        yield made
