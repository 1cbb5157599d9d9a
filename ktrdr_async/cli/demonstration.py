"""The demonstration: a backtest that is killed, cancelled and resumed, and one that isn't; both are compared."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import random
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ktrdr_async.backtesting.results import BacktestResults, Outcome
from ktrdr_async.cli.children import Child, DemoError
from ktrdr_async.cli.output import blank
from ktrdr_async.cli.tables import number, percent, print_digest, print_equity, print_pairs, print_table
from ktrdr_async.errors import KtrdrError
from ktrdr_async.operations.lifecycle import LEASE_SECONDS
from ktrdr_async.supervision.worker import BacktestWorker

if TYPE_CHECKING:
    from ktrdr_async.cli.context import Context
    from ktrdr_async.cli.options import DatabaseOptions

BARS = 3_000
CHECKPOINT_BARS = 200
SHOWN = 12  # hex digits of a digest in the table
SYNTHETIC = f"synthetic:?bars={BARS}&seed=7&timeframe=1h"
COSTS = ("--commission", "0.00002", "--slippage", "0.00005")  # of a liquid currency pair
STRATEGY = ("--strategy", "async_reversion", "--param", "latency_ms=1")
LOCK = "SELECT operation_id FROM ktrdr.operations WHERE operation_id = $1 FOR UPDATE"
WAITING = "SELECT count(*) FROM pg_stat_activity WHERE $1::int = ANY (pg_blocking_pids(pid))"
PATIENCE = 8.0  # seconds until the save waits for the lock; a final save's own deadline is longer
OWN = "your own data: ktrdr-async run --data your.csv --strategy sma_cross --param fast=10 slow=30"


class Step(msgspec.Struct):
    """One row of the table."""

    what: str
    bar: int | None = None
    lost: int | None = None  # bars that had been computed and had to be computed again
    digest: str | None = None
    equal: bool | None = None


def show(context: Context, where: DatabaseOptions) -> int:
    """Plays it, and prints the table. Returns 0 only if all digests are equal."""
    return context.drive(lambda: _play(context, where))


def market() -> tuple[list[str], str]:
    """The data's options and what they are: hourly EURUSD of an installed package, else the synthetic market."""
    found = importlib.util.find_spec("backtesting")  # not imported
    for place in (found.submodule_search_locations or []) if found is not None else []:
        file = Path(place) / "test" / "EURUSD.csv"
        if file.is_file():
            lines = file.read_text(encoding="utf-8").splitlines()
            start = lines[-BARS].partition(",")[0] if len(lines) > BARS else None
            options = ["--data", str(file), "--symbol", "EURUSD"] + (["--start", start] if start else [])
            return options, f"real data: hourly EURUSD bars from {start or 'the start'} on, of the package backtesting"
    return [
        "--data",
        SYNTHETIC,
    ], "the synthetic market, as the package backtesting with its EURUSD bars isn't installed"


async def _play(context: Context, where: DatabaseOptions) -> int:
    options, told = market()
    context.output.note(told)
    roots = tuple(str(Path(value).parent) for value in options[1:2] if os.path.isabs(value))
    async with BacktestWorker.open(where.dsn, data_roots=roots) as worker:
        context.output.note(f"database: {worker.database.label}")
        play = _Play(context, worker, [*options, *STRATEGY, *COSTS], where.dsn, roots)
        try:
            return await play.through()
        finally:
            context.signals.react = lambda _: context.output.note("cleaning up ...")
            await play.clean()


