"""What the benchmarks share: one core, interleaved medians, and rows as a table for people or as JSON for machines."""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

Row = dict[str, Any]
Key = TypeVar("Key", bound=Hashable)

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package beside these scripts, whatever else is installed
ALL_CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None


class Column(NamedTuple):
    """A column of the table: a row's key, what stands above it, and how its values are written."""

    key: str
    title: str
    form: str = ""  # a format specification; None is written as "-"


def parser(doc: str | None, *, repeat: int, bars: str | None = None) -> argparse.ArgumentParser:
    """`--json` and `--repeat`; with `bars`, which says the sizes that one size is run instead of, `--bars N` too."""
    made = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    if bars is not None:
        made.add_argument("--bars", type=int, metavar="N", help=f"one size instead of {bars}")
    made.add_argument("--repeat", type=int, default=repeat, metavar="R", help="interleaved repetitions (%(default)s)")
    made.add_argument("--json", action="store_true", help="the rows as one JSON list")
    return made


def pin() -> None:
    """Keeps this process, and what it starts, on one core."""
    if ALL_CORES is not None:
        os.sched_setaffinity(0, {min(ALL_CORES)})


@contextmanager
def on_all_cores() -> Iterator[None]:
    """For starting what isn't measured (a database server): it keeps the cores that it was started with."""
    if ALL_CORES is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, ALL_CORES)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def private_server() -> Iterator[dict[str, Any]]:
    """An embedded PostgreSQL of our own on a disk, which `BacktestWorker.open()` finds; nothing of it stays.

    Yields what `asyncpg.connect` needs to reach it.
    """
    from ktrdr_async.storage.database import DATABASE_VARIABLE
    from ktrdr_async.storage.embedded import EmbeddedServer
    from ktrdr_async.storage.places import HOME_VARIABLE

    home = Path(tempfile.mkdtemp(prefix="ktrdr-benchmark-"))
    home.chmod(0o755)  # as root, the server's own account has to pass
    os.environ[HOME_VARIABLE] = str(home)
    os.environ.pop(DATABASE_VARIABLE, None)
    server = EmbeddedServer(home)
    sockets = ""
    try:
        with on_all_cores():
            where = server.start()
        sockets = where.host
        yield {"host": where.host, "port": where.port, "user": where.user, "database": where.database, "ssl": False}
    finally:
        server.release()
        if server.wait_until_stopped(60):
            shutil.rmtree(sockets, ignore_errors=True)
            shutil.rmtree(home, ignore_errors=True)


def medians(jobs: Mapping[Key, Callable[[], float]], repeat: int) -> dict[Key, float]:
    """The median of what each job returns; all are run in turn, `repeat` times, so that a slow minute hits all."""
    found: dict[Key, list[float]] = {key: [] for key in jobs}
    for _ in range(repeat):
        for key, job in jobs.items():
            gc.collect()
            found[key].append(job())
    return {key: statistics.median(values) for key, values in found.items()}


def fresh(*arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a fresh interpreter with this package and these scripts on its path. :raises RuntimeError: if it fails."""
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH")]))
    whole = {**os.environ, "PYTHONPATH": path, **(env or {})}
    done = subprocess.run([sys.executable, *arguments], env=whole, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"python {' '.join(arguments)[:200]} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done


def fresh_seconds(*arguments: str, env: Mapping[str, str] | None = None) -> float:
    """Wall time of a fresh interpreter, from start to exit."""
    started = time.perf_counter()
    fresh(*arguments, env=env)
    return time.perf_counter() - started


def machine() -> str:
    """Processor and Python."""
    model = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    cores = f"one of {len(ALL_CORES)} cores" if ALL_CORES is not None else "not pinned to a core"
    return f"{model} ({cores}), {platform.system()}, {platform.python_implementation()} {platform.python_version()}"


def versions(packages: Iterable[str]) -> str:
    """Installed versions; what is missing is named so."""
    return ", ".join(f"{name} {version_of(name) or 'missing'}" for name in packages)


def version_of(package: str) -> str | None:
    """A package's version; None: it isn't installed."""
    if package == "ktrdr_async":  # the one beside these scripts
        import ktrdr_async

        return ktrdr_async.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def report(
    rows: Sequence[Row],
    columns: Sequence[Column],
    *,
    as_json: bool,
    packages: Iterable[str] = (),
    notes: Iterable[str] = (),
) -> None:
    """Prints rows: as a table under a line on the machine, or as one JSON list."""
    if as_json:
        print(json.dumps(list(rows)))
        return
    print(f"{time.strftime('%Y-%m-%d')}, {machine()}")
    print(f"{versions(packages)}\n")
    cells = [[column.title for column in columns]]
    cells += [[_written(row.get(column.key), column.form) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    words = [not any(isinstance(row.get(column.key), int | float) for row in rows) for column in columns]
    for line in cells:
        placed = [c.ljust(w) if word else c.rjust(w) for c, w, word in zip(line, widths, words, strict=True)]
        print("  ".join(placed).rstrip())
    for note in notes:
        print(f"\n{note}")


def _written(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form if isinstance(value, int | float) else "")
