"""The trials, one kind after another, from what is cheap and plain to what is dear: the first difference ends them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, NoReturn

import msgspec
import numpy as np

from ktrdr_async.backtesting.engine import BLOCK_BARS
from ktrdr_async.backtesting.provenance import identity_of
from ktrdr_async.backtesting.tiers import compiled_tier, load_compiled
from ktrdr_async.errors import CheckpointCorruptedError, InputError, UndeclaredStateError
from ktrdr_async.market import Bars
from ktrdr_async.strategies.base import AnyStrategy, WeightStrategy
from ktrdr_async.supervision.jobs import Job
from ktrdr_async.supervision.shielding import in_thread
from ktrdr_async.supervision.turns import turns_of_this_loop
from ktrdr_async.verification import reasons
from ktrdr_async.verification.certificate import Difference, Field, Step, Trial
from ktrdr_async.verification.children import Children, unmakeable
from ktrdr_async.verification.compare import Parting
from ktrdr_async.verification.futures import FUTURES, Future, other_future, places
from ktrdr_async.verification.legs import Leg, Ran, run_leg
from ktrdr_async.verification.plan import Plan
from ktrdr_async.verification.reference import Reference, Watch
from ktrdr_async.verification.strikes import Strike

RECORDED, AGAIN, OBJECT = "uninterrupted", "again, a new object", "again, the same object"
BLOCKS, HASHES, CANCELS, KILLS, FUTURE = "block sizes", "hash seeds", "interruptions", "kill -9", "look-ahead"
TIERS = "tiers"


class Parted(Exception):  # noqa: N818 - no error: what was looked for
    """Two runs part."""

    def __init__(self, difference: Difference) -> None:
        super().__init__(difference.reason)
        self.difference = difference


class Trials:
    """All trials of one job.

    Attributes:
        done: the kinds of trials that found no difference.
        untried: what was left out, and why.
        digest: of the uninterrupted run's result.
    """

    def __init__(
        self,
        job: Job,
        new: Callable[[], AnyStrategy],
        plan: Plan,
        directory: str,
        on_step: Callable[[Step], None],
    ) -> None:
        self.done: list[Trial] = []
        self.untried: list[str] = []
        self.digest: str | None = None
        self._job = job
        self._new = new
        self._plan = plan
        self._step = on_step
        self._leg = Leg(request=job.request, bars=job.bars)
        self._children = Children(directory, job.strategy, job.bars)
        self._unmakeable = unmakeable(job.strategy)
        self._reference = Reference(directory, job.strategy, job.bars.symbols)
        self._built_in = identity_of(job.strategy).built_in

    def close(self) -> None:
        """Gives its files up."""
        self._reference.close()

    async def run(self) -> None:
        """Tries everything. :raises Parted: at the first difference."""
        await self._uninterrupted()
        await self._again()
        await self._block_sizes()
        await self._tiers()
        await self._hash_seeds()
        await self._interruptions()
        await self._kills()
        await self._look_ahead()

    # One leg, and where it parts.

    async def _try(self, leg: Leg, strategy: AnyStrategy | None = None) -> tuple[Ran, Parting | None]:
        watch = Watch(self._reference)
        ran = await run_leg(leg, strategy or self._new(), watch, turn=turns_of_this_loop().turn())
        upto = leg.last if leg.bars is not self._job.bars else None
        return ran, self._reference.compare(leg, ran, watch.parted, upto=upto)

    async def _narrowed(self, leg: Leg, parting: Parting, strategy: AnyStrategy | None = None) -> Parting:
        """The first bar, by the same leg bar by bar. What isn't found again stays as it was seen."""
        if parting.exact and parting.what != "error":
            return parting
        closer = msgspec.structs.replace(leg, block_bars=1, strike=None, last=leg.last or max(parting.bar, 0))
        _, found = await self._try(closer, strategy)
        return found if found is not None and found.bar <= parting.bar else parting

    def _part(self, parting: Parting, trial: str, kind: str, said: tuple[str, str]) -> NoReturn:
        reason, hint = said
        raise Parted(
            Difference(
                kind=kind,
                trial=trial,
                bar=parting.bar,
                time="" if parting.bar < 0 else time_of(self._job.bars, parting.bar),
                exact=parting.exact,
                fields=parting.fields,
                reason=reason,
                hint=hint,
            )
        )

    def _passed(self, what: str, count: int, detail: str = "", *, ended: bool = True) -> None:
        digests = (self.digest,) if ended and self.digest is not None else ()
        self.done.append(Trial(what, count, detail, digests))

    # In this process, uninterrupted.

    async def _uninterrupted(self) -> None:
        self._step(Step(RECORDED, 0, 1))
        leg = msgspec.structs.replace(self._leg, block_bars=1)
        turn = turns_of_this_loop().turn()
        ran = await run_leg(leg, self._job.strategy, self._reference.take, turn=turn)
        if isinstance(ran.exception, UndeclaredStateError):
            parting = Parting(ran.error_bar, "error", (Field("error", "none", ran.error),))
            self._part(parting, RECORDED, "undeclared_state", (ran.exception.message, ran.exception.hint))
        if ran.exception is not None:
            raise ran.exception
        self._reference.ran = ran
        assert ran.ending is not None  # noqa: S101 - it came to its end
        self.digest = ran.ending.digest
        self._passed(RECORDED, 1, f"{len(self._reference.digests):,} states, one a bar")

    async def _again(self) -> None:
        self._step(Step(AGAIN, 0, 1))
        _, parting = await self._try(self._leg)
        if parting is not None:
            parting = await self._narrowed(self._leg, parting)
            kind = await self._kind_of_again()
            self._part(parting, AGAIN, kind, reasons.reason_of(kind))
        self._passed(AGAIN, 1, "equal")
        self._step(Step(OBJECT, 0, 1))
        _, parting = await self._try(self._leg, self._job.strategy)
        if parting is not None:
            parting = await self._narrowed(self._leg, parting, self._job.strategy)
            self._part(parting, OBJECT, "hidden_state", reasons.object_state(self._job.strategy))
        self._passed(OBJECT, 1, "equal")

    async def _kind_of_again(self) -> str:
        """Fresh processes tell what outlives a run from what is never the same."""
        if self._unmakeable is not None:
            return "hidden_state_or_nondeterministic"
        seed = self._plan.hash_seed(0)
        first, second = await self._fresh([(self._leg, seed), (self._leg, seed)])
        return "hidden_state" if _told(first) == _told(second) else "nondeterministic"

    async def _block_sizes(self) -> None:
        sizes = [size for size in self._plan.block_sizes if size not in (1, BLOCK_BARS)]
        for number, size in enumerate(sizes):
            self._step(Step(BLOCKS, number, len(sizes)))
            leg = msgspec.structs.replace(self._leg, block_bars=size)
            _, parting = await self._try(leg)
            if parting is not None:
                parting = await self._narrowed(leg, parting)
                self._part(parting, f"blocks of {size} bars", "engine", reasons.reason_of("engine"))
        tried = sorted({1, BLOCK_BARS, *sizes})
        self._passed(BLOCKS, len(tried), f"{', '.join(map(str, tried))} bars a block: equal")

    async def _tiers(self) -> None:
        self._step(Step(TIERS, 0, 1))
        if compiled_tier() is None:
            loaded = await in_thread(load_compiled)
            if loaded.why_not is not None:
                self.untried.append(f"the compiled tier: {loaded.why_not}")
                return
        leg = msgspec.structs.replace(self._leg, tier="compiled")
        _, parting = await self._try(leg)
        if parting is not None:
            parting = await self._narrowed(leg, parting)
            self._part(parting, "the compiled tier", "engine", reasons.reason_of("engine"))
        self._passed(TIERS, 1, "compiled: equal")

    # In fresh processes.

    async def _fresh(self, legs: list[tuple[Leg, int]], first: int = 0) -> list[tuple[Ran, Any]]:
        """Legs in child processes at the same time."""
        tasks = [
            asyncio.ensure_future(self._children.run(leg, hash_seed=hash_seed, first=first)) for leg, hash_seed in legs
        ]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _compared(self, leg: Leg, told: tuple[Ran, Any]) -> Parting | None:
        ran, snapshots = told
        watch = Watch(self._reference)
        next((each for each in snapshots if watch(each)), None)
        return self._reference.compare(leg, ran, watch.parted)

    async def _narrowed_in_child(self, leg: Leg, parting: Parting, hash_seed: int) -> Parting:
        if parting.exact and parting.what != "error":
            return parting
        bar = max(parting.bar, 0)
        closer = msgspec.structs.replace(leg, block_bars=1, last=bar)
        [told] = await self._fresh([(closer, hash_seed)], bar - bar % BLOCK_BARS)
        found = self._compared(closer, told)
        return found if found is not None and found.bar <= parting.bar else parting

    async def _hash_seeds(self) -> None:
        count = self._plan.hash_seeds
        if not count or self._unmakeable is not None:
            self._leave_out(HASHES, count)
            return
        self._step(Step(HASHES, 0, count))
        seeds = [self._plan.hash_seed(number) for number in range(count)]
        found = await self._fresh([(self._leg, seed) for seed in seeds])
        for seed, told in zip(seeds, found, strict=True):
            parting = self._compared(self._leg, told)
            if parting is not None:
                kind = await self._kind_of_fresh(seed, told, found)
                parting = await self._narrowed_in_child(self._leg, parting, seed)
                self._part(parting, f"a fresh process, PYTHONHASHSEED={seed}", kind, reasons.reason_of(kind))
        self._passed(HASHES, count, f"fresh processes, PYTHONHASHSEED={', '.join(map(str, seeds))}: equal")

    async def _kind_of_fresh(self, seed: int, told: tuple[Ran, Any], others: list[tuple[Ran, Any]]) -> str:
        """Whether the hash seed alone decides: the same seed gives the same, and others something else."""
        [same] = await self._fresh([(self._leg, seed)])
        if _told(same) != _told(told):
            return "process"
        if all(_told(other) == _told(told) for other in others):  # by chance, perhaps: a short set has few orders
            more = range(self._plan.hash_seeds, self._plan.hash_seeds + 3)
            others = await self._fresh([(self._leg, self._plan.hash_seed(number)) for number in more])
        return "process" if all(_told(other) == _told(told) for other in others) else "hash_order"

    async def _kills(self) -> None:
        at = self._plan.kill_bars(len(self._job.bars)) if self._plan.kills else []
        if not at or self._unmakeable is not None:
            self._leave_out(KILLS, self._plan.kills)
            return
        leg, seed = self._leg, self._plan.hash_seed(0)
        for number, bar in enumerate(at):
            self._step(Step(KILLS, number, len(at)))
            state = await self._children.kill(msgspec.structs.replace(leg, strike=Strike(bar, "kill")), hash_seed=seed)
            if state is not None and state.state_digest != self._reference.digests[state.bar_index]:
                field = Field("state_digest", self._reference.digests[state.bar_index], state.state_digest)
                left = Parting(state.bar_index, "state", (field,), exact=False)
                [told] = await self._fresh([(leg, seed)])  # the boundaries between, which the killed one didn't tell
                await self._part_killed(leg, self._compared(leg, told) or left, at[max(0, number - 1)], seed)
            leg = msgspec.structs.replace(leg, state=state)
        [told] = await self._fresh([(leg, seed)])
        parting = self._compared(leg, told)
        if parting is not None:
            await self._part_killed(leg, parting, at[-1], seed)
        where = "the blocks of bars" if isinstance(self._job.strategy, WeightStrategy) else "bars"
        bars = ", ".join(f"{bar:,}" for bar in at)
        self._passed(KILLS, len(at), f"in {where} {bars}, resumed by new processes: equal")

    async def _part_killed(self, leg: Leg, parting: Parting, bar: int, hash_seed: int) -> NoReturn:
        parting = await self._narrowed_in_child(leg, parting, hash_seed)
        self._part_resumed(parting, f"kill -9 in bar {bar:,}, resumed from {_place(leg)} by another process")

    def _leave_out(self, what: str, count: int) -> None:
        if count:
            self.untried.append(f"{what}: {self._unmakeable}")

    # Interrupted.

    async def _interruptions(self) -> None:
        strikes = self._plan.strikes(self._job.strategy, len(self._job.bars))
        if not strikes:
            return
        leg, last = self._leg, "interrupted"
        struck = {"yield": 0, "inside": 0}
        for number, strike in enumerate([*strikes, None]):
            if number < len(strikes):
                self._step(Step(CANCELS, number, len(strikes)))
            # Every second leg goes bar by bar: what a resume lost may heal before the next block ends.
            leg = msgspec.structs.replace(leg, strike=strike, block_bars=1 if number % 2 else BLOCK_BARS)
            ran, parting = await self._try(leg)
            if parting is not None:
                parting = await self._narrowed(leg, parting)
                self._part_resumed(parting, f"{last}, resumed from {_place(leg)} by a new object", ran)
            if ran.struck:
                struck["yield" if leg.strike is not None and leg.strike.how == "yield" else "inside"] += 1
                leg = msgspec.structs.replace(leg, state=ran.state or leg.state)
            last = str(strike)
        inside = (
            f"{struck['yield']:,} at yields, {struck['inside']:,} inside blocks ({reasons.calls(self._job.strategy)})"
        )
        self._passed(CANCELS, sum(struck.values()), f"{inside}, resumed by new objects: equal")

    def _part_resumed(self, parting: Parting, trial: str, ran: Ran | None = None) -> NoReturn:
        if self._built_in or (ran is not None and isinstance(ran.exception, CheckpointCorruptedError)):
            self._part(parting, trial, "engine", reasons.reason_of("engine"))
        self._part(parting, trial, "lost_on_resume", reasons.lost_on_resume(self._job.strategy, parting))

    # With other futures.

    async def _look_ahead(self) -> None:
        ending = self._reference.ran.ending
        if not self._plan.lookahead or ending is None:
            return
        bars, count, strategy = self._job.bars, self._plan.lookahead, self._job.strategy
        at = places(len(bars), ending.ledger, strategy.warmup, count, self._plan.rng("look-ahead"))
        refused = 0
        for number, after in enumerate(at):
            for kind, future in enumerate(FUTURES):
                self._step(Step(FUTURE, len(FUTURES) * number + kind, len(FUTURES) * len(at)))
                refused += not await self._other_future(after, future)
        if refused:
            self.untried.append(f"{refused} of {len(FUTURES) * len(at)} other futures: the strategy's data refuse them")
        if at:
            detail = f"bars after {len(at)} places raised, lowered and cut off: nothing up to there changes"
            self._passed(FUTURE, len(FUTURES) * len(at) - refused, detail, ended=False)

    async def _other_future(self, after: int, future: Future) -> bool:
        """Whether it could be tried."""
        bars = await in_thread(lambda: other_future(self._job.bars, after, future, self._plan.trial_seed))
        leg = msgspec.structs.replace(self._leg, bars=bars, block_bars=after + 1, last=after)
        ran, parting = await self._try(leg)
        if isinstance(ran.exception, InputError):
            return False  # a file of signals that names bars which aren't there any more
        if parting is not None:
            parting = await self._narrowed(leg, parting)
            trial = f"the bars after {after:,} ({time_of(self._job.bars, after)}) {future}"
            self._part(parting, trial, "look_ahead", reasons.look_ahead(self._job.strategy, parting, after, future))
        return True


def _place(leg: Leg) -> str:
    return "the start" if leg.state is None else f"bar {leg.state.bar_index:,}"


def _told(told: tuple[Ran, Any]) -> tuple[Any, ...]:
    """What two runs of fresh processes are compared in."""
    ran, snapshots = told
    rows = {name: column.tobytes() for name, column in ran.columns.items()}
    return ran.ending, ran.error, rows, [each.digest for each in snapshots]


def time_of(bars: Bars, index: int) -> str:
    """A bar's time, ISO 8601, UTC, to the second."""
    return str(np.datetime64(int(bars.timestamps[index]), "ns").astype("datetime64[s]")) + "Z"
