"""A real terminal: the bar, Ctrl-C as it is typed, questions, and the demonstration."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from cli_processes import MARKET, Cli

pytestmark = pytest.mark.anyio

RUN = ("run", "--data", MARKET, "--strategy", "sma_cross")


class Terminal:
    """A command on a pseudo-terminal that is its controlling one."""

    def __init__(self, cli: Cli, *arguments: str) -> None:
        self._master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, b"\x18\x00\x50\x00\x00\x00\x00\x00")  # 24 lines of 80 columns
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CONTROLLED, *arguments],
            env=cli.environment | {"TERM": "xterm"},
            cwd=cli.directory,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        self.seen = ""

    def until(self, text: str) -> None:
        while text not in self.seen:
            assert self._read(), f"it ended before {text!r}: {self.seen}"

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def end(self) -> int:
        while self._read():
            pass
        return self.process.wait(60)

    def hang_up(self) -> None:
        os.close(self._master)
        self._master = -1

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(60)
        if self._master >= 0:
            os.close(self._master)

    def _read(self) -> bool:
        try:
            piece = os.read(self._master, 65_536)
        except OSError:  # EIO: Linux's end of a terminal
            return False
        self.seen += piece.decode(errors="replace")
        return bool(piece)


_CONTROLLED = (
    "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "from ktrdr_async.cli import main; sys.exit(main(sys.argv[1:]))"
)


@contextmanager
def on_terminal(cli: Cli, *arguments: str) -> Iterator[Terminal]:
    made = Terminal(cli, *arguments)
    try:
        yield made
    finally:
        made.close()


async def test_progress_is_a_bar_and_a_typed_ctrl_c_saves(cli: Cli) -> None:
    with on_terminal(cli, *RUN, "--throttle", "100", "--id", "typed") as terminal:
        terminal.until("operation typed")
        terminal.until("━")
        terminal.until("equity")
        terminal.type("\x03")
        terminal.until("go on with: ktrdr-async resume typed")
        assert terminal.end() == 130
        assert "Traceback" not in terminal.seen
        assert terminal.seen.endswith("resume typed\r\n")  # the bar is gone, the cursor is back
        assert terminal.seen.rfind("\x1b[?25h") > terminal.seen.rfind("\x1b[?25l")
    assert cli.show("typed")["status"] == "cancelled"
    with on_terminal(cli, "checkpoints", "delete", "typed") as terminal:
        terminal.until("[y/N]")
        terminal.type("\x03")
        assert terminal.end() == 130
        assert "Traceback" not in terminal.seen
    for answer, left in (("n", True), ("y", False)):
        with on_terminal(cli, "checkpoints", "delete", "typed") as terminal:
            terminal.until("[y/N]")
            terminal.type(f"{answer}\r")
            assert terminal.end() == (1 if left else 0)
        assert (cli.show("typed")["checkpoint"] is not None) is left
    with on_terminal(cli, "checkpoints", "delete", "typed") as terminal:
        terminal.until("typed has no checkpoint")
        assert terminal.end() == 0


async def test_a_terminal_that_is_closed_interrupts_with_a_checkpoint(cli: Cli) -> None:
    with on_terminal(cli, *RUN, "--throttle", "100", "--id", "hung-up") as terminal:
        terminal.until("operation hung-up")
        terminal.until("equity")
        terminal.hang_up()
        assert terminal.process.wait(60) == 129
    shown = cli.show("hung-up")
    assert (shown["status"], shown["checkpoint"]["type"]) == ("interrupted", "shutdown")


async def test_the_demonstration_at_any_width(cli: Cli) -> None:
    ran = cli.run("demo", env={"COLUMNS": "20"})
    assert ran.code == 0, ran
    lines = ran.out.splitlines()
    digest = lines[lines.index("digest") + 1]
    assert len(digest) == 64
    assert lines.count(f"digest        {digest[:12]}") == 2
    assert "kill -9 of process" in ran.out
    assert "Ctrl-C twice, 2nd during the save" in ran.out
    assert "█" in ran.out
    assert lines[-1].startswith("your own data: ktrdr-async run --data ")
    assert "EURUSD" in ran.err
    assert cli.run("list", "--json").json == {"operations": []}


async def test_an_interrupted_demonstration_cleans_up(cli: Cli) -> None:
    live = cli.start("demo", "--json")
    live.until("resumed by process")
    live.send(signal.SIGINT)
    ran = live.end()
    assert ran.code == 130
    assert ran.json["error"]["code"] == "interrupted"
    assert "Traceback" not in ran.err
    assert cli.run("list", "--json").json == {"operations": []}
