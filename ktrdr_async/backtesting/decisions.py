"""What a strategy computes once over the whole history: targets and features, checked, with a digest of any prefix."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from ktrdr_async.backtesting.execution import MAX_LOTS
from ktrdr_async.errors import OrderError, StrategyError
from ktrdr_async.strategies.base import WeightStrategy

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ktrdr_async.market import Bars


class Decided:
    """The rows that `prepare`, `target_weights` or `target_quantities` gave.

    A digest of the rows up to a bar goes into every checkpoint: other rows on resume mean other code, other numbers,
    hidden
    randomness, or rows that knew later bars.
    """

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup
        self.by_weight = True
        self._columns: dict[str, NDArray[np.float64]] = {}
        self._hashes: dict[str, Any] = {}
        self._hashed = 0

    @property
    def columns(self) -> Mapping[str, NDArray[np.float64]]:
        """What was kept, by name; not to be written."""
        return MappingProxyType(self._columns)

    def keep(self, name: str, rows: NDArray[np.float64]) -> None:
        """Takes float64[n] or float64[n, m] under a name."""
        self._columns[name] = np.ascontiguousarray(rows)
        self._hashed, self._hashes = 0, {}

    def digest(self, upto: int) -> str:
        """Hex SHA-256 of the rows 0..upto; asked in growing order it costs what is new."""
        stop = upto + 1
        if stop < self._hashed or not self._hashes:
            self._hashed = 0
            self._hashes = {name: hashlib.sha256(name.encode()) for name in sorted(self._columns)}
        for name, found in self._hashes.items():
            found.update(self._columns[name][self._hashed : stop].astype("<f8", copy=False).tobytes())
        self._hashed = stop
        return hashlib.sha256(b"".join(found.digest() for found in self._hashes.values())).hexdigest()


def checked_targets(strategy: WeightStrategy, bars: Bars, lot_size: float, decided: Decided) -> NDArray[np.float64]:
    """The strategy's targets as float64[n, k]: weights, or lots where it gives quantities (`decided.by_weight` tells).

    Raises:
        OrderError: if a target can't be traded; it names bar and symbol.
        StrategyError: if the shape is wrong, or none or both of the two methods are there.
    """
    name = type(strategy).__name__
    weights = type(strategy).target_weights is not WeightStrategy.target_weights
    quantities = type(strategy).target_quantities is not WeightStrategy.target_quantities
    if weights and quantities and strategy.by_weight is not None:
        weights, quantities = strategy.by_weight, not strategy.by_weight
    if weights == quantities:
        raise StrategyError(
            f"{name} implements {'both' if weights else 'none'} of target_weights and target_quantities",
            hint="implement one of them, or both and `by_weight`, which says for each object which one counts",
        )
    method = "target_weights" if weights else "target_quantities"
    rows = _as_rows(
        f"{name}.{method}", strategy.target_weights(bars) if weights else strategy.target_quantities(bars), bars
    )
    if rows.ndim == 1:
        rows = rows[:, None]
    if rows.shape != (len(bars), len(bars.symbols)):
        raise StrategyError(f"{name}.{method} gave shape {rows.shape}; it must be {(len(bars), len(bars.symbols))}")
    rows = rows.copy()
    rows[: max(0, strategy.warmup - 1)] = np.nan
    present = ~np.isnan(rows)
    _refuse(np.isinf(rows), rows, bars, f"{name}.{method}", "is not finite")
    if weights:
        _refuse(
            present & (np.abs(rows) > 1.0), rows, bars, f"{name}.{method}", "is outside -1..1; there is no leverage"
        )
    early = np.arange(len(bars))[:, None] < np.asarray(bars.first_bar)[None, :]
    _refuse(present & early, rows, bars, f"{name}.{method}", "comes before the symbol's first bar")
    decided.by_weight = weights
    decided.keep(method, rows)
    if weights:
        return rows
    size = np.abs(rows) / lot_size
    _refuse(size >= MAX_LOTS, rows, bars, f"{name}.{method}", f"is more than 2**53 lots of {lot_size}")
    lots = np.floor(size)
    with np.errstate(invalid="ignore"):
        lots[(lots + 1) - size <= np.minimum(1e-9 * (lots + 1), 0.5)] += 1
        return np.where(rows < 0, -lots, lots)


def checked_features(strategy: Any, bars: Bars, given: Any, decided: Decided) -> dict[str, NDArray[np.float64]]:
    """The features of `prepare` beside those of the data: name -> float64[n] or float64[n, m], read-only.

    Raises:
        StrategyError: if a name is taken, or a value isn't an array of n rows.
    """
    name = type(strategy).__name__
    if not isinstance(given, Mapping):
        raise StrategyError(f"{name}.prepare gave a {type(given).__name__}; it must be a dict of name -> array")
    features = dict(bars.features)
    for key, value in given.items():
        if not isinstance(key, str):
            raise StrategyError(f"{name}.prepare: the name {key!r} is not a string")
        if key in bars.features:
            raise StrategyError(f"{name}.prepare: the data have a feature {key!r} already", hint="use another name")
        rows = _as_rows(f"{name}.prepare[{key!r}]", value, None)
        if rows.ndim not in (1, 2) or len(rows) != len(bars):
            raise StrategyError(f"{name}.prepare[{key!r}] has shape {rows.shape}; it needs {len(bars)} rows")
        rows = rows.view()
        rows.flags.writeable = False
        features[key] = rows
        decided.keep(key, rows)
    return features


def _as_rows(what: str, value: Any, bars: Bars | None) -> NDArray[np.float64]:
    if bars is not None and hasattr(value, "columns"):
        if [str(column) for column in value.columns] != list(bars.symbols):
            raise StrategyError(f"{what} has the columns {list(value.columns)}; the symbols are {list(bars.symbols)}")
        times = value.index
        times = times.tz_localize("UTC") if getattr(times, "tz", None) is None else times.tz_convert("UTC")
        if len(times) != len(bars) or not np.array_equal(times.as_unit("ns").asi8, bars.timestamps):
            raise StrategyError(f"{what} has another index than the bars")
        value = value.to_numpy()
    try:
        given = np.asarray(value)
        if given.dtype.kind not in "biuf" and not (given.dtype.kind == "O" and given.size):
            raise TypeError(f"its dtype is {given.dtype}")
        return given.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise StrategyError(f"{what} can't be read as float64: {error}") from error


def _refuse(wrong: NDArray[np.bool_], rows: NDArray[np.float64], bars: Bars, what: str, rule: str) -> None:
    if not wrong.any():
        return
    at, symbol = (int(x) for x in np.argwhere(wrong)[0])
    time = str(np.datetime64(int(bars.timestamps[at]), "ns").astype("datetime64[s]")) + "Z"
    raise OrderError(
        f"{what}: {rows[at, symbol]} of {bars.symbols[symbol]} at bar {at} ({time}) {rule}",
        bar_index=at,
        timestamp=time,
    )
