"""The three kinds of strategy, and the rule that all that changes in one is in its `state`."""

from __future__ import annotations

import inspect
import logging
import math
import types
from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, ClassVar, get_type_hints

import msgspec

from ktrdr_async.errors import ParameterError, UndeclaredStateError
from ktrdr_async.strategies.bar import Bar, Fill, TradeClosed

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    from ktrdr_async.market import Bars

logger = logging.getLogger("ktrdr_async.strategy")

OWN_ATTRIBUTES = frozenset({"state", "_parameters", "_sealed", "_bar", "_initial_state", "_running"})


class StrategyMeta(type):
    """Checks the parameters of every strategy that is made, and seals it once its `__init__` is done."""

    def __call__(cls, /, *args: Any, **kwargs: Any) -> Any:
        """Makes a strategy. :raises ParameterError: if a parameter is unknown, missing, of another type or range."""
        given = _checked_parameters(cls, args, kwargs)
        strategy = super().__call__(**given)
        object.__setattr__(strategy, "_parameters", types.MappingProxyType(given))
        object.__setattr__(strategy, "_sealed", True)
        return strategy


def parameter_types(cls: type) -> dict[str, tuple[Any, Any]]:
    """The parameters that a strategy's class takes: name -> (annotated type, default or `inspect.Parameter.empty`)."""
    constructor: Any = inspect.getattr_static(cls, "__init__")
    if constructor is object.__init__:
        return {}
    try:
        hints = get_type_hints(constructor, include_extras=True)
    except NameError as error:
        raise ParameterError(f"{cls.__name__}.__init__: an annotation can't be read: {error}") from error
    found: dict[str, tuple[Any, Any]] = {}
    for name, parameter in list(inspect.signature(constructor).parameters.items())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ParameterError(f"{cls.__name__}.__init__ takes *{name}: parameters are named", hint="name each one")
        found[name] = (hints.get(name, Any), parameter.default)
    return found


