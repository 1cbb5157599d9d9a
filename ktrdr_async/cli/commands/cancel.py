"""`cancel`: ends an operation of any process, and returns when its checkpoint is durable."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from ktrdr_async.cli.context import Context
from ktrdr_async.cli.failures import Failure
from ktrdr_async.cli.options import USUAL_DATABASE, USUAL_OUTPUT, DatabaseOptions, OutputOptions
from ktrdr_async.errors import InvalidTransitionError

if TYPE_CHECKING:
    from ktrdr_async.operations.lifecycle import Operation

ANSWER_SECONDS = 30.0  # for the owner to hear of it and to save


def cancel(
    operation: Annotated[str, Parameter(metavar="ID")],
    /,
    *,
    where: DatabaseOptions = USUAL_DATABASE,
    out: OutputOptions = USUAL_OUTPUT,
    context: Annotated[Context, Parameter(parse=False)],
) -> int:
    """Cancel an operation, wherever it runs; returns when its checkpoint is durable.

    Args:
        operation: its whole id.
        where: the database.
        out: what is printed.
        context: this command line.
    """
    context.use(out)

    async def work() -> Operation:
        from ktrdr_async.supervision.worker import BacktestWorker

        async with BacktestWorker.open(where.dsn) as worker:
            try:
                return await worker.cancel(operation, timeout=ANSWER_SECONDS)
            except TimeoutError:
                row = await worker.operations.get(operation)
                owner = "its process" if row.owner is None else f"process {row.owner.pid} on {row.owner.host}"
                raise InvalidTransitionError(
                    operation,
                    f"{owner} was told to end {operation}, and hasn't answered in {ANSWER_SECONDS:.0f} s",
                    hint=f"it ends when it hears of it; else end that process and cancel again: {operation}",
                ) from None

    row = context.drive(work)
    from ktrdr_async.cli.described import described

    status = row.status.value
    if status != "cancelled":
        came_first = f"operation {row.operation_id} is {status}: there is nothing to cancel"
        return context.fail(Failure("invalid_transition", came_first), described(row, where.dsn))
    if context.output.json:
        context.output.emit(described(row, where.dsn))
    bar = row.checkpoint_bar
    context.output.note(
        f"{row.operation_id} is cancelled; "
        + ("it has no checkpoint" if bar is None else f"its checkpoint at bar {bar:,} is durable")
    )
    return 0
