"""What a resume notices: sources beside the strategy and of its bases, and data that changed after the checkpoint."""

from __future__ import annotations

import importlib
from contextlib import aclosing
from pathlib import Path

import pytest

import ktrdr_async as kt
from ktrdr_async.backtesting.provenance import identity_of

pytestmark = pytest.mark.anyio


def test_sources_are_those_of_the_module_its_bases_and_what_lies_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, elsewhere = tmp_path / "own", tmp_path / "elsewhere"
    library = own / "venv" / "site-packages"
    for folder in (own, elsewhere, library):
        folder.mkdir(parents=True)
        monkeypatch.syspath_prepend(folder)
    (elsewhere / "prov_base.py").write_text("import ktrdr_async as kt\nclass Base(kt.Strategy): ...\n")
    (elsewhere / "prov_other.py").write_text("LIMIT = 1\n")
    (library / "prov_library.py").write_text("def f(): ...\n")
    (own / "prov_helper.py").write_text("def size(): return 0.5\n")
    (own / "prov_main.py").write_text(
        "from prov_base import Base\nfrom prov_helper import size\nimport prov_library, prov_other\n"
        "class Main(Base):\n    def on_bar(self, bar): bar.target_weight(0, size())\n"
    )
    identity = identity_of(importlib.import_module("prov_main").Main())
    assert set(identity.source) == {"prov_main", "prov_helper", "prov_base"}
    assert not identity.built_in
    assert identity_of(kt.SmaCross()).source == {"builtin": "1"}


async def test_data_that_changed_after_the_checkpoint_are_told_of() -> None:
    bars = kt.Bars.read("synthetic:?bars=1000&seed=4")
    request = kt.BacktestRequest()
    engine = kt.BacktestingEngine(request, bars, kt.RsiReversion())
    async with aclosing(engine.run()) as blocks:
        async for block in blocks:
            if block.bar_index == 499:
                break
    state = kt.build_backtest_checkpoint_state(engine, 499, int(bars.timestamps[499]))
    for data, told in ((bars, False), (bars.head(800), True)):
        resumed = kt.BacktestingEngine(request, data, kt.RsiReversion())
        async with aclosing(resumed.run(state)) as blocks:
            async for _ in blocks:
                pass
        warnings = [each for each in resumed.results().warnings if "the data after bar 499" in each]
        assert bool(warnings) is told
