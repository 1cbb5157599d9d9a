"""Races that only one may win: resumes at once, cancel against completion, the retry of a completion in doubt.

The campaign: pytest -m campaign tests/supervision/test_races.py -s
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter as Tally
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import msgspec
import pytest
from campaigns import Figures, sized
from other_owners import OtherOwner, every, other_owner
from supervision_runs import (
    EVERY_BLOCK,
    NEVER,
    Gate,
    Held,
    held,
    held_digest,
    market,
    outside,
    resumed,
    row_held,
    standing,
    stored_request,
    until,
)
from supervision_storms import proxied

import ktrdr_async as kt
from ktrdr_async.checkpoint.service import CheckpointService
from ktrdr_async.operations.lifecycle import Owner
from ktrdr_async.supervision.worker import BacktestWorker

pytestmark = pytest.mark.anyio
BEFORE = ("pending", "cancelled", "failed", "interrupted", "dead owner", "lease over", "left over")


class Contender:
    """One that resumes an operation, from this process or another one; who gets it stands at a gate."""

    def __init__(self, where: BacktestWorker | OtherOwner, name: str) -> None:
        self.name, self._where = name, where
        self.here = isinstance(where, BacktestWorker)
        self._gate = Gate(420)
        if isinstance(where, BacktestWorker):
            self._handle = where.resume_handle(name, bars=market(), strategy=Held(self._gate), policy=EVERY_BLOCK)
        else:
            where.tell(name, "run", resume=True, bar=420, every=100)

    async def stands(self) -> str:
        """`won`, or why it didn't."""
        if isinstance(self._where, OtherOwner):
            said = await self._where.heard(self.name, "reached", "error", "digest")
            return "won" if "reached" in said else said.get("error", "a result")
        arrival = asyncio.create_task(self._gate.reached.wait())
        await asyncio.wait({arrival, self._handle._actor.task}, return_when=asyncio.FIRST_COMPLETED)
        if arrival.done():
            return "won"
        arrival.cancel()
        try:
            await self._handle.result()
        except kt.KtrdrError as error:
            return type(error).__name__
        return "a result"

    async def digest(self) -> str:
        if isinstance(self._where, OtherOwner):
            self._where.tell(self.name, "open")
            return str((await self._where.heard(self.name, "digest", "error")).get("digest"))
        self._gate.open.set()
        return (await self._handle.result()).digest


async def made(worker: BacktestWorker, dsn: str, name: str, before: str) -> None:
    """An operation that wants to be gone on with."""
    if before == "pending":
        await worker.operations.create(name, await stored_request(Held(Gate())))
        return
    handle, _ = await held(worker, name=name)
    await handle.cancel()
    if before == "cancelled":
        return
    me = Owner.this_process()
    owner = {
        "dead owner": msgspec.structs.replace(me, started=me.started - 1.0),
        "lease over": msgspec.structs.replace(me, host="elsewhere"),
    }.get(before, me)
    claim = await worker.operations.claim(name, owner=owner)
    if before in ("failed", "interrupted"):
        error = {"type": "KeyError", "message": "x"} if before == "failed" else None
        await CheckpointService(worker.database, claim).finish(kt.Status(before), state=None, error=error)
    elif before == "lease over":
        async with outside(dsn) as other:
            await other.execute(
                "UPDATE ktrdr.operations SET heartbeat_at = heartbeat_at - interval '60 s' WHERE operation_id = $1",
                name,
            )


@asynccontextmanager
async def many(dsn: str) -> AsyncIterator[list[BacktestWorker | OtherOwner]]:
    """Three workers with connections of their own, and two in processes of their own."""
    async with AsyncExitStack() as stack:
        here = [await stack.enter_async_context(BacktestWorker.open(dsn)) for _ in range(3)]
        yield [*here, *[await stack.enter_async_context(other_owner(dsn)) for _ in range(2)]]


@sized("trials", ci=7, whole=294, minutes=60)
async def test_of_several_resumes_at_once_one_wins(dsn: str, trials: int, campaign_seed: int, figures: Figures) -> None:
    clean = await held_digest()
    heard: Tally[str] = Tally()
    async with many(dsn) as everybody, BacktestWorker.open(dsn) as maker:
        for number in range(trials):
            chance, name = random.Random(f"{campaign_seed}-{number}"), f"op{number}"
            before = BEFORE[number % len(BEFORE)]
            await made(maker, dsn, name, before)
            was = await maker.operations.get(name)
            chosen = chance.sample(everybody, chance.randrange(2, 6))
            if before == "left over" and not any(isinstance(one, BacktestWorker) for one in chosen):
                chosen[0] = everybody[0]  # others can't know
            together = chance.random() < 0.5
            how = "together" if together else "as they come"
            trial = f"{campaign_seed}-{number}: {before}, {len(chosen)} resume, {how}"
            async with AsyncExitStack() as stack:
                if together:
                    until_blocked = await stack.enter_async_context(row_held(dsn, name))
                contenders = [Contender(one, name) for one in chosen]
                if together:  # of what is left over here, others don't even try to get it
                    await until_blocked(1 if before == "left over" else len(contenders))
            stand = [await contender.stands() for contender in contenders]
            heard.update(stand)
            winners = [one for one, came in zip(contenders, stand, strict=True) if came == "won"]
            assert len(winners) == 1, (trial, stand)
            assert set(stand) <= {"won", "AlreadyClaimedError"}, (trial, stand)
            assert await winners[0].digest() == clean, trial
            row = await maker.operations.get(name)
            assert (row.status, row.result_digest) == (kt.Status.COMPLETED, clean), trial
            assert (row.epoch, row.attempts) == (was.epoch + 1, was.attempts + 1), trial
    figures.add(
        "races of 2 to 5 resumes",
        f"{trials}: {dict(sorted(heard.items()))}; each had one winner, its digest the clean one",
    )


