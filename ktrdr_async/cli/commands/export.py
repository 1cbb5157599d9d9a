"""`export`: writes a completed operation's frames to files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from ktrdr_async.cli.context import Context
from ktrdr_async.cli.options import NO_TRUST, USUAL_DATABASE, USUAL_OUTPUT, DatabaseOptions, OutputOptions, TrustOptions

if TYPE_CHECKING:
    from ktrdr_async.operations.lifecycle import Operation


def export(
    operation: Annotated[str, Parameter(metavar="ID|PREFIX")],
    /,
    *,
    output: Annotated[str, Parameter(name=["--output", "-o"], metavar="DIR")],
    trust: TrustOptions = NO_TRUST,
    where: DatabaseOptions = USUAL_DATABASE,
    out: OutputOptions = USUAL_OUTPUT,
    context: Annotated[Context, Parameter(parse=False)],
) -> int:
    """Write a completed operation's fills, trades, equity and metrics as CSV, Parquet and JSON.

    Args:
        operation: its id, or what no other id begins with.
        output: directory to write to.
        trust: what it may name.
        where: the database.
        out: what is printed.
        context: this command line.
    """
    context.use(out)
    trust.find_in_cwd()

    async def work() -> tuple[Operation, list[str]]:
        import asyncio

        from ktrdr_async.supervision.worker import BacktestWorker

        async with BacktestWorker.open(where.dsn, allow=trust.allow, data_roots=trust.data_root) as worker:
            row = await worker.operations.find(operation)
            results = await worker.results(row.operation_id)
            return row, [str(path) for path in await asyncio.to_thread(results.export, output)]

    row, files = context.drive(work)
    if context.output.json:
        from ktrdr_async.cli.described import described

        context.output.emit(described(row, where.dsn) | {"files": files})
    else:
        for file in files:
            context.output.line(file)
    return 0
