"""`strategies`: what a name may stand for, and with which parameters."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from ktrdr_async.cli.context import Context
from ktrdr_async.cli.options import USUAL_OUTPUT, OutputOptions


def strategies(*, out: OutputOptions = USUAL_OUTPUT, context: Annotated[Context, Parameter(parse=False)]) -> int:
    """List the strategies that are known by name, with parameters, types, ranges and defaults."""
    from ktrdr_async.strategies.parameters import describe
    from ktrdr_async.strategies.registry import strategies as registered
    from ktrdr_async.strategies.registry import summary_of

    context.use(out)
    found = registered()
    if context.output.json:
        context.output.emit(
            {
                "strategies": [
                    {
                        "name": name,
                        "summary": summary_of(kind),
                        "parameters": [parameter._asdict() for parameter in describe(kind)],
                    }
                    for name, kind in found.items()
                ]
            }
        )
        return 0
    for name, kind in found.items():
        context.output.line(f"{name}  {summary_of(kind)}".rstrip())
        parameters = describe(kind)
        room = max((len(parameter.name) for parameter in parameters), default=0)
        for each in parameters:
            bounds = f" {each.range}" if each.range else ""
            default = f", default {each.default}" if each.default else ", required"
            context.output.line(f"    --param {each.name + '=':<{room + 1}} {each.type}{bounds}{default}")
    context.output.note("your own: --strategy module:Class")
    return 0