@sized("trials", ci=4, whole=160, minutes=60)
async def test_a_cancel_against_a_completion(dsn: str, trials: int, campaign_seed: int, figures: Figures) -> None:
    """Forced both ways by the order in which they wait for the row, or as they come."""
    clean = await held_digest()
    heard: Tally[str] = Tally()
    async with BacktestWorker.open(dsn) as worker, BacktestWorker.open(dsn) as rival, other_owner(dsn) as process:
        for number in range(trials):
            chance, name = random.Random(f"{campaign_seed}-{number}"), f"op{number}"
            order = ("completion first", "cancel first", "as they come", "as they come")[number % 4]
            trial = f"{campaign_seed}-{number}: {order}"
            handle, gate = await held(worker, 950, chance.choice((NEVER, every(350))), name)
            asked: asyncio.Task[str] | None = None

            async def ask(name: str = name, chance: random.Random = chance) -> str:
                if chance.random() < 0.5:
                    process.tell(name, "ask-cancel")
                    return str((await process.heard(name, "cancel"))["cancel"])
                try:
                    return (await rival.operations.cancel(name)).status.value
                except kt.KtrdrError as error:
                    return type(error).__name__

            if order == "as they come":
                gate.open.set()
                for _ in range(chance.choice((0, 0, 1, 5, 20, 100))):
                    await asyncio.sleep(0)
                asked = asyncio.create_task(ask())
            else:
                async with row_held(dsn, name) as until_blocked:
                    if order == "completion first":
                        gate.open.set()
                        await until_blocked()
                    asked = asyncio.create_task(ask())
                    await until_blocked(2 if order == "completion first" else 1)
                    if order == "cancel first":
                        gate.open.set()
                        await until_blocked(2)
            said = await asked
            try:
                result = (await handle.result()).digest
            except kt.CancellationError:
                result = "cancelled"
            status, kind, bar = standing(await worker.operations.get(name))
            if result == "cancelled":
                assert order != "completion first", trial
                assert said in ("running", "cancelled"), (trial, said)
                assert (status, kind) == ("cancelled", "cancellation"), trial
                assert bar in (899, 999), trial
            else:
                assert order != "cancel first", trial
                assert result == clean, trial
                assert said == "InvalidTransitionError", (trial, said)
                assert (status, kind) == ("completed", None), trial
            heard[f"{order}: {status}"] += 1
            await resumed(rival, name)
    figures.add("races of a cancel against a completion", f"{trials}: {dict(sorted(heard.items()))}; who lost was told")


@sized("trials", ci=8, whole=120, minutes=60)
async def test_the_retry_of_a_completion_in_doubt(dsn: str, trials: int, campaign_seed: int, figures: Figures) -> None:
    """Its request or its answer is lost, and somebody takes the operation over, or cancels it, meanwhile."""
    clean = await held_digest()
    heard: Tally[str] = Tally()
    with proxied(dsn) as (proxy, through):
        async with BacktestWorker.open(through) as worker, BacktestWorker.open(dsn) as rival:

            async def holds() -> bool:
                return proxy.held > 0

            for number in range(trials):
                chance, name = random.Random(f"{campaign_seed}-{number}"), f"op{number}"
                way: Any = ("request", "reply")[number % 2]
                what = ("take over", "cancel")[number // 2 % 2]
                first = ("rival", "retry")[number // 4 % 2]
                trial = f"{campaign_seed}-{number}: the {way} is lost, {what}, the {first} first"
                handle, gate = await held(worker, 950, chance.choice((NEVER, every(350))), name)
                proxy.arm(way)
                gate.open.set()
                await until(holds, f"{trial}: the completion is under way")

                async def act(name: str = name, what: str = what) -> str:
                    try:
                        if what == "cancel":
                            return (await rival.operations.cancel(name)).status.value
                        again = rival.resume(name, bars=market(), strategy=Held(Gate()), take_over=True)
                        return (await again).digest
                    except kt.KtrdrError as error:
                        return type(error).__name__

                async with row_held(dsn, name) as until_blocked:
                    if first == "retry":
                        proxy.release(cut=True)
                        await until_blocked()
                    acting = asyncio.create_task(act())
                    waits = way == "request"  # else it is completed, and nothing is left to wait for
                    if waits:
                        await until_blocked(2 if first == "retry" else 1)
                    if first == "rival":
                        proxy.release(cut=True)
                        await until_blocked(1 + waits)
                said = await acting
                try:
                    mine = (await handle.result()).digest
                except kt.KtrdrError as error:
                    mine = type(error).__name__
                row = await rival.operations.get(name)
                if way == "reply":  # it had landed
                    assert (mine, said) == (clean, clean if what == "take over" else "InvalidTransitionError"), trial
                elif what == "take over":
                    assert said == clean, (trial, said)
                    assert mine in ("OwnershipLostError", clean), (trial, mine)
                    assert (row.epoch == 1) == (mine == clean), trial
                else:
                    assert (mine, said) in (("CancellationError", "running"), (clean, "InvalidTransitionError")), trial
                    assert (row.status is kt.Status.CANCELLED) == (mine != clean), trial
                if first == "rival" and way == "request":
                    assert mine != clean, trial
                heard[mine if mine != clean else "completed"] += 1
                await resumed(rival, name)
                assert (await rival.operations.get(name)).result_digest == clean, trial
    figures.add(
        "retries of a completion in doubt, against a take-over or a cancel",
        f"{trials}: the first owner heard {dict(sorted(heard.items()))}; one winner each, its digest the clean one",
    )
