"""Seeded mutations of text, bytes and JSON, and the frame in which an input is tried: bounded, counted, named."""

from __future__ import annotations

import copy
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from types import FrameType
from typing import Any

from ktrdr_async.errors import KtrdrError

PATIENCE = 60.0  # seconds for one input, on a machine that does other things as well
LONGEST_MESSAGE = 20_000  # characters

STRINGS = (
    "", " ", "nan", "inf", "-0.0", "1e400", "\0", "a\0b", "\ud800", "\u202e", "x" * 70_000, "%s%n", "../../etc/passwd",
    "$float", "'; DROP TABLE operations; --", "2020-01-01", "9999-12-31", "0001-01-01", "1h", "none", "🎈", "a\nb\r\n",
    "-1", "__class__", "os:system", "synthetic:?bars=9", "01.02.2020", "{}", "[", '"', "\\u0000", "NaN", "é" * 300,
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 3, 10, 2**31, 2**53 + 1, 2**63, -(2**63) - 1, 2**64, 10**30, 10**400, -(10**400), 0.0, -0.0, 0.5, 1.5,
    -1.5, 1e-320, 1e16, 1e300, -1e308, float("nan"), float("inf"), -float("inf"),
)  # fmt: skip


PIECES = (b"\0", b"\n", b"\r", b",", b";", b'"', b"\xff\xfe", b"nan", b"-", b"1e999", b"\xef\xbb\xbf")


class _HangError(BaseException):
    """An input took longer than any should."""


@contextmanager
def bounded(seconds: float = PATIENCE) -> Iterator[None]:
    """Ends what hangs with an error that nothing catches by accident."""

    def late(_: int, __: FrameType | None) -> None:
        raise _HangError(f"no end within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Tried:
    """Counts inputs by kind and by what came of them."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.taken = 0
        self.refused: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.kinds.values())

    def note(self, kind: str, error: KtrdrError | None) -> None:
        """One more input; an error is one of ours, says something, and isn't endless."""
        self.kinds[kind] += 1
        if error is None:
            self.taken += 1
            return
        self.refused[error.code] += 1
        assert error.message.strip(), repr(error)
        assert len(error.message) < LONGEST_MESSAGE, f"a message of {len(error.message)} characters"

    def __str__(self) -> str:
        kinds = ", ".join(f"{name} {count:,}" for name, count in sorted(self.kinds.items()))
        codes = ", ".join(f"{name} {count:,}" for name, count in self.refused.most_common())
        return f"{self.total:,} ({kinds}): taken {self.taken:,}, refused {sum(self.refused.values()):,} ({codes})"


def attempt(call: Callable[..., Any], *arguments: Any, **keywords: Any) -> tuple[Any, KtrdrError | None]:
    """What a call gives, or the error of ours that it raises; every other error is the test's to fail on."""
    with bounded():
        try:
            return call(*arguments, **keywords), None
        except KtrdrError as error:
            return None, error


def mutated_bytes(rng: Random, data: bytes) -> bytes:
    """Some bytes changed, cut out, doubled, moved or put in."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8, 40))):
        at = rng.randrange(len(out) + 1)
        length = rng.choice((1, 1, 2, 4, 16, 200))
        kind = rng.randrange(7)
        if kind == 0 and out:
            out[min(at, len(out) - 1)] = rng.randrange(256)
        elif kind == 1:
            del out[at : at + length]
        elif kind == 2:
            out[at:at] = rng.randbytes(length)
        elif kind == 3:
            out[at:at] = out[at : at + length] * rng.choice((1, 2, 50))
        elif kind == 4:
            del out[at:]
        elif kind == 5 and out:
            out[min(at, len(out) - 1)] ^= 1 << rng.randrange(8)
        else:
            piece = rng.choice(
                (b"\0", b"\n", b"\r", b",", b";", b'"', b"\xff\xfe", b"nan", b"-", b"1e999", b"\xef\xbb\xbf")
            )
            out[at:at] = piece * rng.choice((1, 2, 300))
    return bytes(out)


def any_value(rng: Random, depth: int = 0) -> Any:
    """Any JSON value, also those that JSON text can't hold."""
    kind = rng.randrange(10 if depth < 4 else 6)
    if kind < 2:
        return rng.choice(NUMBERS)
    if kind < 4:
        return rng.choice(STRINGS)
    if kind == 4:
        return rng.choice((None, True, False))
    if kind == 5:
        return rng.choice((rng.randrange(-50, 500), rng.uniform(-2, 50), rng.uniform(-2, 2)))
    if kind == 6:
        return [any_value(rng, depth + 1) for _ in range(rng.choice((0, 1, 2, 5)))]
    if kind == 7:
        names = [*STRINGS, "$float", "data", "bars"]
        return {rng.choice(names): any_value(rng, depth + 1) for _ in range(rng.choice((0, 1, 1, 3)))}
    if kind == 8:
        return {"$float": any_value(rng, depth + 1)}
    return nested(rng, rng.choice((3, 30, 64, 65, 300)))


def nested(rng: Random, depth: int) -> Any:
    """A value inside so many lists or objects."""
    value: Any = 1
    for _ in range(depth):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of everything in a tree, but of the tree itself."""
    items = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    found = []
    for key, item in items:
        found += [(*path, key), *places(item, (*path, key))]
    return found


def mutated_tree(rng: Random, tree: Any, change: Callable[[Random, Any], Any] | None = None) -> Any:
    """A copy of a JSON tree in which one to three places were removed, replaced, doubled, renamed or swapped."""
    made = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        known = places(made)
        if not known:
            return any_value(rng)
        *way, key = rng.choice(known)
        holder = made
        for step in way:
            holder = holder[step]
        kind = rng.randrange(7)
        if kind == 0:
            del holder[key]
        elif kind == 1:
            holder[key] = any_value(rng)
        elif kind == 2:
            holder[key] = change(rng, holder[key]) if change else near(rng, holder[key])
        elif kind == 3 and isinstance(holder, list):
            holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(holder[key]))
        elif kind == 3:
            holder[rng.choice(STRINGS)] = holder.pop(key)
        elif kind == 4:
            other = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
            holder[key], holder[other] = holder[other], holder[key]
        elif kind == 5:
            holder[key] = [holder[key]] if rng.random() < 0.5 else {"a": holder[key]}
        else:
            holder[key] = near(rng, holder[key])
    return made


def near(rng: Random, value: Any) -> Any:
    """A value of the same kind, another one most of the time."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + rng.choice((1, -1, 100, 2**40))
    if isinstance(value, float):
        return rng.choice((value + 1, -value, value * (1 + 2**-50), value * 1e10))
    if isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        return rng.choice((value[:at] + value[at + 1 :], value[:at] + rng.choice("0aA:=-,. /") + value[at:], value * 2))
    if isinstance(value, list):
        return rng.choice((value[::-1], value[1:], value + value))
    return any_value(rng)
