"""`demo`: kills, cancels and resumes a backtest on real data, and compares the result with an uninterrupted run."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from ktrdr_async.cli.context import Context
from ktrdr_async.cli.options import USUAL_DATABASE, USUAL_OUTPUT, DatabaseOptions, OutputOptions


def demo(
    *,
    where: DatabaseOptions = USUAL_DATABASE,
    out: OutputOptions = USUAL_OUTPUT,
    context: Annotated[Context, Parameter(parse=False)],
) -> int:
    """Kill, cancel and resume a backtest on real data, and compare it with an uninterrupted run; under 30 s."""
    context.use(out)
    from ktrdr_async.cli.demonstration import show

    return show(context, where)
