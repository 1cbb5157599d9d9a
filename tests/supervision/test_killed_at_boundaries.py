"""X1 and R1: `kill -9` before each packet to PostgreSQL, after it, and at its answer; counted on the wire, not listed.

The campaign: pytest -m campaign tests/supervision/test_killed_at_boundaries.py -s
"""

from __future__ import annotations

import random
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from boundary_kills import (
    BARS,
    BEATS,
    INTERVAL,
    REQUEST,
    VICTIM,
    Job,
    Nursery,
    Said,
    Standing,
    Striking,
    nursery,
    policy,
)
from campaigns import Figures, sized
from supervision_runs import outside, until

import ktrdr_async as kt
from ktrdr_async.storage.database import Database
from ktrdr_async.storage.migrations import load_migrations
from ktrdr_async.storage.queries import sql_directory
from ktrdr_async.supervision.worker import BacktestWorker

pytestmark = pytest.mark.anyio
EVERY = 10**6  # more than there are
TRIES = 6  # where a heartbeat that comes when it comes moved the boundary out of the run


class Scenario(msgspec.Struct):
    """What the victim does, and what was done to the operation before it."""

    victim: dict[str, Any]
    before: dict[str, Any] | None = None


KILLED = {"strike": "execute save_checkpoint, answered 1"}
SCENARIOS = {  # a test run makes the first four, at one boundary each
    "first claim, saves, completion": Scenario({}),
    "claim of a takeover": Scenario({}, KILLED),
    "cancel after saves": Scenario({"cancel_at": 750}),
    "failure after saves": Scenario({"fail_at": 750}),
    "cancel before the first save": Scenario({"cancel_at": 150}),
    "cancel before the first boundary": Scenario({"cancel_at": 50}),
    "failure before the first save": Scenario({"fail_at": 150}),
    "failure before the first boundary": Scenario({"fail_at": 50}),
    "claim of a resume": Scenario({}, {"cancel_at": 450}),
    "cancel of what a dead process ran": Scenario({"act": "ask"}, KILLED),
    "heartbeat": Scenario({"act": "beat"}),
}


class Truth(msgspec.Struct):
    """Of the run that nothing interrupts."""

    digest: str
    audit: Any
    states: dict[int, str]  # state digests of its boundaries, by bar


@pytest.fixture(scope="module")
def victims() -> Iterator[Nursery]:
    with nursery() as opened:
        yield opened


@pytest.fixture
async def survivor(dsn: str) -> AsyncIterator[BacktestWorker]:
    async with BacktestWorker.open(dsn, allow=("boundary_kills",)) as opened:
        yield opened


async def connections_gone(dsn: str) -> None:
    """Until the server has done with all that a victim sent to it."""
    async with outside(dsn) as other:

        async def none() -> bool:
            asked = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1 AND datname = current_database()"
            return not await other.fetchval(asked, VICTIM)

        await until(none, "the connections of a victim end")


async def truth() -> Truth:
    bars = kt.Bars.read(str(REQUEST.data))
    engine = kt.BacktestingEngine(REQUEST, bars, Striking())
    states = {-1: ""}
    async for block in engine.run():
        state = kt.build_backtest_checkpoint_state(engine, block.bar_index, block.timestamp)
        states[block.bar_index] = state.state_digest
    results = engine.results()
    assert results.trade_records, "nothing that could be lost"
    return Truth(results.digest, results.audit(), states)


