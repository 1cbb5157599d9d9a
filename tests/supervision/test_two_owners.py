"""R2 against zombies: an owner is stopped past its lease, another takes over, the first wakes and writes nothing.

The campaign: pytest -m campaign tests/supervision/test_two_owners.py -s
"""

from __future__ import annotations

import asyncio
import random
import signal
from collections import Counter as Tally
from contextlib import AsyncExitStack
from typing import Any

import asyncpg
import msgspec
import pytest
from campaigns import Figures, sized
from other_owners import OtherOwner, other_owner
from supervision_runs import EVERY_BLOCK, Gate, Held, held_digest, market, outside, row_held, until
from supervision_storms import Proxy, proxied

import ktrdr_async as kt
from ktrdr_async.operations.service import OperationsService
from ktrdr_async.supervision.worker import BacktestWorker, OperationHandle

pytestmark = pytest.mark.anyio
LEASE = 0.3  # seconds
# Who writes what, in the order in which the rows are written, and which of it is a claim.
AUDIT = """
CREATE TABLE audit (id bigint GENERATED ALWAYS AS IDENTITY, operation_id text, writer text, relation text, what text,
    claimed boolean NOT NULL);
CREATE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO public.audit (operation_id, writer, relation, what, claimed) VALUES (
        COALESCE(NEW.operation_id, OLD.operation_id), current_setting('application_name'), TG_TABLE_NAME, TG_OP,
        TG_TABLE_NAME = 'operations' AND TG_OP = 'UPDATE'
            AND to_jsonb(NEW) ->> 'owner_token' IS DISTINCT FROM to_jsonb(OLD) ->> 'owner_token');
    RETURN NULL; END $$;
CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON ktrdr.operations
    FOR EACH ROW EXECUTE FUNCTION audit();
CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON ktrdr.operation_checkpoints
    FOR EACH ROW EXECUTE FUNCTION audit();
CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON ktrdr.ledger_segments
    FOR EACH ROW EXECUTE FUNCTION audit();
"""
# What stood before the claim, as if from a dump of then: the next claim is given the epoch that the zombie has.
RESTORE = """
ALTER TABLE ktrdr.operations DISABLE TRIGGER operations_guard;
UPDATE ktrdr.operations SET status = 'pending', epoch = 0, attempts = 0, owner_token = NULL, owner_host = NULL,
    owner_boot_id = NULL, owner_pid_namespace = NULL, owner_pid = NULL, owner_started = NULL, heartbeat_at = NULL,
    started_at = NULL WHERE operation_id = '{name}';
ALTER TABLE ktrdr.operations ENABLE TRIGGER operations_guard;
"""
WRITES = ("save", "completion", "cancel", "failure")
# What holds the zombie's write up: nothing (it wasn't sent yet), the network, a third one's lock on the head's row, or
# on the operation's row, where the claim waits before the zombie's statement. Reissued: it wasn't sent yet, and the
# claim comes to the same epoch, so that only the tokens differ.
HOLDS = ("none", "network", "head", "operation")
CASES = [(write, hold) for hold in HOLDS for write in WRITES] + [("heartbeat", "none"), ("heartbeat", "reissued")]
CASES += [(write, "reissued") for write in WRITES]


class Trial(msgspec.Struct, frozen=True):
    seed: str
    write: str
    hold: str
    take_over: bool  # a person decides; else the lease has to pass
    newcomer_bar: int  # where the new owner stands while the zombie wakes


def drawn(seed: int, number: int) -> Trial:
    chance = random.Random(f"{seed}-{number}")
    write, hold = CASES[5 * number % len(CASES)]
    bars = (830, 960) if write == "completion" else (320, 420, 650)
    # At the first one the new owner has saved nothing yet: only the fence keeps the zombie out, no head that moved on.
    bar = bars[0] if hold == "reissued" else chance.choice(bars)
    return Trial(f"{seed}-{number}", write, hold, chance.random() < 0.5, bar)


