"""R1: what was acknowledged is there after PostgreSQL was killed in the middle of it.

The campaign: pytest -m campaign tests/supervision/test_server_killed_in_saves.py -s
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from functools import partial
from pathlib import Path

import msgspec
import psutil
import pytest
from campaigns import Figures, sized
from homes import make_home, seed
from supervision_kills import Marked, postmaster, request_of

import ktrdr_async as kt
from ktrdr_async.backtesting.checkpoint_builder import Since, build_closing_state
from ktrdr_async.operations.lifecycle import Owner
from ktrdr_async.storage.embedded import EmbeddedServer
from ktrdr_async.supervision.jobs import Permissions
from ktrdr_async.supervision.stored import rebuild

pytestmark = pytest.mark.anyio

BARS = 4_000  # a save every 100
PATIENCE = 0.1  # seconds of trying to save to a server that is gone
COMPLETED = b"completed"


def kill(pid: int) -> None:
    """`kill -9` of every process"""
    server = psutil.Process(pid)
    for process in [server, *server.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def stop_immediately(pid: int) -> None:
    """SIGQUIT, as `pg_ctl stop -m immediate`"""
    os.kill(pid, signal.SIGQUIT)


def bits(state: kt.BacktestCheckpointState | None) -> bytes:
    """All of a state but the trades, which follow from its ledger; JSONB has an order of its own for keys."""
    return b"" if state is None else msgspec.msgpack.encode(msgspec.structs.replace(state, trades=[]), order="sorted")


class Writer:
    """Saves every boundary of a run, and knows what was sent and what was acknowledged, bit for bit."""

    def __init__(
        self, service: kt.CheckpointService, name: str, bars: kt.Bars, state: kt.BacktestCheckpointState | None = None
    ) -> None:
        self.service, self.name, self.bars, self.state = service, name, bars, state
        self.sent = self.acknowledged = bits(state)
        self.saves = 0
        self.stopped = threading.Event()

    async def write(self) -> None:
        """Runs to the end, from the checkpoint on."""
        engine = kt.BacktestingEngine(request_of(BARS), self.bars, Marked())
        async with aclosing(engine.run(self.state)) as blocks:
            async for block in blocks:
                state = kt.build_backtest_checkpoint_state(engine, block.bar_index, block.timestamp)
                self.sent = bits(state)
                await self.service.save_checkpoint(self.name, kt.CheckpointType.PERIODIC, state)
                self.acknowledged = self.sent
                self.saves += 1
        outcome, at = engine.results().outcome(), self.service.acknowledged
        self.sent = COMPLETED
        await self.service.finish(
            kt.Status.COMPLETED,
            state=build_closing_state(engine, Since(at.ledger, at.samples, at.recorded)),
            result=msgspec.to_builtins(outcome),
            result_digest=outcome.digest,
        )
        self.acknowledged = COMPLETED
        self.saves += 1


class Siege:
    """A server that is killed again and again while operation after operation is written."""

    def __init__(self, server: EmbeddedServer, database: kt.Database, strike: Callable[[int], None], seed: str) -> None:
        self.server, self.database, self.strike = server, database, strike
        self.operations = kt.OperationsService(database)
        self.chance = random.Random(seed)
        self.bars = kt.Bars.read(str(request_of(BARS).data))
        self.clean = ""
        self.counts: Counter[str] = Counter()

    async def last(self, trials: int) -> None:
        """Kills so often; then what was being written is written to its end."""
        self.clean = (await kt.backtest(self.bars, Marked(), request=request_of(BARS))).digest
        writer = await self._begin()
        for number in range(trials):
            writing = asyncio.create_task(writer.write())
            writing.add_done_callback(lambda _, writer=writer: writer.stopped.set())
            halt = partial(asyncio.get_running_loop().call_soon_threadsafe, writing.cancel)
            await asyncio.to_thread(self._strike, writer, halt, *self._moment())
            if not writing.cancelled():
                await writing
            self.counts["acknowledged"] += writer.saves
            found = await self._look(writer, f"trial {number}")
            writer = await (self._begin() if found == COMPLETED else self._go_on(writer, found))
        await writer.write()
        assert await self._look(writer, "the end") == COMPLETED

    def _moment(self) -> tuple[int, float]:
        """After how many saves, and how many seconds later."""
        return self.chance.randrange(6), self.chance.random() * 0.01

    def _strike(self, writer: Writer, halt: Callable[[], object], saves: int, seconds: float) -> None:
        """Kills the server, then the writer's hope for an answer, then starts the server again."""
        while writer.saves < saves and not writer.stopped.wait(0.0005):
            pass
        time.sleep(seconds)
        pid = postmaster(self.server.home)
        assert pid is not None
        self.strike(pid)
        assert self.server.wait_until_stopped(60)
        if not writer.stopped.wait(PATIENCE):
            halt()
        assert writer.stopped.wait(60)
        self.server.ensure_running(60)

    async def _look(self, writer: Writer, when: str) -> bytes:
        """What is stored: what was acknowledged last, or the one after it that was in doubt."""
        row = await self.operations.get(writer.name)
        state = await kt.CheckpointService(self.database).load_checkpoint(writer.name)
        found = bits(state)
        if row.status is kt.Status.COMPLETED:
            assert state is None
            results = await rebuild(self.database, row, self.bars, Permissions(trusted=True))
            assert results.digest == row.result_digest == self.clean
            found = COMPLETED
            self.counts["completed"] += 1
        assert found in (writer.acknowledged, writer.sent), f"{when}: another state is stored"
        if writer.service.in_doubt:
            self.counts["in doubt"] += 1
            self.counts["landed"] += found == writer.sent
        return found

    async def _begin(self) -> Writer:
        row = await self.operations.create(None, request_of(BARS).to_dict())
        return Writer(await self._claimed(row.operation_id), row.operation_id, self.bars)

    async def _claimed(self, name: str) -> kt.CheckpointService:
        claim = await self.operations.claim(name, owner=Owner.this_process(), take_over=True)
        return kt.CheckpointService(self.database, claim)

    async def _go_on(self, writer: Writer, found: bytes) -> Writer:
        """The same owner, who sends again what didn't land, or a new one, after whom the old one can't write."""
        service, name = writer.service, writer.name
        if self.chance.random() < 0.5:
            expected = writer.sent if service.in_doubt and writer.sent != COMPLETED else found
        else:
            expected, service = found, await self._claimed(name)
            if writer.service.in_doubt:
                with pytest.raises(kt.OwnershipLostError):
                    await writer.service.resolve()
        state = await service.load_checkpoint(name)
        assert bits(state) == expected
        assert not service.in_doubt
        return Writer(service, name, self.bars, state)


