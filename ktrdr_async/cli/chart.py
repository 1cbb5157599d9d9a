"""A small chart of columns, for terminals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Values = Sequence[float] | NDArray[np.float64]

EIGHTHS = " ▁▂▃▄▅▆▇█"
PLAIN = " ..::||##"  # where the terminal's encoding has no blocks


def sampled(values: Values, width: int) -> list[float]:
    """At most `width` of the values: the last one of each of as many equal parts."""
    count = len(values)
    if count <= width:
        return [float(value) for value in values]
    return [float(values[(i + 1) * count // width - 1]) for i in range(width)]


def columns(values: Values, *, width: int, height: int, blocks: str = EIGHTHS) -> list[str]:
    """Lines of a chart, from the top: one column a value, its height between the least and the greatest of them.

    Equal values are drawn at half the height; the least is never invisible.
    """
    points = sampled(values, width)
    low, high = min(points), max(points)
    steps = height * 8
    span = high - low
    heights = [max(1, round((point - low) / span * steps)) if span > 0 else steps // 2 for point in points]
    return ["".join(blocks[min(8, max(0, each - 8 * row))] for each in heights) for row in range(height - 1, -1, -1)]


def chart(values: Values, *, width: int, height: int = 6, encoding: str | None = "utf-8") -> list[str]:
    """The chart with its greatest and least value at the left; empty where there is no room for it."""
    try:
        EIGHTHS.encode(encoding or "ascii")
        blocks = EIGHTHS
    except (UnicodeEncodeError, LookupError):
        blocks = PLAIN
    top, bottom = f"{max(values):,.0f}", f"{min(values):,.0f}"
    room = max(len(top), len(bottom))
    if width - room - 1 < 8:
        return []
    lines = columns(values, width=min(width - room - 1, 72), height=height, blocks=blocks)
    labels = [top, *[""] * (height - 2), bottom]
    return [f"{label:>{room}} {line}" for label, line in zip(labels, lines, strict=True)]