class Stage:
    """The zombie, the worker that takes over, and who watches both."""

    def __init__(self, zombie: OtherOwner, worker: BacktestWorker, proxy: Proxy, dsn: str, watcher: Any) -> None:
        self.zombie, self.worker, self.proxy, self.dsn, self.watcher = zombie, worker, proxy, dsn, watcher

    async def begin(self, trial: Trial, name: str) -> None:
        """The zombie stands before the write."""
        last = trial.write == "completion"  # which shall be its next write
        self.zombie.tell(name, "run", bar=950 if last else 345, every=350 if last else 100)
        await self.zombie.heard(name, "reached")

    async def write(self, trial: Trial, name: str) -> None:
        """The zombie does it, as soon as it is awake."""
        if trial.write == "heartbeat":
            await self.watcher.execute("SELECT pg_notify('ktrdr_async', $1)", name)
        else:
            self.zombie.tell(name, {"cancel": "cancel", "failure": "fail"}.get(trial.write, "open"))

    async def taken_over(self, trial: Trial, name: str, gate: Gate) -> OperationHandle:
        """The new owner, at its gate, or at an end that was reached before it came."""
        while True:
            handle = self.claiming(trial, name, gate)
            arrival = asyncio.create_task(gate.reached.wait())
            await asyncio.wait({handle._actor.task, arrival}, return_when=asyncio.FIRST_COMPLETED)
            if arrival.done():
                return handle
            arrival.cancel()
            try:
                await handle.result()
                return handle
            except kt.AlreadyClaimedError:  # also where it was completed while the claim waited for its row
                assert not trial.take_over or (trial.write, trial.hold) == ("completion", "head"), trial

    def claiming(self, trial: Trial, name: str, gate: Gate) -> OperationHandle:
        return self.worker.resume_handle(
            name, bars=market(), strategy=Held(gate), policy=EVERY_BLOCK, take_over=trial.take_over
        )

    async def rows(self, name: str) -> list[asyncpg.Record]:
        """Head and segments, with the transactions that wrote them."""
        heads = "SELECT xmin::text, * FROM ktrdr.operation_checkpoints WHERE operation_id = $1"
        segments = "SELECT xmin::text, * FROM ktrdr.ledger_segments WHERE operation_id = $1 ORDER BY sequence"
        return [*await self.watcher.fetch(heads, name), *await self.watcher.fetch(segments, name)]

    async def until_blocked(self, writes: int) -> None:
        async def blocked() -> bool:
            return bool(
                await self.watcher.fetchval(
                    "SELECT count(*) >= $1 FROM pg_stat_activity WHERE datname = current_database()"
                    " AND wait_event_type = 'Lock' AND application_name <> 'test'", writes,
                )
            )  # fmt: skip

        await until(blocked, f"{writes} writes wait")

    async def play(self, trial: Trial, name: str) -> tuple[dict[str, Any], kt.BacktestResults]:
        """The zombie is stopped, the other one takes over, the zombie is woken; what it said, and the result."""
        gate = Gate(trial.newcomer_bar)
        await self.begin(trial, name)
        async with AsyncExitStack() as stack:
            if trial.hold in ("none", "reissued"):
                self.zombie.signal(signal.SIGSTOP)
                await self.write(trial, name)
                if trial.hold == "reissued":
                    await self.watcher.execute(RESTORE.format(name=name))
                handle = await self.taken_over(trial, name, gate)
            elif trial.hold == "network":
                self.proxy.arm("request")
                await self.write(trial, name)

                async def held() -> bool:
                    return self.proxy.held > 0

                await until(held, f"{trial}: the proxy holds it")
                self.zombie.signal(signal.SIGSTOP)
                handle = await self.taken_over(trial, name, gate)
            elif trial.hold == "head":
                third = await stack.enter_async_context(outside(self.dsn))
                await third.execute("BEGIN")
                await third.execute("SELECT FROM ktrdr.operation_checkpoints WHERE operation_id = $1 FOR UPDATE", name)
                await self.write(trial, name)
                await self.until_blocked(1)
                self.zombie.signal(signal.SIGSTOP)
                taking = asyncio.create_task(self.taken_over(trial, name, gate))
                if trial.take_over:  # else it only asks again and again
                    await self.until_blocked(2)
                await third.execute("ROLLBACK")
                handle = await taking
            else:
                self.zombie.signal(signal.SIGSTOP)
                await self.write(trial, name)
                await asyncio.sleep(LEASE)
                async with row_held(self.dsn, name):
                    taking = asyncio.create_task(self.taken_over(trial, name, gate))
                    await self.until_blocked(1)
                    self.zombie.signal(signal.SIGCONT)
                    await self.until_blocked(2)
                handle = await taking
            before = await self.rows(name)
            self.proxy.release()
            self.zombie.signal(signal.SIGCONT)
            said = await self.zombie.heard(name, "error", "digest")
            assert await self.rows(name) == before, trial
            gate.open.set()
            return said, await handle.result()

    async def written(self, name: str) -> tuple[int, int]:
        """The zombie's writes before the other one's claim, and since."""
        row = await self.watcher.fetchrow(
            "WITH claim AS (SELECT min(id) AS id FROM public.audit"
            " WHERE operation_id = $1 AND writer = 'newcomer' AND claimed)"
            " SELECT count(*) FILTER (WHERE a.id < claim.id OR claim.id IS NULL) AS before,"
            " count(*) FILTER (WHERE a.id > claim.id) AS since"
            " FROM public.audit a, claim WHERE a.operation_id = $1 AND a.writer = 'zombie'", name,
        )  # fmt: skip
        return row["before"], row["since"]


