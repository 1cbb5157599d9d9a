"""The summary: what a person must see of a run before trusting it."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ktrdr_async.backtesting.results import BacktestResults

COSTLY = 0.2  # share of the capital above which costs are said in plain words


def percent(value: float | None) -> str:
    """A fraction as a percentage, or a dash."""
    return "-" if value is None else f"{value:+.2%}"


def number(value: float | None, places: int = 2) -> str:
    """A number with thousands' commas, or a dash."""
    return "-" if value is None else f"{value:,.{places}f}"


def minute_of(timestamp: int) -> str:
    """Nanoseconds since the epoch as a UTC minute; without pandas, whose import takes longer than a run."""
    return str(np.datetime64(timestamp, "ns").astype("datetime64[m]")).replace("T", " ")


def rows_of(results: BacktestResults) -> list[tuple[str, str]]:
    """The summary's rows: what it is, and its value as text."""
    m, counters, bars = results.metrics, results.counters, results.bars
    first, last = (minute_of(int(bars.timestamps[at])) for at in (0, -1))
    zero = sum(counters.zero_lots)
    late = results.run.lag_text()
    names = ", ".join(bars.symbols[:6]) + (" ..." if len(bars.symbols) > 6 else "")
    return [
        ("strategy", f"{results.strategy.name} {_parameters(results)}".strip()),
        (
            "bars",
            f"{len(bars):,} of {names}, {first} to {last} UTC",
        ),
        ("final equity", f"{number(m.final_equity)} from {number(m.initial_capital)}"),
        ("total return", f"{percent(m.total_return)}   buy and hold {percent(m.buy_and_hold_return)}"),
        ("annual return", f"{percent(m.annual_return)}   volatility {percent(m.volatility)}"),
        ("Sharpe", f"{number(m.sharpe)}   Sortino {number(m.sortino)}   by bars {number(m.sharpe_per_bar)}"),
        ("max drawdown", f"{percent(m.max_drawdown)}   longest {m.longest_drawdown_bars:,} bars"),
        ("trades", f"{m.trades:,}   won {percent(m.win_rate).lstrip('+')}   profit factor {number(m.profit_factor)}"),
        ("exposure", f"{m.exposure:.1%} of the bars   turnover {number(m.turnover, 1)} times the capital"),
        ("costs", f"{number(m.fees + m.slippage_paid)} = {m.costs_share:.1%} of the capital (fees {number(m.fees)})"),
        (
            "orders",
            f"{len(results.ledger):,} fills   {counters.cut:,} cut   {len(results.unfilled_orders):,} unfilled   "
            f"{zero:,} of zero lots",
        ),
        *([("run", f"{results.run.seconds:.1f} s, {late}")] if late else []),
        ("digest", results.digest),
    ]


def warnings_of(results: BacktestResults) -> list[str]:
    """What a person should know before trusting the figures, in plain words."""
    m, counters, symbols = results.metrics, results.counters, results.bars.symbols
    found = [*results.bars.warnings, *results.noticed]
    if not results.ledger:
        found.append("no order was filled: does the strategy decide anything on these bars, after its warm-up?")
    if m.costs_share > COSTLY:
        found.append(
            f"costs ate {m.costs_share:.0%} of the starting capital ({number(m.fees + m.slippage_paid)}): "
            f"are commission {results.request.commission} and slippage {results.request.slippage} those of this market?"
        )
    for j, first in enumerate(counters.zero_lots_first):
        if first is not None:
            found.append(
                f"{symbols[j]}: {counters.zero_lots[j]:,} weights came to zero lots; the first was for "
                f"{number(first[0])}, one lot is {number(first[1])}: use a smaller lot_size or more capital"
            )
    if counters.cut:
        found.append(
            f"{counters.cut:,} orders were cut to the buying power, {counters.cut_to_zero:,} of them to nothing"
        )
    if results.ruined_at is not None:
        found.append(
            f"equity was gone at bar {results.ruined_at}; {counters.refused_after_ruin:,} later orders were refused"
        )
    for symbol, bars in results.stale_bars.items():
        found.append(f"{symbol} was held for {bars:,} bars at which it had no bar, marked at its last close")
    if counters.ordered_rows > 5 and counters.ordered_rows * 2 > len(results.bars):
        found.append(
            f"{counters.ordered_rows:,} of {len(results.bars):,} bars ordered something: give NaN where nothing should "
            "change (`on_change` does it), or set min_trade"
        )
    if results.open_positions:
        found.append(f"left open: {', '.join(f'{q:g} {s}' for s, q in results.open_positions.items())}")
    run = results.run
    if run.long_call:
        more = "" if run.long_calls == 1 else (
            f"; {run.long_calls:,} calls took more than 50 ms, the longest {run.longest_call_ms:.0f} ms"
        )  # fmt: skip
        found.append(f"{run.long_call}, and everybody else on it waited{more}")
    found += [f"went on in spite of a difference: {accepted}" for accepted in results.accepted_mismatches]
    return found + m.notes


def summary_of(results: BacktestResults) -> str:
    """The figures that matter, as plain text."""
    rows = rows_of(results)
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    return "\n".join(lines + [f"! {warning}" for warning in results.warnings])


def html_of(results: BacktestResults) -> str:
    """The summary for a notebook: a small equity curve over the table, everything escaped."""
    width, height, points = 640, 120, 320
    equity = results.equity
    picked = [float(equity[round(i * (len(equity) - 1) / (points - 1))]) for i in range(points)]
    low, high = min(picked), max(picked)
    scale = (height - 4) / (high - low) if high > low else 0.0
    line = " ".join(
        f"{i * width / (points - 1):.1f},{height - 2 - (v - low) * scale:.1f}" for i, v in enumerate(picked)
    )
    rows = "".join(
        f"<tr><th style='text-align:left'>{escape(name)}</th><td style='text-align:left'>{escape(value)}</td></tr>"
        for name, value in rows_of(results)
    )
    notes = "".join(f"<li>{escape(warning)}</li>" for warning in results.warnings)
    return (
        f"<svg width='{width}' height='{height}' role='img' aria-label='equity'>"
        f"<polyline points='{line}' fill='none' stroke='currentColor'/></svg>"
        f"<table>{rows}</table>{f'<ul>{notes}</ul>' if notes else ''}"
    )


def _parameters(results: BacktestResults) -> str:
    return ", ".join(f"{name}={value}" for name, value in results.strategy.parameters.items())
