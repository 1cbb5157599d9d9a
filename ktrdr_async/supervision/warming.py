"""What a process pays once: modules that are imported at first use, figures that are computed at the first checkpoint.

A running loop would stand still for it, in a thread too: imports hold the interpreter.
"""

from __future__ import annotations

import contextlib
import importlib

from ktrdr_async.backtesting.ledger import LedgerEvent
from ktrdr_async.checkpoint.codec import GENESIS, Counts, SegmentWork, encode_head
from ktrdr_async.checkpoint.manifest import Manifest, environment, numeric_probe
from ktrdr_async.checkpoint.schemas import (
    BacktestCheckpointState,
    EquitySample,
    PositionState,
    RecordedValue,
    WaitingOrder,
)

_AT_FIRST_USE = (
    "numpy.random", "pandas", "pyarrow", "pyarrow.csv", "pyarrow.pandas_compat", "pyarrow.parquet",
    "pyarrow.vendored.version", "zoneinfo", "ktrdr_async.backtesting.summary", "ktrdr_async.market.csv_files",
    "ktrdr_async.market.frames", "ktrdr_async.market.sources", "ktrdr_async.market.synthetic",
    "ktrdr_async.supervision.local",
)  # fmt: skip


def warm_up() -> None:
    """Pays it now. A second time costs nothing."""
    for name in _AT_FIRST_USE:
        with contextlib.suppress(ImportError):  # who needs it says so
            importlib.import_module(name)
    environment()
    numeric_probe()
    _encode_one_of_each()


def _encode_one_of_each() -> None:
    """What msgspec learns of a type when it first meets it, milliseconds in all."""
    encode_head(
        BacktestCheckpointState(
            bar_index=0,
            current_date="",
            cash=0.0,
            positions=[PositionState("", 0, 0, 0.0, 0.0, 0.0, 0.0)],
            waiting=[WaitingOrder(0, 1, "order", None)],
            manifest=Manifest({}, "", "", {}, "", 0, None),
        )
    )
    ledger = [LedgerEvent(0, 0, 1, 1, 0.0, 0.0, 0.0, "open", "order", None)]
    recorded = [RecordedValue(0, "", 0.0)]
    for _ in SegmentWork("", 1, Counts(), GENESIS).encode(ledger, [EquitySample(0, 0, 0.0)], recorded):
        pass
