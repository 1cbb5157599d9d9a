"""Who may write the database, who may name code, who may read: what the README says of it, held.

The embedded server's own rules (places, sockets, accounts, locks, namespaces) are held by tests/storage, names of code
by tests/strategies/test_registry.py and tests/supervision/test_permissions.py, digests by tests/checkpoint, what the
sources may not hold by tests/test_threats_in_sources.py.
"""

from __future__ import annotations

import asyncio
import gzip
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import ktrdr_async as kt
from ktrdr_async.errors import EmbeddedServerError
from ktrdr_async.market import csv_files, sources
from ktrdr_async.operations.service import OperationsService
from ktrdr_async.storage import embedded, locks, places
from ktrdr_async.storage.embedded import EmbeddedServer
from ktrdr_async.strategies import registry, signals, state
from ktrdr_async.supervision.worker import BacktestWorker

ROOT = Path(kt.__file__).parent
MARKET = "synthetic:?bars=300&seed=7&timeframe=1h"
SECRET = "Geheim-77"


# Names of code.


MINE = "import ktrdr_async as kt\nclass Mine(kt.Strategy):\n    def on_bar(self, bar):\n        pass\n"


@pytest.mark.anyio
async def test_a_worker_never_looks_in_the_current_directory(
    dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "threat_here.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each not in ("", str(tmp_path))])
    before = list(sys.path)
    request = kt.BacktestRequest(data=MARKET, strategy="threat_here:Mine")
    async with BacktestWorker.open(dsn, allow=("threat_here",)) as worker:
        await worker.operations.create("op", request.to_dict())
        with pytest.raises(kt.InputError, match="no module 'threat_here'"):
            await worker.resume("op")
        with pytest.raises(kt.InputError, match="no module 'threat_here'"):
            await worker.run(request, "mine")
    assert sys.path == before


@pytest.mark.anyio
async def test_extend_and_fork_too_import_only_what_is_allowed(
    dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "threat_named.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    request = kt.BacktestRequest(data=MARKET, strategy="threat_named:Mine")
    longer = {"data": MARKET.replace("300", "400")}
    async with BacktestWorker.open(dsn) as worker:
        await worker.run(request, "op", keep_state=True)  # named by the calling code: needs no list
    monkeypatch.delitem(sys.modules, "threat_named")
    async with BacktestWorker.open(dsn) as worker:
        for descend, changes in ((worker.extend, longer), (worker.fork, {"commission": 0.01})):
            with pytest.raises(kt.CodeNotAllowedError):
                await descend("op", changes=changes)
        assert "threat_named" not in sys.modules
    async with BacktestWorker.open(dsn, allow=("threat_named:Mine",)) as worker:
        assert len((await worker.extend("op", changes=longer)).bars) == 400


# Names of data.


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A permitted directory and another one, with the same bars and signals in each."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    frame = kt.Bars.read(MARKET).to_pandas()
    frame.columns = frame.columns.get_level_values(1)
    for place in (inside, outside):
        place.mkdir()
        frame.to_csv(place / "bars.csv", index_label="time")
        (place / "signals.csv").write_text("time,signal\n2020-01-01T05:00,0.5\n2020-01-02T05:00,0\n")
    return inside, outside


def request_of(bars: Path, given: Path) -> dict[str, Any]:
    parameters = {"file": str(given / "signals.csv")}
    return kt.BacktestRequest(data=str(bars / "bars.csv"), strategy="signals", parameters=parameters).to_dict()


@pytest.mark.anyio
async def test_files_that_a_stored_strategy_names_lie_under_the_roots_too(dsn: str, files: tuple[Path, Path]) -> None:
    inside, outside = files
    (inside / "link.csv").symlink_to(outside / "signals.csv")
    linked = request_of(inside, inside)
    linked["parameters"]["file"] = str(inside / "link.csv")
    async with BacktestWorker.open(dsn, data_roots=(inside,)) as worker:
        rows = {"out": request_of(inside, outside), "linked": linked, "in": request_of(inside, inside)}
        for name, stored in rows.items():
            await worker.operations.create(name, stored)
        for name in ("out", "linked"):
            with pytest.raises(kt.KtrdrError, match="outside the permitted directories"):
                await worker.resume(name)
        assert (await worker.resume("in")).fills.shape[0] == 2
        (inside / "signals.csv").write_text(f"time,signal\n2020-01-01T05:00,{SECRET}\n")
        await worker.operations.create("told", rows["in"])
        with pytest.raises(kt.KtrdrError, match="must be a number") as caught:
            await worker.resume("told")
        assert SECRET not in f"{caught.value} {caught.value.hint}"


@pytest.mark.anyio
async def test_data_of_ones_own_open_no_door_for_what_is_stored(dsn: str, files: tuple[Path, Path]) -> None:
    """An extension's data are the calling code's; the file that its strategy reads is still the row's."""
    inside, outside = files
    async with BacktestWorker.open(dsn) as worker:
        await worker.run(kt.BacktestRequest.from_dict(request_of(inside, outside)), "op", keep_state=True)
        with pytest.raises(kt.KtrdrError, match="outside the permitted directories"):
            await worker.extend("op", changes={"data": str(outside / "bars.csv")})


@pytest.mark.anyio
async def test_ones_own_embedded_database_may_name_every_file(
    embedded_server: EmbeddedServer, files: tuple[Path, Path]
) -> None:
    _, outside = files
    async with BacktestWorker.open() as worker:
        assert worker.database.embedded
        await worker.operations.create("threat", request_of(outside, outside))
        assert (await worker.resume("threat")).fills.shape[0] == 2


class Waiting(kt.AsyncStrategy):
    """Waits after its last bar, once."""

    resources = ("gate",)

    def __init__(self) -> None:
        self.gate: list[asyncio.Event] = [asyncio.Event()]

    async def on_bar(self, bar: kt.Bar) -> None:
        pass

    async def on_end(self, bar: kt.Bar) -> None:
        self.gate[0].set()
        await asyncio.Event().wait()


class Going(Waiting):
    """Doesn't."""

    async def on_end(self, bar: kt.Bar) -> None:
        pass


Going.__qualname__ = Waiting.__qualname__  # the same strategy, by its name


@pytest.mark.anyio
async def test_changed_data_that_were_accepted_are_told_for_ever_also_after_the_last_bar(
    dsn: str, files: tuple[Path, Path]
) -> None:
    inside, _ = files
    bars, waiting = inside / "bars.csv", Waiting()
    async with BacktestWorker.open(dsn, data_roots=(inside,)) as worker:
        handle = worker.start(kt.BacktestRequest(data=str(bars)), "op", strategy=waiting)
        await waiting.gate[0].wait()
        await handle.cancel()
        assert (await worker.operations.get("op")).checkpoint_bar == 299
        lines = bars.read_text().splitlines()
        lines[9] = ",".join([*lines[9].split(",")[:-1], "77.0"])
        bars.write_text("\n".join(lines))
        with pytest.raises(kt.CheckpointMismatchError):
            await worker.resume("op", strategy=Going())
        results = await worker.resume("op", strategy=Going(), accept_mismatch=True)
        assert any("bars: stored" in each for each in results.accepted_mismatches), results.accepted_mismatches
        assert (await worker.results("op")).accepted_mismatches == results.accepted_mismatches


# Secrets.


@pytest.mark.anyio
async def test_a_password_is_in_no_log_message_or_repr(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with BacktestWorker.open(f"{dsn}&password={SECRET}") as worker:
        handle = worker.start(kt.BacktestRequest(data=MARKET, strategy="sma_cross"), "op", throttle=2_000)
        await handle.until_stored()
        async with worker.database.connection() as connection:  # what is lost is told, and made again
            await connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        await handle.result()
        assert SECRET not in f"{worker.database!r} {worker.database.label} {vars(worker.database)}"
    with pytest.raises(kt.DatabaseError) as caught:
        async with BacktestWorker.open(f"postgresql://me:{SECRET}@127.0.0.1:1/x?connect_timeout=1"):
            pass
    assert SECRET not in f"{caught.value} {caught.value.hint} {caplog.text}"


# Everything that is decoded is bounded.


def big_csv(path: Path) -> None:
    rows = "".join(f"{1_577_836_800 + at},1,1,1,1\n" for at in range(40_000))
    path.write_text(f"time,open,high,low,close\n{rows}")


def bomb(path: Path) -> None:
    big_csv(path)
    path.write_bytes(gzip.compress(path.read_bytes()))


def wide_parquet(path: Path) -> None:
    prices = {name: [1.0, 1.0] for name in ("open", "high", "low", "close")}
    pq.write_table(pa.table({"time": [1, 2], **prices, "junk": ["x" * 300_000, "y" * 300_000]}), path)


@pytest.mark.parametrize("write", [big_csv, bomb, wide_parquet])
def test_a_file_of_bars_is_bounded(
    write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "A.csv")
    kt.Bars.read(str(tmp_path / "A.csv"))
    for module in (csv_files, sources):
        monkeypatch.setattr(module, "MAX_BYTES", 400_000)  # more than is read of it at a time
    with pytest.raises(kt.InputError, match="GiB is refused"):
        kt.Bars.read(str(tmp_path / "A.csv"))


def test_signals_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bars = kt.Bars.read(MARKET)
    (tmp_path / "a.csv").write_text("time,signal\n2020-01-01,1\n")
    made = registry.make("signals", {"file": str(tmp_path / "a.csv")})
    assert isinstance(made, signals.Signals)
    made.target_weights(bars)
    monkeypatch.setattr(signals, "_MAX_BYTES", 10)
    with pytest.raises(kt.InputError, match="are refused"):
        made.target_weights(bars)


class Any_(msgspec.Struct):  # noqa: N801
    value: Any = None


@pytest.mark.parametrize(("data", "words"), [(b"\x91" * 100_000 + b"\x01", "too deep"), (bytes(2_000), "more than")])
def test_a_strategys_state_is_bounded(data: bytes, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "MAX_STATE_BYTES", 200_000 if words == "too deep" else 1_000)
    with pytest.raises(msgspec.ValidationError, match=words):
        state.decode_state(b"\x81\xa5value" + data, Any_)


def test_a_request_is_bounded() -> None:
    deep: Any = 1
    for _ in range(100):
        deep = [deep]
    with pytest.raises(kt.ParameterError, match="nested deeper"):
        kt.BacktestRequest(strategy="sma_cross", parameters={"fast": deep})
    with pytest.raises(kt.ParameterError) as caught:
        kt.BacktestRequest(seed="x" * 10_000_000)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 20_000


@pytest.mark.anyio
@pytest.mark.parametrize("column", ["request", "progress", "result", "error"])
async def test_a_row_that_is_nested_too_deep_is_refused(database: Any, column: str) -> None:
    operations = OperationsService(database)
    await operations.create("op", kt.BacktestRequest(data=MARKET, strategy="sma_cross").to_dict())
    deep = '{"a":' * 100 + "1" + "}" * 100
    async with database.connection() as connection:
        await connection.execute("ALTER TABLE ktrdr.operations DISABLE TRIGGER USER")
        for check in ("completed", "failed"):
            await connection.execute(f"ALTER TABLE ktrdr.operations DROP CONSTRAINT operations_{check}")
        await connection.execute(f"UPDATE ktrdr.operations SET {column} = $1::text::jsonb", deep)
    with pytest.raises(kt.CheckpointCorruptedError, match=f"the {column} of operation op can't be read"):
        await operations.get("op")


# The embedded server.


def test_nobody_starts_without_the_run_lock(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = EmbeddedServer(home)
    places.prepare_home(home, shared_with_account=os.geteuid() == 0)
    held = locks.try_lock(server.root, "run.lock")
    assert held is not None
    monkeypatch.setattr(embedded, "START_PATIENCE", 0.5)
    monkeypatch.setattr(embedded, "FOREIGN_PATIENCE", 60.0)
    with pytest.raises(EmbeddedServerError, match=r"didn't answer within 0\.5 s"):
        server.start()
    assert not (server.root / "data").exists()
    os.close(held)
    monkeypatch.undo()
    server.start()
    try:
        assert locks.take_run(server.root) is None
        pid = int((server.root / "data" / "postmaster.pid").read_text().split()[0])
        assert psutil.Process(pid).cmdline()[1:] == ["-D", str(server.root / "data")]  # settings are in its file
    finally:
        server.release()


def test_an_owner_is_given_on_a_descriptor_that_no_link_leads_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="link"):
        places.give(tmp_path / "link", os.geteuid(), os.getegid())
    assert places.private_directory(tmp_path / "link", os.geteuid()) == "it isn't a directory"


def test_a_sockets_path_fits_the_kernel() -> None:
    assert {"linux": 107, "darwin": 103}.get(sys.platform, places.SOCKET_PATH_LIMIT) == places.SOCKET_PATH_LIMIT
    longest = Path("/" + "d" * (places.SOCKET_PATH_LIMIT - len(places.SOCKET_NAME) - 2))
    assert places.fits(longest)
    assert not places.fits(Path(f"{longest}d"))


def test_the_readme_says_who_may_do_what() -> None:
    text = (ROOT.parent / "README.md").read_text(encoding="utf-8")
    section = text.partition("\n## Threats\n")[2].partition("\n## ")[0]
    for words in ("write the database", "name code", "read results", "data_roots", "allow="):
        assert words in section, words
    assert 8 <= len([line for line in section.splitlines() if line.strip()]) <= 16
