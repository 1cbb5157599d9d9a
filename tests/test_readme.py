"""The README's promises, as they are printed there."""

import asyncio
import re
import sys
import textwrap
import types
from pathlib import Path

import httpx
import pandas as pd
import pytest

import ktrdr_async as kt
from ktrdr_async.backtesting import audit

README = Path(__file__).parents[1] / "README.md"


def block(marker: str) -> str:
    found = re.search(rf"{re.escape(marker)}\n+```(?:python|bash)\n(.*?)```", README.read_text(), re.DOTALL)
    assert found, f"README.md has no block after {marker}"
    return found[1]


def module(name: str, source: str, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    made = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, made)
    exec(compile(source, str(README), "exec"), made.__dict__)
    return made


def test_first_screen_has_the_two_commands_and_who_it_is_for() -> None:
    first = "\n".join(README.read_text().splitlines()[:32])
    assert "35 ms" in first
    assert "ktrdr-async demo" in first
    assert "-m pytest" in first


def test_script_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    frame = kt.Bars.read("synthetic:?bars=3000&seed=1").to_pandas()["ASSET"]
    frame.rename_axis("time").to_csv("eurusd.csv")
    module("script", block("## In a script"), monkeypatch)
    assert "digest" in capsys.readouterr().out
    assert pd.read_csv(tmp_path / "out" / "equity.csv").shape[0] == 3000


def test_strategy_as_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = module("printed_strategy", block("## A strategy of your own"), monkeypatch)
    bars = kt.Bars.read("synthetic:?bars=20000&seed=3")
    results = kt.backtest_sync(bars, made.Reversal(band=0.005), commission=0.0, slippage=0.0)
    assert set(results.fills["tag"].dropna()) == {"dip"}
    assert results.audit().ok
    with pytest.raises(kt.ParameterError, match="band"):
        made.Reversal(band=0.0)


def test_audit_as_printed() -> None:
    printed = [line.strip() for line in textwrap.dedent(block("<!-- the audit -->")).splitlines()]
    source = [line.strip() for line in Path(audit.__file__).read_text().splitlines()]
    start = source.index(printed[0])
    assert source[start : start + len(printed)] == printed


@pytest.mark.anyio
async def test_service_as_printed(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KTRDR_ASYNC_DATABASE", dsn)
    service = module("service", block("<!-- the service -->"), monkeypatch)
    data = "synthetic:?bars=400000&seed=5"
    expected = (await kt.backtest(data, "sma_cross", parameters={"fast": 12})).digest
    async with (
        service.app.router.lifespan_context(service.app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app=service.app), base_url="http://service") as client,
    ):
        assert (await client.post("/backtests/one", params={"data": data, "fast": 12})).json() == {"id": "one"}
        seen = (await client.get("/backtests/one")).json()
        while seen["status"] == "pending" or seen["bar"] < 1000:
            assert seen["status"] in ("pending", "running")
            await asyncio.sleep(0)  # the transport in memory never gives the loop a turn, as a socket would
            seen = (await client.get("/backtests/one")).json()
        assert seen["of"] == 400_000
        assert (await client.post("/backtests/one/cancel")).json() == {"status": "cancelled"}
        assert (await client.post("/backtests/one/resume")).json() == {"id": "one"}
        assert (await service.app.state.worker.handle("one").result()).digest == expected
        assert (await client.get("/backtests/one")).json() == {
            "status": "completed",
            "bar": 399_999,
            "of": 400_000,
            "equity": (await service.app.state.worker.results("one")).final_equity,
        }
        row = await service.app.state.worker.operations.get("one")
        assert row.result is not None
        assert row.result["run"]["resumed_from"][0] >= 1000
        bad = await client.post("/backtests/two", params={"data": "/nowhere.csv"})
        assert (bad.status_code, bad.json()["error"]) == (422, "bad_data")
        assert "there is no such file" in bad.json()["message"]
        missing = await client.get("/backtests/two")
        assert (missing.status_code, missing.json()["error"]) == (404, "not_found")
        assert (await client.post("/backtests/a b", params={"data": data})).status_code == 422
