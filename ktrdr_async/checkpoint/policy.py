"""When a checkpoint is due. A pure object: it is told bars and durations, and is given its clock."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from ktrdr_async.checkpoint.schemas import DEFAULT_CHECKPOINT_BAR_INTERVAL
from ktrdr_async.errors import ParameterError


class CheckpointPolicy:
    """Due after N bars or M seconds, whichever comes first; but saves take no more than a share of the run's time.

    The share is kept between each two saves: after one that took s seconds, the next is due s / max_overhead seconds
    later at the earliest; and one that is expected to take s seconds isn't due for its bars alone before the run has
    gone on for s / max_overhead seconds, the first one neither. A run that makes records faster than they can be saved
    at that share is saved each `time_interval_seconds` only: lost work is bounded by the largest of the interval,
    `save_seconds / max_overhead` and that time.

    Args:
        unit_interval: bars, >= 1.
        time_interval_seconds: seconds, > 0.
        max_overhead: share of the run's time, in (0, 1]; None is the plain rule.
        clock: seconds, never going back.

    Raises:
        ParameterError: if one of them is out of its range.
    """

    __slots__ = (
        "_bar",
        "_clock",
        "_expected",
        "_pause",
        "_time",
        "max_overhead",
        "time_interval_seconds",
        "unit_interval",
    )

    def __init__(
        self,
        unit_interval: int = DEFAULT_CHECKPOINT_BAR_INTERVAL,
        time_interval_seconds: float = 300,
        max_overhead: float | None = 0.05,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if isinstance(unit_interval, bool) or not isinstance(unit_interval, int) or unit_interval < 1:
            raise ParameterError(f"unit_interval is {unit_interval!r}, it must be a whole number of bars, at least 1")
        if not time_interval_seconds > 0:
            raise ParameterError(f"time_interval_seconds is {time_interval_seconds!r}, it must be more than 0")
        if max_overhead is not None and not 0 < max_overhead <= 1:
            raise ParameterError(f"max_overhead is {max_overhead!r}, it must be more than 0 and at most 1, or None")
        self.unit_interval = unit_interval
        self.time_interval_seconds = time_interval_seconds
        self.max_overhead = max_overhead
        self._clock = clock
        self._bar = -1  # last bar that is safe, or needs no saving: bar 0's predecessor
        self._time = clock()  # when it was saved, or the run began
        self._expected = 0.0  # seconds that a save would take now
        self._pause = 0.0  # seconds after that before the share permits another save

    def start(self, bar_index: int = -1) -> None:
        """A run begins after this bar (absolute index): what follows counts from here. -1: it begins at bar 0."""
        self._bar = bar_index
        self._time = self._clock()

    def expect(self, save_seconds: float) -> None:
        """What a save would take now, as far as the caller can tell; 0 where nobody says."""
        self._expected = save_seconds

    def should_checkpoint(self, bar_index: int, force: bool = False) -> bool:
        """Whether a checkpoint of the boundary after this bar (absolute index) is due; `force` says yes always."""
        if force:
            return True
        # The clock is read only where bars or the pause leave it to decide: this is asked every 100 bars.
        if bar_index - self._bar >= self.unit_interval:
            pause = self._pause if self.max_overhead is None else max(self._pause, self._expected / self.max_overhead)
            if pause == 0.0 or self._clock() - self._time >= pause:
                return True
        return self._clock() - self._time >= max(self.time_interval_seconds, self._pause)

    def record_checkpoint(self, bar_index: int, save_seconds: float = 0.0) -> None:
        """A checkpoint of this bar is durable, after `save_seconds` of saving; called when it is."""
        if not (save_seconds >= 0 and math.isfinite(save_seconds)):
            raise ParameterError(f"save_seconds is {save_seconds!r}, it must be a finite number, at least 0")
        self._bar = bar_index
        self._time = self._clock()
        self._pause = 0.0 if self.max_overhead is None else save_seconds / self.max_overhead
