"""Writes a run's frames to files that other tools read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ktrdr_async.errors import InputError

if TYPE_CHECKING:
    from ktrdr_async.backtesting.results import BacktestResults


def export(results: BacktestResults, directory: str | Path) -> list[Path]:
    """Writes fills, trades, round trips, equity and recorded values as CSV and Parquet, and `result.json`.

    Raises:
        InputError: if the directory can't be made or written.
    """
    target = Path(directory)
    if "\0" in str(target):
        raise InputError("the name of a directory has no zero byte", hint="name another directory")
    frames = {
        "fills": results.fills,
        "trades": results.trades,
        "round_trips": results.round_trips,
        "equity": results.equity_curve.reset_index(),
        "recorded": results.recorded,
        "unfilled": results.unfilled,
    }
    written: list[Path] = []
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, frame in frames.items():
            csv, parquet = target / f"{name}.csv", target / f"{name}.parquet"
            frame.to_csv(csv, index=False)  # floats come out as their shortest exact text
            with parquet.open("wb") as stream:  # pyarrow itself takes no path that isn't UTF-8
                frame.to_parquet(stream, index=False)
            written += [csv, parquet]
        outcome = target / "result.json"
        outcome.write_bytes(msgspec.json.format(msgspec.json.encode(results.outcome())) + b"\n")
        written.append(outcome)
    except OSError as error:
        raise InputError(
            f"{target}: can't write the results: {error.strerror or error}", hint="name another directory"
        ) from error
    return written
