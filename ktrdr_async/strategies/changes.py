"""From a weight in every row to orders at changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

Rows = TypeVar("Rows", "NDArray[np.float64]", "pd.DataFrame", "pd.Series[Any]")


def on_change(weights: Rows) -> Rows:
    """Keeps each value that differs from the last one of its column that isn't NaN, and makes the others NaN.

    Args:
        weights: float64[n] or float64[n, k], or a Series or DataFrame of them; a value in every row. The first value
            of a column is
            kept, unless it is 0: nothing is held before it.

    Returns:
        The same kind and shape, with a value only where something should be ordered.
    """
    values: NDArray[np.float64] = np.array(weights, dtype=np.float64)
    columns = values[:, None] if values.ndim == 1 else values
    for j in range(columns.shape[1]):
        column = columns[:, j]
        present = np.flatnonzero(~np.isnan(column))
        kept = column[present]
        before = np.concatenate([[0.0], kept[:-1]])
        column[present[kept == before]] = np.nan
    if isinstance(weights, np.ndarray):
        return values
    made: Any = weights.copy()
    made[:] = values
    return made  # type: ignore[no-any-return]
