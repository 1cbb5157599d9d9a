"""What a strategy computes once over the whole history: targets and features, checked, with a digest of any prefix."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from ktrdr_async.backtesting.execution import MAX_LOTS
from ktrdr_async.errors import OrderError, StrategyError
from ktrdr_async.strategies.base import WeightStrategy

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ktrdr_async.market import Bars


_HASHED_VALUES = 8192  # that are hashed in a step


class Targets:
    """Targets that are known before the run: where there is one, its place in n rows of k symbols, and its value."""

    def __init__(self, places: NDArray[np.int64], values: NDArray[np.float64], shape: tuple[int, int]) -> None:
        self.places = places  # int64[m], row * k + symbol, increasing
        self.values = values  # float64[m], weights, or signed units
        self.shape = shape

    def between(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """Bars, symbols and values of the targets at bars start..stop-1."""
        k = self.shape[1]
        first, last = np.searchsorted(self.places, (start * k, stop * k))
        places = self.places[first:last]
        return places // k, places % k, self.values[first:last]

    def rows(self, start: int, stop: int) -> NDArray[np.float64]:
        """The rows start..stop-1 as float64[stop - start, k], NaN where there is no target."""
        bars, symbols, values = self.between(start, stop)
        found = np.full((stop - start, self.shape[1]), np.nan)
        found[bars - start, symbols] = values
        return found


class Decided:
    """What `prepare`, `target_weights` or `target_quantities` gave.

    A digest of the rows up to a bar goes into every checkpoint: other rows on resume mean other code, other numbers,
    hidden randomness, or rows that knew later bars.
    """

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup
        self.by_weight = True
        self._columns: dict[str, NDArray[np.float64] | Targets] = {}
        self._hashes: dict[str, Any] = {}
        self._hashed = 0

    @property
    def columns(self) -> Mapping[str, NDArray[np.float64]]:
        """What was kept, as rows, by name; not to be written."""
        found = {
            name: kept.rows(0, kept.shape[0]) if isinstance(kept, Targets) else kept
            for name, kept in self._columns.items()
        }
        return MappingProxyType(found)

    def keep(self, name: str, kept: NDArray[np.float64] | Targets) -> None:
        """Takes targets, float64[n] or float64[n, m] under a name."""
        self._columns[name] = kept if isinstance(kept, Targets) else np.ascontiguousarray(kept)
        self._hashed, self._hashes = 0, {}

    def digest(self, upto: int) -> str:
        """Hex SHA-256 of the rows 0..upto; asked in growing order it costs what is new."""
        for _ in self.steps(upto):
            pass
        return hashlib.sha256(b"".join(found.digest() for found in self._hashes.values())).hexdigest()

    def steps(self, upto: int) -> Iterator[None]:
        """Takes the rows 0..upto in, some thousand values a step: `digest` has nothing left to do then."""
        stop = upto + 1
        if not self._columns:
            return
        if stop < self._hashed or not self._hashes:
            self._hashed = 0
            self._hashes = {name: hashlib.sha256(name.encode()) for name in sorted(self._columns)}
        widths = (kept.shape[1] if len(kept.shape) > 1 else 1 for kept in self._columns.values())
        size = max(1, _HASHED_VALUES // max(1, sum(widths)))
        while self._hashed < stop:
            start, end = self._hashed, min(stop, self._hashed + size)
            hashes = {name: found.copy() for name, found in self._hashes.items()}
            for name, found in hashes.items():
                kept = self._columns[name]
                rows = kept.rows(start, end) if isinstance(kept, Targets) else kept[start:end]
                found.update(rows.astype("<f8", copy=False).tobytes())
            self._hashed, self._hashes = end, hashes  # together: what is interrupted before has changed nothing
            yield


def checked_targets(
    strategy: WeightStrategy, bars: Bars, lot_size: float, decided: Decided, kernels: ModuleType | None = None
) -> Targets:
    """The strategy's targets: weights, or signed units where it gives quantities (`decided.by_weight` tells).

    Args:
        strategy: whose.
        bars: over what.
        lot_size: units in a lot.
        decided: takes them.
        kernels: the compiled indicators, for a built-in strategy that has its decisions in them too.

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
    found = strategy.compiled_targets(bars, kernels) if kernels is not None else None
    if found is None:
        given = strategy.target_weights(bars) if weights else strategy.target_quantities(bars)
        found = _places_in(f"{name}.{method}", given, bars)
    first = int(np.searchsorted(found[0], max(0, strategy.warmup - 1) * bars.k))
    targets = Targets(found[0][first:], found[1][first:], (len(bars), bars.k))
    _check(targets, bars, f"{name}.{method}", None if weights else lot_size)
    decided.by_weight = weights
    decided.keep(method, targets)
    return targets


def _places_in(what: str, given: Any, bars: Bars) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    rows = _as_rows(what, given, bars)
    if rows.ndim == 1:
        rows = rows[:, None]
    if rows.shape != (len(bars), bars.k):
        raise StrategyError(f"{what} gave shape {rows.shape}; it must be {(len(bars), bars.k)}")
    flat = rows.ravel()
    places = np.flatnonzero(flat == flat)
    return places, flat[places]


def _check(targets: Targets, bars: Bars, what: str, lot_size: float | None) -> None:
    """Refuses what can't be traded; `lot_size` is None where targets are weights."""
    values, k = targets.values, bars.k

    def refuse(wrong: NDArray[np.bool_], rule: str) -> None:
        if wrong.any():
            m = int(np.argmax(wrong))
            at, symbol = divmod(int(targets.places[m]), k)
            time = str(np.datetime64(int(bars.timestamps[at]), "ns").astype("datetime64[s]")) + "Z"
            raise OrderError(
                f"{what}: {values[m]} of {bars.symbols[symbol]} at bar {at} ({time}) {rule}",
                bar_index=at,
                timestamp=time,
            )

    refuse(np.isinf(values), "is not finite")
    if lot_size is None:
        refuse(np.abs(values) > 1.0, "is outside -1..1; there is no leverage")
    first = np.asarray(bars.first_bar)
    if first.any():
        refuse(targets.places // k < first[targets.places % k], "comes before the symbol's first bar")
    if lot_size is not None:
        refuse(np.abs(values) / lot_size >= MAX_LOTS, f"is more than 2**53 lots of {lot_size}")


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
        return given.astype(np.float64, copy=False)
    except (TypeError, ValueError) as error:
        raise StrategyError(f"{what} can't be read as float64: {error}") from error
