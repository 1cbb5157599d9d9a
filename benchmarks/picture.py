"""Draws the README's picture and prints its table from what the other scripts print with --json.

    python benchmarks/picture.py [--bars N] [--repeat R]

Runs `peers.py` and `loop_lag.py`, writes `benchmarks/speed.svg` beside this file, and prints the table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import machine, version_of

HERE = Path(__file__).resolve().parent
US = "ktrdr_async"
WIDTH, LINE, LEFT = 720, 24, 190  # pixels
LOW, HIGH = 1e3, 1e8  # bars a second, the ends of the axis


def rows_of(script: str, *arguments: str) -> list[dict[str, Any]]:
    """What a script prints."""
    done = subprocess.run(
        [sys.executable, str(HERE / script), *arguments, "--json"], stdout=subprocess.PIPE, text=True, check=True
    )
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def table(rows: list[dict[str, Any]], lags: list[dict[str, Any]]) -> str:
    """Two tables in Markdown."""
    lines = ["| job | engine | bars | seconds | bars a second | theirs / ours |", "|---|---|---:|---:|---:|---:|"]
    for row in rows:
        ratio = "not comparable" if row["ratio"] is None else f"{row['ratio']:.1f}"
        engine = f"{row['engine']}, with checkpoints" if row["variant"] == "checkpoints" else row["engine"]
        lines.append(
            f"| {row['job']} | {engine} | {row['bars']:,} | {row['seconds']:.3f} | {row['bars'] / row['seconds']:,.0f} "
            f"| {ratio} |"
        )
    lines += ["", "| beside | engine | ticks late: p50 | p99 | max, ms |", "|---|---|---:|---:|---:|"]
    for lag in lags:
        lines.append(
            f"| {lag['operations']} x {lag['job']} | {lag['engine']} | {lag['p50_ms']:.2f} | {lag['p99_ms']:.2f} "
            f"| {lag['max_ms']:.1f} |"
        )
    return "\n".join(lines)


def picture(rows: list[dict[str, Any]]) -> str:
    """Bars a second of each engine and job on a logarithmic axis, as SVG."""

    def place(speed: float) -> float:
        share = (math.log10(speed) - math.log10(LOW)) / (math.log10(HIGH) - math.log10(LOW))
        return LEFT + share * (WIDTH - LEFT - 90)

    shown = [row for row in rows if row["variant"] == "warm" and row["ratio"] is not None]
    height = LINE * (len(shown) + len({row["job"] for row in shown})) + 46
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="10" y="20" font-weight="bold">Bars a second, SMA 10/30, {shown[0]["bars"]:,} bars, one core</text>',
    ]
    for power in range(int(math.log10(LOW)), int(math.log10(HIGH)) + 1):
        x = place(10.0**power)
        parts.append(f'<line x1="{x:.0f}" y1="30" x2="{x:.0f}" y2="{height - 16}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.0f}" y="{height - 4}" fill="#666" text-anchor="middle">10^{power}</text>')
    y, job = 34, ""
    for row in sorted(shown, key=lambda row: (row["job"] != "weights", row["seconds"] / row["bars"])):
        if row["job"] != job:
            job = row["job"]
            y += LINE
            parts.append(f'<text x="10" y="{y - 8}" font-weight="bold">{job}</text>')
        speed = row["bars"] / row["seconds"]
        colour = "#1f6feb" if row["engine"] == US else "#9aa4b2"
        parts.append(f'<text x="{LEFT - 8}" y="{y + 8}" text-anchor="end">{row["engine"]}</text>')
        parts.append(f'<rect x="{LEFT}" y="{y - 5}" width="{place(speed) - LEFT:.0f}" height="16" fill="{colour}"/>')
        parts.append(f'<text x="{place(speed) + 6:.0f}" y="{y + 8}">{speed:,.0f}</text>')
        y += LINE
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--bars", type=int, default=1_000_000, help="of the jobs (default 1 M)")
    options.add_argument("--repeat", type=int, default=5, help="interleaved repetitions (default 5)")
    given = options.parse_args()
    rows = rows_of("peers.py", "--bars", str(given.bars), "--repeat", str(given.repeat), "--no-cold")
    lags = [
        row
        for row in rows_of("loop_lag.py", "--operations", "1", "10", "100", "--jobs", "weights", "on_bar")
        if row["what"] == "ticker" and row["part"] == "bars"
    ]
    (HERE / "speed.svg").write_text(picture(rows), encoding="utf-8")
    print(table(rows, lags))
    named = ("numpy", "pandas", "numba", "vectorbt", "backtesting", "backtrader")
    peers = ", ".join(f"{name} {found}" for name in named if (found := version_of(name)))
    print(f"\n{time.strftime('%Y-%m-%d')}, {machine()}; {peers}: `python benchmarks/picture.py`")


if __name__ == "__main__":
    main()
