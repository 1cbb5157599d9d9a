"""What a strategy is told beside its bars: fills, ended trades, the end."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, cast

from ktrdr_async.strategies.bar import Bar, Fill, TradeClosed
from ktrdr_async.strategies.base import AsyncStrategy, Strategy

if TYPE_CHECKING:
    from ktrdr_async.backtesting.ledger import LedgerEvent, Trade
    from ktrdr_async.backtesting.portfolio import Portfolio
    from ktrdr_async.backtesting.turn import Turn


class Hooks:
    """Calls a strategy's `on_fill`, `on_trade` and `on_end`; a coroutine is awaited without the turn."""

    def __init__(self, strategy: Strategy | AsyncStrategy, portfolio: Portfolio, turn: Turn) -> None:
        kind, base = type(strategy), AsyncStrategy if isinstance(strategy, AsyncStrategy) else Strategy
        self.wanted = (kind.on_fill, kind.on_trade) != (base.on_fill, base.on_trade)
        self._strategy = strategy
        self._portfolio = portfolio
        self._turn = turn

    async def tell_fills(self, bar: Bar, filled: int) -> None:
        """Tells of the last `filled` events, in ledger order; a trade that ended comes after the fill that ended it."""
        portfolio, strategy = self._portfolio, self._strategy
        ended = dict(portfolio.follow())
        total = len(portfolio.events)
        for index in range(total - filled, total):
            await self._call(strategy.on_fill, bar, self._fill_of(bar, portfolio.events[index]))
            trade = ended.get(index)
            if trade is not None:
                await self._call(strategy.on_trade, bar, self._trade_of(bar, trade))

    async def tell_end(self, bar: Bar) -> None:
        """Tells of the end."""
        await self._call(self._strategy.on_end, bar)

    async def _call(self, method: Callable[..., Any], *args: Any) -> None:
        if isinstance(self._strategy, AsyncStrategy):
            self._turn.leave()
            await cast("Awaitable[None]", method(*args))
            await self._turn.enter()
        else:
            method(*args)

    def _fill_of(self, bar: Bar, event: LedgerEvent) -> Fill:
        quantity = event.lots * self._portfolio.terms.lot_size
        return Fill(
            bar.symbols[event.symbol], quantity, event.price, event.fee, event.part, event.reason, event.tag
        )  # fmt: skip

    def _trade_of(self, bar: Bar, trade: Trade) -> TradeClosed:
        return TradeClosed(
            symbol=bar.symbols[trade.symbol],
            side=trade.side,
            entry_bar=trade.entry_bar,
            exit_bar=trade.exit_bar,
            quantity=trade.lots * self._portfolio.terms.lot_size,
            entry_price=trade.entry_price,
            exit_price=trade.exit_price,
            fees=trade.fees,
            net_pnl=trade.net_pnl,
            mae=cast("float", trade.mae),  # the portfolio's trade book has the prices
            mfe=cast("float", trade.mfe),
        )
