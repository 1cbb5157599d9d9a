"""A worker on a database of its own, for each test that asks."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from ktrdr_async.supervision.worker import BacktestWorker


@pytest.fixture
async def worker(dsn: str) -> AsyncIterator[BacktestWorker]:
    async with BacktestWorker.open(dsn, allow=("supervision_runs",)) as opened:
        yield opened
