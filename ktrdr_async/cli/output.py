"""Where words go: one JSON object to stdout or results to people there, everything else to stderr; never a password.

Nothing here imports more than the standard library until something is to be drawn.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

WIDEST_PLAIN = 10_000  # columns: what isn't a terminal gets every table whole

# The example that a hint gives is no secret.
_USER_INFO = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)(?!user:password@host)[^\s'\"]*@")
_PASSWORD = re.compile(r"((?:ssl)?password\s*=\s*)('[^']*'|[^\s&'\"]+)", re.IGNORECASE)


_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def blank() -> dict[str, Any]:
    """The object that `--json` prints, before anything is known."""
    return {
        "operation_id": None,
        "status": None,
        "result_digest": None,
        "metrics": None,
        "trades": None,
        "bars": None,
        "resumed_from": [],
        "checkpoints": {"saved": 0, "failed": 0},
    }


def one_line(tree: Any) -> str:
    """JSON in one line of ASCII. JSON has no NaN and no infinities: they become null."""
    return json.dumps(_finite(tree), allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()  # a lone surrogate is no character
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plain(text: str) -> str:
    """The text with its control characters spelled out, but for line ends and tabs: a terminal would obey them."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def wants_json(tokens: Sequence[str]) -> bool:
    """Whether a command line asks for the one object, however wrong the rest of it is."""
    return any(word == "--json" or word.lower() in ("--json=true", "--json=yes", "--json=1") for word in tokens)


class Secrets:
    """Passwords that a command line or the environment holds, to be kept out of every message."""

    def __init__(self, texts: Sequence[str]) -> None:
        from urllib.parse import unquote, urlsplit

        found: set[str] = set()
        for text in texts:
            for url in re.findall(r"[A-Za-z][A-Za-z0-9+.-]*://\S+", text):
                try:
                    password = urlsplit(url).password
                except ValueError:
                    continue
                found |= {password, unquote(password)} if password else set()
            found |= {match[1].strip("'") for match in _PASSWORD.findall(text)}
        words = sorted((re.escape(word) for word in found if len(word) >= 4), key=len, reverse=True)
        self._words = re.compile(rf"(?<!\w)(?:{'|'.join(words)})(?!\w)") if words else None

    def hide(self, text: str) -> str:
        """The text without user and password of any URL, and without the known passwords."""
        text = _PASSWORD.sub(r"\1***", _USER_INFO.sub(r"\1", text))
        return self._words.sub("***", text) if self._words else text


class Output:
    """The two streams of one command.

    Args:
        json: print one object on stdout and nothing else there.
        quiet: no progress.
        secrets: what messages must not tell.
    """

    def __init__(self, *, json: bool, quiet: bool = False, secrets: Secrets | None = None) -> None:
        self.json = json
        self.quiet = quiet
        self._secrets = secrets or Secrets(())
        self._result: TextIO | None = sys.stdout
        self._above: Callable[[str], None] | None = None  # prints above a progress bar
        self.failed_write: OSError | None = None
        self.descriptor = 1  # of the result's stream
        self.last_word: Callable[[], None] = lambda: None  # called before the one object of `--json` is printed
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        if json:
            self._keep_stdout()

    def _keep_stdout(self) -> None:
        # A strategy may print: then its words go to stderr, and stdout keeps the one object alone.
        if self._result is None:  # it was closed, and its number may be another file's by now
            return
        try:
            own = os.dup(1)
            os.dup2(2, 1)
        except OSError:
            return
        self.descriptor = own
        self._result = os.fdopen(own, "w", encoding="utf-8")
        sys.stdout = sys.stderr if sys.stderr is not None else open(os.devnull, "w")  # noqa: SIM115 - until the end

    def close(self) -> None:
        """Gives back the stream that was kept for the one object."""
        if self.descriptor != 1 and self._result is not None:
            _close_quietly(self._result)
            self._result.close()

    # To stderr.

    def note(self, text: str) -> None:
        """A line for people."""
        text = plain(self._secrets.hide(text))
        if self._above is None:
            self._write(sys.stderr, text + "\n")
            return
        try:
            self._above(text)
        except OSError:  # the terminal has gone away: what a signal has to do goes on
            self._above = None

    def error(self, message: str, hint: str = "", details: str = "") -> None:
        """What went wrong, and what to do."""
        if details:
            self.note(details.rstrip())
        self.note(f"error: {message}")
        if hint:
            self.note(f"hint: {hint}")

    def above(self, printer: Callable[[str], None] | None) -> None:
        """Lines go through `printer` while a progress bar is on the screen."""
        self._above = printer

    def hide(self, text: str) -> str:
        """The text without secrets."""
        return self._secrets.hide(text)

    # To stdout.

    def emit(self, tree: Mapping[str, Any]) -> None:
        """The one object of `--json`."""
        self.last_word()
        self._write(self._result, one_line(tree) + "\n")

    def line(self, text: str = "") -> None:
        """A line of the result, as it is: never cut, never wrapped."""
        self._write(self._result, plain(text) + "\n")

    @property
    def encoding(self) -> str:
        """What the result's stream can write."""
        return getattr(self._result, "encoding", None) or "utf-8"

    def console(self) -> Console:
        """A rich console as wide as the result's stream; what isn't a terminal has room for everything."""
        import io

        from rich.console import Console

        stream = self._result
        terminal = stream is not None and stream.isatty()
        width = None if terminal or "COLUMNS" in os.environ else WIDEST_PLAIN
        return Console(
            file=io.StringIO(), force_terminal=terminal, width=width, highlight=False, emoji=False, markup=False
        )

    def draw(self, *renderables: Any) -> None:
        """Prints what rich draws, in one write."""
        console = self.console()
        for renderable in renderables:
            console.print(renderable)
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        shown = lines if console.is_terminal else [plain(line.rstrip()) for line in lines]
        self._write(self._result, "".join(f"{line}\n" for line in shown))

    def _write(self, stream: TextIO | None, text: str) -> None:
        """Writes and flushes. A reader that has gone away is no error; a full disk is, and is told at the end."""
        if stream is None:
            return
        try:
            stream.write(text)
            stream.flush()
        except BrokenPipeError:
            _close_quietly(stream)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and stream is self._result:
                self.failed_write = error
            _close_quietly(stream)


def _close_quietly(stream: TextIO) -> None:
    # What stays in its buffer would be written again when the interpreter ends, with a complaint.
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError):
        return
