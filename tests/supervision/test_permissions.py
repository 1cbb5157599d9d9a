"""What a name that was read from a database may reach: code on the allow-list, data under the roots."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from supervision_runs import MARKET, market, standing

import ktrdr_async as kt
from ktrdr_async.supervision.worker import BacktestWorker

pytestmark = pytest.mark.anyio


async def interrupted(dsn: str, request: kt.BacktestRequest, name: str = "op") -> None:
    """An operation whose worker left before its end."""
    async with BacktestWorker.open(dsn) as worker:
        handle = worker.start(request, name, throttle=3_000)
        async for now in handle.progress(0.01):
            if now.bar_index >= 99:
                break
        assert not handle.done


async def test_only_allowed_code_is_imported_on_resume(dsn: str) -> None:
    request = kt.BacktestRequest(data=MARKET, strategy="supervision_runs:Counter")
    await interrupted(dsn, request)  # given by the calling code: needs no list
    async with BacktestWorker.open(dsn) as worker:
        was = standing(await worker.operations.get("op"))
        with pytest.raises(kt.CodeNotAllowedError):
            await worker.resume("op")
        assert standing(await worker.operations.get("op")) == was
    async with BacktestWorker.open(dsn, allow=("supervision_runs:Held",)) as worker:
        with pytest.raises(kt.CodeNotAllowedError):
            await worker.resume("op")
    async with BacktestWorker.open(dsn, allow=("supervision_runs:Counter",)) as worker:
        results = await worker.resume("op")
    assert results.digest == (await kt.backtest(None, "supervision_runs:Counter", request=request)).digest


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    """A permitted directory and one outside of it, with a file of bars each."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for place in (inside, outside):
        place.mkdir()
        frame = market().to_pandas()
        frame.columns = frame.columns.get_level_values(1)
        frame.to_csv(place / "AAA.csv", index_label="time")
    return inside, outside


async def refused(dsn: str, name: str, roots: tuple[Path, ...]) -> None:
    async with BacktestWorker.open(dsn, data_roots=roots) as worker:
        was = standing(await worker.operations.get(name))
        with pytest.raises(kt.InputError) as caught:
            await worker.resume(name)
        assert caught.value.code == "data_not_allowed"
        assert standing(await worker.operations.get(name)) == was


async def test_stored_data_are_read_only_under_the_roots(dsn: str, places: tuple[Path, Path]) -> None:
    inside, outside = places
    linked = inside / "link.csv"
    linked.symlink_to(outside / "AAA.csv")
    folder = inside / "folder"
    folder.mkdir()
    (folder / "BBB.csv").symlink_to(outside / "AAA.csv")
    shutil.copy(inside / "AAA.csv", folder / "AAA.csv")
    references = {
        "inside": inside / "AAA.csv",
        "outside": outside / "AAA.csv",
        "around": f"{inside}/../outside/AAA.csv",
        "link": linked,
        "pair": f"X={inside}/AAA.csv,Y={outside}/AAA.csv",
        "folder": folder,
    }
    for name, reference in references.items():  # handed over by the calling code, all of them can be read
        await interrupted(dsn, kt.BacktestRequest(data=str(reference), strategy="sma_cross"), name)
    for name in references:
        await refused(dsn, name, ())
    for name in ("outside", "around", "link", "pair", "folder"):
        await refused(dsn, name, (inside,))
    async with BacktestWorker.open(dsn, data_roots=(inside,)) as worker:
        results = await worker.resume("inside")
        assert results.digest == (await worker.results("inside")).digest
    async with BacktestWorker.open(dsn) as worker:
        with pytest.raises(kt.InputError) as caught:
            await worker.results("inside")
        assert caught.value.code == "data_not_allowed"


async def test_a_file_that_has_changed_is_not_gone_on_with(dsn: str, places: tuple[Path, Path]) -> None:
    inside, _ = places
    path = inside / "AAA.csv"
    request = kt.BacktestRequest(data=str(path), strategy="sma_cross")
    clean = (await kt.backtest(None, "sma_cross", request=request)).digest
    await interrupted(dsn, request)
    text = path.read_text()
    lines = text.splitlines()
    lines[50] = ",".join([*lines[50].split(",")[:-1], "12345.0"])
    path.write_text("\n".join(lines) + "\n")
    async with BacktestWorker.open(dsn, data_roots=(inside,)) as worker:
        was = standing(await worker.operations.get("op"))
        with pytest.raises(kt.CheckpointMismatchError) as caught:
            await worker.resume("op")
        assert list(caught.value.differences) == ["bars"]
        assert standing(await worker.operations.get("op")) == was
        path.write_text(text)
        assert (await worker.resume("op")).digest == clean
