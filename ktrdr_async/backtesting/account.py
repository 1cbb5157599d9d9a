"""What a strategy sees of its account."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ktrdr_async.backtesting import execution as ex
from ktrdr_async.errors import OrderError

if TYPE_CHECKING:
    from ktrdr_async.backtesting.ledger import TradeBook
    from ktrdr_async.backtesting.portfolio import Portfolio
    from ktrdr_async.strategies.bar import Bar


class PositionOf:
    """One symbol's position at this bar's close; read-only."""

    __slots__ = ("_account", "_symbol")

    def __init__(self, account: AccountView, symbol: int) -> None:
        self._account, self._symbol = account, symbol

    @property
    def quantity(self) -> float:
        """Signed units held."""
        account, portfolio = self._account, self._account._portfolio
        if portfolio.quiet_until < account._bar._start + account._bar._i:
            portfolio.settle(account._bar.index)
        return portfolio.lots[self._symbol] * account._lot_size

    @property
    def price(self) -> float:
        """Last close; NaN before the symbol's first bar."""
        return float(self._account._book.mark[self._symbol])

    @property
    def value(self) -> float:
        """Signed notional at the last close, account currency."""
        book, lot_size = self._account._book, self._account._lot_size
        lots = book.lots[self._symbol]
        return float(ex.notional(lots, lot_size, book.mark[self._symbol])) if lots else 0.0

    @property
    def entry_price(self) -> float:
        """Mean price of the open trade's opening fills; NaN where flat."""
        trade = self._account._trades().open.get(self._symbol)
        return trade.entry_price if trade is not None else float("nan")


class AccountView:
    """The account at this bar's close, for strategies; read-only. It is brought up to the bar when it is looked at."""

    __slots__ = ("_bar", "_lot_size", "_portfolio", "_positions", "_symbols")

    def __init__(self, portfolio: Portfolio, symbols: Sequence[str]) -> None:
        self._portfolio = portfolio
        self._lot_size = portfolio.terms.lot_size
        self._symbols = symbols
        self._positions: dict[int | str, PositionOf] = {j: PositionOf(self, j) for j in range(len(symbols))}
        self._positions.update({name: self._positions[j] for j, name in enumerate(symbols)})

    def follow(self, bar: Bar) -> None:
        """Looks at the account at the bar that this object stands for."""
        self._bar = bar

    @property
    def _book(self) -> ex.Book:
        portfolio, bar = self._portfolio, self._bar
        if portfolio.next_bar <= bar.index:
            portfolio.advance(bar.index + 1)
        return portfolio.book

    def _trades(self) -> TradeBook:
        self._settle()
        return self._portfolio.trades()

    def _settle(self) -> None:
        # Bars at which cash and lots stay what they are needn't be computed for those who look at no more.
        if self._portfolio.quiet_until < self._bar.index:
            self._portfolio.settle(self._bar.index)

    @property
    def cash(self) -> float:
        """Account currency."""
        self._settle()
        return float(self._portfolio.book.money[ex.CASH])

    @property
    def equity(self) -> float:
        """Account currency: cash and what is held at the last closes."""
        return float(self._book.money[ex.EQUITY])

    def __getitem__(self, symbol: int | str) -> PositionOf:
        try:
            return self._positions[symbol]
        except KeyError:
            raise OrderError(f"there is no symbol {symbol!r}; there are: {', '.join(self._symbols)}") from None