@contextmanager
def log_on_disk(home: Path) -> Iterator[None]:
    """Puts the write-ahead log on the disk: syncing takes time there, in which a kill finds a commit half done."""
    place, log = make_home(on_disk=True), EmbeddedServer(home).root / "data" / "pg_wal"
    try:
        subprocess.run(["cp", "-a", str(log), str(place)], check=True)
        shutil.rmtree(log)
        log.symlink_to(place / "pg_wal")
        yield
    finally:
        shutil.rmtree(place)


@sized("trials", ci=3, whole=500, minutes=30)
@pytest.mark.parametrize("strike", [kill, stop_immediately])
async def test_no_acknowledged_checkpoint_is_lost_with_the_server(
    strike: Callable[[int], None], trials: int, home: Path, initialized: Path, campaign_seed: int, figures: Figures
) -> None:
    seed(home, initialized)
    with log_on_disk(home):
        server = EmbeddedServer(home)
        where = server.start()
        try:
            dsn = f"postgresql://{where.user}@/{where.database}?host={where.host}&port={where.port}"
            async with kt.Database.open(dsn) as database:
                async with database.connection() as connection:
                    assert await connection.fetchval("SHOW fsync") == "on"
                siege = Siege(server, database, strike, f"{campaign_seed} {strike.__name__}")
                await siege.last(trials)
        finally:
            server.release()
            assert server.wait_until_stopped(60)
    count = siege.counts
    safe = f"{count['acknowledged']} checkpoints acknowledged, the last one there each time, bit for bit"
    doubt = f"{count['in doubt']} in doubt, of which {count['landed']} had landed"
    figures.add(
        f"PostgreSQL killed during saves ({strike.__doc__})",
        f"{trials} kills: {safe}; {doubt}; {count['completed']} operations completed with the true digest",
    )
