"""A connection that is cut after byte k of what was said, for each k: nothing is half done, doubled or lost.

All of them: pytest -m campaign tests/supervision/test_cut_conversations.py -s
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pytest
from campaigns import Figures, sized
from cutting_proxy import DOWN, STORED, UP, Cut, Lane, cutting_proxy, lanes, state
from supervision_runs import (
    EVERY_BLOCK,
    REQUEST,
    Counter,
    digest_of,
    market,
    nothing_left,
    outside,
    row_held,
    until,
)

from ktrdr_async.checkpoint.position import Position
from ktrdr_async.checkpoint.schemas import BacktestCheckpointState, CheckpointType
from ktrdr_async.checkpoint.service import CheckpointService
from ktrdr_async.operations.lifecycle import Claim, Owner, Status
from ktrdr_async.operations.service import OperationsService
from ktrdr_async.storage.database import Database
from ktrdr_async.storage.embedded import EmbeddedServer
from ktrdr_async.supervision.worker import BacktestWorker

pytestmark = pytest.mark.anyio
RECOVERY_SECONDS = 5.0  # what the service may take, once connections go through again
LANES = 12
PERIODIC = CheckpointType.PERIODIC
RESULT = {"result": {"final_equity": 1.5}, "result_digest": "ab" * 32}

Act = Callable[[Lane], Awaitable[object]]


FIRST, LATER = state(99, 0, 2), state(199, 2, 4)


@dataclass(frozen=True)
class Verb:
    """Something that a service is asked for, and how often an operation was saved before."""

    act: Act
    claimed: bool = True
    saved: bool = True


async def create(lane: Lane) -> None:
    assert (await lane.operations.create(lane.name, STORED)).status is Status.PENDING


async def claim(lane: Lane) -> None:
    """The claim that is answered is the one that stands."""
    found = await lane.operations.claim(lane.name, owner=Owner.this_process())
    _, token = await lane.rows()
    assert str(found.token) == token


async def save(lane: Lane, now: BacktestCheckpointState) -> None:
    """A save that is in doubt is resolved, and not made twice."""
    if lane.checkpoints.in_doubt:
        await lane.checkpoints.resolve()
    if lane.checkpoints.acknowledged.bar_index < now.bar_index:
        receipt = await lane.checkpoints.save_checkpoint(lane.name, PERIODIC, now)
        assert receipt.revision == lane.acknowledged.revision + 1
    assert not lane.checkpoints.in_doubt
    assert lane.checkpoints.acknowledged.revision == lane.acknowledged.revision + 1


async def end(lane: Lane, status: Status, **what: Any) -> None:
    assert await lane.checkpoints.finish(status, state=LATER, **what) is status


VERBS = {
    "create": Verb(create, claimed=False, saved=False),
    "claim": Verb(claim, claimed=False, saved=False),
    "first save": Verb(lambda lane: save(lane, FIRST), saved=False),
    "later save": Verb(lambda lane: save(lane, LATER)),
    "completion": Verb(lambda lane: end(lane, Status.COMPLETED, **RESULT)),
    "cancellation": Verb(lambda lane: end(lane, Status.CANCELLED)),
    "failure": Verb(lambda lane: end(lane, Status.FAILED, error={"message": "x"})),
}


class Trials:
    """One verb's trials, on several lanes at once."""

    def __init__(self, name: str, lanes: list[Lane], seed: int) -> None:
        self.name, self.verb, self.lanes, self.seed = name, VERBS[name], lanes, seed
        self.done: dict[Lane, str] = {}  # the operation's rows after the verb
        self.said: dict[str, int] = {}  # bytes of the verb's conversation
        self.count = 0
        self.reset: dict[str, int] = {}  # of these the last ones, when the pool has its connection back
        self.durable = 0  # the server had done it when the connection was cut
        self.doubtful = 0  # and the answer wasn't whole
        self.slowest = 0.0  # seconds from a cut to the verb's answer

    async def prepare(self) -> None:
        """A dry run: how the operation stands before and after, and how much is said."""
        for lane in self.lanes:
            await lane.forget()
            claim: Claim | None = None
            acknowledged = Position()
            if self.name != "create":
                await lane.operations.create(lane.name, STORED)
            if self.verb.claimed:
                claim = await lane.operations.claim(lane.name, owner=Owner.this_process())
            if self.verb.saved:
                service = CheckpointService(lane.database, claim)
                await service.save_checkpoint(lane.name, PERIODIC, FIRST)
                acknowledged = service.acknowledged
            await lane.keep(claim, acknowledged)
            await lane.put_back()
            before = dict(lane.proxy.said)
            async with lane.database.connection():
                pass
            self.reset = {way: lane.proxy.said[way] - before[way] for way in before}
            before = dict(lane.proxy.said)
            await self.verb.act(lane)
            self.said = {way: lane.proxy.said[way] - before[way] for way in before}
            self.done[lane], _ = await lane.rows()
            assert self.done[lane] != lane.kept

    def places(self, most: int) -> list[tuple[str, int]]:
        """After which byte to cut: all of them, or the edges and some drawn at random, half of them from an answer."""
        everywhere = [(way, byte) for way, said in self.said.items() for byte in range(said + 1)]
        if most >= len(everywhere):
            return everywhere
        answered = {way: said - self.reset[way] for way, said in self.said.items()}
        edges = [(way, byte) for way, said in self.said.items() for byte in (0, said, answered[way])]
        answer = [(DOWN, byte) for byte in range(answered[DOWN] - 32, answered[DOWN])]
        chance = random.Random(f"{self.seed} {self.name}")
        half = min((most - len(edges)) // 2, len(answer))
        return edges + chance.sample(answer, half) + chance.sample(everywhere, most - len(edges) - half)

    def saw(self, lane: Lane, place: tuple[str, int], rows: str) -> None:
        """Takes in how the operation stood when its connection was cut."""
        way, byte = place
        assert rows in (lane.kept, self.done[lane]), "half done"
        self.durable += rows == self.done[lane]
        self.doubtful += rows == self.done[lane] and byte < self.said[way] - self.reset[way] + (way == UP)

    def rows_of_places(self, count: int) -> list[tuple[tuple[str, int], ...]]:
        """For each trial where to cut the conversation, and then those that are to find out what became of it."""
        chance = random.Random(f"{self.seed} {self.name} again")
        made = []
        for _ in range(count):
            first, *later = chance.choices([UP, DOWN], k=chance.randint(2, 4))
            others = [(way, chance.randrange(3 * self.said[way])) for way in later]
            made.append(((first, chance.randrange(self.said[first] + 1)), *others))
        return made

    async def run(self, places: list[Any], trial: Callable[[Lane, Any], Awaitable[None]]) -> None:
        """Makes a trial for each place; what fails says which."""
        left = iter(list(enumerate(places)))

        async def on(lane: Lane) -> None:
            for number, place in left:
                try:
                    async with asyncio.timeout(30.0):
                        await trial(lane, place)
                except Exception as error:
                    error.add_note(f"{self.name}, trial {number}: {place}, seed {self.seed}")
                    raise
                self.count += 1

        async with asyncio.TaskGroup() as group:
            for lane in self.lanes:
                group.create_task(on(lane))

    async def cut_once(self, lane: Lane, place: tuple[str, int]) -> None:
        """What the service makes of it by itself: the verb is done, once."""
        way, byte = place
        seen: list[str] = []

        async def settled(pid: int | None) -> None:
            await lane.gone(pid)
            seen.append((await lane.rows())[0])

        await lane.put_back()
        lane.proxy.settled = settled
        lane.proxy.cut = Cut(way, byte, reset=byte % 2 == 1)
        cuts = lane.proxy.cuts
        await self.verb.act(lane)
        assert lane.proxy.cuts == cuts + 1, "nothing was cut"
        self._recovered(lane)
        self.saw(lane, place, seen[0])
        rows, _ = await lane.rows()
        assert rows == self.done[lane]

    async def cut_and_cancelled(self, lane: Lane, place: tuple[str, int]) -> None:
        """The caller is cancelled when the connection is cut, and asks again."""
        way, byte = place
        await lane.put_back()
        asked = asyncio.create_task(self._ask(lane))
        seen: list[str] = []

        async def settled(pid: int | None) -> None:
            await lane.gone(pid)
            seen.append((await lane.rows())[0])
            asked.cancel()

        lane.proxy.settled = settled
        lane.proxy.cut = Cut(way, byte)
        await asyncio.wait({asked})
        self.saw(lane, place, seen[0])
        if asked.cancelled():
            await self.verb.act(lane)
            self._recovered(lane)
        else:
            asked.result()  # it was answered before the cut
        rows, _ = await lane.rows()
        if self.name == "claim" and asked.cancelled() and seen[0] == self.done[lane]:
            rows = rows.replace('"epoch": 2', '"epoch": 1').replace('"attempts": 2', '"attempts": 1')  # claimed anew
        assert rows == self.done[lane]

    async def cut_again(self, lane: Lane, place: tuple[tuple[str, int], ...]) -> None:
        """The connections that are made to find out what became of it are cut as well."""
        left = list(place)
        seen: list[str] = []

        async def settled(pid: int | None) -> None:
            await lane.gone(pid)
            seen.append((await lane.rows())[0])
            if left:
                lane.proxy.cut = Cut(*left.pop(0), greeting=True)

        await lane.put_back()
        lane.proxy.settled = settled
        lane.proxy.cut = Cut(*left.pop(0), greeting=True)
        await self.verb.act(lane)
        lane.proxy.cut = None
        self._recovered(lane)
        self.saw(lane, place[0], seen[0])
        assert seen == sorted(seen, key=[lane.kept, self.done[lane]].index), "half done, or undone"
        rows, _ = await lane.rows()
        assert rows == self.done[lane]

    async def _ask(self, lane: Lane) -> None:
        await self.verb.act(lane)

    def _recovered(self, lane: Lane) -> None:
        seconds = asyncio.get_running_loop().time() - lane.proxy.cut_at
        assert seconds < RECOVERY_SECONDS
        self.slowest = max(self.slowest, seconds)


@sized("most", ci=20, whole=10**9, minutes=60)
async def test_a_conversation_that_is_cut_after_any_byte(
    dsn: str, embedded_server: EmbeddedServer, most: int, campaign_seed: int, figures: Figures
) -> None:
    async with lanes(dsn, embedded_server.administrator, min(LANES, most // 2)) as made:
        for name in VERBS:
            trials = Trials(name, made, campaign_seed)
            await trials.prepare()
            await trials.run(trials.places(most), trials.cut_once)
            assert 0 < trials.doubtful < trials.durable < trials.count
            figures.add(
                f"{name}, cut once after a byte of {trials.said[UP]} up and {trials.said[DOWN]} down",
                f"{trials.count} cuts, {trials.durable} of them after the server had done it and {trials.doubtful} "
                f"of these before the answer was whole; done once each time, "
                f"at most {trials.slowest:.2f} s after the cut",
            )


@sized("most", ci=10, whole=1_000, minutes=30)
async def test_a_caller_who_is_cancelled_at_the_cut_and_asks_again(
    dsn: str, embedded_server: EmbeddedServer, most: int, campaign_seed: int, figures: Figures
) -> None:
    async with lanes(dsn, embedded_server.administrator, min(LANES, most)) as made:
        for name in VERBS:
            trials = Trials(name, made, campaign_seed + 1)
            await trials.prepare()
            await trials.run(trials.places(most), trials.cut_and_cancelled)
            assert 0 < trials.doubtful < trials.durable < trials.count
            figures.add(
                f"{name}, cut and cancelled, asked for again",
                f"{trials.count} cuts, {trials.durable} of them after the server had done it and {trials.doubtful} "
                "of these before the answer was whole; done once each time",
            )


@sized("count", ci=10, whole=1_000, minutes=30)
async def test_what_finds_out_what_became_of_it_is_cut_too(
    dsn: str, embedded_server: EmbeddedServer, count: int, campaign_seed: int, figures: Figures
) -> None:
    async with lanes(dsn, embedded_server.administrator, min(LANES, count)) as made:
        for name in VERBS:
            trials = Trials(name, made, campaign_seed)
            await trials.prepare()
            before = sum(lane.proxy.cuts for lane in made)
            await trials.run(trials.rows_of_places(count), trials.cut_again)
            cuts = sum(lane.proxy.cuts for lane in made) - before
            assert cuts > trials.count
            figures.add(
                f"{name}, cut two to four times in a row",
                f"{trials.count} trials with {cuts} cuts; done once each time, "
                f"at most {trials.slowest:.2f} s after the last",
            )


async def test_a_claim_that_lands_while_it_is_tried_again_is_its_own(dsn: str) -> None:
    """The statement that was cut off still waits at the server, and lands before the one that repeats it."""
    async with cutting_proxy(dsn) as (proxy, through), Database.open(through) as database, outside(dsn) as looker:
        operations = OperationsService(database)
        for name in ("dry", "op0"):
            await operations.create(name, STORED)
        before = proxy.said[UP]
        await operations.claim("dry", owner=Owner.this_process())
        said = proxy.said[UP] - before
        async with database.connection() as connection:
            reset = len(connection.get_reset_query()) + 6  # what the pool says afterwards, in one message

        async def wait_for_the_row(sessions: int) -> None:
            async def waiting() -> bool:
                count = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = $1"
                return bool(await looker.fetchval(count, urlsplit(dsn).path[1:]) == sessions)

            await until(waiting, f"{sessions} claims wait for the row")

        first = asyncio.Event()

        async def settled(pid: int | None) -> None:
            await first.wait()

        proxy.settled, proxy.cut = settled, Cut(UP, said - reset)
        async with row_held(dsn, "op0"):
            claiming = asyncio.create_task(operations.claim("op0", owner=Owner.this_process()))
            await wait_for_the_row(1)
            first.set()
            await wait_for_the_row(2)
        claim = await claiming
        row = await looker.fetchrow(
            "SELECT epoch, attempts, owner_token FROM ktrdr.operations WHERE operation_id = 'op0'"
        )
        assert tuple(row) == (1, 1, claim.token)
        assert claim.epoch == 1


@sized("runs", ci=1, whole=200, minutes=30)
async def test_runs_whose_conversations_are_cut_again_and_again(
    dsn: str, runs: int, campaign_seed: int, figures: Figures
) -> None:
    """Opening apart, everything that a worker says: looking, claiming, loading, saving, beating, ending."""
    clean = await digest_of(Counter, "counter")
    async with cutting_proxy(dsn) as (proxy, through), BacktestWorker.open(through) as worker:
        before = asyncio.all_tasks()
        for run in range(runs):
            chance = random.Random(f"{campaign_seed} {run}")

            def cut(chance: random.Random = chance) -> None:
                size = int(60_000 ** chance.uniform(0.45, 0.85))
                proxy.cut = Cut(chance.choice([UP, DOWN]), size, reset=chance.random() < 0.5)

            async def settled(pid: int | None, cut: Callable[[], None] = cut) -> None:
                cut()

            proxy.settled = settled
            cut()
            try:
                results = await worker.run(REQUEST, f"op{run}", bars=market(), strategy=Counter(), policy=EVERY_BLOCK)
            except Exception as error:
                error.add_note(f"run {run}, seed {campaign_seed}")
                raise
            assert results.digest == clean, f"run {run}, seed {campaign_seed}"
        cuts, proxy.cut, proxy.settled = proxy.cuts, None, None
        for run in range(runs):
            assert (await worker.results(f"op{run}", bars=market())).digest == clean
        await nothing_left(worker, dsn, {task for task in before if not task.done()} | proxy.tasks)
    async with outside(dsn) as looker:
        found = await looker.fetch("SELECT status, epoch FROM ktrdr.operations")
        assert [tuple(row) for row in found] == runs * [("completed", 1)]
    assert cuts > runs
    figures.add(
        "runs that are cut again and again", f"{runs} runs, {cuts} cuts; each result is that of a run that nothing cut"
    )
