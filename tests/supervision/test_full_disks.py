"""A disk that is full: the last good checkpoint stands, and what ran goes on once there is room. Real file systems."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import numpy as np
import pytest
from homes import make_home, seed
from supervision_runs import EVERY_BLOCK, REQUEST, Gate, Held, market, until

import ktrdr_async as kt
from ktrdr_async.storage.embedded import EmbeddedServer
from ktrdr_async.storage.places import HOME_VARIABLE
from ktrdr_async.storage.record import Record
from ktrdr_async.supervision.worker import BacktestWorker

pytestmark = pytest.mark.anyio


class Noise(msgspec.Struct):
    seen: int = 0
    noise: Any = msgspec.field(default_factory=lambda: np.zeros(20_000, dtype=np.int64))


class Large(Held):
    """Trades by what it keeps, which doesn't compress: each save needs some 200 kB."""

    def __init__(self, gate: Any = None) -> None:
        super().__init__(gate)
        self.state = Noise()

    async def on_bar(self, bar: kt.Bar) -> None:
        if bar.index == self.gate.bar and not self.gate.open.is_set():
            self.gate.reached.set()
            await self.gate.open.wait()
        self.state.seen += 1
        if bar.index % 50 == 0:
            self.state.noise = bar.rng.integers(0, 2**62, 20_000)
        if self.state.seen % 7 == 0:
            bar.target_weight(0, 0.9 if self.state.noise[0] % 2 else -0.5)


class Disk:
    """A file system of its own for an embedded server, small enough to be filled."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._filler = place / "filler"

    def fill(self) -> None:
        with self._filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(65536))
            except OSError:
                pass

    def free(self) -> None:
        self._filler.unlink()


@pytest.fixture
def small_disk(initialized: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    place = make_home()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=110m,mode=755", "none", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        place.rmdir()
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        seed(place, initialized)
        monkeypatch.setenv(HOME_VARIABLE, str(place))
        yield Disk(place)
        server = EmbeddedServer(place)
        assert server.wait_until_stopped(30)
        if (record := Record.read(server.root / "server.json")) is not None:
            shutil.rmtree(record.sockets, ignore_errors=True)
    finally:
        subprocess.run(["umount", str(place)], check=True)
        place.rmdir()


async def large_digest() -> str:
    return (await kt.backtest(market(), Large(Gate()), request=REQUEST)).digest


async def test_a_full_disk(small_disk: Disk) -> None:
    """The last good checkpoint stands, the error says what is wrong and how large it was; freed, it goes on."""
    async with BacktestWorker.open() as worker:
        gate = Gate(345)
        handle = worker.start(REQUEST, "op", bars=market(), strategy=Large(gate), policy=EVERY_BLOCK)
        await gate.reached.wait()
        small_disk.fill()
        gate.open.set()
        with pytest.raises(kt.CheckpointError, match=r"\d+ bytes of operation op: DiskFull.* No space left on device"):
            await handle.result()
        assert handle.statistics.checkpoints_failed > 0
        assert (await worker.operations.get("op")).checkpoint_bar == 299
        small_disk.free()
        results = await worker.resume("op", bars=market(), strategy=Large(Gate()))
        assert results.digest == await large_digest()
        assert results.run.resumed_from == [299]
        assert not worker.debts


@pytest.mark.campaign
async def test_a_server_that_crashes_as_it_has_no_room_for_its_log(small_disk: Disk) -> None:
    """It panics, and can't recover until there is room; the save that was under way is made then."""
    async with BacktestWorker.open() as worker:
        gate = Gate(345)
        handle = worker.start(REQUEST, "op", bars=market(), strategy=Large(gate), policy=EVERY_BLOCK)
        await gate.reached.wait()
        server = worker.database._server
        assert server is not None
        where = server.administrator
        admin = await asyncpg.connect(host=where.host, port=where.port, user=where.user, database="postgres", ssl=False)
        small_disk.fill()
        await admin.execute("SELECT pg_switch_wal()")  # the next record needs a new file
        gate.open.set()

        async def crashed() -> bool:
            return bool(admin.is_closed())

        await until(crashed, "the server has crashed")
        small_disk.free()
        try:
            results = await handle.result()
        except (kt.CheckpointError, kt.DatabaseError):
            results = await worker.resume("op", bars=market(), strategy=Large(Gate()))
        assert results.digest == await large_digest()
