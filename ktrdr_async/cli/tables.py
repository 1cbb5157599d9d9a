"""What commands show: a run's summary, lists of operations, one operation. A digest is never cut and never wrapped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from ktrdr_async.cli.chart import chart

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from rich.table import Table

    from ktrdr_async.backtesting.results import Outcome
    from ktrdr_async.cli.output import Output
    from ktrdr_async.operations.lifecycle import Operation

Rows = Sequence[tuple[str, str]]


def time_text(nanoseconds: int | None) -> str:
    """A bar's time, UTC, to the minute."""
    if nanoseconds is None:
        return "-"
    try:
        return f"{datetime.fromtimestamp(nanoseconds // 1_000_000_000, UTC):%Y-%m-%d %H:%M}"
    except (OverflowError, ValueError, OSError):  # no bar has it: what is stored was changed
        return f"{nanoseconds} ns"


def moment(when: datetime | None) -> str:
    """A time of the server's clock, UTC, to the second."""
    return "-" if when is None else f"{when.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def percent(value: float | None, sign: str = "+") -> str:
    """A fraction as a percentage, or a dash."""
    return "-" if value is None else f"{value:{sign}.2%}"


def number(value: float | None, places: int = 2) -> str:
    """A number with thousands' commas, or a dash."""
    return "-" if value is None else f"{value:,.{places}f}"


def summary_rows(outcome: Outcome, request: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures that matter, from what is stored of a run: no data are needed."""
    m, run, counters = outcome.metrics, outcome.run, outcome.counters
    named = ", ".join(f"{name}={value}" for name, value in outcome.strategy.parameters.items())
    symbols = ", ".join(outcome.symbols[:6]) + (" ..." if len(outcome.symbols) > 6 else "")
    first, last = time_text(outcome.first_timestamp), time_text(outcome.last_timestamp)
    resumed = ", ".join(f"{bar:,}" for bar in run.resumed_from)
    how = f"{run.seconds:.1f} s, {run.checkpoints_saved:,} checkpoints"
    late = run.lag_text().removeprefix("loop ")
    return [
        ("strategy", f"{outcome.strategy.name} {named}".strip()),
        ("bars", f"{outcome.bars:,} of {symbols}, {first} to {last} UTC"),
        ("final equity", f"{number(m.final_equity)} from {number(m.initial_capital)}"),
        ("total return", f"{percent(m.total_return)}   buy and hold {percent(m.buy_and_hold_return)}"),
        ("annual return", f"{percent(m.annual_return)}   volatility {percent(m.volatility, '')}"),
        ("Sharpe", f"{number(m.sharpe)}   Sortino {number(m.sortino)}   by bars {number(m.sharpe_per_bar)}"),
        ("max drawdown", f"{percent(m.max_drawdown)}   longest {m.longest_drawdown_bars:,} bars"),
        ("trades", f"{m.trades:,}   won {percent(m.win_rate, '')}   profit factor {number(m.profit_factor)}"),
        ("exposure", f"{m.exposure:.1%} of the bars   turnover {number(m.turnover, 1)} times the capital"),
        (
            "costs",
            f"{number(m.fees + m.slippage_paid)} = {m.costs_share:.1%} of the capital "
            f"(commission {request.get('commission')}, slippage {request.get('slippage')})",
        ),
        ("orders", f"{outcome.events:,} fills   {counters.cut:,} cut   {len(outcome.unfilled):,} unfilled"),
        ("run", how + (f", resumed from bars {resumed}" if resumed else "")),
        *([("loop", late)] if late else []),
    ]


def print_pairs(output: Output, rows: Rows, *, title: str = "") -> None:
    """Two columns: what it is, and its value."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column()
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(Text(name, style="dim"), Text(value))
    output.draw(*([Text(title, style="bold")] if title else []), grid)


def print_digest(output: Output, digest: str, label: str = "digest") -> None:
    """A digest whole, on a line that nothing wraps."""
    if output.console().width < len(label) + 10 + len(digest):
        output.line(label)
        output.line(digest)
    else:
        output.line(f"{label:<14} {digest}")


def print_summary(
    output: Output,
    operation_id: str | None,
    outcome: Outcome,
    request: Mapping[str, Any],
    equity: Sequence[float] | NDArray[np.float64] | None,
) -> None:
    """The end of a run: figures, equity as a chart where it is at hand, warnings, digest."""
    from rich.text import Text

    title = f"operation {operation_id}" if operation_id else "backtest, not kept in a database"
    print_pairs(output, summary_rows(outcome, request), title=title)
    if equity is not None:
        print_equity(output, equity)
    if outcome.warnings:
        output.draw(*[Text(f"! {warning}", style="yellow") for warning in outcome.warnings])
    print_digest(output, outcome.digest)


def print_equity(output: Output, equity: Sequence[float] | NDArray[np.float64]) -> None:
    """The equity curve as a small chart."""
    for line in chart(equity, width=min(output.console().width, 80), encoding=output.encoding):
        output.line(line)


def print_table(
    output: Output, columns: Sequence[str], rows: Sequence[Sequence[str]], *, optional: Sequence[str] = ()
) -> None:
    """A table, without optional columns that the terminal has no room for.

    Where that is still too wide, a block of lines for each row instead: nothing is ever cut.
    """
    console = output.console()
    left_out = [set(optional[:count]) for count in range(len(optional) + 1)]
    for missing in left_out:
        shown = [i for i, column in enumerate(columns) if column not in missing]
        table = _table([columns[i] for i in shown], [[row[i] for i in shown] for row in rows])
        if console.measure(table, options=console.options.update(width=10_000)).maximum <= console.width:
            output.draw(table)
            return
    room = max(len(column) for column in columns)
    for row in rows:
        for column, cell in zip(columns, row, strict=True):
            output.line(f"{column:<{room}} {cell}".rstrip())
        output.line()


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*[Text(cell) for cell in row])
    return table


