"""R1 and R2 by chance: any order of claims, saves, kills, cancels and deletions against a plain model of the protocol.

The services and the server are the real ones; an owner on this host is a process, and is killed with SIGKILL. What an
owner held it goes on using after it was forgotten: every claim that was ever made may be tried again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator
from typing import Any

import hypothesis
import pytest
from campaigns import Figures, sized
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from operation_model import LEASE, STANDING, Expected, Ground, Session, T, check, verdict

from ktrdr_async.checkpoint.schemas import BacktestCheckpointState, CheckpointType
from ktrdr_async.checkpoint.service import CheckpointService
from ktrdr_async.errors import (
    AlreadyClaimedError,
    CancellationError,
    InvalidTransitionError,
    KtrdrError,
    OperationNotFoundError,
)
from ktrdr_async.operations import service as service_module
from ktrdr_async.operations.lifecycle import Beat, Claim, Status
from ktrdr_async.storage.embedded import EmbeddedServer

NAMES = st.sampled_from("abc")
OWNERS = st.sampled_from("xyz")  # z is on another host
SESSIONS = st.integers(0, 39)  # see Machine.drawn
KINDS = {
    Status.FAILED: CheckpointType.FAILURE,
    Status.CANCELLED: CheckpointType.CANCELLATION,
    Status.INTERRUPTED: CheckpointType.SHUTDOWN,
}


class Machine(RuleBasedStateMachine):
    """Three operations, three owners, and every claim that was ever made."""

    ground: Ground

    def __init__(self) -> None:
        super().__init__()
        self.model: dict[str, Expected] = {}
        self.sessions: list[Session] = []
        self.before: dict[str, Status] = {}

    def teardown(self) -> None:
        for name in self.model:
            self.look(name)
        self.ground.run(self.ground.eyes.execute("DELETE FROM ktrdr.operations"))
        self.ground.reached["examples"] += 1

    def expect(self, error: type[Exception] | None, work: Awaitable[T]) -> T | None:
        """What the call gives, or None where it is refused as the model says."""
        self.ground.reached["steps"] += 1
        if error is None:
            return self.ground.run(work)
        with pytest.raises(KtrdrError) as caught:
            self.ground.run(work)
        assert type(caught.value) is error, caught.value
        self.ground.reached[f"times {error.__name__}"] += 1
        return None

    def missing(self, name: str) -> type[Exception] | None:
        return None if name in self.model else OperationNotFoundError

    def claimed(self, name: str, owner: str, claim: Claim) -> None:
        row = self.model[name]
        service = CheckpointService(self.ground.database, claim)
        row.session = Session(next(self.ground.sessions), name, owner, claim, service)
        self.sessions.append(row.session)
        row.epoch += 1
        assert claim.epoch == row.epoch
        row.status, row.failed, row.alive = Status.RUNNING, False, True
        row.touch()

    def written(self, session: Session, kind: CheckpointType | None, events: int) -> None:
        row = self.model[session.name]
        row.ledger += [session.number] * events
        row.segments += events > 0
        row.touch()
        if kind is not None:
            session.revision, session.bar = session.revision + 1, session.bar + 1
            row.head = session.revision, kind.value, session.bar, session.number

    @initialize(owners=st.permutations("xyz"))
    def begin(self, owners: list[str]) -> None:
        for name, owner in zip("ab", owners, strict=False):
            self.submit(name)
            self.claim(name, owner, take_over=False, careless=1)

    @rule(name=NAMES)
    def submit(self, name: str) -> None:
        self.expect(None, self.ground.operations.create(name, {"of": name}))
        self.model.setdefault(name, Expected())

    @rule(name=NAMES, owner=OWNERS, take_over=st.booleans(), careless=st.integers(0, 5))
    def claim(self, name: str, owner: str, take_over: bool, careless: int) -> None:
        row, error = self.model.get(name), self.missing(name)
        if row is not None and row.status is Status.COMPLETED:
            error = InvalidTransitionError
        elif row is not None and row.status is Status.RUNNING and not (take_over or row.abandoned):
            error = AlreadyClaimedError
        who = self.ground.owner(owner)
        made = self.ground.operations.claim(name, owner=who, take_over=take_over, lease_seconds=LEASE)
        claim = self.expect(error, made)
        if claim is not None:
            self.claimed(name, owner, claim)
            if careless:
                self.load(self.sessions[-1])

    @rule(name=NAMES, owners=st.permutations("xyz"))
    def claim_twice_at_once(self, name: str, owners: list[str]) -> None:
        row = self.model.get(name)
        if row is None or row.status in (Status.RUNNING, Status.COMPLETED):
            return
        claim, living = self.ground.operations.claim, [self.ground.owner(owner) for owner in owners[:2]]
        both = asyncio.gather
        calls = [claim(name, owner=owner, lease_seconds=LEASE) for owner in living]

        async def race() -> list[Any]:
            return list(await both(*calls, return_exceptions=True))

        found = self.expect(None, race())
        assert found is not None
        assert sorted(type(one).__name__ for one in found) == ["AlreadyClaimedError", "Claim"], found
        winner = next(place for place, one in enumerate(found) if isinstance(one, Claim))
        self.claimed(name, owners[winner], found[winner])
        self.ground.reached["races"] += 1

    def load(self, session: Session) -> None:
        """What is stored is what was acknowledged, whoever asks; the service goes on from there."""
        row = self.model.get(session.name)
        state = self.expect(self.missing(session.name), session.service.load_checkpoint(session.name))
        if row is None or row.head is None:
            assert state is None
            return
        self.compare(row, state)
        session.revision, session.bar = row.head[0], row.head[2]

    def compare(self, row: Expected, state: BacktestCheckpointState | None) -> None:
        assert state is not None
        assert row.head is not None
        assert (state.bar_index, state.cash) == (row.head[2], float(row.head[3]))
        writers = [str(number) for number in row.ledger]
        assert [(event.bar, event.tag) for event in state.ledger] == list(enumerate(writers))
        assert [sample.equity for sample in state.equity_samples] == row.ledger
        assert [value.value for value in state.recorded] == row.ledger

    @rule(which=SESSIONS, events=st.integers(0, 3))
    def tick(self, which: int, events: int) -> None:
        """An engine comes to a boundary, and saves it."""
        session = self.drawn(which)
        error = verdict(self.model.get(session.name), session, None, whole=True)
        assert not isinstance(error, Status)
        kind = CheckpointType.PERIODIC
        made = session.service.save_checkpoint(session.name, kind, session.next_state(events), deadline=60)
        if self.expect(error, made) is not None:
            self.written(session, kind, events)

    @rule(which=SESSIONS)
    def load_again(self, which: int) -> None:
        """A zombie may read what the new owner wrote, and still not write."""
        self.load(self.drawn(which))

    @rule(which=SESSIONS, wanted=st.sampled_from(sorted(KINDS)), events=st.integers(-1, 2), late=st.booleans())
    def end(self, which: int, wanted: Status, events: int, late: bool) -> None:
        """Failed, cancelled or interrupted; without a state where `events` is -1, and `late` after a cancel."""
        session = self.drawn(which)
        if late:
            self.cancel(session.name, None)
        found = verdict(self.model.get(session.name), session, wanted, whole=events >= 0)
        error = {"type": "E"} if wanted is Status.FAILED else None
        state = session.next_state(events) if events >= 0 else None
        made = session.service.finish(wanted, state=state, error=error, deadline=60)
        status = self.expect(found if isinstance(found, type) else None, made)
        if isinstance(found, type):
            return
        row = self.model[session.name]
        if found is None:
            row.status = Status.CANCELLED if wanted is Status.INTERRUPTED and row.cancelled else wanted
            row.failed = error is not None
            self.written(session, KINDS[wanted] if state else None, max(events, 0))
        assert status is row.status

    @rule(which=SESSIONS, events=st.integers(-1, 2), cancelled_meanwhile=st.booleans())
    def complete(self, which: int, events: int, cancelled_meanwhile: bool) -> None:
        session = self.drawn(which)
        row, found = (
            self.model.get(session.name),
            verdict(self.model.get(session.name), session, Status.COMPLETED, whole=True),
        )
        state = session.next_state(events) if events >= 0 else None
        result, digest = {"session": session.number}, session.digest
        made = session.service.finish(
            Status.COMPLETED, state=state, result=result, result_digest=digest, deadline=60
        )  # fmt: skip
        if found is None and cancelled_meanwhile and row is not None:
            if not self.race_of_a_cancel(row, session, made):
                return
        else:
            self.expect(found if isinstance(found, type) else None, made)
        if found is None and row is not None:
            row.status, row.head = Status.COMPLETED, None
            self.written(session, None, max(events, 0))

    def race_of_a_cancel(self, row: Expected, session: Session, completion: Awaitable[Status]) -> bool:
        """Whether the completion won; the cancel then hears of it, and the other way round."""
        cancel = self.ground.operations.cancel(session.name)

        async def race() -> list[Any]:
            return list(await asyncio.gather(completion, cancel, return_exceptions=True))

        answers = self.expect(None, race())
        assert answers is not None
        self.ground.reached["races"] += 1
        if answers[0] is Status.COMPLETED:
            assert isinstance(answers[1], InvalidTransitionError), answers
            return True
        assert isinstance(answers[0], CancellationError), answers
        self.cancelled(row)
        assert answers[1].status is row.status
        return False

    def cancelled(self, row: Expected) -> None:
        row.cancel_epoch = row.epoch
        if row.status is not Status.RUNNING:
            row.touch()  # its end is of now
            row.status = Status.CANCELLED
        elif row.abandoned:
            row.old, row.status = False, Status.CANCELLED

    @rule(name=NAMES, behind=st.sampled_from([None, 0, 1]))
    def cancel(self, name: str, behind: int | None) -> None:
        """Whichever epoch there is, the present one, or the one before it."""
        row, error = self.model.get(name), self.missing(name)
        epoch = None if behind is None or row is None else row.epoch - behind
        open_ = (Status.PENDING, Status.INTERRUPTED, Status.RUNNING)
        hit = row is not None and row.status in open_ and epoch in (None, row.epoch)
        if row is not None and not hit and row.status is not Status.CANCELLED:
            error = InvalidTransitionError
        found = self.expect(error, self.ground.operations.cancel(name, epoch=epoch))
        if row is not None and hit:
            self.cancelled(row)
        if row is not None and found is not None:
            assert (found.status, found.cancel_requested) == (row.status, row.cancelled)

    @rule(name=NAMES, paused=st.booleans())
    def pause(self, name: str, paused: bool) -> None:
        row, error = self.model.get(name), self.missing(name)
        if row is not None and row.status is Status.COMPLETED:
            error = InvalidTransitionError
        if self.expect(error, self.ground.operations.pause(name, paused)) is not None and row is not None:
            row.paused = paused

    @rule(name=NAMES)
    def delete_checkpoint(self, name: str) -> None:
        row, error = self.model.get(name), self.missing(name)
        if row is not None and row.status in (Status.RUNNING, Status.COMPLETED):
            error = InvalidTransitionError
        self.expect(error, self.ground.operations.delete_checkpoint(name))
        if row is not None and error is None:
            row.head, row.ledger, row.segments = None, [], 0

    @rule(owner=OWNERS)
    def kill(self, owner: str) -> None:
        """The owner is gone without a word: its process by SIGKILL, or its host, whose lease runs out."""
        if owner in self.ground.processes:
            self.ground.kill(owner)
            self.ground.reached["kills"] += 1
        for name, row in self.model.items():
            if row.session is None or row.session.owner != owner or row.status is not Status.RUNNING:
                continue
            row.alive = owner == "z"
            if owner == "z":
                self.ground.silence(name)
                row.silent = True

    @rule(which=SESSIONS)
    def heartbeat(self, which: int) -> None:
        session = self.drawn(which)
        row = self.model.get(session.name)
        mine = row is not None and row.session is session
        kind = "lost" if not mine else "ours" if row.status is Status.RUNNING else "ended"
        made = self.ground.operations.heartbeat(self.ground.eyes, [Beat(session.claim, {"bar": session.bar})])
        (answer,) = self.expect(None, made) or []
        paused = row is not None and row.paused
        assert (answer.kind, answer.cancel, answer.paused) == (kind, mine and row.cancelled, paused)
        if kind == "ours":
            row.touch()

    @rule()
    def orphans(self) -> None:
        found = self.expect(None, self.ground.operations.orphans())
        assert found is not None
        expected = set()
        for name, row in self.model.items():
            if row.status is Status.INTERRUPTED:
                expected.add(name)
            elif row.status is Status.RUNNING and row.abandoned:
                if row.cancelled:
                    row.status, row.old = Status.CANCELLED, False
                else:
                    expected.add(name)
        assert {operation.operation_id for operation in found} == expected

    @rule(name=NAMES)
    def grow_old(self, name: str) -> None:
        """A month passes for one operation."""
        if name in self.model:
            self.ground.age(name)
            self.model[name].silent = self.model[name].old = True

    @rule(dry_run=st.booleans())
    def clean(self, dry_run: bool) -> None:
        """What runs under a living owner is never deleted; the id of a deleted one may be used again, from epoch 0."""
        old = [
            name for name, row in self.model.items() if row.old and (row.status is not Status.RUNNING or row.abandoned)
        ]
        made = self.ground.operations.clean(dry_run=dry_run)
        assert sorted(self.expect(None, made) or []) == sorted(old)
        for name in [] if dry_run else old:
            del self.model[name]
            self.before.pop(name, None)

    @rule(name=NAMES, owner=OWNERS)
    def begin_anew(self, name: str, owner: str) -> None:
        """The same id and the same epoch again: only the token tells the new owner from the old one."""
        self.grow_old(name)
        self.clean(dry_run=False)
        self.submit(name)
        self.claim(name, owner, take_over=False, careless=1)

    def look(self, name: str) -> None:
        """Somebody without a claim reads what stands there."""
        row, reader = self.model[name], CheckpointService(self.ground.database)
        state = self.ground.run(reader.load_checkpoint(name))
        if row.head is None:
            assert state is None
        else:
            self.compare(row, state)
        ledger = self.ground.run(reader.load_ledger(name)).ledger
        assert [event.tag for event in ledger] == [str(number) for number in row.ledger]

    def drawn(self, which: int) -> Session:
        """An owner by the latest claim where the number is even, else any session that ever was.

        What hypothesis draws mustn't depend on who wins a race: the same number may mean another session then.
        """
        owners = [row.session for row in self.model.values() if row.session is not None]
        among = self.sessions if which % 2 or not owners else owners
        return among[which // 2 % len(among)]

    @invariant()
    def what_stands_is_what_the_protocol_says(self) -> None:
        rows = self.ground.run(self.ground.eyes.fetch(STANDING))
        assert {row["operation_id"] for row in rows} == self.model.keys()
        for row in rows:
            named = row["operation_id"]
            check(row, self.model[named], self.before.get(named, Status.PENDING))
        self.before = {row["operation_id"]: Status(row["status"]) for row in rows}
        if rows:
            assert rows[0]["heads"] == sum(one.head is not None for one in self.model.values())
            assert rows[0]["segments"] == sum(one.segments for one in self.model.values())


@pytest.fixture
def ground(embedded_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ground]:
    monkeypatch.setattr(service_module, "LEASE_SECONDS", LEASE)
    made = Ground(embedded_server)
    yield made
    made.close()


@pytest.mark.timeout(2_700)  # also of the slice: a failure is made smaller before it is told
@sized("examples", ci=30, whole=5_000)
def test_the_services_do_what_the_protocol_says(
    ground: Ground, campaign_seed: int, figures: Figures, examples: int
) -> None:
    machine = hypothesis.seed(campaign_seed)(type("SeededMachine", (Machine,), {"ground": ground}))
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=50, database=None, deadline=None, print_blob=False,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
    reached = ", ".join(f"{number:,} {what}" for what, number in sorted(ground.reached.items()))
    figures.add("operations and checkpoints against a model", f"{reached}, 0 differences")
