from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_processes import Cli


@pytest.fixture
def cli(dsn: str, tmp_path: Path) -> Iterator[Cli]:
    """The command line on a fresh database."""
    made = Cli(tmp_path, dsn)
    yield made
    made.close()


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[Cli]:
    """The command line without any database."""
    made = Cli(tmp_path, None)
    yield made
    made.close()
