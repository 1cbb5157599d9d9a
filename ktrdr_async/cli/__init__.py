"""The command line: `ktrdr-async`. Every command is a thin face on `BacktestWorker` and the services beside it.

Modules here import pandas, asyncpg and pyarrow only inside the functions that need them: help and bad usage are quick.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line. Returns the exit code: 0 done, 2 bad input, 1 other failure, 130 Ctrl-C, 143 SIGTERM."""
    from ktrdr_async.cli.signals import Signals

    tokens = list(sys.argv[1:] if argv is None else argv)
    signals = Signals(tokens)
    signals.install()  # before anything large is imported: a Ctrl-C is never a traceback
    from ktrdr_async.cli.app import run

    return run(tokens, signals)
