"""The engine: pure computation, an async generator that yields at each boundary. It knows no database and no clock."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

import msgspec
import numpy as np

from ktrdr_async import compiling
from ktrdr_async.backtesting import execution as ex
from ktrdr_async.backtesting.account import AccountView
from ktrdr_async.backtesting.boundaries import Boundary, Kept
from ktrdr_async.backtesting.checkpoint_builder import counters_of, recorded_values
from ktrdr_async.backtesting.curve import equity_curve
from ktrdr_async.backtesting.decisions import Decided, checked_features, checked_targets
from ktrdr_async.backtesting.hooks import Hooks
from ktrdr_async.backtesting.portfolio import Portfolio, Recorded
from ktrdr_async.backtesting.provenance import Accept, check_past, identity_of, nothing
from ktrdr_async.backtesting.results import BacktestResults, Unfilled
from ktrdr_async.backtesting.tiers import INTERPRETED, TierName, tier_of
from ktrdr_async.backtesting.turn import NoTurn, Turn
from ktrdr_async.errors import CheckpointCorruptedError, OrderError, StrategyError
from ktrdr_async.strategies.bar import ORDER, Bar  # its kinds have the numbers of `execution`'s
from ktrdr_async.strategies.base import AnyStrategy, AsyncStrategy, Strategy, WeightStrategy
from ktrdr_async.strategies.state import check_declared, check_state, decode_state, encode_state

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ktrdr_async.backtesting.request import BacktestRequest
    from ktrdr_async.checkpoint.schemas import BacktestCheckpointState
    from ktrdr_async.market import Bars

BLOCK_BARS = 100
KERNELS = "ktrdr_async.strategies.kernels"
_ENDS_MORE = (StopIteration, StopAsyncIteration, GeneratorExit, SystemExit, KeyboardInterrupt)
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
        tier: "auto" and "compiled" use the compiled tier where it is loaded; every bit is the same.

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
        tier: TierName = "auto",
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
        self._equity = np.full(len(bars), np.nan)
        self._targets_known = isinstance(strategy, WeightStrategy)
        self._tier = tier_of(tier)
        self._portfolio = Portfolio(request, bars, self._equity, self._tier, block_bars)
        self._decided = Decided(strategy.warmup)
        self._window = (0, 0)  # bars whose rows the strategy's bar holds as floats
        self._boundary = self._portfolio.boundary(-1, self._initial_state)
        self._kept: tuple[Kept, int, int, bytes | None] | None = None  # what it is made of, until somebody looks at it
        self._state: bytes | None = None  # of a strategy whose targets are known: it doesn't change any more
        self._unfilled: tuple[Unfilled, ...] = ()
        self._bar: Bar | None = None  # with `_hooks`: None where targets are known
        self._hooks: Hooks | None = None
        self._started = False
        self._finished = False

    @property
    def boundary(self) -> Boundary:
        """The last boundary: the whole state at the last yield, also after an interruption inside a block."""
        if self._kept is not None:
            kept, m, recorded, state = self._kept
            self._boundary, self._kept = kept.boundary(m, recorded, state), None
        return self._boundary

    @property
    def tier(self) -> str:
        """Which tier computes: "interpreted" or "compiled"."""
        return self._tier.name

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
            n, size, portfolio = len(self.bars), self._block_bars, self._portfolio
            while first < n:
                if self._targets_known and self._tier is not INTERPRETED:
                    kept = portfolio.advance_blocks(min(n, first + portfolio.piece))
                    for m, block in enumerate(self._blocks(kept)):
                        self._kept = kept, m, 0, self._state
                        yield block
                    first = portfolio.next_bar
                    if self._turn.clock() >= self._turn.deadline:
                        await self._turn.pass_on()
                    continue
                stop = min(n, (first // size + 1) * size)
                if self._targets_known:
                    await self._compute_targets(stop)
                else:
                    await self._compute_bars(first, stop)
                block = self._settle(stop, self._encoded(first // size))
                yield block
                first = stop
            await self._close()
        finally:
            self._turn.leave()
            object.__setattr__(self.strategy, "_bar", None)
            object.__setattr__(self.strategy, "_running", False)

    def _encoded(self, block: int) -> bytes | None:
        if self._targets_known:
            return self._state
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
            ledger=self._portfolio.events,
            recorded=tuple(self._portfolio.recorded),
            counters=counters_of(self.boundary.book),
            unfilled=self._unfilled,
            equity=self._equity,
            noticed=self.noticed,
        )

    def _settle(self, stop: int, strategy_state: bytes | None) -> Block:
        """Brings the account to the boundary after bar stop - 1."""
        portfolio, at = self._portfolio, stop - 1
        try:
            portfolio.advance(stop, whole=True)
        except OrderError as error:
            self._name_bar(error, error.bar_index)
            raise
        kept = portfolio.kept(at)
        if kept is None:
            self._boundary = portfolio.boundary(at, strategy_state)
        else:
            self._kept = kept, 0, len(portfolio.recorded), strategy_state
        book, time = portfolio.book, int(self.bars.timestamps[at])
        cash, equity = float(book.money[ex.CASH]), float(book.money[ex.EQUITY])
        return Block(at, time, equity, cash, portfolio.event_count, int(book.tally[ex.TRADES]))

    def _blocks(self, kept: Kept) -> Iterable[Block]:
        times = self.bars.timestamps[np.array(kept.ends, np.int64)].tolist()
        return map(Block, kept.ends, times, kept.money(ex.EQUITY), kept.money(ex.CASH), kept.fills(), kept.trades())

    # Before the first bar.

    async def _prepare(self) -> None:
        strategy, bars = self.strategy, self.bars
        features: dict[str, NDArray[np.float64]] = {}
        if isinstance(strategy, WeightStrategy):
            kernels = compiling.compiled(KERNELS) if self._tier is not INTERPRETED else None
            targets = await self._turn.prepare(
                self, lambda: checked_targets(strategy, bars, self.request.lot_size, self._decided, kernels)
            )
            self._portfolio.know(targets, by_weight=self._decided.by_weight)
        elif isinstance(strategy, AsyncStrategy):
            given = await self._turn.prepare(self, strategy.prepare(bars))
            features = checked_features(strategy, bars, given, self._decided)
        else:
            features = await self._turn.prepare(
                self, lambda: checked_features(strategy, bars, strategy.prepare(bars), self._decided)
            )
        encoded = check_state(strategy.state)
        self._state = encoded if self._targets_known else None
        self._boundary = self._portfolio.boundary(-1, encoded)
        if not isinstance(strategy, WeightStrategy):
            self._hooks = Hooks(strategy, self._portfolio, self._turn)
            account = AccountView(self._portfolio, bars.symbols)
            self._bar = Bar(bars, features, self.request.seed, account)
            account.follow(self._bar)
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
        self._state = state.strategy_state if self._targets_known else None
        self._boundary = self._portfolio.boundary(state.bar_index, state.strategy_state)
        for _ in self._portfolio.digest_steps(self._boundary):
            if self._turn.clock() >= self._turn.deadline:
                await self._turn.pass_on()
        if not self.accepted and self._portfolio.state_digest(self._boundary) != state.state_digest:
            raise CheckpointCorruptedError(
                operation, f"the state at bar {state.bar_index} has another digest than was stored"
            )
        self.resumed_from = state.bar_index
        return state.bar_index + 1

    # Bars.

    async def _compute_targets(self, stop: int) -> None:
        portfolio, turn = self._portfolio, self._turn
        while portfolio.next_bar < stop:
            portfolio.advance(min(stop, portfolio.next_bar + portfolio.piece))
            if turn.clock() >= turn.deadline:
                await turn.pass_on()

    async def _compute_bars(self, first: int, stop: int) -> None:
        strategy = cast("Strategy | AsyncStrategy", self.strategy)
        bar = cast("Bar", self._bar)
        portfolio, turn, clock = self._portfolio, self._turn, self._turn.clock
        waits = isinstance(strategy, AsyncStrategy)
        on_bar: Callable[[Bar], Any] = strategy.on_bar
        begins = max(0, strategy.warmup - 1)
        hooks, told = cast("Hooks", self._hooks), cast("Hooks", self._hooks).wanted
        deadline = turn.deadline
        at = first
        try:
            while at < stop:
                if not self._window[0] <= at < self._window[1]:
                    self._window = (at, min(len(self.bars), at + max(1, min(512, _WINDOW_VALUES // self._k))))
                    bar._window(*self._window)
                start, end = self._window
                if not (told or waits) and at >= begins:
                    for i in range(at - start, min(stop, end) - start):
                        bar._i = i
                        on_bar(bar)
                        if bar._said:
                            self._listen(bar)
                        if clock() >= deadline:
                            await turn.pass_on()
                            deadline = turn.deadline
                    at = min(stop, end)
                    continue
                for at in range(at, min(stop, end)):  # noqa: B020 - an error names it
                    bar._i = at - start
                    if told and portfolio.quiet_until < at:
                        before = portfolio.event_count
                        portfolio.settle(at)
                        if portfolio.event_count > before:
                            await hooks.tell_fills(bar, portfolio.event_count - before)
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
            at = max(first, bar.index)  # the loop may have gone past it
            bar._decisions.clear()
            bar._recorded.clear()
            bar._said = False
            if isinstance(error, _ENDS_MORE):
                # They would end the generator, the loop or the process, and not this run alone.
                ends = "ended its process:" if isinstance(error, SystemExit) else "raised"
                failed = StrategyError(f"the strategy's code {ends} {error!r}")
                self._name_bar(failed, at)
                raise failed from error
            if not isinstance(error, Exception):
                raise
            cause = self._first_error(error, at)
            self._name_bar(cause, at)
            if cause is error:
                raise
            raise cause from error

    def _first_error(self, error: Exception, at: int) -> Exception:
        """Orders are carried out when the account is looked at: one of an earlier bar that can't be comes first."""
        if not isinstance(error, OrderError) or error.bar_index < 0:
            try:
                self._portfolio.advance(at)
            except OrderError as earlier:
                return earlier
        return error

    def _listen(self, bar: Bar) -> None:
        """Takes what was recorded and decided at a bar."""
        bar._said = False
        at, portfolio = bar.index, self._portfolio
        if bar._recorded:
            portfolio.recorded.extend((at, name, number) for name, number in bar._recorded.items())
            bar._recorded.clear()
        decisions = bar._decisions
        for j in sorted(decisions) if len(decisions) > 1 else decisions:
            kind, value, tag = decisions[j]
            if kind == ORDER:
                quantities, value = value, 0
                for quantity in quantities:
                    lots = ex.lots_of_quantity(quantity, portfolio.terms.lot_size)
                    if not -ex.MAX_LOTS < lots < ex.MAX_LOTS:
                        raise portfolio.too_many_lots(at)
                    value += lots
            portfolio.decide(at, j, kind, value, ex.NO_TAG if tag is None else portfolio.tag_number(tag))
        decisions.clear()

    def _time(self, at: int) -> str:
        return str(np.datetime64(int(self.bars.timestamps[at]), "ns").astype("datetime64[s]")) + "Z"

    def _name_bar(self, error: Exception, at: int) -> None:
        if isinstance(error, StrategyError):
            if error.bar_index < 0:
                error.bar_index, error.timestamp = at, self._time(at)
            at = error.bar_index
        self.failed_bar = at
        symbols = ", ".join(self.bars.symbols[:5]) + (", ..." if self._k > 5 else "")
        error.add_note(f"in {type(self.strategy).__name__} at bar {at}, {self._time(at)}, symbols {symbols}")

    # After the last bar.

    async def _close(self) -> None:
        """The closing step: what is open is closed at the last close, and what waits then is unfilled.

        What the strategy orders when it hears of the closing fills comes too late, like the orders of the last bar.
        """
        portfolio, last = self._portfolio, len(self.bars) - 1
        bar, hooks = self._bar, self._hooks
        filled = portfolio.close_all() if self.request.force_close else 0
        if bar is not None and hooks is not None:
            if not self._window[0] <= last < self._window[1]:
                self._window = (last, last + 1)
                bar._window(*self._window)
            bar._i = last - self._window[0]
            bar._begin_closing()
            try:
                if filled and hooks.wanted:
                    await hooks.tell_fills(bar, filled)
                    self._listen(bar)
                bar._may_order = False
                await hooks.tell_end(bar)
                self._listen(bar)
                portfolio.carry_out()
            except Exception as error:
                self._name_bar(error, last)
                raise
        book = portfolio.boundary(last, None).book
        self._unfilled = tuple(
            Unfilled(j, book.waiting[j], None if book.waiting_tag[j] < 0 else portfolio.tags[book.waiting_tag[j]])
            for j in range(self._k)
            if book.waiting[j] != 0
        )
        self._finished = True