def check_said(trial: Trial, said: dict[str, Any], landed: bool) -> str:
    """How the zombie hears of it: never as a success, unless its write came before the claim."""
    if landed and "digest" in said:
        assert (trial.write, trial.hold) == ("completion", "head"), trial
        return "completed before"
    told = said.get("error")
    if told == "OwnershipLostError":
        return told
    expected = {"cancel": "CancelledError", "failure": "KeyError"}.get(trial.write)
    assert told == expected, (trial, said)
    if trial.hold != "head":  # there its end was written before the claim
        assert any("OwnershipLostError" in note for note in said["notes"]), (trial, said)
    return f"{told} with a note"


@sized("trials", ci=6, whole=330, minutes=60)
async def test_a_zombie_writes_nothing(
    dsn: str, trials: int, campaign_seed: int, figures: Figures, monkeypatch: pytest.MonkeyPatch
) -> None:
    await held_digest()
    defaults: Any = OperationsService.claim.__kwdefaults__
    monkeypatch.setitem(defaults, "lease_seconds", LEASE)
    told: Tally[str] = Tally()
    kinds: Tally[str] = Tally()
    sent = 0
    async with BacktestWorker.open(f"{dsn}&application_name=newcomer") as worker, outside(dsn) as watcher:
        await watcher.execute(AUDIT)
        with proxied(dsn) as (proxy, through):
            async with other_owner(f"{through}&application_name=zombie", host="elsewhere") as zombie:
                stage = Stage(zombie, worker, proxy, dsn, watcher)
                for number in range(trials):
                    trial, name = drawn(campaign_seed, number), f"op{number}"
                    said, results = await stage.play(trial, name)
                    before, since = await stage.written(name)
                    assert since == 0, f"{trial}: the zombie wrote {since} rows"
                    assert before > 0, trial
                    assert results.digest == await held_digest(), trial
                    told[check_said(trial, said, trial.hold == "head")] += 1
                    kinds[trial.write] += 1
                    sent += trial.hold in ("network", "head", "operation")
                    assert (await worker.results(name, bars=market())).digest == results.digest
    figures.add(
        "owners that were stopped past their lease, replaced and woken",
        f"{trials} ({dict(sorted(kinds.items()))}; of {sent} the write was under way): 0 rows written since the claim; "
        f"they heard {dict(sorted(told.items()))}",
    )
