"""What a strategy sees and says at one bar: its values, the read-only past, and the orders of this one decision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import msgspec

from ktrdr_async.errors import OrderError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    from ktrdr_async.market import Bars

Row = tuple[float, ...]


class Fill(msgspec.Struct, frozen=True):
    """One fill, as `on_fill` gets it."""

    symbol: str
    quantity: float  # signed, in units
    price: float  # quote currency, slippage included
    fee: float  # account currency
    part: Literal["open", "close"]
    reason: Literal["order", "ruin", "forced_close"]
    tag: str | None


class TradeClosed(msgspec.Struct, frozen=True):
    """One trade that has ended, as `on_trade` gets it."""

    symbol: str
    side: int  # 1 long, -1 short
    entry_bar: int
    exit_bar: int
    quantity: float  # the largest held, in units
    entry_price: float
    exit_price: float
    fees: float  # account currency
    net_pnl: float  # account currency
    mae: float  # account currency, smallest open P&L before exit costs
    mfe: float  # account currency, largest open P&L before exit costs


class PositionView(Protocol):
    """One symbol's position at this bar's close; read-only."""

    @property
    def quantity(self) -> float:
        """Signed units held."""

    @property
    def price(self) -> float:
        """Last close; NaN before the symbol's first bar."""

    @property
    def value(self) -> float:
        """Signed notional at the last close, account currency."""

    @property
    def entry_price(self) -> float:
        """Mean price of the open trade's opening fills; NaN where flat."""


class PortfolioView(Protocol):
    """The account at this bar's close; read-only."""

    @property
    def cash(self) -> float:
        """Account currency."""

    @property
    def equity(self) -> float:
        """Account currency: cash and what is held at the last closes."""

    def __getitem__(self, symbol: int | str) -> PositionView: ...


class Past:
    """Bars 0..index as read-only arrays without a copy: row i is bar i, column j is symbol j (C order)."""

    __slots__ = ("_bars", "_stop")

    def __init__(self, bars: Bars, stop: int) -> None:
        self._bars, self._stop = bars, stop

    def __len__(self) -> int:
        return self._stop

    @property
    def timestamps(self) -> NDArray[np.int64]:
        """int64[index + 1], ns since the epoch, UTC."""
        return self._bars.timestamps[: self._stop]

    @property
    def open(self) -> NDArray[np.float64]:
        """float64[index + 1, k]."""
        return self._bars.open[: self._stop]

    @property
    def high(self) -> NDArray[np.float64]:
        """float64[index + 1, k]."""
        return self._bars.high[: self._stop]

    @property
    def low(self) -> NDArray[np.float64]:
        """float64[index + 1, k]."""
        return self._bars.low[: self._stop]

    @property
    def close(self) -> NDArray[np.float64]:
        """float64[index + 1, k]."""
        return self._bars.close[: self._stop]

    @property
    def volume(self) -> NDArray[np.float64]:
        """float64[index + 1, k]."""
        return self._bars.volume[: self._stop]


class SymbolBar:
    """One symbol's values at this bar: `bar["EURUSD"].close`."""

    __slots__ = ("_bar", "_symbol")

    def __init__(self, bar: Bar, symbol: int) -> None:
        self._bar, self._symbol = bar, symbol

    @property
    def open(self) -> float:
        """Quote currency; NaN where the symbol has no bar here."""
        return self._bar.open[self._symbol]

    @property
    def high(self) -> float:
        """Quote currency; NaN where the symbol has no bar here."""
        return self._bar.high[self._symbol]

    @property
    def low(self) -> float:
        """Quote currency; NaN where the symbol has no bar here."""
        return self._bar.low[self._symbol]

    @property
    def close(self) -> float:
        """Quote currency; NaN where the symbol has no bar here."""
        return self._bar.close[self._symbol]

    @property
    def volume(self) -> float:
        """Units; NaN where the symbol has no bar here."""
        return self._bar.volume[self._symbol]

    def feature(self, name: str) -> float:
        """The symbol's value of a feature with one column a symbol."""
        return cast("Row", self._bar.feature(name))[self._symbol]


WEIGHT, QUANTITY, ORDER = 0, 1, 2
Decision = tuple[
    int, Any, str | None
]  # a weight (fraction of equity), a quantity (signed units) or a list of them; tag


_NO_DECISION: Decision = (WEIGHT, 0.0, None)


