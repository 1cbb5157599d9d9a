"""The manifest: what a checkpoint was made from, so that a resume can prove that it goes on with the same."""

from __future__ import annotations

import functools
import hashlib
import math
import platform
from types import MappingProxyType
from typing import Any

import msgspec


class Manifest(msgspec.Struct, frozen=True):
    """What must match on resume, and what is only recorded."""

    request: dict[str, Any]  # data, symbols, parameters, costs, seed: the original request
    bars: str  # hex fingerprint of the bars up to the checkpoint's bar
    strategy: str  # registered name, or module:Class
    strategy_source: dict[str, str]  # module -> hex digest of its source; {"builtin": N} for the package's own
    decisions: str  # hex digest of the rows that `prepare` or the targets gave, up to the checkpoint's bar
    arithmetic_version: int
    numeric_probe: str | None  # None for built-in strategies: their bits are the same everywhere
    recorded: dict[str, str] = {}  # versions, CPU, OS, tier: never compared

    def differences(self, found: Manifest) -> dict[str, tuple[str, str]]:
        """What differs between this (stored) manifest and the one of this run: field -> (stored, found)."""
        result: dict[str, tuple[str, str]] = {}
        for key in sorted(self.request.keys() | found.request.keys()):
            stored, now = self.request.get(key), found.request.get(key)
            if stored != now:
                result[f"request.{key}"] = (repr(stored), repr(now))
        for module in sorted(self.strategy_source.keys() | found.strategy_source.keys()):
            both = self.strategy_source.get(module, "not used"), found.strategy_source.get(module, "not used")
            if both[0] != both[1]:
                result[f"strategy_source.{module}"] = both
        for name in ("bars", "strategy", "decisions", "arithmetic_version", "numeric_probe"):
            stored, now = getattr(self, name), getattr(found, name)
            if stored != now:
                result[name] = (str(stored), str(now))
        return result


@functools.cache
def environment() -> MappingProxyType[str, str]:
    """What is recorded and never compared: versions, machine, system."""
    import numpy
    import pandas

    return MappingProxyType(
        {
            "python": platform.python_version(),
            "numpy": numpy.__version__,
            "pandas": pandas.__version__,
            "machine": platform.machine(),
            "system": f"{platform.system()} {platform.release()}",
        }
    )


@functools.cache
def numeric_probe() -> str:
    """SHA-256 over functions whose bits change with CPU features, BLAS kernels and threads, libm and Python.

    A strategy that isn't built in may use any of them; where the probe differs, its numbers may differ too.
    """
    import numpy as np

    x = np.arange(1, 4001, dtype=np.float64) / 997.0
    found = hashlib.sha256()
    for function in (np.exp, np.log, np.log1p, np.sin, np.tanh, np.cbrt):
        found.update(function(x).tobytes())
    found.update(np.power(x, 1.7).tobytes())
    found.update(np.exp(x[::3]).tobytes())
    grid = np.sin(np.arange(500 * 37, dtype=np.float64)).reshape(500, 37)
    wide = np.sin(np.arange(1500 * 500, dtype=np.float64) / 7.0).reshape(1500, 500)
    for axis in (0, 1):
        found.update(grid.mean(axis=axis).tobytes())
        found.update(np.asfortranarray(grid).sum(axis=axis).tobytes())
    found.update((grid.T @ grid).tobytes())
    found.update((wide.T @ wide).tobytes())
    values = x.tolist()
    found.update(np.float64(sum(values)).tobytes())
    for scalar in (math.exp, math.sin, math.log, math.tanh):
        found.update(np.array([scalar(v) for v in values[::40]]).tobytes())
    found.update(np.array([math.pow(v, 1.3) for v in values[::40]]).tobytes())
    return found.hexdigest()
