"""What is tried, how often, and where: chosen once, by a seed, so that the same call tries the same."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

import msgspec

from ktrdr_async.backtesting.engine import BLOCK_BARS
from ktrdr_async.errors import ParameterError
from ktrdr_async.strategies.base import AnyStrategy, WeightStrategy
from ktrdr_async.verification.strikes import How, Strike, suited

_INSIDE: tuple[How, ...] = ("between", "await", "raise")


class Plan(msgspec.Struct, frozen=True):
    """How much is tried."""

    interruptions: int | Literal["all"]
    kills: int
    hash_seeds: int
    block_sizes: tuple[int, ...]
    lookahead: int
    trial_seed: int

    @classmethod
    def checked(
        cls,
        interruptions: int | str,
        kills: int,
        hash_seeds: int,
        block_sizes: Sequence[int],
        lookahead: int,
        trial_seed: int,
    ) -> Plan:
        """The plan. :raises ParameterError: if a count is out of its range."""
        counts = {"kills": kills, "hash_seeds": hash_seeds, "lookahead": lookahead, "trial_seed": trial_seed}
        for name, value in counts.items():
            if not isinstance(value, int) or value < 0:
                raise ParameterError(f"{name} is {value!r}; it must be a whole number, 0 or more")
        if interruptions != "all" and (not isinstance(interruptions, int) or interruptions < 0):
            raise ParameterError(f"interruptions is {interruptions!r}; it must be 'all' or a whole number, 0 or more")
        for size in block_sizes:
            if not isinstance(size, int) or size < 1:
                raise ParameterError(f"a block size is {size!r}; a block has at least one bar")
        many: int | Literal["all"] = "all" if isinstance(interruptions, str) else interruptions
        return cls(many, kills, hash_seeds, tuple(dict.fromkeys(block_sizes)), lookahead, trial_seed)

    def rng(self, what: str) -> random.Random:
        """The random numbers of one kind of trial; what other kinds try changes nothing in them."""
        return random.Random(f"{self.trial_seed} {what}")  # noqa: S311 - a choice, no secret

    def strikes(self, strategy: AnyStrategy, bars: int) -> list[Strike]:
        """Where a chain of runs is interrupted, in order: about half at yields, the others inside bars.

        A chain goes on from each interruption, so that many cost little more than one run; inside a block it falls back
        to the boundary before.
        """
        yields = [*range(BLOCK_BARS - 1, bars, BLOCK_BARS)]
        if not yields or yields[-1] != bars - 1:
            yields.append(bars - 1)
        # Where targets are known a run is looked at once a piece: one bar of a block is as good as another.
        inside = [*range(0, bars, BLOCK_BARS)] if isinstance(strategy, WeightStrategy) else [*range(bars)]
        rng = self.rng("interruptions")
        if self.interruptions != "all":
            yields = rng.sample(yields, min(len(yields), self.interruptions // 2))
            inside = rng.sample(inside, min(len(inside), self.interruptions - len(yields)))
        chosen = [Strike(bar, "yield") for bar in yields]
        for number, bar in enumerate(sorted(inside)):
            chosen.append(Strike(bar, suited(_INSIDE[number % 3], strategy, bar)))
        return sorted(chosen, key=lambda strike: (strike.bar, strike.how == "yield"))

    def kill_bars(self, bars: int) -> list[int]:
        """Bars in which child processes are killed, in order; where there is room none before the first boundary."""
        room = range(min(BLOCK_BARS, bars - 1), bars)
        return sorted(self.rng("kills").sample(room, min(self.kills, len(room))))

    def hash_seed(self, number: int) -> int:
        """PYTHONHASHSEED of a child process."""
        return (self.trial_seed * 1_000 + number + 1) % 2**32