class Bar:
    """One bar, whole: a decision made from it fills from the next bar on.

    `open`, `high`, `low`, `close` and `volume` are tuples with one float a symbol, NaN where the symbol has no bar.
    The same
    object serves every bar of a run; what has to outlive `on_bar` is copied into the strategy's `state`.
    """

    __slots__ = (
        "_bars", "_close", "_decisions", "_feature_rows", "_features", "_first_bars", "_high", "_i", "_index_of",
        "_low", "_may_order", "_open", "_portfolio", "_recorded", "_rng", "_said", "_seed", "_start", "_stop",
        "_texts", "_volume",
    )  # fmt: skip

    def __init__(
        self, bars: Bars, features: dict[str, NDArray[np.float64]], seed: int, portfolio: PortfolioView
    ) -> None:
        self._bars = bars
        self._features = features
        self._seed = seed
        self._portfolio = portfolio
        self._index_of = {name: position for position, name in enumerate(bars.symbols)}
        self._decisions: dict[int, Decision] = {}  # what a bar's calls have come to, one a symbol
        self._first_bars: list[int] = bars.first_bar.tolist()
        self._recorded: dict[str, float] = {}
        self._texts: set[str] = set()  # tags and names that were checked
        self._rng: tuple[int, np.random.Generator] | None = None
        self._may_order = True
        self._said = False  # something was ordered or recorded at this bar
        self._window(0, 0)

    # The engine moves the bar: a window of rows is turned into Python floats a chunk at a time and a column when asked
    # for.

    def _window(self, start: int, stop: int) -> None:
        self._start, self._stop, self._i = start, stop, 0
        self._open: list[Row] | None = None
        self._high: list[Row] | None = None
        self._low: list[Row] | None = None
        self._close: list[Row] | None = None
        self._volume: list[Row] | None = None
        self._feature_rows: dict[str, list[Any]] = {}

    def _rows(self, values: NDArray[np.float64]) -> list[Row]:
        window = values[self._start : self._stop]
        return list(zip(*(window[:, j].tolist() for j in range(window.shape[1])), strict=True))

    @property
    def index(self) -> int:
        """Absolute, 0-based."""
        return self._start + self._i

    @property
    def timestamp(self) -> int:
        """Opening time, ns since the epoch, UTC."""
        return int(self._bars.timestamps[self.index])

    @property
    def time(self) -> pd.Timestamp:
        """Opening time as a pandas Timestamp, UTC."""
        import pandas as pd

        return pd.Timestamp(self.timestamp, tz="UTC")

    @property
    def symbols(self) -> tuple[str, ...]:
        """The symbols, in the order of every row."""
        return self._bars.symbols

    @property
    def open(self) -> Row:
        """Quote currency, one a symbol."""
        if self._open is None:
            self._open = self._rows(self._bars.open)
        return self._open[self._i]

    @property
    def high(self) -> Row:
        """Quote currency, one a symbol."""
        if self._high is None:
            self._high = self._rows(self._bars.high)
        return self._high[self._i]

    @property
    def low(self) -> Row:
        """Quote currency, one a symbol."""
        if self._low is None:
            self._low = self._rows(self._bars.low)
        return self._low[self._i]

    @property
    def close(self) -> Row:
        """Quote currency, one a symbol."""
        if self._close is None:
            self._close = self._rows(self._bars.close)
        return self._close[self._i]

    @property
    def volume(self) -> Row:
        """Units, one a symbol."""
        if self._volume is None:
            self._volume = self._rows(self._bars.volume)
        return self._volume[self._i]

    def feature(self, name: str) -> Any:
        """This bar's row of a feature of `prepare` or the data: a float a column, or one float where it is 1-D."""
        try:
            return self._feature_rows[name][self._i]
        except KeyError:
            return self._load_feature(name)[self._i]

    def _load_feature(self, name: str) -> list[Any]:
        values = self._features.get(name)
        if values is None:
            raise OrderError(
                f"there is no feature {name!r}; there are: {', '.join(sorted(self._features)) or 'none'}",
                hint="return it from `prepare`, or name the data's column in `features`",
            )
        rows = self._rows(values) if values.ndim == 2 else values[self._start : self._stop].tolist()
        self._feature_rows[name] = rows
        return rows

    @property
    def past(self) -> Past:
        """Bars 0..index as read-only arrays, without a copy."""
        return Past(self._bars, self.index + 1)

    @property
    def portfolio(self) -> PortfolioView:
        """The account at this bar's close."""
        return self._portfolio

    @property
    def rng(self) -> np.random.Generator:
        """Random numbers of this bar: Philox keyed by (seed, bar index), so there is no state to save."""
        if self._rng is None or self._rng[0] != self.index:
            import numpy as np

            self._rng = (self.index, np.random.Generator(np.random.Philox(key=[self._seed, self.index])))
        return self._rng[1]

    def _begin_closing(self) -> None:
        """Random numbers of the closing step are its own: a resume from the last boundary draws none of the bar's."""
        import numpy as np

        key = [self._seed, len(self._bars)]
        self._rng = (self.index, np.random.Generator(np.random.Philox(key=key)))

    def __getitem__(self, symbol: int | str) -> SymbolBar:
        return SymbolBar(self, self._position(symbol))

    def __repr__(self) -> str:
        return f"Bar(index={self.index}, time={self.time.isoformat()}, close={self.close})"

    # Decisions.

    def target_weight(self, symbol: int | str, weight: float, *, tag: str | None = None) -> None:
        """Orders a rebalance to `weight` of equity, -1..1. :raises OrderError: if it or the symbol can't be traded."""
        if not -1.0 <= weight <= 1.0:
            raise OrderError(f"weight {weight} of {self._name(symbol)} is outside -1..1", hint="there is no leverage")
        self._target(symbol, WEIGHT, weight, tag)

    def target_quantity(self, symbol: int | str, quantity: float, *, tag: str | None = None) -> None:
        """Orders what leads to `quantity` signed units. :raises OrderError: if it or the symbol can't be traded."""
        if not math.isfinite(quantity):
            raise self._not_finite(symbol, quantity)
        self._target(symbol, QUANTITY, quantity, tag)

    def flatten(self, symbol: int | str | None = None, *, tag: str | None = None) -> None:
        """Orders a symbol's position closed, or every one that has had a bar."""
        if symbol is not None:
            self._target(symbol, QUANTITY, 0.0, tag)
            return
        for position in range(len(self._bars.symbols)):
            if self._first_bars[position] <= self.index:
                self._target(position, QUANTITY, 0.0, tag)

    def order(self, symbol: int | str, quantity: float, *, tag: str | None = None) -> None:
        """Orders `quantity` signed units more; several add up. :raises OrderError: if the symbol has a target here."""
        if not math.isfinite(quantity):
            raise self._not_finite(symbol, quantity)
        position = self._tradable(symbol, tag)
        kind, quantities, before = self._decisions.get(position, (ORDER, [], None))
        if kind != ORDER:
            raise self._two_kinds(symbol)
        quantities.append(float(quantity))
        self._decisions[position] = (ORDER, quantities, before if tag is None else tag)

    def record(self, **values: float) -> None:
        """Keeps a value a name for this bar; `results.recorded` shows them all. The last one a name and bar counts."""
        self._said = True
        for name, value in values.items():
            if name not in self._texts:
                self._check_text(name, "a recorded value's name")
            try:
                number = float(value)
                self._recorded[name] = number if number == number else math.nan  # one NaN of the many
            except (TypeError, ValueError) as error:
                raise OrderError(f"record({name}={value!r}): {error}", hint="record numbers") from None

    def _check_text(self, text: object, what: str) -> None:
        # Checked where it is said, and not when all is stored: then it would be too late.
        if not isinstance(text, str) or not 0 < len(text) <= 200 or "\0" in text:
            raise OrderError(f"{what} is {text!r}; it must be a text of 1 to 200 characters without NUL")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise OrderError(f"{what} can't be stored: {error}") from None
        self._texts.add(text)

    def _target(self, symbol: int | str, kind: int, value: float, tag: str | None) -> None:
        position = self._tradable(symbol, tag)
        if self._decisions and self._decisions.get(position, _NO_DECISION)[0] == ORDER:
            raise self._two_kinds(symbol)
        self._decisions[position] = (kind, float(value), tag)

    def _not_finite(self, symbol: int | str, quantity: float) -> OrderError:
        return OrderError(f"quantity {quantity} of {self._name(symbol)} is not a finite number")

    def _two_kinds(self, symbol: int | str) -> OrderError:
        return OrderError(f"{self._name(symbol)} has a target and an order in one bar", hint="use one of the two")

    def _tradable(self, symbol: int | str, tag: str | None) -> int:
        first = self._first_bars
        position = symbol if isinstance(symbol, int) and 0 <= symbol < len(first) else self._position(symbol)
        if tag is not None and tag not in self._texts:
            self._check_text(tag, "a tag")
        if first[position] > self._start + self._i:
            raise OrderError(
                f"{self._name(symbol)} has no bar yet: its first is bar {first[position]}, this is {self.index}"
            )
        if not self._may_order:
            raise OrderError("nothing can be ordered after the last bar", hint="on_end only looks")
        self._said = True
        return position

    def _position(self, symbol: int | str) -> int:
        symbols: Sequence[str] = self._bars.symbols
        if isinstance(symbol, str):
            position = self._index_of.get(symbol)
            if position is None:
                raise OrderError(f"there is no symbol {symbol!r}; there are: {', '.join(symbols)}")
            return position
        if not 0 <= symbol < len(symbols):
            raise OrderError(f"there is no symbol {symbol}; positions are 0 to {len(symbols) - 1}")
        return symbol

    def _name(self, symbol: int | str) -> str:
        return self._bars.symbols[self._position(symbol)]
