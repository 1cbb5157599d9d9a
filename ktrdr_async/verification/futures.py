"""Other futures of the same past: what a strategy that doesn't look ahead can't see before they come."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

import numpy as np

from ktrdr_async.backtesting.ledger import LedgerEvent
from ktrdr_async.market import Bars

Future = Literal["raised", "lowered", "cut off"]
FUTURES: tuple[Future, ...] = ("raised", "lowered", "cut off")
_FACTORS = {"raised": (1.05, 1.5), "lowered": (0.6, 0.95)}  # of the prices after t, a bar and symbol each


def other_future(bars: Bars, after: int, future: Future, seed: int) -> Bars:
    """The bars with another future from bar `after + 1` on, or none.

    Prices and volumes are multiplied by a random factor a bar and symbol, so that open, high, low and close keep their
    order; rows of features change places, so that their values stay those that the data know.
    """
    if future == "cut off":
        return bars.head(after + 1)
    rng = np.random.default_rng([seed, after, FUTURES.index(future)])
    start = after + 1
    low, high = _FACTORS[future]
    factor = rng.uniform(low, high, size=(len(bars) - start, bars.k))
    fields = [np.array(column) for column in (bars.open, bars.high, bars.low, bars.close, bars.volume)]
    for column in fields:
        column[start:] *= factor
    features = {name: np.array(column) for name, column in bars.features.items()}
    for column in features.values():
        column[start:] = column[start:][rng.permutation(len(bars) - start)]
    return Bars(np.array(bars.timestamps), fields, symbols=bars.symbols, timeframe=bars.timeframe, features=features)


def places(bars: int, ledger: Sequence[LedgerEvent], warmup: int, count: int, rng: random.Random) -> list[int]:
    """Bars after which the future is changed, in order.

    Half of them ordered something: a strategy that looks one bar ahead shows it in that bar's decision alone. Early
    ones are left out where there is room: features may need some bars to be made at all.
    """
    last = bars - 2
    first = min(last, max(warmup, bars // 10))
    if last < 0:
        return []
    deciding = sorted({event.bar - 1 for event in ledger if event.reason == "order" and first <= event.bar - 1 <= last})
    chosen = set(rng.sample(deciding, min(len(deciding), (count + 1) // 2)))
    free = [t for t in range(first, last + 1) if t not in chosen]
    chosen.update(rng.sample(free, min(len(free), count - len(chosen))))
    return sorted(chosen)
