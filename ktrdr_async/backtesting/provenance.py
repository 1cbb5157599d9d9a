"""What a run is made from: the strategy's identity and source, the manifest, and a checkpoint's check against both."""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any

import msgspec

from ktrdr_async.backtesting.execution import ARITHMETIC_VERSION
from ktrdr_async.checkpoint.manifest import Manifest, environment, numeric_probe
from ktrdr_async.checkpoint.schemas import check_version
from ktrdr_async.errors import CheckpointCorruptedError, CheckpointMismatchError
from ktrdr_async.strategies.base import StrategyBase

if TYPE_CHECKING:
    from ktrdr_async.backtesting.engine import BacktestingEngine
    from ktrdr_async.checkpoint.schemas import BacktestCheckpointState

_OWN = "ktrdr_async.strategies."
_LIBRARIES = frozenset({"site-packages", "dist-packages"})


class StrategyIdentity(msgspec.Struct, frozen=True):
    """Which strategy this is."""

    name: str  # registered name, or module:Class
    parameters: dict[str, Any]
    source: dict[str, str]  # module -> hex digest of its source; {"builtin": N} for the package's own

    @property
    def built_in(self) -> bool:
        """Whether it is the package's own."""
        return set(self.source) == {"builtin"}


def identity_of(strategy: StrategyBase) -> StrategyIdentity:
    """The strategy's name, parameters and sources.

    The sources are those of its module, and of what that uses from modules that lie beside it; never of libraries,
    whose patch releases strand no run.
    """
    kind = type(strategy)
    own = kind.__module__.startswith(_OWN)
    name = getattr(kind, "name", kind.__qualname__) if own else f"{kind.__module__}:{kind.__qualname__}"
    return StrategyIdentity(name, strategy.parameters, dict(_sources_of(kind)))


@functools.cache
def _sources_of(kind: type) -> Mapping[str, str]:
    # Once a class: it costs milliseconds, and a file that is edited later isn't what this process runs.
    if kind.__module__.startswith(_OWN):
        return MappingProxyType({"builtin": str(getattr(kind, "version", 1))})
    found: dict[str, str] = {}
    bases = {cls.__module__ for cls in kind.__mro__ if not cls.__module__.startswith("ktrdr_async.")}
    waiting = sorted(bases)
    root = _folder_of(sys.modules.get(kind.__module__))
    while waiting:
        name = waiting.pop()
        module = sys.modules.get(name)
        if name in found or name == "builtins" or module is None:
            continue
        if name not in bases and not _lies_beside(module, root):
            continue
        found[name] = _digest_of(module, kind)
        for value in list(vars(module).values()):
            used = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            if isinstance(used, str):
                waiting.append(used)
    for cls in kind.__mro__:
        if cls.__module__.startswith(_OWN) and hasattr(cls, "version"):
            found[f"{cls.__module__}:{cls.__qualname__}"] = str(vars(cls).get("version", 1))
    return MappingProxyType(found)


def _lies_beside(module: ModuleType, root: Path | None) -> bool:
    folder = _folder_of(module)
    if root is None or folder is None or root.name in _LIBRARIES or not folder.is_relative_to(root):
        return False
    return _LIBRARIES.isdisjoint(folder.relative_to(root).parts)


def _folder_of(module: ModuleType | None) -> Path | None:
    file = getattr(module, "__file__", None)
    return Path(file).resolve().parent if isinstance(file, str) else None


def _digest_of(module: ModuleType, kind: type) -> str:
    try:
        return hashlib.sha256(inspect.getsource(module).encode()).hexdigest()
    except (OSError, TypeError):
        pass
    try:  # a notebook, or code that was typed in
        return hashlib.sha256(inspect.getsource(kind).encode()).hexdigest()
    except (OSError, TypeError):
        return "no source at hand"


def prepare_manifests(engine: BacktestingEngine) -> None:
    """Computes what all manifests of a run share: milliseconds that a loop needn't wait for."""
    strategy = engine.strategy
    environment()
    engine.bars.fingerprint()
    if not identity_of(strategy).built_in:
        numeric_probe()


