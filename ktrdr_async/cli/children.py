"""Child processes of the demonstration: the same command line, started, watched, and killed by pid."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from ktrdr_async.errors import KtrdrError

PATIENCE = 60.0  # seconds for a child to get anywhere

_PROGRESS = re.compile(r"bar ([\d,]+) of [\d,]+.*?(?:  checkpoint ([\d,]+))?$")


class DemoError(KtrdrError):
    """A child didn't do what the story says; its own words are in the message."""

    code = "demo_failed"

    def __init__(self, message: str, words: str) -> None:
        super().__init__(f"{message}: {words}" if words else message)


class Told(msgspec.Struct):
    """What a child's last line of progress said."""

    bar: int = -1
    checkpoint: int | None = None


class Child:
    """A `ktrdr-async` in a session of its own, so that a Ctrl-C at the terminal reaches its parent alone."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.told = Told()
        self._process = process
        self._lines: list[str] = []

    @classmethod
    async def start(cls, *arguments: str, environment: Mapping[str, str]) -> Child:
        """Starts one."""
        # Where this process doesn't look for modules in the current directory, its children don't either.
        safe = () if "" in sys.path or os.getcwd() in sys.path else ("-P",)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *(*safe, "-m", "ktrdr_async", *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        return cls(process)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def words(self) -> str:
        """The end of what it said to people."""
        return " | ".join(self._lines[-3:])

    async def until(self, reached: Callable[[Told], bool]) -> None:
        """Reads its progress until it is somewhere. :raises DemoError: if it ends before, or gets nowhere."""
        await self._read(lambda _: reached(self.told))

    async def says(self, text: str) -> None:
        """Reads until it says something. :raises DemoError: if it doesn't."""
        await self._read(lambda line: text in line)

    def kill(self) -> None:
        """`kill -9`."""
        if self._process.returncode is None:
            os.kill(self._process.pid, signal.SIGKILL)

    def interrupt(self) -> None:
        """What Ctrl-C does."""
        self._process.send_signal(signal.SIGINT)

    async def ended(self) -> tuple[dict[str, Any], int]:
        """Waits for its end: the object that it printed, and its exit code."""
        stream = self._process.stdout
        assert stream is not None  # noqa: S101 - it is a pipe
        printed, _ = await asyncio.gather(stream.read(), self._read(None))
        code = await self._process.wait()
        return (json.loads(printed) if printed.strip() else {}), code

    async def gone(self) -> None:
        """Waits until it isn't there any more; what it printed is of no interest."""
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                await stream.read()
        await self._process.wait()

    async def _read(self, enough: Callable[[str], bool] | None) -> None:
        stream = self._process.stderr
        assert stream is not None  # noqa: S101 - it is a pipe
        try:
            async with asyncio.timeout(PATIENCE):
                while line := (await stream.readline()).decode(errors="replace").rstrip():
                    match = _PROGRESS.match(line)
                    if match is not None:
                        checkpoint = match[2]
                        self.told = Told(_whole(match[1]), None if checkpoint is None else _whole(checkpoint))
                    else:
                        self._lines.append(line)
                    if enough is not None and enough(line):
                        return
        except TimeoutError:
            raise DemoError(f"process {self.pid} got nowhere in {PATIENCE:.0f} s", self.words()) from None
        if enough is not None:
            raise DemoError(f"process {self.pid} ended too early", self.words())


def _whole(text: str) -> int:
    return int(text.replace(",", ""))
