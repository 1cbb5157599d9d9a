"""Wall time of a fresh process that runs a backtest over 35,000 bars of a CSV file, against one that imports pandas.

    python benchmarks/startup.py [--bars N] [--repeat R] [--json]

Each is a new interpreter from start to exit, reading the file, running and printing included, on one core; byte code
and file are in the system's caches, as all has run once before. `ratio` is its time over that of `python -c 'import
pandas'`. Ways to run:

- `script`: `python -c` with `print(kt.backtest_sync(...))`;
- `no_database`: `ktrdr-async run --no-database`;
- `database`: `ktrdr-async run` with an embedded PostgreSQL that is running already, on the other cores where there are
  any: connecting, claiming, saves and the stored result included.

The tier is chosen by the run itself: at this size no process loads numba.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from common import Column, Row, fresh, fresh_seconds, medians, parser, pin, private_server, report

import ktrdr_async as kt

BARS = 35_000
BUDGET = 2.0  # times `import pandas`; without a database
COSTS = {"commission": 0.00002, "slippage": 0.00005}
BARE, PANDAS, US = "python", "pandas", "ktrdr_async"
STRATEGIES = {  # job: how a script makes it, and how the command line names it
    "weights": ("import ktrdr_async as kt", "kt.SmaCross(10, 30)", ["sma_cross", "--param", "fast=10"]),
    "on_bar": ("import ktrdr_async as kt; from cross import Cross", "Cross()", ["cross:Cross"]),
}
COLUMNS = (
    Column("engine", "engine"),
    Column("job", "job"),
    Column("variant", "way"),
    Column("bars", "bars", ","),
    Column("seconds", "seconds", ".3f"),
    Column("ratio", "times import pandas", ".2f"),
    Column("budget", "at most", ".1f"),
)

Key = tuple[str, str, str]  # engine, job, way


def written(bars: int, directory: Path) -> Path:
    """A CSV file as people have them."""
    import pandas as pd

    made = kt.Bars.read(f"synthetic:?bars={bars}&seed=7&timeframe=1h")
    columns = {name: getattr(made, name)[:, 0] for name in ("open", "high", "low", "close", "volume")}
    frame = pd.DataFrame(columns, index=pd.DatetimeIndex(made.timestamps, name="timestamp"))
    frame.to_csv(path := directory / "market.csv")
    return path


def commands(data: Path) -> dict[Key, list[str]]:
    """Arguments of each fresh interpreter."""
    found: dict[Key, list[str]] = {(BARE, "nothing", "script"): ["-c", "pass"]}
    found[PANDAS, "import", "script"] = ["-c", "import pandas"]
    costs = [word for name, value in COSTS.items() for word in (f"--{name}", f"{value:f}")]
    for job, (imports, strategy, named) in STRATEGIES.items():
        terms = ", ".join(f"{name}={value}" for name, value in COSTS.items())
        script = f"{imports}; print(kt.backtest_sync({str(data)!r}, {strategy}, {terms}))"
        run = ["-m", "ktrdr_async", "run", "--data", str(data), "--strategy", *named, *costs]
        found[US, job, "script"] = ["-c", script]
        found[US, job, "no_database"] = [*run, "--no-database"]
        found[US, job, "database"] = run
    return found


def measure(bars: int, repeat: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as directory, private_server():
        runs = commands(written(bars, Path(directory)))
        for each in runs.values():
            fresh(*each)
        seconds = medians({key: once(each) for key, each in runs.items()}, repeat)
    rows = []
    for (engine, job, way), took in seconds.items():
        row = {"engine": engine, "job": job, "bars": bars if engine == US else 0, "variant": way, "seconds": took}
        row["ratio"] = took / seconds[PANDAS, "import", "script"]
        row["budget"] = BUDGET if engine == US and way != "database" and bars == BARS else None
        rows.append(row)
    return rows


def once(arguments: list[str]) -> Callable[[], float]:
    return lambda: fresh_seconds(*arguments)


def main() -> None:
    options = parser(__doc__, repeat=7, bars=f"{BARS:,}").parse_args()
    pin()
    rows = measure(options.bars or BARS, options.repeat)
    report(rows, COLUMNS, as_json=options.json, packages=[US, "numpy", "pandas", "pyarrow", "asyncpg"])


if __name__ == "__main__":
    main()
