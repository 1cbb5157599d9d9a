"""What a difference means, in words: which kind of fault shows in which kind of trial."""

from __future__ import annotations

from ktrdr_async.strategies.base import AnyStrategy, AsyncStrategy, WeightStrategy
from ktrdr_async.verification.compare import Parting

_DECLARE = "keep what changes in `state`, a msgspec.Struct"
_REASONS: dict[str, tuple[str, str]] = {
    "hidden_state": (
        "two uninterrupted runs in this process differ, and fresh processes agree: something outlives a run, such as a "
        "global of a module, an attribute of a class, a closure, or an object that several strategies share",
        _DECLARE,
    ),
    "nondeterministic": (
        "two uninterrupted runs differ, in fresh processes too: randomness without a seed, the clock, or something "
        "outside the process",
        "use `bar.rng` for random numbers and `bar.timestamp` for the time",
    ),
    "hidden_state_or_nondeterministic": (
        "two uninterrupted runs in this process differ: something outlives a run (a global, a class attribute, a "
        "closure), or randomness without a seed, or the clock",
        f"{_DECLARE}; use `bar.rng` and `bar.timestamp`; with the class in a module, fresh processes tell which it is",
    ),
    "hash_order": (
        "runs with another PYTHONHASHSEED differ: the order of a set, or `hash()`, decides",
        "iterate over sorted(...), or use a dict or a list",
    ),
    "process": (
        "a run in a fresh process differs: something of the process decides, such as what an earlier run left in it, "
        "its environment, its id, or an object's address",
        _DECLARE,
    ),
    "engine": (
        "the engine itself differs: the strategy knows neither of blocks nor of checkpoints",
        "that is a fault of ktrdr_async: please report it with this certificate",
    ),
}


def object_state(strategy: AnyStrategy) -> tuple[str, str]:
    """The same object ran twice, and new ones agree."""
    names = ", ".join(f"`{name}`" for name in strategy.resources)
    where = f"in one of its resources ({names})" if names else "outside `state`"
    return f"the same object, run again, differs: it keeps something {where}", f"{_DECLARE}; resources don't change"


def lost_on_resume(strategy: AnyStrategy, parting: Parting) -> tuple[str, str]:
    """Only a run that was interrupted and resumed differs."""
    if parting.what == "rows":
        made = made_by(strategy)
        return f"`{made}` gave other rows in the resumed run, over the same bars", "no randomness and no clock there"
    names = ", ".join(f"`{name}`" for name in strategy.resources)
    where = f", perhaps in one of its resources ({names})" if names else ""
    return (
        f"only a run that was interrupted and resumed differs: something isn't in the checkpoint{where}",
        f"{_DECLARE}; if all that it keeps is there, please report this as a fault of ktrdr_async",
    )


def look_ahead(strategy: AnyStrategy, parting: Parting, after: int, future: str) -> tuple[str, str]:
    """The past changed with the future."""
    if parting.what == "rows":
        where = f"`{made_by(strategy)}`"
    elif parting.what == "error":
        where = "the strategy, which broke there,"
    else:
        where = "`on_bar`, or what it is told of fills and trades,"
    return (
        f"with the bars after {after:,} {future}, {where} does something else at bar {max(parting.bar, 0):,}: "
        "it knows bars that come later",
        "row i may use bars 0..i only: no centred windows, no shift(-1), no mean or scale of the whole history",
    )


def made_by(strategy: AnyStrategy) -> str:
    """The method that rows come from."""
    if not isinstance(strategy, WeightStrategy):
        return "prepare"
    kind = type(strategy)
    weights = kind.target_weights is not WeightStrategy.target_weights
    if weights and kind.target_quantities is not WeightStrategy.target_quantities:
        weights = bool(strategy.by_weight)
    return "target_weights" if weights else "target_quantities"


def reason_of(kind: str) -> tuple[str, str]:
    """Reason and hint of a kind that needs no more than its name."""
    return _REASONS[kind]


def calls(strategy: AnyStrategy) -> str:
    """Where a strategy can be interrupted inside a bar."""
    if isinstance(strategy, WeightStrategy):
        return "between pieces of bars"
    return "between bars, in awaits, by errors" if isinstance(strategy, AsyncStrategy) else "between bars, by errors"
