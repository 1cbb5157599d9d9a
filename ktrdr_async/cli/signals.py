"""SIGINT, SIGTERM and SIGHUP: one handler from the first line to the last, so that no signal falls between two of them.

Before the loop there is nothing to lose, and a signal ends the process. In the loop a signal is handed to whatever the
command does at that moment. Once it is settled what came of it, signals change nothing any more.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ktrdr_async.cli.output import blank, one_line, wants_json

if TYPE_CHECKING:
    import asyncio
    from types import FrameType

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
if hasattr(signal, "SIGHUP"):
    NAMES[signal.SIGHUP] = "SIGHUP"

React = Callable[[int], None]


class Interrupted(Exception):  # noqa: N818 - no error: a person's wish
    """A signal ended the command before anything was started, or while it only looked."""


class Signals:
    """What arrived, and who is told.

    Attributes:
        first: the first signal, which decides the exit code; None: none came.
        count: how many came.
        react: called on the loop with each signal's number.
        settled: what came of the command is decided, and only remains to be told.
        result: descriptor of the stream that the one object of `--json` goes to.
    """

    def __init__(self, tokens: Sequence[str]) -> None:
        self.first: int | None = None
        self.count = 0
        self.react: React | None = None
        self.settled = False
        self.result = 1
        self._wants_json = wants_json(tokens)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._told = 0
        self._taken: list[signal.Signals] = []

    @property
    def exit_code(self) -> int:
        """128 and the first signal's number."""
        return 128 + (self.first or signal.SIGINT)

    @property
    def name(self) -> str:
        """The first signal, as people call it."""
        return NAMES.get(signal.Signals(self.first or signal.SIGINT), "a signal")

    def install(self) -> None:
        """Takes the signals over, SIGINT also where a shell's background job inherited it as ignored or blocked."""
        self._taken = [
            number for number in NAMES if NAMES[number] != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN
        ]
        for number in self._taken:
            signal.signal(number, self._arrived)
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self._taken)

    def finish(self) -> None:
        """The last word is being said: nothing cuts it off, nor the interpreter's end, which takes handlers away."""
        self.settled = True
        for number in self._taken:
            signal.signal(number, signal.SIG_IGN)

    @contextmanager
    def on_this_loop(self, react: React) -> Iterator[None]:
        """Hands signals to `react`, and later to what `self.react` is set to, as callbacks of the running loop."""
        import asyncio
        import socket

        loop = asyncio.get_running_loop()
        # The kernel may give the signal to another thread: a byte in this socket wakes the loop for the handler.
        reader, writer = socket.socketpair()
        reader.setblocking(False)
        writer.setblocking(False)
        loop.add_reader(reader, lambda: reader.recv(4096))
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        self.react, self._loop, self.settled = react, loop, False
        try:
            yield
        finally:
            self._loop = None
            signal.set_wakeup_fd(before)
            loop.remove_reader(reader)
            reader.close()
            writer.close()

    def _arrived(self, number: int, _frame: FrameType | None) -> None:
        self.count += 1
        if self.first is None:
            self.first = number
        if self.settled:
            return
        if self._loop is not None:
            if self.count - self._told > 2:  # the loop stands still: code of a strategy doesn't give way
                kill = f"`kill -9 {os.getpid()}` ends it, and the last checkpoint stands"
                _write(2, f"the process is busy and can't save now; {kill}\n")
            self._loop.call_soon_threadsafe(self._tell, number)
        else:
            self._leave(number)

    def _tell(self, number: int) -> None:
        self._told += 1
        if self.react is not None:
            self.react(number)

    def _leave(self, number: int) -> None:
        message = f"{self.name}: nothing was started"
        _write(2, f"{message}\n")
        if self._wants_json:
            _write(
                self.result,
                one_line(blank() | {"error": {"code": "interrupted", "message": message, "hint": ""}}) + "\n",
            )
        os._exit(128 + number)


def _write(descriptor: int, text: str) -> None:
    # Not through sys.stderr: a handler may interrupt a write to it, and its buffer isn't reentrant.
    try:
        os.write(descriptor, text.encode())
    except OSError:
        return