def _checked_parameters(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    known = parameter_types(cls)
    if len(args) > len(known):
        raise ParameterError(f"{cls.__name__} takes {len(known)} parameters, {len(args)} were given")
    given = dict(zip(known, args, strict=False)) | kwargs
    for name in given:
        if name not in known:
            names = ", ".join(known) or "none"
            raise ParameterError(f"{cls.__name__} has no parameter {name!r}", hint=f"its parameters: {names}")
    checked: dict[str, Any] = {}
    for name, (kind, default) in known.items():
        if name not in given:
            if default is inspect.Parameter.empty:
                raise ParameterError(f"{cls.__name__} needs the parameter {name!r}")
            checked[name] = default
            continue
        value = given[name]
        if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
            value = value.item()  # a numpy scalar
        try:
            checked[name] = msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            raise ParameterError(f"{cls.__name__}: {name}={value!r}: {str(error).split(' - at')[0].lower()}") from error
        if not _storable(checked[name]):
            raise ParameterError(
                f"{cls.__name__}: {name}={value!r} couldn't be stored: numbers are finite, integers have 64 bits"
            )
    return checked


def _storable(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    if isinstance(value, Mapping):
        return all(map(_storable, value.values()))
    return all(map(_storable, value)) if isinstance(value, list | tuple) else True


class _BarLog(logging.LoggerAdapter[logging.Logger]):
    """Puts the bar's index and time before each message."""

    def __init__(self, bar: Bar | None) -> None:
        super().__init__(logger, {"bar": bar.index, "time": bar.time.isoformat()} if bar is not None else {})

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Adds the prefix, and the same values as fields of the record."""
        extra = dict(self.extra or {})
        kwargs["extra"] = {"bar_index": extra.get("bar"), "bar_time": extra.get("time")}
        return (f"bar {extra['bar']}, {extra['time']}: {msg}" if extra else msg), kwargs


class StrategyBase(metaclass=StrategyMeta):
    """What the three kinds share.

    Attributes:
        warmup: the first decision is at index `warmup - 1`; 0 and 1 mean the same.
        resources: names of attributes that hold models and the like: never saved, never checked, not to change.
        state: a `msgspec.Struct`, the only thing that may change; None where nothing does.
    """

    warmup: int = 0
    resources: ClassVar[tuple[str, ...]] = ()
    state: Any = None
    _parameters: Mapping[str, Any] = types.MappingProxyType({})
    _sealed: bool = False
    _bar: Bar | None = None
    _running: bool = False  # in a run: one object serves one run at a time
    _initial_state: bytes | None = None  # what every run starts from, so that one object can run twice

    def __setattr__(self, name: str, value: Any) -> None:
        if self._sealed and name != "state":
            raise UndeclaredStateError(
                f"{type(self).__name__}.{name} was set after __init__; only `state` may change",
                hint="keep it in the strategy's `state`, a msgspec.Struct",
                bar_index=-1 if self._bar is None else self._bar.index,
                timestamp="" if self._bar is None else self._bar.time.isoformat(),
            )
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        if self._sealed:
            raise UndeclaredStateError(
                f"{type(self).__name__}.{name} was deleted after __init__; only `state` may change"
            )
        object.__delattr__(self, name)

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters that it was made with, as JSON-ready values; what JSON can't hold goes by its type's name."""
        found: dict[str, Any] = {}
        for name, value in self._parameters.items():
            try:
                found[name] = msgspec.json.decode(msgspec.json.encode(value))
            except (TypeError, ValueError):
                found[name] = f"<{type(value).__name__}>"
        return found

    @property
    def log(self) -> logging.LoggerAdapter[logging.Logger]:
        """A logger (`ktrdr_async.strategy`) whose messages carry the bar and its time."""
        return _BarLog(self._bar)


class WeightStrategy(StrategyBase):
    """Decides for all bars at once: implement one of `target_weights` and `target_quantities`.

    Row i may use bars 0..i only. NaN keeps what is; a number is an order to go there, once.
    """

    @property
    def by_weight(self) -> bool | None:
        """For a class with both methods, whose parameters choose: True for weights, False for quantities."""
        return None

    def target_weights(self, bars: Bars) -> NDArray[np.float64] | pd.DataFrame:
        """float64[n, k] (or a frame with the bars' index and columns): fractions of equity, -1..1."""
        raise NotImplementedError

    def target_quantities(self, bars: Bars) -> NDArray[np.float64] | pd.DataFrame:
        """float64[n, k] (or a frame with the bars' index and columns): signed units."""
        raise NotImplementedError

    def compiled_targets(
        self, bars: Bars, kernels: types.ModuleType
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]] | None:
        """For a built-in that has its decisions in `kernels`: places (row * k + symbol, increasing) and values."""
        return None


class Strategy(StrategyBase):
    """Decides bar by bar.

    `on_fill` and `on_trade` come in ledger order before `on_bar` of the same bar and may order like it; what one bar's
    calls
    order is one decision. `on_end` comes once after the closing step and can't order.
    """

    def prepare(self, bars: Bars) -> Mapping[str, NDArray[np.float64]]:
        """Features over the full history: name -> float64[n] or float64[n, m]; row i may use bars 0..i only."""
        return {}

    def on_bar(self, bar: Bar) -> None:
        """Called once a bar, from index `warmup - 1` on."""
        raise NotImplementedError

    def on_fill(self, bar: Bar, fill: Fill) -> None:
        """Called for each fill at this bar's open."""

    def on_trade(self, bar: Bar, trade: TradeClosed) -> None:
        """Called for each trade that ended at this bar's open, after the `on_fill` of the fill that ended it."""

    def on_end(self, bar: Bar) -> None:
        """Called once, after the closing step."""


class AsyncStrategy(StrategyBase):
    """A `Strategy` whose methods are coroutines, so that they may await a model server.

    Exact across interruptions where the answers are functions of what was sent: a block that was interrupted is
    computed
    again from its boundary, and asks again.
    """

    async def prepare(self, bars: Bars) -> Mapping[str, NDArray[np.float64]]:
        """As `Strategy.prepare`; one batched call here beats one a bar."""
        return {}

    async def on_bar(self, bar: Bar) -> None:
        """Called once a bar, from index `warmup - 1` on."""
        raise NotImplementedError

    async def on_fill(self, bar: Bar, fill: Fill) -> None:
        """Called for each fill at this bar's open."""

    async def on_trade(self, bar: Bar, trade: TradeClosed) -> None:
        """Called for each trade that ended at this bar's open."""

    async def on_end(self, bar: Bar) -> None:
        """Called once, after the closing step."""


AnyStrategy = WeightStrategy | Strategy | AsyncStrategy
