"""What a run is made from: the strategy's identity and source, the manifest, and a checkpoint's check against both."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from ktrdr_async.backtesting.execution import ARITHMETIC_VERSION
from ktrdr_async.checkpoint.manifest import Manifest, environment, numeric_probe
from ktrdr_async.checkpoint.schemas import SCHEMA_VERSION
from ktrdr_async.errors import CheckpointCorruptedError, CheckpointMismatchError, SchemaVersionError
from ktrdr_async.strategies.base import StrategyBase

if TYPE_CHECKING:
    from ktrdr_async.backtesting.engine import BacktestingEngine
    from ktrdr_async.checkpoint.schemas import BacktestCheckpointState

_OWN = "ktrdr_async.strategies."


class StrategyIdentity(msgspec.Struct, frozen=True):
    """Which strategy this is."""

    name: str  # registered name, or module:Class
    parameters: dict[str, Any]
    source: str  # "builtin:N", or the hex digest of its classes' source


def identity_of(strategy: StrategyBase) -> StrategyIdentity:
    """The strategy's name, parameters and source digest.

    The source is that of the class and its bases outside the package; what their modules hold beside them isn't seen.
    """
    kind = type(strategy)
    if kind.__module__.startswith(_OWN):
        name = getattr(kind, "name", kind.__qualname__)
        return StrategyIdentity(name, strategy.parameters, f"builtin:{getattr(kind, 'version', 1)}")
    return StrategyIdentity(f"{kind.__module__}:{kind.__qualname__}", strategy.parameters, _source_digest(kind))


@functools.cache
def _source_digest(kind: type) -> str:
    # Once a class: it costs milliseconds, and a file that is edited later isn't what this process runs.
    found = hashlib.sha256()
    for cls in kind.__mro__:
        if cls is object:
            continue
        if cls.__module__.startswith("ktrdr_async."):
            found.update(f"{cls.__qualname__}:{vars(cls).get('version', 1)}".encode())
            continue
        try:
            found.update(inspect.getsource(cls).encode())
        except (OSError, TypeError):
            found.update(f"{cls.__module__}:{cls.__qualname__}: no source at hand".encode())
    return found.hexdigest()


def prepare_manifests(strategy: StrategyBase) -> None:
    """Computes what all manifests of this process and class share: milliseconds that a loop needn't wait for."""
    environment()
    if not identity_of(strategy).source.startswith("builtin:"):
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
        numeric_probe=None if identity.source.startswith("builtin:") else numeric_probe(),
        recorded={**environment(), "tier": "interpreted"},
    )


Accept = Callable[[str], bool]  # whether a manifest's field may differ


def nothing(_field: str) -> bool:
    """Accepts no difference."""
    return False


def anything(_field: str) -> bool:
    """Accepts every difference."""
    return True


def check_past(
    engine: BacktestingEngine, state: BacktestCheckpointState, operation: str, accept: Accept = nothing
) -> list[str]:
    """Refuses a checkpoint that this engine can't go on from. Returns the differences that were accepted, in words.

    Raises:
        SchemaVersionError: if newer code wrote it.
        CheckpointCorruptedError: if it isn't whole.
        CheckpointMismatchError: if data, code, numbers or request differ; it holds each difference.
    """
    if state.schema_version > SCHEMA_VERSION:
        raise SchemaVersionError(
            f"the checkpoint has schema version {state.schema_version}, this code knows {SCHEMA_VERSION}",
            hint="upgrade ktrdr_async",
        )
    if state.ledger_from or state.recorded_from:
        raise CheckpointCorruptedError(
            operation,
            f"the checkpoint isn't whole: its ledger starts at event {state.ledger_from}, what was recorded at value "
            f"{state.recorded_from}",
            hint="load it with its segments",
        )
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
    return [f"bar {state.bar_index}: {name}: stored {before}, now {now}" for name, (before, now) in found.items()]