class Trials:
    """One scenario, with a kill in another place each time."""

    def __init__(self, title: str, victims: Nursery, survivor: BacktestWorker, dsn: str, clean: Truth) -> None:
        self.title, self.scenario = title, SCENARIOS[title]
        self.victims, self.survivor, self.dsn, self.clean = victims, survivor, dsn, clean
        self.count = 0
        self.lost = 0  # bars, by the worst of the kills

    async def strike(self, boundary: str = "") -> Said:
        """Kills a victim there, looks at what is left, and goes on with it to the end."""
        self.count += 1
        name = f"{self.title.replace(' ', '-').replace(',', '')}.{self.count}"
        stored = Standing()
        if self.scenario.before is not None:
            await self.victims.victim(Job(self.dsn, name, **self.scenario.before))
            await connections_gone(self.dsn)
            stored = await self.standing(name)
            assert stored.bar >= 0
        said = await self.victims.victim(Job(self.dsn, name, strike=boundary, stored=stored, **self.scenario.victim))
        await connections_gone(self.dsn)
        lost = said.bar - await self.look(name, said)
        assert lost <= INTERVAL, f"{name}, {boundary}: killed at bar {said.bar}, {lost} bars are lost"
        self.lost = max(self.lost, lost)
        await self.finish(name)
        return said

    async def standing(self, name: str) -> Standing:
        try:
            row = await self.survivor.operations.get(name)
        except kt.OperationNotFoundError:
            return Standing()
        bar = -1 if row.checkpoint_bar is None else row.checkpoint_bar
        return Standing(row.epoch, bar, row.status not in (kt.Status.PENDING, kt.Status.RUNNING))

    async def look(self, name: str, said: Said) -> int:
        """A whole old state or a whole new one, never less than was acknowledged; the bar that is safe."""
        found = await self.standing(name)
        assert said.acknowledged.run <= found.run <= said.sent.run
        if not found.epoch:
            return -1
        row = await self.survivor.operations.get(name)
        state = await kt.CheckpointService(self.survivor.database).load_checkpoint(name)
        if row.status is kt.Status.COMPLETED:
            assert state is None
            assert (await self.survivor.results(name)).digest == self.clean.digest
            return BARS - 1
        bar = -1 if state is None else state.bar_index
        assert bar in (said.acknowledged.bar, said.sent.bar)
        assert self.clean.states[bar] == ("" if state is None else state.state_digest)
        return bar

    async def finish(self, name: str) -> None:
        """Another process goes on: one result, which is the true one, a whole ledger, no checkpoint."""
        results = await self.survivor.run(REQUEST, name, policy=policy())
        assert results.digest == self.clean.digest
        assert results.audit() == self.clean.audit
        async with outside(self.dsn) as other:
            ends = await other.fetch(
                "SELECT status, result_digest, final_segment FROM ktrdr.operations WHERE operation_id = $1", name
            )
            assert [row["result_digest"] for row in ends] == [self.clean.digest]
            assert ends[0]["status"] == "completed"
            heads = "SELECT count(*) FROM ktrdr.operation_checkpoints WHERE operation_id = $1"
            assert await other.fetchval(heads, name) == 0
            segments = await other.fetch(
                "SELECT sequence, ledger_from, ledger_to, samples_from, samples_to, recorded_from, recorded_to"
                " FROM ktrdr.ledger_segments WHERE operation_id = $1 ORDER BY sequence",
                name,
            )
        assert [row["sequence"] for row in segments] == list(range(1, ends[0]["final_segment"] + 1))
        for kind in ("ledger", "samples", "recorded"):
            stops = [row[f"{kind}_to"] for row in segments]
            assert [row[f"{kind}_from"] for row in segments] == [0, *stops[:-1]]
        assert segments[-1]["ledger_to"] == len(results.ledger)


WHOLE = [pytest.mark.campaign, pytest.mark.timeout(1_800)]
CASES = [
    pytest.param(list(SCENARIOS)[:4], 1, id="slice"),
    *(pytest.param([name], EVERY, id=f"whole, {name}", marks=WHOLE) for name in SCENARIOS),
]


@pytest.mark.parametrize(("names", "trials"), CASES)
async def test_whole_and_exact_after_a_kill_at_every_boundary(
    names: list[str],
    trials: int,
    victims: Nursery,
    survivor: BacktestWorker,
    dsn: str,
    campaign_seed: int,
    figures: Figures,
) -> None:
    clean = await truth()
    for name in names:
        one = Trials(name, victims, survivor, dsn, clean)
        said = await one.strike()
        assert not said.killed
        if name == "heartbeat":
            last = said.boundaries.index(f"execute heartbeat, answered {BEATS}")
            boundaries = [each for each in said.boundaries[: last + 1] if " heartbeat, " in each]
        else:
            boundaries = [each for each in said.boundaries if " heartbeat, " not in each]
        chosen = sampled(boundaries, trials, f"{campaign_seed} {name}")
        for boundary in chosen:
            for _ in range(TRIES):
                said = await one.strike(boundary)
                if said.killed:
                    break
            assert said.killed, f"{name}: {boundary} is out of reach"
            assert said.boundaries[-1] == boundary
        reached = f"{len(chosen)} of {len(boundaries)} boundaries: whole, then digest and audit equal"
        lost = f"at most {one.lost} of {BARS} bars lost at a checkpoint every {INTERVAL}"
        figures.add(f"kill -9 at every SQL boundary: {name}", f"{reached}; {lost}")


def sampled(boundaries: list[str], trials: int, seed: str) -> list[str]:
    return random.Random(seed).sample(boundaries, min(trials, len(boundaries)))


