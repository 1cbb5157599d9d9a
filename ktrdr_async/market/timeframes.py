"""The length of a bar and the spelling of times: what people write, and what they read in messages."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktrdr_async.errors import DataError

SECOND = 1_000_000_000
UNITS = {"s": SECOND, "m": 60 * SECOND, "h": 3_600 * SECOND, "d": 86_400 * SECOND, "w": 604_800 * SECOND}
DAY = UNITS["d"]
LONGEST = 520 * UNITS["w"]

_DATE = re.compile(r"\d{4}(-\d{2}(-\d{2}([T ]\d{2}(:\d{2}(:\d{2}(\.\d{1,9})?)?)?)?)?)?", re.ASCII)
_ZONE = re.compile(r"(?<=\d)\s*(Z|UTC|[+-]00:?00)$", re.ASCII)
_SPELLING = re.compile(r"([1-9][0-9]{0,5})([smhdw])", re.ASCII)


def parse_timeframe(text: str) -> int:
    """Reads a bar's length such as `1m`, `5m`, `15m`, `1h`, `4h`, `1d` or `1w` as nanoseconds.

    Raises:
        DataError: if it is spelled otherwise, or is longer than 520 weeks.
    """
    match = _SPELLING.fullmatch(text) if isinstance(text, str) else None
    length = int(match[1]) * UNITS[match[2]] if match else 0
    if not 0 < length <= LONGEST:
        raise DataError(
            f"{text!r} is not a timeframe",
            where="timeframe",
            hint="write a number and one of s, m, h, d, w: 1m 5m 15m 1h 4h 1d 1w (m is a minute)",
        )
    return length


def format_timeframe(length: int) -> str:
    """Spells a length in nanoseconds in the largest unit that divides it; `1500000000ns` if none does."""
    for unit in ("w", "d", "h", "m", "s"):
        if length > 0 and length % UNITS[unit] == 0:
            return f"{length // UNITS[unit]}{unit}"
    return f"{length}ns"


def infer_timeframe(timestamps: NDArray[np.int64]) -> int:
    """Gives the most common step in ns, of equally common ones the shortest; one day where there is none."""
    if len(timestamps) < 2:
        return DAY
    steps = np.diff(timestamps)
    if steps.min() == steps.max():
        return int(steps[0])
    steps, counts = np.unique(steps, return_counts=True)
    return int(steps[int(np.argmax(counts))])


def format_time(timestamp: int) -> str:
    """Writes a timestamp as `2017-04-19 09:00:00 UTC`, with a fraction only if it has one."""
    unit = "s" if timestamp % SECOND == 0 else "ns"
    return str(np.datetime64(timestamp, "ns").astype(f"datetime64[{unit}]")).replace("T", " ") + " UTC"


def period_of(text: str, name: str) -> tuple[int, int]:
    """Gives the first nanosecond of what an ISO text names, and the first one after it."""
    body = _ZONE.sub("", text) if isinstance(text, str) else ""
    try:
        if not _DATE.fullmatch(body) or not "1678" <= body < "2262":
            raise ValueError
        moment = np.datetime64(body)
    except ValueError:
        raise DataError(
            f"{text!r} is not a time", where=name, hint="write a UTC time as 2020-03-02 or 2020-03-02 14:30"
        ) from None
    unit: Any = np.datetime_data(moment)[0]
    after = moment + np.timedelta64(1, unit)
    return int(moment.astype("datetime64[ns]").astype(np.int64)), int(after.astype("datetime64[ns]").astype(np.int64))