def print_operations(output: Output, rows: Sequence[Operation]) -> None:
    """A list of operations."""
    columns = ("id", "status", "strategy", "data", "bar/bars", "checkpoint", "updated (UTC)")
    print_table(output, columns, [_cells(row) for row in rows], optional=("data", "strategy"))


def _cells(row: Operation) -> tuple[str, ...]:
    done, bars = progress_of(row)
    where = "-" if row.checkpoint_bar is None else f"{row.checkpoint_bar:,} {row.checkpoint_type}"
    data = str(row.request.get("data") or "-")
    shown = data if len(data) <= 40 else f"...{data[-37:]}"
    bar = f"{'-' if done is None else f'{done:,}'}/{'-' if bars is None else f'{bars:,}'}"
    return (
        row.operation_id,
        row.status.value + (" (dead)" if owner_is_dead(row) else ""),
        str(row.request.get("strategy")),
        shown,
        bar,
        where,
        f"{updated(row).astimezone(UTC):%m-%d %H:%M}",
    )


def progress_of(row: Operation) -> tuple[int | None, int | None]:
    """An operation's last known bar, and how many it has. :raises CheckpointCorruptedError: if its row isn't whole."""
    from ktrdr_async.supervision.stored import check

    check(row)
    told = row.progress or {}
    bars = told.get("bars") or None
    bar = told.get("bar_index", -1)
    if row.result is not None:
        bars = row.result.get("bars", bars)
        bar = bars - 1 if bars else bar
    if row.checkpoint_bar is not None:
        bar = max(bar, row.checkpoint_bar)
    return (bar if bar >= 0 else None), bars


def owner_is_dead(row: Operation) -> bool:
    """Whether a row says `running`, and its process is known to be gone: `resume` takes it over at once."""
    from ktrdr_async.operations.lifecycle import Status, is_alive

    return row.status is Status.RUNNING and row.owner is not None and is_alive(row.owner) is False


def updated(row: Operation) -> datetime:
    """When an operation was last touched."""
    return max(when for when in (row.created_at, row.started_at, row.heartbeat_at, row.finished_at) if when is not None)
