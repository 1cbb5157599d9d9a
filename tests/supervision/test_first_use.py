"""What a process pays once is paid before a worker is ready, and the host's garbage collector is left as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from supervision_runs import HERE

import ktrdr_async as kt

SCRIPT = """
import asyncio, gc, json, sys
from ktrdr_async.supervision import worker as _
import ktrdr_async as kt

first = "anyio._backends._asyncio" in sys.modules
collector = lambda: [gc.isenabled(), gc.get_threshold(), gc.get_freeze_count(), len(gc.callbacks), gc.get_debug()]
before = collector()

class Mine(kt.Strategy):
    def prepare(self, bars):
        return {"mean": kt.indicators.sma(bars.close, 50)}

    def on_bar(self, bar):
        bar.record(drawn=float(bar.rng.random()))
        if bar.index % 10 == 0:
            bar.target_weight(0, 0.5 if bar.close[0] > bar.feature("mean")[0] else 0.0)

async def main():
    later = {}
    async with kt.BacktestWorker.open(sys.argv[1], alone=ALONE) as worker:
        ready = set(sys.modules)
        policy = kt.CheckpointPolicy(100, max_overhead=None)
        for data in sys.argv[2:]:
            for strategy in (Mine(), kt.SmaCross(), kt.Signals(file=sys.argv[2].replace("bars", "signals"), clip=True)):
                request = kt.BacktestRequest(data=data)
                handle = worker.start(request, strategy=strategy, policy=policy)
                results = await handle.result()
                assert results.run.checkpoints_saved > 2
                str(results)
        handle = worker.start(kt.BacktestRequest(data=data), "op", strategy=Mine(), policy=policy, throttle=2000)
        while handle.inspect().checkpoint_bar is None:
            await asyncio.sleep(0.01)
        await handle.cancel()
        await worker.resume("op", strategy=Mine())
        frame = results.bars.to_pandas()["ASSET"]
        await kt.backtest(frame, kt.RsiReversion())
    later = sorted(set(sys.modules) - ready)
    print(json.dumps({"first": first, "later": later, "collector": [before, collector()]}))

asyncio.run(main())
"""
HARMLESS = ("encodings.",)  # a codec's module: a millisecond


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    where = tmp_path_factory.mktemp("first_use")
    bars = kt.Bars.read("synthetic:?bars=600&seed=7&timeframe=1h")
    frame = bars.to_pandas()["ASSET"].rename_axis("time")
    frame.to_csv(where / "bars.csv")
    frame.to_parquet(where / "bars.parquet")
    (frame[["close"]] * 0.0).iloc[::7].rename(columns={"close": "weight"}).to_csv(where / "signals.csv")
    return [str(where / "bars.csv"), str(where / "bars.parquet"), "synthetic:?bars=600&seed=7&timeframe=1h"]


def told(dsn: str, references: list[str], *, alone: bool) -> dict[str, Any]:
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1])}
    script = SCRIPT.replace("ALONE", repr(alone))
    command = [sys.executable, "-c", script, dsn, *references]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, cwd=Path("/"))
    assert ended.returncode == 0, ended.stderr
    return dict(json.loads(ended.stdout))


@pytest.mark.anyio
async def test_nothing_is_imported_once_a_worker_is_ready(dsn: str, references: list[str]) -> None:
    found = told(dsn, references, alone=False)
    assert found["first"], "the first checkpoint of a process imports anyio's backend"
    assert [name for name in found["later"] if not name.startswith(HARMLESS)] == []
    assert found["collector"][0] == found["collector"][1]


@pytest.mark.anyio
async def test_who_is_alone_pays_for_what_it_uses(dsn: str, references: list[str]) -> None:
    """A command line has nobody to keep waiting. And the test above can fail."""
    assert "pandas" in told(dsn, references, alone=True)["later"]
