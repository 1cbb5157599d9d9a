"""The application: which commands there are, how a command line is taken apart, and how whatever goes wrong ends."""

from __future__ import annotations

from collections.abc import Sequence

from cyclopts import App, CycloptsError, Parameter

from ktrdr_async.cli.context import Context
from ktrdr_async.cli.failures import BAD_INPUT, FAILED, Failure, failure_of
from ktrdr_async.cli.options import HOW
from ktrdr_async.cli.signals import Interrupted, Signals

HELP = """A pure-asyncio backtesting engine whose runs survive cancels, deploys and crashes bit for bit.

Ctrl-C saves a checkpoint and prints the command that goes on from it.
"""


def application() -> App:
    """Every command under its name."""
    from ktrdr_async import __version__
    from ktrdr_async.cli.commands import (
        cancel,
        checkpoints,
        demo,
        descend,
        export,
        looking,
        resume,
        run,
        strategies,
        verify,
    )

    app = App(
        name="ktrdr-async",
        help=HELP,
        help_format="plaintext",
        version=f"ktrdr-async {__version__}",
        default_parameter=Parameter(negative=(), show_default=False),
        group_parameters=HOW,
        help_flags=["--help", "-h"],
    )
    app.command(demo.demo)
    app.command(run.run)
    app.command(resume.resume)
    app.command(descend.extend)
    app.command(descend.fork)
    app.command(cancel.cancel)
    app.command(looking.list_operations, name="list")
    app.command(looking.show)
    app.command(export.export)
    app.command(checkpoints.application())
    app.command(verify.verify)
    app.command(strategies.strategies)
    return app


def run(tokens: Sequence[str], signals: Signals) -> int:
    """Runs one command line. Returns the exit code; raises nothing."""
    context = Context(tokens, signals)
    try:
        code = _run(list(tokens), context)
    except Interrupted as error:
        code = context.interrupted(str(error))
    except Exception as error:
        code = context.fail(failure_of(error))
    signals.finish()
    if context.output.failed_write is not None:
        reason = context.output.failed_write.strerror
        context.output.error(f"the result couldn't be written to standard output: {reason}")
        code = code or FAILED
    context.output.close()
    return code


def _run(tokens: list[str], context: Context) -> int:
    app = application()
    try:
        command, bound, ignored = app.parse_args(tokens, print_error=False, exit_on_error=False, help_on_error=False)
    except CycloptsError as error:
        words = " ".join(str(error).split())
        known = next((token for token in tokens if not token.startswith("-")), "")
        hint = f"ktrdr-async {known} --help" if known in app else "ktrdr-async --help"
        return context.fail(Failure("usage", words, hint, exit_code=BAD_INPUT))
    if "context" not in ignored:  # help or version
        try:
            command(*bound.args, **bound.kwargs)
        except OSError as error:
            context.output.failed_write = error
        return 0
    code: int = command(*bound.args, **bound.kwargs, context=context)
    return code
