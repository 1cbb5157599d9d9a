"""Progress on stderr: a bar on a terminal, a line every few seconds elsewhere, nothing where none is wanted."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, Protocol

from ktrdr_async.cli.tables import time_text

if TYPE_CHECKING:
    from ktrdr_async.cli.output import Output
    from ktrdr_async.supervision.mailbox import Progress

ON_TERMINAL, ELSEWHERE = 0.1, 5.0  # seconds between two looks


class View(Protocol):
    """Something that shows progress."""

    interval: float  # seconds between two updates

    def update(self, now: Progress) -> None:
        """Shows where the run stands."""

    def close(self) -> None:
        """Takes itself off the screen."""


def view_of(output: Output, seconds: float | None) -> View:
    """What fits the stream that stderr is."""
    if output.quiet or sys.stderr is None:
        return Nothing()
    if sys.stderr.isatty() and seconds is None:
        return Bar(output)
    return Lines(output, seconds or ELSEWHERE)


class Nothing:
    """No progress."""

    interval = ELSEWHERE

    def update(self, now: Progress) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Lines:
    """A line every `interval` seconds."""

    def __init__(self, output: Output, interval: float) -> None:
        self.interval = interval
        self._output = output
        self._last: tuple[int, int | None] | None = None
        self._began = time.monotonic()

    def update(self, now: Progress) -> None:
        """Prints a line, unless nothing has moved, or there is nothing to tell yet."""
        state = (now.bar_index, now.checkpoint_bar)
        if now.bar_index >= 0 and state != self._last:
            self._last = state
            self._output.note(describe(now))

    def close(self) -> None:
        """Nothing is left on the screen."""


def describe(now: Progress) -> str:
    """Progress in one line. `bar` is the absolute index of the last boundary's last bar."""
    parts = [
        f"bar {now.bar_index:,} of {now.bars:,}",
        f"{now.fraction:.1%}",
        time_text(now.timestamp),
        f"equity {now.equity:,.2f}" if now.equity is not None else "",
        f"trades {now.trades:,}",
        f"{now.bars_per_second:,.0f} bars/s" if now.bars_per_second else "",
        f"{clock(now.seconds_left)} left" if now.seconds_left is not None else "",
        f"checkpoint {now.checkpoint_bar:,}" if now.checkpoint_bar is not None else "",
        "paused" if now.paused else "",
    ]
    return "  ".join(part for part in parts if part)


def clock(seconds: float) -> str:
    """Minutes and seconds, and hours where there are any."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


class Bar:
    """A bar that is redrawn in its place."""

    interval = ON_TERMINAL

    def __init__(self, output: Output) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._output = output
        console = Console(stderr=True, highlight=False, emoji=False)
        self._shown = Progress(
            BarColumn(bar_width=20),
            TextColumn("{task.description}", markup=False),
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task: Any = self._shown.add_task("starting", total=None)
        self._shown.start()
        output.above(lambda text: console.print(text, markup=False, soft_wrap=True))

    def update(self, now: Progress) -> None:
        """Draws it again."""
        if now.bar_index >= 0:
            self._shown.update(self._task, total=now.bars, completed=now.bar_index + 1, description=_short(now))
        self._shown.refresh()

    def close(self) -> None:
        """Takes it away; what is printed later is printed plainly."""
        self._output.above(None)
        self._shown.stop()


def _short(now: Progress) -> str:
    parts = [
        f"{now.fraction:4.0%}",
        time_text(now.timestamp),
        f"equity {now.equity:,.0f}" if now.equity is not None else "",
        f"trades {now.trades:,}",
        f"{now.bars_per_second:,.0f} bars/s" if now.bars_per_second else "",
        f"{clock(now.seconds_left)} left" if now.seconds_left is not None else "",
    ]
    return "  ".join(part for part in parts if part)