def migrations(directory: Path, more: int) -> Path:
    """The package's migrations and some that can't be applied twice."""
    shutil.copytree(str(sql_directory("migrations")), directory)
    first = len(load_migrations(directory)) + 1
    texts = ["CREATE TABLE ktrdr.more (n int); INSERT INTO ktrdr.more VALUES (1);", "ALTER TABLE ktrdr.more ADD m int;"]
    for number, text in enumerate(texts[:more], start=first):
        (directory / f"{number:04d}_more.sql").write_text(text)
    return directory


async def catalogue(other: Any) -> list[str]:
    """Everything in the victim's schema."""
    rows = await other.fetch(
        """
        SELECT format('%s %s %s %s', c.relkind, c.relname, a.attname, a.atttypid::regtype)
        FROM pg_class c LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0
        WHERE c.relnamespace = to_regnamespace($1)
        UNION ALL SELECT format('%s %s', proname, prosrc) FROM pg_proc WHERE pronamespace = to_regnamespace($1)
        UNION ALL SELECT format('%s %s', conname, contype) FROM pg_constraint WHERE connamespace = to_regnamespace($1)
        UNION ALL SELECT tgname FROM pg_trigger t JOIN pg_class c ON c.oid = tgrelid
        WHERE c.relnamespace = to_regnamespace($1) AND NOT tgisinternal
        """,
        VICTIM,
    )
    return sorted(str(row[0]) for row in rows)


def counted(said: Said, moment: str) -> int:
    return sum(each.startswith(f"query COMMIT;, {moment}") for each in said.boundaries)


@sized("trials", ci=3, whole=EVERY, minutes=20)
async def test_a_database_killed_in_a_migration_opens_afterwards(
    trials: int, victims: Nursery, dsn: str, tmp_path: Path, campaign_seed: int, figures: Figures
) -> None:
    steps = [migrations(tmp_path / f"{more}", more) for more in range(3)]
    clean = (await truth()).digest
    own = len(load_migrations(steps[0]))
    async with outside(dsn) as other:
        expected: dict[int, list[str]] = {0: []}
        for more in range(3):
            expected[own + more] = await migrated(other, dsn, steps[more])
            await other.execute(f"DROP SCHEMA {VICTIM} CASCADE")
        job = Job(dsn, act="migrate", schema=VICTIM, migrations=str(steps[2]))
        said = await victims.victim(job)
        assert not said.killed
        boundaries, applied = said.boundaries, own + 2
        assert counted(said, "answered") == applied + 2  # the table of migrations, each of them, and a last look
        chosen = sampled(boundaries, trials, f"{campaign_seed} migrations")
        for boundary in chosen:
            await other.execute(f"DROP SCHEMA IF EXISTS {VICTIM} CASCADE")
            said = await victims.victim(msgspec.structs.replace(job, strike=boundary))
            assert said.killed, f"{boundary} is out of reach"
            await connections_gone(dsn)
            await look_at_migrations(other, said, expected)
            assert await migrated(other, dsn, steps[2]) == expected[applied], boundary
            async with BacktestWorker.open(dsn, schema=VICTIM, allow=("boundary_kills",)) as worker:
                assert (await worker.run(REQUEST, "op", policy=policy())).digest == clean
    reached = f"{len(chosen)} of {len(boundaries)} boundaries: each whole or not there, then opened and run exactly"
    figures.add(f"kill -9 at every SQL boundary: {applied} migrations", reached)


async def migrated(other: Any, dsn: str, steps: Path) -> list[str]:
    """Opens the victim's schema; what is in it then."""
    async with Database.open(dsn, schema=VICTIM, migrations=steps):
        versions = await other.fetch(f"SELECT version FROM {VICTIM}.migrations ORDER BY version")
        assert [row[0] for row in versions] == [step.version for step in load_migrations(steps)]
        return await catalogue(other)


async def look_at_migrations(other: Any, said: Said, expected: dict[int, list[str]]) -> None:
    """Each migration is there as a whole or not at all, and every one that was acknowledged is there."""
    found, table = 0, await other.fetchval("SELECT to_regclass($1) IS NOT NULL", f"{VICTIM}.migrations")
    if table:
        found = await other.fetchval(f"SELECT count(*) FROM {VICTIM}.migrations")
    if found or not table:
        assert await catalogue(other) == expected[found]
    acknowledged, sent = counted(said, "answered"), counted(said, "sent")
    assert table or not acknowledged
    assert min(acknowledged - 1, max(expected)) <= found <= max(sent - 1, 0)
