"""A pool that the service owns is used as it is and given back whole; behind a transaction pooler all works too."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import asyncpg
import pytest
from supervision_runs import EVERY_BLOCK, NEVER, REQUEST, Gate, Held, held, held_digest, market, standing

import ktrdr_async as kt
from ktrdr_async.supervision.worker import BacktestWorker

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("size", [2, 5])
async def test_a_pool_of_the_service(dsn: str, size: int) -> None:
    async with asyncpg.create_pool(dsn, min_size=1, max_size=size) as pool:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # asyncpg warns of a listener that is left on a released connection
            async with BacktestWorker.open(pool=pool) as worker:
                done = [
                    worker.start(REQUEST, f"done{n}", bars=market(), strategy=Held(Gate()), policy=EVERY_BLOCK)
                    for n in range(10)
                ]
                for handle in done:
                    assert (await handle.result()).digest == await held_digest()
                for number in range(3):
                    await held(worker, name=f"left{number}")
                handle, _ = await held(worker, name="cancelled")
                await handle.cancel()
        assert not pool.is_closing()
        assert pool.get_idle_size() == pool.get_size()
        assert standing_of(await rows(pool)) == {
            **{f"done{n}": ("completed", None) for n in range(10)},
            **{f"left{n}": ("interrupted", "shutdown") for n in range(3)},
            "cancelled": ("cancelled", "cancellation"),
        }
        held_ones = [await pool.acquire() for _ in range(size)]
        for connection in held_ones:
            assert await connection.fetch("SELECT pg_listening_channels()") == []
            assert not connection.is_in_transaction()
            await pool.release(connection)
        async with BacktestWorker.open(pool=pool) as worker:
            for number in range(3):
                results = await worker.resume(f"left{number}", bars=market(), strategy=Held(Gate()))
                assert results.digest == await held_digest()


async def test_a_pool_of_one_connection_is_refused(dsn: str) -> None:
    """The heartbeats' connection would leave none for anything else: every save would wait for its deadline."""
    async with asyncpg.create_pool(dsn, min_size=1, max_size=1) as pool:
        with pytest.raises(kt.InputError, match="needs two"):
            await BacktestWorker.open(pool=pool).__aenter__()


async def rows(pool: asyncpg.Pool) -> list[asyncpg.Record]:
    return await pool.fetch(
        "SELECT o.operation_id, o.status, c.checkpoint_type FROM ktrdr.operations o"
        " LEFT JOIN ktrdr.operation_checkpoints c USING (operation_id)"
    )


def standing_of(found: list[asyncpg.Record]) -> dict[str, tuple[str, str | None]]:
    return {row["operation_id"]: (row["status"], row["checkpoint_type"]) for row in found}


@contextmanager
def pooler(dsn: str, place: Path) -> Iterator[str]:
    """A pgbouncer in transaction mode before the database; the DSN to it."""
    binary = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    if binary is None:
        pytest.skip("no pgbouncer here: install the system's package of that name")
    parts = urlsplit(dsn)
    host, port = parse_qs(parts.query)["host"][0], parse_qs(parts.query)["port"][0]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        listen = free.getsockname()[1]
    configuration = place / "pgbouncer.ini"
    configuration.write_text(
        f"[databases]\n{parts.path[1:]} = host={host} port={port} user=ktrdr_async\n[pgbouncer]\n"
        f"listen_addr = 127.0.0.1\nlisten_port = {listen}\nunix_socket_dir =\npool_mode = transaction\n"
        "auth_type = any\nadmin_users = ktrdr_async\ndefault_pool_size = 3\nserver_reset_query =\n"
    )
    account = Path(host).owner()  # only it may pass the socket's directory
    command = [binary, str(configuration)]
    if os.getuid() == 0:
        command = [binary, "-u", account, str(configuration)]
        for part in (configuration, *configuration.parents[:-1]):
            if part.is_relative_to("/tmp") or part.is_relative_to("/var/tmp"):
                part.chmod(part.stat().st_mode | 0o055)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(200):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", listen)) == 0:
                        break
                assert process.poll() is None, "pgbouncer didn't start"
                with socket.socket() as idle:
                    idle.settimeout(0.02)
                    idle.connect_ex(("203.0.113.1", 9))
            yield f"postgresql://ktrdr_async@127.0.0.1:{listen}{parts.path}"
        finally:
            process.kill()


@pytest.mark.campaign
async def test_behind_a_transaction_pooler(dsn: str, tmp_path: Path) -> None:
    with pooler(dsn, tmp_path) as pooled:
        async with BacktestWorker.open(pooled) as worker, BacktestWorker.open(pooled) as other:
            handles = [
                worker.start(REQUEST, f"op{n}", bars=market(), strategy=Held(Gate()), policy=EVERY_BLOCK)
                for n in range(50)
            ]
            for handle in handles:
                assert (await handle.result()).digest == await held_digest()
            for times in (1, 3):
                gate = Gate(345)
                run = asyncio.create_task(
                    worker.run(REQUEST, f"run{times}", bars=market(), strategy=Held(gate), policy=NEVER)
                )
                await gate.reached.wait()
                for _ in range(times):
                    run.cancel()
                    await asyncio.sleep(0)
                await asyncio.wait({run})
                assert run.cancelled()
                row = await worker.operations.get(f"run{times}")
                assert standing(row) == ("cancelled", "cancellation", 299)
                results = await other.resume(f"run{times}", bars=market(), strategy=Held(Gate()))
                assert results.digest == await held_digest()
            handle, _ = await held(worker, name="asked")
            row = await other.cancel("asked")  # heard by polling alone
            assert standing(row) == ("cancelled", "cancellation", 299)
            with pytest.raises(kt.CancellationError):
                await handle.result()
            await held(worker, name="left")
        async with BacktestWorker.open(pooled) as worker:
            assert standing(await worker.operations.get("left")) == ("interrupted", "shutdown", 299)
