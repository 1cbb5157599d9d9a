"""`list` and `show`: they look, and change nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from ktrdr_async.cli.context import Context
from ktrdr_async.cli.options import USUAL_DATABASE, USUAL_OUTPUT, DatabaseOptions, OutputOptions, StatusName
from ktrdr_async.errors import InputError

if TYPE_CHECKING:
    from ktrdr_async.operations.lifecycle import Operation
    from ktrdr_async.operations.service import OperationsService


def list_operations(
    *,
    status: Annotated[tuple[StatusName, ...], Parameter(metavar="STATUS")] = (),
    limit: Annotated[int, Parameter(metavar="N", allow_leading_hyphen=True, show_default=True)] = 50,
    where: DatabaseOptions = USUAL_DATABASE,
    out: OutputOptions = USUAL_OUTPUT,
    context: Annotated[Context, Parameter(parse=False)],
) -> int:
    """List operations, newest first.

    Args:
        status: only those of this status; may be given several times.
        limit: how many at most.
        where: the database.
        out: what is printed.
        context: this command line.
    """
    context.use(out)
    if limit < 1:
        raise InputError(f"--limit is {limit}; it must be at least 1")

    async def work(_: object, operations: OperationsService) -> list[Operation]:
        from ktrdr_async.operations.lifecycle import Status

        return await operations.list(statuses=[Status(each) for each in status], limit=limit)

    rows = context.look(where, work)
    if context.output.json:
        from ktrdr_async.cli.described import described

        context.output.emit({"operations": [described(row, where.dsn) for row in rows]})
    elif rows:
        from ktrdr_async.cli.tables import print_operations

        print_operations(context.output, rows)
    else:
        context.output.note("there are no operations" + (f" that are {' or '.join(status)}" if status else ""))
    return 0


def show(
    operation: Annotated[str, Parameter(metavar="ID|PREFIX")],
    /,
    *,
    where: DatabaseOptions = USUAL_DATABASE,
    out: OutputOptions = USUAL_OUTPUT,
    context: Annotated[Context, Parameter(parse=False)],
) -> int:
    """Show an operation: a completed one's figures, where another one stands and what its checkpoint is.

    Args:
        operation: its id, or what no other id begins with.
        where: the database.
        out: what is printed.
        context: this command line.
    """
    context.use(out)
    row = context.look(where, lambda _, operations: operations.find(operation))
    from ktrdr_async.cli.described import described, print_operation

    if context.output.json:
        context.output.emit(described(row, where.dsn))
    else:
        print_operation(context.output, row, where.dsn)
    return 0
