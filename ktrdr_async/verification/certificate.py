"""What a verification came to: what was tried, or where two runs part; as records, as text, as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from ktrdr_async.errors import KtrdrError

MOST_FIELDS = 12  # that a difference names


class VerificationError(KtrdrError):
    """A child process ended otherwise than it was told to; that says nothing of the strategy."""

    code = "verification_error"


class Step(msgspec.Struct, frozen=True):
    """Progress: the next run is about to begin."""

    what: str  # which kind of trial
    done: int  # runs of this kind that have ended
    of: int  # runs of this kind


class Trial(msgspec.Struct, frozen=True):
    """One kind of trial that found no difference."""

    what: str
    count: int  # interruptions, processes, sizes, futures: whatever it is made of
    detail: str = ""
    digests: tuple[str, ...] = ()  # hex, of the results that came of it, each once; none where runs weren't ended


class Field(msgspec.Struct, frozen=True):
    """A value that two runs don't agree on; floats as the shortest text that gives them back."""

    name: str  # path in the state, such as EURUSD.waiting.lots or state.recent[3]
    reference: str  # in the uninterrupted run
    found: str  # in the other one


class Difference(msgspec.Struct, frozen=True):
    """The first bar at which two runs part."""

    kind: (
        str  # look_ahead, hidden_state, nondeterministic, hash_order, process, lost_on_resume, engine, undeclared_state
    )
    trial: str  # what was done to the second run
    bar: int  # absolute index; -1: before the first bar
    time: str  # of that bar, ISO 8601, UTC; empty for -1
    exact: bool  # False: they part at this bar or after the boundary before it, and a second look didn't find it again
    fields: tuple[Field, ...]
    reason: str
    hint: str = ""


class Certificate(msgspec.Struct, frozen=True, kw_only=True):
    """What `verify` found. Truth value and `ok` say the same."""

    ok: bool
    strategy: str
    parameters: dict[str, Any]
    source: dict[str, str]  # module -> digest of its source; {"builtin": N} for the package's own
    symbols: tuple[str, ...]
    bars: int
    first: str  # time of the first bar, ISO 8601, UTC
    last: str
    digest: str | None  # hex, of the result; None where no run came to its end
    trials: tuple[Trial, ...]
    untried: tuple[str, ...] = ()  # what was left out, and why
    difference: Difference | None = None
    versions: dict[str, str] = {}
    seconds: float = 0.0

    def __bool__(self) -> bool:
        return self.ok

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values."""
        return dict(msgspec.to_builtins(self))

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def named(parameters: Mapping[str, Any]) -> str:
    """Parameters on a line."""
    return ", ".join(f"{name}={value}" for name, value in parameters.items())


def _lines(c: Certificate) -> list[str]:
    what = f"{c.strategy} {named(c.parameters)}".strip()
    symbols = ", ".join(c.symbols[:6]) + (" ..." if len(c.symbols) > 6 else "")
    lines = [f"{'verified' if c.ok else 'FAILED'}: {what}", f"{c.bars:,} bars of {symbols}, {c.first} to {c.last}", ""]
    room = max((len(trial.what) for trial in c.trials), default=0)
    lines += [f"  {trial.what:<{room}}  {trial.count:>6,}  {trial.detail}".rstrip() for trial in c.trials]
    lines += [f"  not tried: {reason}" for reason in c.untried]
    if c.difference is not None:
        lines += ["", *_difference(c.difference)]
    lines.append("")
    if c.digest is not None:
        lines.append(f"digest    {c.digest}")
    lines.append(f"versions  {', '.join(f'{name} {version}' for name, version in c.versions.items())}")
    return lines


def _difference(d: Difference) -> list[str]:
    at = "before the first bar" if d.bar < 0 else f"at bar {d.bar:,} ({d.time})" if d.exact else f"by bar {d.bar:,}"
    lines = [f"the runs part {at}: {d.trial}"]
    table = [("field", "uninterrupted", "this run"), *((f.name, f.reference, f.found) for f in d.fields)]
    widths = [max(len(row[i]) for row in table) for i in range(2)]
    if d.fields:
        lines += [f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in table]
    lines.append(f"{d.kind}: {d.reason}")
    if d.hint:
        lines.append(f"hint: {d.hint}")
    return lines