class _Play:
    def __init__(
        self, context: Context, worker: BacktestWorker, request: list[str], dsn: str | None, roots: tuple[str, ...]
    ) -> None:
        prefix = f"demo-{secrets.token_hex(3)}"
        self.context = context
        self.worker = worker
        self.request = request
        self.broken, self.whole = f"{prefix}-interrupted", f"{prefix}-uninterrupted"
        self.steps: list[Step] = []
        self.children: list[Child] = []
        self._resumed_at = -1
        self._environment = dict(os.environ) | ({"KTRDR_ASYNC_DATABASE": dsn} if dsn else {})
        self._roots = [word for root in roots for word in ("--data-root", root)]

    async def through(self) -> int:
        """All of it."""
        run = ["run", *self.request, "--checkpoint-bars", str(CHECKPOINT_BARS)]
        pace = ["--checkpoint-bars", str(CHECKPOINT_BARS), *self._roots]
        await self._killed(await self._start(*run, "--id", self.broken))
        await self._cancelled_twice(await self._start("resume", self.broken, *pace))
        resumed = await self._to_its_end("then to the end", "resume", self.broken, *pace)
        whole = await self._to_its_end("another run, uninterrupted", *run, "--id", self.whole)
        equal = resumed["result_digest"] == whole["result_digest"] and resumed["result_digest"] is not None
        results = await self.worker.results(self.broken)
        equal = equal and results.digest == whole["result_digest"]
        for step in self.steps:
            step.equal = equal if step.digest is not None else None
        self._tell(results, resumed, equal)
        return 0 if equal else 1

    async def _start(self, *arguments: str) -> Child:
        child = await Child.start(*arguments, "--json", "--progress-seconds", "0.02", environment=self._environment)
        self.children.append(child)
        return child

    async def _killed(self, child: Child) -> None:
        at = random.randrange(2 * CHECKPOINT_BARS, BARS // 3)  # noqa: S311 - a story, not a result
        # A boundary that was computed and isn't saved: what the kill takes away is then more than nothing.
        await child.until(lambda told: told.bar >= at and told.checkpoint is not None and told.bar > told.checkpoint)
        await asyncio.sleep(random.random() * 0.03)  # noqa: S311 - and somewhere inside a block
        child.kill()
        await child.ended()
        row = await self.worker.operations.get(self.broken)
        kept = -1 if row.checkpoint_bar is None else row.checkpoint_bar
        self._step(Step(f"kill -9 of process {child.pid}", child.told.bar, max(0, child.told.bar - kept)))
        self._resumed_at = kept

    async def _cancelled_twice(self, child: Child) -> None:
        database = self.worker.database
        at = self.steps[0].bar or 0
        at = random.randrange(at + CHECKPOINT_BARS, at + 3 * CHECKPOINT_BARS)  # noqa: S311
        self._step(Step(f"resumed by process {child.pid}", self._resumed_at))
        await child.until(lambda told: told.bar >= at)
        async with database.connection(timeout=PATIENCE) as holder, database.connection(timeout=PATIENCE) as watcher:
            holding = await holder.fetchval("SELECT pg_backend_pid()")
            async with holder.transaction():
                await holder.fetchval(LOCK, self.broken)  # the save has to wait for this
                child.interrupt()
                await child.says("saving a checkpoint")
                await self._until_waiting(watcher, holding)
                child.interrupt()
                await child.says("still saving")
                during = await watcher.fetchval(WAITING, holding) > 0
        found, code = await child.ended()
        if not during or code != 130 or found.get("status") != "cancelled":
            raise DemoError(f"the cancelled process ended with {code} and status {found.get('status')}", child.words())
        kept = found["checkpoint_bar"]
        self._step(Step("Ctrl-C twice, 2nd during the save", kept, max(0, child.told.bar - kept)))
        self._resumed_at = kept

    async def _until_waiting(self, watcher: Any, holding: int) -> None:
        async with asyncio.timeout(PATIENCE):
            while not await watcher.fetchval(WAITING, holding):  # noqa: ASYNC110 - the server has no event for it
                await asyncio.sleep(0.01)

    async def _to_its_end(self, what: str, *arguments: str) -> dict[str, Any]:
        child = await self._start(*arguments)
        if arguments[0] == "resume":
            self._step(Step(f"resumed by process {child.pid}", self._resumed_at))
        found, code = await child.ended()
        if code != 0:
            raise DemoError(f"a process ended with {code}", child.words())
        self._step(Step(what, found["bars"] - 1, None, found["result_digest"]))
        return found

    def _step(self, step: Step) -> None:
        self.steps.append(step)
        self.context.output.note(f"{step.what}: bar {step.bar:,}" + (f", {step.lost:,} bars lost" if step.lost else ""))

    def _tell(self, results: BacktestResults, last: dict[str, Any], equal: bool) -> None:
        output, outcome = self.context.output, results.outcome()
        if output.json:
            told = blank() | {name: value for name, value in last.items() if name in blank()}
            steps = [msgspec.to_builtins(step) for step in self.steps]
            output.emit(told | {"equal": equal, "steps": steps})
            return
        rows = [
            (
                step.what,
                "-" if step.bar is None else f"{step.bar:,}",
                "-" if step.lost is None else f"{step.lost:,}",
                "-" if step.digest is None else step.digest[:SHOWN],
                "-" if step.equal is None else ("yes" if step.equal else "NO"),
            )
            for step in self.steps
        ]
        print_table(output, ("what happened", "bar", "bars lost", "digest", "equal"), rows)
        output.line("(bars are those of the last boundary that was told; the kill came up to 100 bars after it)")
        output.line()
        print_pairs(output, _figures(outcome))
        print_equity(output, results.equity)
        print_digest(output, outcome.digest)
        output.line("every bit is equal" if equal else "THE RESULTS DIFFER")
        output.line(OWN)

    async def clean(self) -> None:
        """Ends what still runs, and deletes both operations."""
        for child in self.children:
            child.kill()
            await child.gone()
        database, operations = self.worker.database, self.worker.operations
        for name in (self.broken, self.whole):
            try:
                row = await operations.get(name)
                if row.status.value in ("pending", "running", "interrupted"):
                    row = await operations.cancel(name)
                statement, arguments = database.sql("delete_operation"), (name, row.epoch, 0.0, LEASE_SECONDS)
                await database.retrying(lambda c: c.fetchval(statement, *arguments), seconds=5.0)  # noqa: B023 - awaited here
            except KtrdrError:
                continue


def _figures(outcome: Outcome) -> list[tuple[str, str]]:
    m = outcome.metrics
    return [
        ("bars", f"{outcome.bars:,} of {', '.join(outcome.symbols)}, a model awaited for about 1 ms at each"),
        ("final equity", f"{number(m.final_equity)} from {number(m.initial_capital)}"),
        ("total return", f"{percent(m.total_return)}   buy and hold {percent(m.buy_and_hold_return)}"),
        ("Sharpe", f"{number(m.sharpe)}   max drawdown {percent(m.max_drawdown)}"),
        ("trades", f"{m.trades:,}   won {percent(m.win_rate, '')}   costs {m.costs_share:.1%} of the capital"),
    ]
