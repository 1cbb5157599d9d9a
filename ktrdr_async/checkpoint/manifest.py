"""The manifest: what a checkpoint was made from, so that a resume can prove that it goes on with the same."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import math
import platform
from collections.abc import Iterator
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from numpy.typing import NDArray


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
    return MappingProxyType(
        {
            "python": platform.python_version(),
            "numpy": _version_of("numpy"),
            "pandas": _version_of("pandas"),
            "machine": platform.machine(),
            "system": f"{platform.system()} {platform.release()}",
        }
    )


def _version_of(package: str) -> str:
    # Not by importing it: pandas takes 0.3 s, in which a running loop stands.
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@functools.cache
def numeric_probe() -> str:
    """SHA-256 over functions whose bits change with CPU features, BLAS kernels and threads, libm, Python and libraries.

    A strategy that isn't built in may use any of them; where the probe differs, its numbers may differ too.
    """
    found = hashlib.sha256()
    for values in _probed():
        found.update(values.tobytes())
    return found.hexdigest()


def _probed() -> Iterator[NDArray[Any]]:
    import numpy as np
    import pandas as pd

    x = np.arange(1, 4001, dtype=np.float64) / 997.0
    unit = x % 1.0
    short = x.astype(np.float32)
    for function in (
        np.exp, np.exp2, np.expm1, np.log, np.log2, np.log10, np.log1p, np.sin, np.cos, np.tan, np.arctan, np.sinh,
        np.cosh, np.tanh, np.arcsinh, np.cbrt,
    ):  # fmt: skip
        yield function(x)
        yield function(short)
    yield np.exp(x[::3])
    yield np.arcsin(unit)
    yield np.arctan2(x, unit)
    yield np.power(x, 1.7)

    grid = np.sin(np.arange(500 * 37, dtype=np.float64)).reshape(500, 37)
    wide = np.sin(np.arange(1500 * 500, dtype=np.float64) / 7.0).reshape(1500, 500)
    for axis in (0, 1):
        yield grid.mean(axis=axis)
        yield np.asfortranarray(grid).sum(axis=axis)
    yield grid.T @ grid
    yield wide.T @ wide
    yield wide.T @ x[:1500]
    yield np.array([x[:20] @ unit[:20], x @ unit])
    yield np.convolve(unit, x[:50])
    yield np.linalg.lstsq(grid, x[:500], rcond=None)[0]
    yield np.linalg.solve(grid[:37] + 3.0 * np.eye(37), x[:37])
    yield np.linalg.svd(grid[:40, :5])[1]
    yield np.fft.rfft(unit[:1000])

    values = x.tolist()
    yield np.array([sum(values), math.fsum(values)])
    for scalar in (math.exp, math.expm1, math.log, math.log10, math.sin, math.tan, math.atan, math.tanh):
        yield np.array([scalar(v) for v in values[::40]])
    yield np.array([math.pow(v, 1.3) for v in values[::40]])

    rng = np.random.Generator(np.random.Philox(key=7))
    yield rng.random(64)
    yield rng.standard_normal(1000)
    yield rng.standard_exponential(1000)
    yield rng.standard_gamma(1.7, 1000)
    yield rng.integers(0, 97, 64)
    yield rng.permutation(64)

    frame, series = pd.DataFrame(grid[:, :5]), pd.Series(unit)
    window = series.rolling(20)
    for made in (
        frame.mean(axis=1), frame.std(), frame.corr(), window.mean(), window.std(), window.skew(),
        window.corr(pd.Series(x)), series.ewm(span=12).mean(),
    ):  # fmt: skip
        yield made.to_numpy()
    yield np.array([series.skew(), series.kurt()])
