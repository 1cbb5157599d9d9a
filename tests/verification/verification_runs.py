"""Real bars: hourly EURUSD that the package `backtesting` ships."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import ktrdr_async as kt


def shipped(name: str) -> Path:
    """A file of the package; not imported, as it warns."""
    spec = importlib.util.find_spec("backtesting")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "test" / name


FILE = shipped("EURUSD.csv")
EURUSD = kt.Bars.read(str(FILE), symbols=("EURUSD",))
COSTS: dict[str, Any] = {"commission": 0.00002, "slippage": 0.00005}
