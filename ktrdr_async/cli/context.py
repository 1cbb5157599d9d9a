"""What a command gets beside its options, and how its coroutine is driven: one loop, one task, clean ends."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ktrdr_async.cli.output import Output, Secrets, blank, wants_json
from ktrdr_async.cli.signals import Interrupted, Signals

if TYPE_CHECKING:
    from ktrdr_async.cli.failures import Failure
    from ktrdr_async.cli.options import DatabaseOptions, OutputOptions
    from ktrdr_async.operations.service import OperationsService
    from ktrdr_async.storage.database import Database

T = TypeVar("T")

DATABASE_VARIABLE = "KTRDR_ASYNC_DATABASE"


class Context:
    """One command line.

    Attributes:
        output: where words go.
        signals: what arrived.
    """

    def __init__(self, tokens: Sequence[str], signals: Signals) -> None:
        self.signals = signals
        self._secrets = Secrets([*tokens, os.environ.get(DATABASE_VARIABLE, "")])
        self.output = Output(json=wants_json(tokens), secrets=self._secrets)
        self.output.last_word = signals.finish
        signals.result = self.output.descriptor
        logger = logging.getLogger()
        logger.addHandler(NoteHandler(self.output))
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # what it says of tasks is said by us

    def use(self, options: OutputOptions) -> None:
        """Takes a command's own output options over."""
        self.output.quiet = options.quiet

    def drive(self, body: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Runs a coroutine to its end on a loop of its own.

        A signal cancels it, until it says otherwise by setting `signals.react`.

        Raises:
            Interrupted: if a signal cancelled it.
        """

        async def guarded() -> T:
            task = asyncio.ensure_future(body())

            def stop(_: int) -> None:
                if self.signals.count == 1:  # once: what it then closes isn't cut off
                    task.cancel()
                self.output.note(f"{self.signals.name}: stopping ...")

            with self.signals.on_this_loop(stop):
                await asyncio.wait({task})
                self.signals.settled = True
            if task.cancelled():
                raise Interrupted(f"{self.signals.name}: ended")
            return task.result()

        with asyncio.Runner(loop_factory=_new_loop) as runner:
            return runner.run(guarded())

    def look(self, options: DatabaseOptions, body: Callable[[Database, OperationsService], Awaitable[T]]) -> T:
        """Runs a coroutine with the database open."""

        async def opened() -> T:
            from ktrdr_async.operations.service import OperationsService
            from ktrdr_async.storage.database import Database

            async with Database.open(options.dsn) as database:
                return await body(database, OperationsService(database))

        return self.drive(opened)

    def confirm(self, question: str) -> bool:
        """Asks a person; where nobody is there to ask, the answer is no."""
        import sys

        if sys.stdin is None or not sys.stdin.isatty() or sys.stderr is None or not sys.stderr.isatty():
            return False
        self.signals.settled = False
        sys.stderr.write(f"{question} [y/N] ")
        sys.stderr.flush()
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    # Ends.

    def fail(self, failure: Failure, known: Mapping[str, Any] | None = None) -> int:
        """Says what went wrong. Returns the exit code."""
        if self.output.json:
            error = {name: self.output.hide(text) for name, text in failure.to_dict().items()}
            self.output.emit(blank() | dict(known or {}) | {"error": error})
        self.output.error(failure.message, failure.hint, failure.details)
        return failure.exit_code

    def interrupted(self, message: str) -> int:
        """Says that a signal ended it. Returns the exit code."""
        if self.output.json:
            self.output.emit(blank() | {"error": {"code": "interrupted", "message": message, "hint": ""}})
        self.output.note(message)
        return self.signals.exit_code if self.signals.first is not None else 128 + signal.SIGINT


def _new_loop() -> asyncio.AbstractEventLoop:
    """A loop of uvloop's, where that is installed: its turns cost half."""
    try:
        import uvloop

        for descriptor in range(3):  # it aborts the process where it gets the place of a closed stream
            os.fstat(descriptor)
    except (ImportError, OSError):
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


class NoteHandler(logging.Handler):
    """Log records as lines of people's output, without tracebacks."""

    def __init__(self, output: Output) -> None:
        super().__init__(logging.WARNING)
        self._output = output

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one record."""
        try:
            text = record.getMessage()
            error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
            if error is not None:
                text += f" ({type(error).__name__}: {error})"
            self._output.note(f"{record.levelname.lower()}: {text}")
        except Exception:  # a message whose arguments don't fit it: logging would print a traceback
            self._output.note(f"{record.levelname.lower()}: {record.msg}")
