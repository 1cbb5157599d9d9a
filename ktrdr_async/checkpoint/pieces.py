"""Building, encoding and decoding in pieces: one piece between two turns of the loop, whoever saves or loads.

Hundreds of operations come to the same bar together, and save together. If each gave the loop a turn after its own
piece, the loop would still stand for a piece of every one of them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import TypeVar
from weakref import WeakKeyDictionary

import anyio

T = TypeVar("T")

PIECE_SECONDS = 0.0003  # after which small steps that go together end

_locks: WeakKeyDictionary[asyncio.AbstractEventLoop, anyio.Lock] = WeakKeyDictionary()


def _lock_of_this_loop() -> anyio.Lock:
    loop = asyncio.get_running_loop()
    lock = _locks.get(loop)
    if lock is None:
        lock = _locks[loop] = anyio.Lock()  # taking it gives a turn, also where nobody else wants it
    return lock


async def one_piece(work: Callable[[], T]) -> T:
    """Does a short piece of work when its turn has come."""
    async with _lock_of_this_loop():
        return work()


def together(steps: Iterator[T | None]) -> Iterator[T | None]:
    """Small steps as pieces of some of them; what a step gives that isn't None ends a piece."""
    ends = time.perf_counter() + PIECE_SECONDS
    for given in steps:
        if given is not None or time.perf_counter() >= ends:
            yield given
            ends = time.perf_counter() + PIECE_SECONDS


async def in_pieces(pieces: Iterator[T | None]) -> list[T]:
    """Goes through an iterator, each step of it a piece; what it gave that isn't None."""
    lock = _lock_of_this_loop()
    found: list[T] = []
    while True:
        async with lock:
            try:
                given = next(pieces)
            except StopIteration:
                return found
        if given is not None:
            found.append(given)
