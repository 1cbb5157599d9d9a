"""What the engine's tests share: a run from end to end, a cancelled one, a checkpoint through JSON, markets as bars."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest
from oracle import Market, Terms

import ktrdr_async as kt
from ktrdr_async.market.synthetic import synthetic

SYMBOLS = ("A", "B", "C", "D", "E")


def bars_of(market: Market) -> kt.Bars:
    """The oracle's plain market as bars."""
    return kt.Bars.from_arrays(*market, symbols=SYMBOLS[: market.close.shape[1]], timeframe=None)


def request_of(terms: Terms, **more: Any) -> kt.BacktestRequest:
    """The oracle's terms as a request."""
    names = ("initial_capital", "commission", "slippage", "lot_size", "min_trade", "force_close")
    return kt.BacktestRequest(**{name: getattr(terms, name) for name in names}, **more)


def hourly(n: int, *, seed: int = 7, symbols: tuple[str, ...] = ("A", "B")) -> kt.Bars:
    """A synthetic market in which the second symbol starts late, has holes and stops early."""
    made = synthetic(n, seed=seed, symbols=symbols)
    if len(symbols) == 1:
        return made
    fields = [np.array(getattr(made, name)) for name in ("open", "high", "low", "close", "volume")]
    gone = np.zeros(n, dtype=np.bool_)
    gone[: n // 50 + 1] = True
    gone[n // 3 : n // 3 + n // 20] = True
    gone[n - n // 50 :] = True
    gone[:: max(17, n // 40)] = True
    for values in fields:
        values[gone, 1] = np.nan
    return kt.Bars.from_arrays(made.timestamps, *fields, symbols=symbols)


def flat_bars(*columns: list[float], step: str = "1d", **kwargs: Any) -> kt.Bars:
    """Bars whose four prices are one, a list a symbol; NaN is a missing bar."""
    prices = np.array(columns, dtype=np.float64).T
    times = np.datetime64("2024-01-01", "ns") + np.arange(len(prices)) * np.timedelta64(
        int(step[:-1]), _UNITS[step[-1]]
    )
    symbols = SYMBOLS[: prices.shape[1]]
    return kt.Bars.from_arrays(times, prices, prices, prices, prices, symbols=symbols, timeframe=step, **kwargs)


_UNITS: dict[str, Any] = {"d": "D", "h": "h", "m": "m"}


async def finish(
    engine: kt.BacktestingEngine, resume_from: kt.BacktestCheckpointState | None = None, *, audited: bool = True
) -> kt.BacktestResults:
    """Runs to the end. Accounting (X4) is checked of every run that comes through here."""
    async with aclosing(engine.run(resume_from)) as blocks:
        async for _ in blocks:
            pass
    results = engine.results()
    if audited:
        account(results)
    return results


def account(results: kt.BacktestResults) -> None:
    """X4: `audit()` agrees, and the trades' P&L is the change of equity."""
    audit = results.audit()
    assert audit.ok, audit
    if results.request.force_close:
        traded = sum(abs(e.lots) * results.request.lot_size * e.price for e in results.ledger)
        pnl = sum(trade.net_pnl for trade in results.trade_records)
        gained = results.final_equity - results.request.initial_capital
        assert abs(pnl - gained) <= 1e-9 * (traded + results.request.initial_capital)


async def cancel_at(
    engine: kt.BacktestingEngine, yields: int, resume_from: kt.BacktestCheckpointState | None = None
) -> None:
    """Consumes the engine in a task that is cancelled at its `yields`-th yield, counted from 1."""

    async def consume() -> None:
        seen = 0
        async with aclosing(engine.run(resume_from)) as blocks:
            async for _ in blocks:
                seen += 1
                if seen == yields:
                    task.cancel()
                    await asyncio.sleep(0)

    task = asyncio.create_task(consume())
    with pytest.raises(asyncio.CancelledError):
        await task


def through_json(state: kt.BacktestCheckpointState) -> kt.BacktestCheckpointState:
    """A state as a database gives it back: as text, in which no value is NaN or infinite."""
    return kt.BacktestCheckpointState.from_dict(json.loads(json.dumps(state.to_dict(), allow_nan=False)))


def checkpoint(engine: kt.BacktestingEngine, **kwargs: Any) -> kt.BacktestCheckpointState:
    """The checkpoint of the engine's last boundary, through JSON."""
    at = engine.boundary.bar_index
    return through_json(kt.build_backtest_checkpoint_state(engine, at, int(engine.bars.timestamps[at]), **kwargs))


class Hops:
    """A turn of the test's own: every `every`-th look at its clock finds it over, and passing on really suspends.

    With `cancel_at` the task that runs the engine is cancelled in that `pass_on`, counted from 1.
    """

    deadline = 1.0

    def __init__(self, every: int = 1, cancel_at: int = 0) -> None:
        self.every, self.cancel_at = every, cancel_at
        self.looks = self.passed = 0

    def clock(self) -> float:
        self.looks += 1
        return float(self.looks % self.every == 0)

    async def pass_on(self) -> None:
        self.passed += 1
        if self.passed == self.cancel_at:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
        await asyncio.sleep(0)

    async def enter(self) -> None:
        await asyncio.sleep(0)

    def leave(self) -> None:
        pass

    async def offload(self, work: Any) -> Any:
        await asyncio.sleep(0)
        return work()

    async def prepare(self, engine: kt.BacktestingEngine, work: Any) -> Any:
        return await self.offload(work) if callable(work) else await work
