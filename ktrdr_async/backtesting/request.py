"""The request: everything that says which backtest this is, as a plain record that travels as JSON."""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import msgspec
import numpy as np

from ktrdr_async.errors import ParameterError

MAX_DEPTH = 32  # levels of lists and objects in a parameter


@functools.cache
def _fields() -> tuple[msgspec.structs.FieldInfo, ...]:
    return msgspec.structs.fields(BacktestRequest)


class BacktestRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One backtest: data, strategy, costs.

    Raises:
        ParameterError: if a value is out of its range; the message names the field, the value and the range.
    """

    data: str | None = (
        None  # a data reference that another machine can read again; None: bars are handed over in memory
    )
    symbols: tuple[str, ...] = ()  # those to trade, in this order; empty: all that the data have
    start: str | None = None  # first bar, inclusive, ISO 8601
    end: str | None = None  # last bar, inclusive; a date without a time means that whole day
    timeframe: str | None = None  # e.g. "1h"; None: the most common step
    tz: str | None = None  # zone of times that carry none; None: UTC
    timestamps: Literal["open", "close"] = "open"  # what the data's times name
    date_format: str | None = None  # strptime format of the time column
    features: tuple[str, ...] = ()  # further columns that travel with the bars
    strategy: str | None = None  # registered name or module:Class; None: the strategy is handed over as an object
    parameters: dict[str, Any] = {}
    initial_capital: float = 100_000.0  # account currency, > 0
    commission: float = 0.001  # fraction of notional a side, 0 <= commission < 1
    slippage: float = 0.0005  # fraction of price against the order, 0 <= slippage < 1
    lot_size: float = 1.0  # units in a lot, > 0
    min_trade: float = 0.0  # fraction of equity below which a rebalance is skipped, 0 <= min_trade < 1
    force_close: bool = True  # close what is open after the last bar
    seed: int = 0  # of bar.rng, 0 <= seed < 2**64

    def __post_init__(self) -> None:
        """Gives each field its declared type, as a database would give it back, and checks the ranges."""
        for field in _fields():
            value = getattr(self, field.name)
            try:
                kept = msgspec.convert(value.item() if isinstance(value, np.generic) else value, field.type)
            except msgspec.ValidationError as error:
                what = str(error).split(" - at")[0].lower()
                raise ParameterError(f"{field.name} is {value!r}: {what}") from None
            msgspec.structs.force_setattr(self, field.name, kept)
        _check_storable(self.parameters)
        try:
            msgspec.json.encode(self)
        except UnicodeEncodeError:
            raise ParameterError("a text of the request holds a lone surrogate, which can't be stored") from None
        if not (math.isfinite(self.initial_capital) and self.initial_capital > 0):
            raise ParameterError(f"initial_capital is {self.initial_capital}; it must be a finite number above 0")
        if not (math.isfinite(self.lot_size) and self.lot_size > 0):
            raise ParameterError(f"lot_size is {self.lot_size}; it must be a finite number above 0")
        for name in ("commission", "slippage", "min_trade"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ParameterError(f"{name} is {value}; it must be a fraction from 0 up to, not including, 1")
        if not 0 <= self.seed < 2**64:
            raise ParameterError(f"seed is {self.seed}; it must be from 0 to 2**64 - 1")

    def to_dict(self) -> dict[str, Any]:
        """JSON's values, as a database gives them back: lists, not tuples."""
        return dict(msgspec.json.decode(msgspec.json.encode(self)))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> BacktestRequest:
        """Validates and rebuilds a request. :raises ParameterError: if a field has another type or range."""
        try:
            return msgspec.convert(data, cls)
        except msgspec.ValidationError as error:
            cause = error.__cause__
            raise cause if isinstance(cause, ParameterError) else ParameterError(f"the request: {error}") from error
        except UnicodeEncodeError:
            raise ParameterError("the request has a field whose name is no text") from None


def _check_storable(value: Any, name: str = "parameters", depth: int = 0) -> None:
    """Refuses what JSON would store as something else without a word."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ParameterError(f"{name} is {value}; a number must be finite")
    if isinstance(value, dict | list | tuple):
        if depth > MAX_DEPTH:
            raise ParameterError(f"{name} is nested deeper than {MAX_DEPTH} levels")
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _check_storable(item, f"{name}.{key}", depth + 1)