def manifest_of(engine: BacktestingEngine, upto: int) -> Manifest:
    """What a checkpoint at bar `upto` of this engine is made from."""
    identity = identity_of(engine.strategy)
    return Manifest(
        request=engine.request.to_dict() | {"parameters": identity.parameters},
        bars=engine.bars.fingerprint(upto),
        strategy=identity.name,
        strategy_source=identity.source,
        decisions=engine.decided.digest(upto),
        arithmetic_version=ARITHMETIC_VERSION,
        numeric_probe=None if identity.built_in else numeric_probe(),
        recorded={**environment(), "tier": engine.tier, "data": _data_of(engine)},
    )


Accept = Callable[[str], bool]  # whether a manifest's field may differ


def nothing(_field: str) -> bool:
    """Accepts no difference."""
    return False


def anything(_field: str) -> bool:
    """Accepts every difference."""
    return True


def _data_of(engine: BacktestingEngine) -> str:
    return f"{len(engine.bars)} bars, fingerprint {engine.bars.fingerprint()[:12]}"


def _in_range(state: BacktestCheckpointState) -> bool:
    """Whether every count, and every sum of lots, has at most 64 bits, as the state's digest takes them."""
    counters = state.counters
    counts = [
        counters.cut, counters.cut_to_zero, counters.refused_after_ruin, counters.ordered_rows, counters.ruined_at,
        *counters.zero_lots, *(order.lots for order in state.waiting), *(event.requested for event in state.ledger),
        *(record.bar for record in state.recorded), sum(abs(event.lots) for event in state.ledger),
    ]  # fmt: skip
    return min(counts) >= -(2**63) and max(counts) < 2**63


def check_past(
    engine: BacktestingEngine, state: BacktestCheckpointState, operation: str, accept: Accept = nothing
) -> list[str]:
    """Refuses a checkpoint that this engine can't go on from. Returns the differences that were accepted, in words.

    Raises:
        SchemaVersionError: if its version isn't known here.
        CheckpointCorruptedError: if it isn't whole.
        CheckpointMismatchError: if data, code, numbers or request differ; it holds each difference.
    """
    check_version(state.schema_version)
    if state.ledger_from or state.recorded_from:
        raise CheckpointCorruptedError(
            operation,
            f"the checkpoint isn't whole: its ledger starts at event {state.ledger_from}, what was recorded at value "
            f"{state.recorded_from}",
            hint="load it with its segments",
        )
    if not _in_range(state):
        raise CheckpointCorruptedError(operation, "the checkpoint holds a count that no run comes to")
    n = len(engine.bars)
    if not 0 <= state.bar_index < n:
        raise CheckpointMismatchError(
            operation,
            f"the checkpoint is of bar {state.bar_index} and the data have {n} bars",
            differences={"bars.count": (f"more than {state.bar_index}", str(n))},
            hint="give the data that the run was started with",
        )
    if state.manifest is None:
        raise CheckpointMismatchError(
            operation, "the checkpoint has no manifest", differences={"manifest": ("none", "needed")}
        )
    found = state.manifest.differences(manifest_of(engine, state.bar_index))
    refused = {name: both for name, both in found.items() if not accept(name)}
    if refused:
        lines = "; ".join(f"{name}: stored {before}, now {now}" for name, (before, now) in refused.items())
        raise CheckpointMismatchError(
            operation,
            f"the checkpoint at bar {state.bar_index} was made from something else: {lines}",
            differences=refused,
            hint="go on with the same data, code and environment, or start a new operation",
        )
    saved, here = state.manifest.recorded.get("data"), _data_of(engine)
    if saved is not None and saved != here and not accept("request.data"):
        engine.noticed.append(
            f"the data after bar {state.bar_index} are others than when it was saved: {saved}, now {here}"
        )
    return [f"bar {state.bar_index}: {name}: stored {before}, now {now}" for name, (before, now) in found.items()]
