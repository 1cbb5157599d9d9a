"""The engine: pure computation, an async generator that yields at each boundary. It knows no database and no clock."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Any, cast

import msgspec
import numpy as np

from ktrdr_async.backtesting import execution as ex
from ktrdr_async.backtesting.checkpoint_builder import counters_of, recorded_values
from ktrdr_async.backtesting.decisions import Decided, checked_features, checked_targets
from ktrdr_async.backtesting.hooks import Hooks
from ktrdr_async.backtesting.portfolio import AccountView, Boundary, Portfolio, Recorded, equity_curve
from ktrdr_async.backtesting.provenance import Accept, check_past, identity_of, nothing
from ktrdr_async.backtesting.results import BacktestResults, Unfilled
from ktrdr_async.backtesting.turn import NoTurn, Turn
from ktrdr_async.errors import CheckpointCorruptedError, OrderError, StrategyError
from ktrdr_async.strategies.bar import QUANTITY, WEIGHT, Bar
from ktrdr_async.strategies.base import AnyStrategy, AsyncStrategy, Strategy, WeightStrategy
from ktrdr_async.strategies.state import check_declared, check_state, decode_state, encode_state

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ktrdr_async.backtesting.request import BacktestRequest
    from ktrdr_async.checkpoint.schemas import BacktestCheckpointState
    from ktrdr_async.market import Bars

BLOCK_BARS = 100
_ENDS_MORE = (StopIteration, StopAsyncIteration, GeneratorExit, SystemExit, KeyboardInterrupt)
_PIECE_VALUES = 256  # symbol-bars that are computed between two looks at the turn where targets are known
_WINDOW_VALUES = 4096  # values of a column that are turned into Python floats at a time


class Block(msgspec.Struct, frozen=True, gc=False):
    """What is known at a boundary."""

    bar_index: int  # absolute index of the block's last bar
    timestamp: int  # of that bar, ns since the epoch, UTC
    equity: float  # account currency, at its close
    cash: float  # account currency
    fills: int  # ledger events so far
    trades: int  # trades that have ended so far


class BacktestingEngine:
    """One backtest of one strategy over bars.

    Args:
        request: costs, capital and seed; what it says of data and strategy names was resolved by the caller.
        bars: the bars, n >= 1.
        strategy: one of the three kinds; the engine owns it for the run.
        turn: asked between bars whether to give way; without one the engine only gives the loop a turn where its
            consumer does.
        block_bars: bars between two yields.

    Raises:
        UndeclaredStateError: if the strategy could change outside its `state`.
    """

    def __init__(
        self,
        request: BacktestRequest,
        bars: Bars,
        strategy: AnyStrategy,
        *,
        turn: Turn | None = None,
        block_bars: int = BLOCK_BARS,
    ) -> None:
        if block_bars < 1:
            raise ValueError(f"block_bars is {block_bars}; a block has at least one bar")
        check_declared(strategy)
        self.request = request
        self.bars = bars
        self.strategy = strategy
        self._state_type = None if strategy.state is None else type(strategy.state)
        self._initial_state = strategy._initial_state or check_state(strategy.state)
        object.__setattr__(strategy, "_initial_state", self._initial_state)
        self.failed_bar: int | None = None  # the bar at which the strategy raised
        self.resumed_from: int | None = None
        self.noticed: list[str] = []  # what a person should know of the checkpoint that it went on from
        self.accepted: list[str] = []  # how the checkpoint that it went on from differs, in words
        self._turn: Turn = turn or NoTurn()
        self._block_bars = block_bars
        self._k = len(bars.symbols)
        self._piece = max(1, min(block_bars, _PIECE_VALUES // self._k))
        self._portfolio = Portfolio(request, bars, self._piece)
        self._equity = np.full(len(bars), np.nan)
        self._decided = Decided(strategy.warmup)
        self._targets: NDArray[np.float64] | None = None
        self._window = (0, 0)
        self._opens: list[float] = []
        self._closes: list[float] = []
        self._rows: list[float] = []
        self._decides: list[bool] = []
        self._boundary = self._portfolio.boundary(-1, self._initial_state)
        self._unfilled: tuple[Unfilled, ...] = ()
        self._bar: Bar | None = None  # with `_hooks`: None where targets are known
        self._hooks: Hooks | None = None
        self._started = False
        self._finished = False

    @property
    def boundary(self) -> Boundary:
        """The last boundary: the whole state at the last yield, also after an interruption inside a block."""
        return self._boundary

    @property
    def portfolio(self) -> Portfolio:
        """The account; at a boundary nothing moves in it."""
        return self._portfolio

    @property
    def equity(self) -> NDArray[np.float64]:
        """float64[n], account currency at each close; NaN where no bar was computed yet. Not to be written."""
        return self._equity

    @property
    def decided(self) -> Decided:
        """What `prepare` or the targets gave, and its digest up to a bar."""
        return self._decided

    async def run(
        self, resume_from: BacktestCheckpointState | None = None, *, accept: Accept = nothing
    ) -> AsyncGenerator[Block, None]:
        """Computes, and yields a `Block` at each boundary; after the last one comes the closing step.

        Args:
            resume_from: a whole checkpoint state to go on from.
            accept: which fields of its manifest may differ; `accepted` lists the ones that did.

        Raises:
            CheckpointMismatchError: if the state was made from other data, code or numbers.
            CheckpointCorruptedError: if the state contradicts itself.
            StrategyError: if the strategy breaks a rule. What it raises itself comes through with a note that names
                the bar.
        """
        if self._started:
            raise RuntimeError("an engine runs once; make another one")
        self._started = True
        if self.strategy._running:
            raise StrategyError(f"this {type(self.strategy).__name__} is in another run", hint="make one for each run")
        object.__setattr__(self.strategy, "_running", True)
        try:
            self.strategy.state = decode_state(self._initial_state, self._state_type)
            await self._turn.enter()
            await self._prepare()
            first = 0 if resume_from is None else await self._restore(resume_from, accept)
            n, size = len(self.bars), self._block_bars
            while first < n:
                stop = min(n, (first // size + 1) * size)
                if self._targets is None:
                    await self._compute_bars(first, stop)
                else:
                    await self._compute_targets(first, stop)
                self._boundary = self._portfolio.boundary(stop - 1, self._encoded(first // size))
                yield self._block()
                first = stop
            await self._close()
        finally:
            self._turn.leave()
            object.__setattr__(self.strategy, "_bar", None)
            object.__setattr__(self.strategy, "_running", False)

    def _encoded(self, block: int) -> bytes | None:
        # That it comes back equal is proved at the first boundaries and at each tenth: that costs more than encoding.
        state = self.strategy.state
        return check_state(state) if block < 10 or block % 10 == 0 else encode_state(state)

    def results(self) -> BacktestResults:
        """The results of a run that has come to its end. :raises RuntimeError: if it hasn't."""
        if not self._finished:
            raise RuntimeError("the run hasn't come to its end; consume `run()` first")
        return BacktestResults(
            request=self.request,
            bars=self.bars,
            strategy=identity_of(self.strategy),
            ledger=tuple(self._portfolio.events),
            recorded=tuple(self._portfolio.recorded),
            counters=counters_of(self._boundary.book),
            unfilled=self._unfilled,
            equity=self._equity,
            noticed=self.noticed,
        )

    def _block(self) -> Block:
        boundary = self._boundary
        money, tally = boundary.book.money, boundary.book.tally
        at = boundary.bar_index
        return Block(
            at, int(self.bars.timestamps[at]), money[ex.EQUITY], money[ex.CASH], boundary.events, tally[ex.TRADES]
        )

    # Before the first bar.

    async def _prepare(self) -> None:
        strategy, bars = self.strategy, self.bars
        features: dict[str, NDArray[np.float64]] = {}
        if isinstance(strategy, WeightStrategy):
            self._targets = await self._turn.offload(
                lambda: checked_targets(strategy, bars, self.request.lot_size, self._decided)
            )
        elif isinstance(strategy, AsyncStrategy):
            self._turn.leave()
            given = await strategy.prepare(bars)
            await self._turn.enter()
            features = checked_features(strategy, bars, given, self._decided)
        else:
            features = await self._turn.offload(
                lambda: checked_features(strategy, bars, strategy.prepare(bars), self._decided)
            )
        self._boundary = self._portfolio.boundary(-1, check_state(strategy.state))
        if not isinstance(strategy, WeightStrategy):
            self._hooks = Hooks(strategy, self._portfolio, self._turn)
            self._bar = Bar(bars, features, self.request.seed, AccountView(self._portfolio, bars.symbols))
            object.__setattr__(strategy, "_bar", self._bar)

    async def _restore(self, state: BacktestCheckpointState, accept: Accept = nothing) -> int:
        operation = "the checkpoint"
        recorded: list[Recorded] = recorded_values(state.recorded, operation)

        def restore() -> None:
            self.accepted = check_past(self, state, operation, accept)
            self._portfolio.restore(state, recorded, operation)
            upto = state.bar_index + 1
            self._equity[:upto] = equity_curve(
                state.ledger, self.bars.close[:upto], self.request.initial_capital, self.request.lot_size
            )

        await self._turn.offload(restore)
        try:
            self.strategy.state = decode_state(state.strategy_state, self._state_type)
        except (msgspec.MsgspecError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointCorruptedError(
                operation, f"the strategy's state doesn't fit {self._state_type}: {error}"
            ) from error
        self._boundary = self._portfolio.boundary(state.bar_index, state.strategy_state)
        if not self.accepted and self._portfolio.state_digest(self._boundary) != state.state_digest:
            raise CheckpointCorruptedError(
                operation, f"the state at bar {state.bar_index} has another digest than was stored"
            )
        self.resumed_from = state.bar_index
        return state.bar_index + 1

    # Bars.

    def _load_window(self, at: int) -> None:
        """Turns the next bars of the columns that every bar needs into flat lists of floats."""
        stop = min(len(self.bars), at + max(1, min(512, _WINDOW_VALUES // self._k)))
        self._opens, self._closes = self.bars.open[at:stop].ravel().tolist(), self.bars.close[at:stop].ravel().tolist()
        if self._targets is not None:
            window = self._targets[at:stop]
            self._decides = cast("list[bool]", (~np.isnan(window)).any(axis=1).tolist())
            self._rows = window.ravel().tolist()
        self._window = (at, stop)
        if self._bar is not None:
            self._bar._window(at, stop)

    async def _compute_targets(self, first: int, stop: int) -> None:
        portfolio, turn, equity = self._portfolio, self._turn, [0.0] * self._piece
        by_weight = self._decided.by_weight
        at = first
        while at < stop:
            if not self._window[0] <= at < self._window[1]:
                self._load_window(at)
            start, end = self._window
            count = min(self._piece, stop - at, end - at)
            filled = ex.run_targets(
                portfolio.book, portfolio.terms, self._k, self._opens, self._closes, self._rows, self._decides,
                by_weight,
                at - start, at, count, equity, portfolio.fills,
            )  # fmt: skip
            if filled < 0:
                raise self._too_many_lots(-1 - filled)
            if filled:
                portfolio.take_fills(filled)
            self._equity[at : at + count] = equity[:count]
            at += count
            if turn.clock() >= turn.deadline:
                await turn.pass_on()

    async def _compute_bars(self, first: int, stop: int) -> None:
        strategy = cast("Strategy | AsyncStrategy", self.strategy)
        bar = cast("Bar", self._bar)
        portfolio, turn, k = self._portfolio, self._turn, self._k
        book, terms, fills = portfolio.book, portfolio.terms, portfolio.fills
        money, tally, mark, lots, lot_size = book.money, book.tally, book.mark, book.lots, terms.lot_size
        mark_close, clock = ex.mark_one if k == 1 else ex.mark_close, turn.clock
        waiting, waits = ex.WAITING, isinstance(strategy, AsyncStrategy)
        on_bar: Callable[[Bar], Any] = strategy.on_bar
        begins = max(0, strategy.warmup - 1)
        hooks, told = cast("Hooks", self._hooks), cast("Hooks", self._hooks).wanted
        equity: list[float] = []
        append, deadline = equity.append, turn.deadline
        at = first
        try:
            while at < stop:
                if not self._window[0] <= at < self._window[1]:
                    self._load_window(at)
                start, end = self._window
                opens, closes = self._opens, self._closes
                for at in range(at, min(stop, end)):  # noqa: B020 - an error names it
                    bar._i = i = at - start
                    if tally[waiting]:
                        filled = ex.fill_waiting(book, terms, k, opens, i * k, at, fills, 0)
                        portfolio.take_fills(filled)
                    else:
                        filled = 0
                    value = mark_close(money, mark, lots, lot_size, k, closes, i * k)
                    append(value)
                    if value <= 0.0 and tally[ex.RUINED_AT] < 0:
                        ex.go_bust(book, k, at)
                    if filled and told:
                        await hooks.tell_fills(bar, filled)
                        deadline = turn.deadline
                    if at >= begins:
                        if waits:
                            turn.leave()
                            await on_bar(bar)
                            await turn.enter()
                            deadline = turn.deadline
                        else:
                            on_bar(bar)
                    if bar._said:
                        self._listen(bar)
                    if clock() >= deadline:
                        await turn.pass_on()
                        deadline = turn.deadline
                at += 1
        except BaseException as error:
            bar._decisions.clear()
            bar._recorded.clear()
            bar._said = False
            if isinstance(error, _ENDS_MORE):
                # They would end the generator, the loop or the process, and not this run alone.
                ends = "ended its process:" if isinstance(error, SystemExit) else "raised"
                failed = StrategyError(f"the strategy's code {ends} {error!r}")
                self._name_bar(failed, at)
                raise failed from error
            if isinstance(error, Exception):
                self._name_bar(error, at)
            raise
        self._equity[first:stop] = equity

    def _listen(self, bar: Bar) -> None:
        """Takes what was recorded at a bar, and turns its decisions into waiting orders."""
        bar._said = False
        if bar._recorded:
            at = bar.index
            self._portfolio.recorded.extend((at, name, number) for name, number in bar._recorded.items())
            bar._recorded.clear()
        portfolio, book, terms = self._portfolio, self._portfolio.book, self._portfolio.terms
        ordered = False
        for j in sorted(bar._decisions):
            decision = bar._decisions[j]
            if book.tally[ex.RUINED_AT] >= 0:
                book.tally[ex.REFUSED] += 1
                continue
            tag = portfolio.tag_number(decision.tag)
            if decision.kind == WEIGHT:
                order = ex.decide_weight(book, terms, j, decision.values[0], tag)
                if order == ex.MAX_LOTS:
                    raise self._too_many_lots(bar.index)
            else:
                lots = [ex.lots_of_quantity(value, terms.lot_size) for value in decision.values]
                if any(abs(each) >= ex.MAX_LOTS for each in lots):
                    raise self._too_many_lots(bar.index)
                if decision.kind == QUANTITY:
                    order = ex.decide_target(book, terms, j, lots[0], tag)
                else:
                    order = book.waiting[j]
                    for each in lots:
                        order += each
                    if abs(order) >= ex.MAX_LOTS:
                        raise self._too_many_lots(bar.index)
                    ex.put_order(book, j, order, ex.ORDER, tag)
            ordered = ordered or order != 0
        book.tally[ex.ORDERED_ROWS] += ordered
        bar._decisions.clear()

    def _too_many_lots(self, at: int) -> OrderError:
        error = OrderError(
            f"an order at bar {at} comes to more than 2**53 lots of {self.request.lot_size}",
            hint="use a larger lot_size",
        )
        error.bar_index, error.timestamp = at, self._time(at)
        return error

    def _time(self, at: int) -> str:
        return str(np.datetime64(int(self.bars.timestamps[at]), "ns").astype("datetime64[s]")) + "Z"

    def _name_bar(self, error: Exception, at: int) -> None:
        self.failed_bar = at
        if isinstance(error, StrategyError) and error.bar_index < 0:
            error.bar_index, error.timestamp = at, self._time(at)
        symbols = ", ".join(self.bars.symbols[:5]) + (", ..." if self._k > 5 else "")
        error.add_note(f"in {type(self.strategy).__name__} at bar {at}, {self._time(at)}, symbols {symbols}")

    # After the last bar.

    async def _close(self) -> None:
        """The closing step: what is open is closed at the last close, and what waits then is unfilled.

        What the strategy orders when it hears of the closing fills comes too late, like the orders of the last bar.
        """
        portfolio, last = self._portfolio, len(self.bars) - 1
        book, bar, hooks = portfolio.book, self._bar, self._hooks
        filled = 0
        if self.request.force_close:
            filled = ex.close_all(book, portfolio.terms, self._k, last, portfolio.fills)
            portfolio.take_fills(filled)
            closes = self.bars.close[last].tolist()
            self._equity[last] = ex.mark_close(
                book.money, book.mark, book.lots, self.request.lot_size, self._k, closes, 0
            )
        if bar is not None and hooks is not None:
            if not self._window[0] <= last < self._window[1]:
                self._load_window(last)
            bar._i = last - self._window[0]
            try:
                if filled and hooks.wanted:
                    await hooks.tell_fills(bar, filled)
                    self._listen(bar)
                bar._may_order = False
                await hooks.tell_end(bar)
                self._listen(bar)
            except Exception as error:
                self._name_bar(error, last)
                raise
        self._unfilled = tuple(
            Unfilled(j, book.waiting[j], None if book.waiting_tag[j] < 0 else portfolio.tags[book.waiting_tag[j]])
            for j in range(self._k)
            if book.waiting[j] != 0
        )
        self._finished = True
