"""`cancel`: ends an operation of any process, and returns when its checkpoint is durable."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from ktrdr_async.cli.context import Context
from ktrdr_async.cli.options import DatabaseOptions, OutputOptions

if TYPE_CHECKING:
    from ktrdr_async.operations.lifecycle import Operation


def cancel(
    operation: Annotated[str, Parameter(metavar="ID")],
    /,
    *,
    where: DatabaseOptions = DatabaseOptions(),
    out: OutputOptions = OutputOptions(),
    context: Annotated[Context, Parameter(parse=False)],
) -> int:
    """Cancel an operation, wherever it runs; returns when its checkpoint is durable.

    Args:
        operation: its whole id.
    """
    context.use(out)

    async def work() -> Operation:
        from ktrdr_async.supervision.worker import BacktestWorker

        async with BacktestWorker.open(where.dsn) as worker:
            return await worker.cancel(operation)

    row = context.drive(work)
    from ktrdr_async.cli.described import described

    cancelled = row.status.value == "cancelled"
    if context.output.json:
        context.output.emit(described(row))
    at = (
        "it has no checkpoint"
        if row.checkpoint_bar is None
        else f"its checkpoint at bar {row.checkpoint_bar:,} is durable"
    )
    context.output.note(
        f"{row.operation_id} is {row.status.value}" + (f"; {at}" if row.status.value != "completed" else "")
    )
    return 0 if cancelled else 1
