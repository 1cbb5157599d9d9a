"""What a process pays once: modules that are imported at first use, figures that are computed at the first checkpoint.

A running loop would stand still for it, in a thread too: imports hold the interpreter.
"""

from __future__ import annotations

import contextlib
import importlib

from ktrdr_async.checkpoint.manifest import environment, numeric_probe

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
