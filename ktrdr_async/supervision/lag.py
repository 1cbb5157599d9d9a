"""How late a loop comes to those that it serves: a ticker beside what runs, and how late its ticks were.

It ticks only while somebody watches, each 2 ms while somebody computes and each 10 ms while all wait: waking an idle
loop costs more than it tells. A tick counts for the time that it stands for.
"""

from __future__ import annotations

import asyncio
import gc
import math
import time
from collections.abc import Callable

from ktrdr_async.backtesting.results import Lag

BUSY_SECONDS = 0.002
IDLE_TICKS = 5  # times `BUSY_SECONDS`
_OCTAVE = 16  # buckets in which lateness doubles: each is 4 % wide
_BUCKETS = 26 * _OCTAVE  # from 1 us to a minute


def _bucket(seconds: float) -> int:
    return min(_BUCKETS - 1, int(_OCTAVE * math.log2(seconds * 1e6))) if seconds > 1e-6 else 0


def _full_collections() -> int:
    return int(gc.get_stats()[-1]["collections"])


def _upper(bucket: int) -> float:
    """The upper end of a bucket, ms."""
    return float(2.0 ** ((bucket + 1) / _OCTAVE)) / 1e3


class LoopLag:
    """The ticker of one loop.

    Args:
        busy: whether somebody computes now.
        clock: monotonic seconds.
    """

    def __init__(self, busy: Callable[[], bool], clock: Callable[[], float] = time.perf_counter) -> None:
        self._busy = busy
        self._clock = clock
        self._counts = [0] * _BUCKETS
        self._watches = 0
        self._ticks = 1  # that the next one stands for
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._collections = 0

    def watch(self) -> Watch:
        """Begins to look; `end` it."""
        self._watches += 1
        if self._timer is None or self._ticks > 1:  # something begins: it is looked at closely
            if self._overdue() > 0:
                self._count()
            if self._timer is not None:
                self._timer.cancel()
            self._wait(1)
        return Watch(self)

    def _wait(self, ticks: int) -> None:
        self._ticks = ticks
        self._collections = _full_collections()
        seconds = ticks * BUSY_SECONDS
        self._due = self._clock() + seconds
        self._timer = asyncio.get_running_loop().call_later(seconds, self._tick)

    def _tick(self) -> None:
        self._count()
        self._wait(1 if self._busy() else IDLE_TICKS)

    def _count(self) -> None:
        self._counts[_bucket(self._clock() - self._due)] += self._ticks

    def collected(self) -> bool:
        """Whether there was a full garbage collection since the last tick: the host's, whoever ran then."""
        return self._timer is not None and _full_collections() != self._collections

    def _overdue(self) -> float:
        """Seconds by which the next tick is late already."""
        return self._clock() - self._due if self._timer is not None else 0.0

    def _unwatch(self) -> None:
        self._watches -= 1
        if not self._watches and self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Watch:
    """What a ticker tells from some moment on."""

    __slots__ = ("_before", "_ended", "_lag")

    def __init__(self, lag: LoopLag) -> None:
        self._lag = lag
        self._before = lag._counts.copy()
        self._ended = False

    def figures(self) -> Lag | None:
        """Median, 99th percentile and maximum so far, each at most 4 % too large; None before the first tick."""
        counts = [now - before for now, before in zip(self._lag._counts, self._before, strict=True)]
        overdue = self._lag._overdue()
        if overdue > 0:
            counts[_bucket(overdue)] += 1
        total, passed, found = sum(counts), 0, []
        if not total:
            return None
        shares = [0.5, 0.99, 1.0]
        for bucket, count in enumerate(counts):
            passed += count
            while shares and passed >= shares[0] * total:
                found.append(round(_upper(bucket), 3))
                del shares[0]
        return Lag(*found)

    def end(self) -> None:
        """Stops looking. Ending twice is once."""
        if not self._ended:
            self._ended = True
            self._lag._unwatch()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
