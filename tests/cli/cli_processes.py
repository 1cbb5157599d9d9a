"""The real console entry in child processes: started, watched by what it prints, ended by pid."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PATIENCE = 60.0  # seconds for anything that is waited for
MARKET = "synthetic:?bars=3000&seed=7&timeframe=1h"
STRATEGIES = '''
import os, sys, time
import msgspec
import ktrdr_async as kt

class Seen(msgspec.Struct):
    bars: int = 0

class Counting(kt.Strategy):
    """Is long for 50 bars of every 100."""
    def __init__(self):
        self.state = Seen()
    def on_bar(self, bar):
        self.state.bars += 1
        if self.state.bars % 50 == 1:
            bar.target_weight(0, 0.5 if self.state.bars % 100 == 1 else 0.0)

class Breaking(kt.Strategy):
    """Talks, and breaks."""
    def __init__(self, at: int = 500):
        self.at, self.state = at, Seen()
    def on_bar(self, bar):
        print("a strategy's own words")
        if bar.index == self.at:
            self.breaks(bar)
    def breaks(self, bar):
        raise ValueError(f"not at bar {bar.index}")

class Stuck(kt.Strategy):
    """Doesn't give way at bar 150 until a file is there."""
    def __init__(self, file: str = ""):
        self.file, self.state = file, Seen()
    def on_bar(self, bar):
        if bar.index == 150:
            sys.stderr.write("stuck\\n")
            sys.stderr.flush()
            while not os.path.exists(self.file):
                time.sleep(0.01)
'''


class Ran:
    """What a command came to."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> dict[str, Any]:
        """The one object on stdout: exactly one line, and nothing else."""
        assert self.out.endswith("\n"), self
        assert self.out.count("\n") == 1, self
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found

    def __repr__(self) -> str:
        return f"exit {self.code}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"


class Live:
    """A command that is still running; its stderr is read by a thread, so that nothing blocks it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._arrived: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._arrived.put(line.rstrip("\n"))
        self._arrived.put(None)

    def until(self, reached: Callable[[str], bool] | str) -> str:
        """The first line from here on that is as asked for."""
        while (line := self._arrived.get(timeout=PATIENCE)) is not None:
            self.lines.append(line)
            if (reached in line) if isinstance(reached, str) else reached(line):
                return line
        raise AssertionError(f"it ended before {reached!r}: {self.lines}")

    def operation(self) -> str:
        """Its operation's id, once it is told."""
        return self.until(lambda line: line.startswith("operation ")).split()[1]

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait(PATIENCE)

    def end(self) -> Ran:
        """Its end."""
        assert self.process.stdout is not None
        out = self.process.stdout.read()
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        while (line := self._arrived.get(timeout=PATIENCE)) is not None:
            self.lines.append(line)
        return Ran(code, out, "\n".join(self.lines))


class Cli:
    """`python -m ktrdr_async` on one database, in a directory of its own."""

    def __init__(self, directory: Path, database: str | None) -> None:
        self.directory = directory
        (directory / "mine.py").write_text(STRATEGIES)
        self.environment = {
            name: value for name, value in os.environ.items() if name not in ("COLUMNS", "KTRDR_ASYNC_DATABASE")
        } | {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}  # as for the installed command: no directory by itself
        if database is not None:
            self.environment["KTRDR_ASYNC_DATABASE"] = database
        self._live: list[Live] = []

    def _popen(self, arguments: Sequence[str], extra: Mapping[str, str], **options: Any) -> subprocess.Popen[str]:
        given: dict[str, Any] = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "cwd": self.directory,
        } | options
        command = [sys.executable, "-m", "ktrdr_async", *arguments]
        return subprocess.Popen(command, text=True, env=self.environment | dict(extra), **given)

    def run(self, *arguments: str, env: Mapping[str, str] | None = None, **options: Any) -> Ran:
        """Runs a command to its end. No traceback but a strategy's own is ever right."""
        process = self._popen(arguments, env or {}, **options)
        out, err = process.communicate(timeout=PATIENCE)
        ran = Ran(process.returncode, out or "", err or "")
        assert "Traceback (most" not in ran.err, ran
        return ran

    def start(self, *arguments: str, env: Mapping[str, str] | None = None, **options: Any) -> Live:
        """Starts a command."""
        live = Live(self._popen(arguments, env or {}, **options))
        self._live.append(live)
        return live

    def show(self, operation_id: str) -> dict[str, Any]:
        return self.run("show", operation_id, "--json").json

    def until_shown(self, operation_id: str, reached: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Looks until an operation is as asked for."""
        for _ in range(200):
            found = self.show(operation_id)
            if reached(found):
                return found
        raise AssertionError(f"never: {found}")

    def digest(self, *arguments: str) -> str:
        """The digest of an uninterrupted run without any database."""
        found = self.run("run", *arguments, "--no-database", "--json").json["result_digest"]
        assert isinstance(found, str)
        return found

    def close(self) -> None:
        """Ends what a failed test left running."""
        for live in self._live:
            if live.process.poll() is None:
                live.process.kill()
            live.process.wait(PATIENCE)
            live._reader.join(PATIENCE)
            for stream in (live.process.stdout, live.process.stderr):
                if stream is not None:
                    stream.close()
