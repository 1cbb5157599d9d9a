"""`checkpoints`: list, show, delete, clean."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from ktrdr_async.cli.context import Context
from ktrdr_async.cli.options import USUAL_DATABASE, USUAL_OUTPUT, DatabaseOptions, OutputOptions
from ktrdr_async.errors import InputError

if TYPE_CHECKING:
    from ktrdr_async.checkpoint.schemas import BacktestCheckpointState
    from ktrdr_async.operations.lifecycle import Operation
    from ktrdr_async.operations.service import OperationsService
    from ktrdr_async.storage.database import Database

MOST = 10_000  # operations that are looked through


def application() -> App:
    """The commands under `checkpoints`."""
    app = App(name="checkpoints", help="Look at stored checkpoints, delete them, clean old operations away.")
    app.command(list_checkpoints, name="list")
    app.command(show_checkpoint, name="show")
    app.command(delete_checkpoint, name="delete")
    app.command(clean)
    return app


def list_checkpoints(
    *,
    where: DatabaseOptions = USUAL_DATABASE,
    out: OutputOptions = USUAL_OUTPUT,
    context: Annotated[Context, Parameter(parse=False)],
) -> int:
    """List the checkpoints of unfinished operations, newest operation first."""
    context.use(out)

    async def work(_: Database, operations: OperationsService) -> list[Operation]:
        return [row for row in await operations.list(limit=MOST) if row.checkpoint_bar is not None]

    rows = context.look(where, work)
    if context.output.json:
        from ktrdr_async.cli.described import described

        context.output.emit({"operations": [described(row, where.dsn) for row in rows]})
        return 0
    from ktrdr_async.cli.tables import moment, print_table

    if not rows:
        context.output.note("there are no checkpoints")
        return 0
    cells = [
        (
            row.operation_id,
            row.status.value,
            f"{row.checkpoint_bar:,}",
            str(row.checkpoint_type),
            moment(row.checkpoint_at),
            f"{row.checkpoint_bytes or 0:,}",
        )
        for row in rows
    ]
    print_table(context.output, ("id", "status", "bar", "type", "saved (UTC)", "bytes"), cells)
    return 0


def show_checkpoint(
    operation: Annotated[str, Parameter(metavar="ID|PREFIX")],
    /,
    *,
    where: DatabaseOptions = USUAL_DATABASE,
    out: OutputOptions = USUAL_OUTPUT,
    context: Annotated[Context, Parameter(parse=False)],
) -> int:
    """Load a checkpoint, which proves that it is whole, and show what it holds.

    Args:
        operation: the operation's id, or what no other id begins with.
        where: the database.
        out: what is printed.
        context: this command line.
    """
    context.use(out)

    async def work(
        database: Database, operations: OperationsService
    ) -> tuple[Operation, BacktestCheckpointState | None]:
        from ktrdr_async.checkpoint.service import CheckpointService

        row = await operations.find(operation)
        return row, await CheckpointService(database, None).load_checkpoint(row.operation_id)

    row, state = context.look(where, work)
    if state is None:
        raise InputError(
            f"operation {row.operation_id} is {row.status.value} and has no checkpoint",
            hint=f"ktrdr-async show {row.operation_id}",
        )
    facts = _facts(state)
    if context.output.json:
        from ktrdr_async.cli.described import described

        context.output.emit(described(row, where.dsn) | {"state": facts})
        return 0
    from ktrdr_async.cli.tables import print_digest, print_pairs

    shown = [(name.replace("_", " "), _text(value)) for name, value in facts.items() if name != "state_digest"]
    print_pairs(context.output, shown, title=f"checkpoint of operation {row.operation_id}")
    print_digest(context.output, state.state_digest, "state digest")
    return 0


def _facts(state: BacktestCheckpointState) -> dict[str, Any]:
    import msgspec

    return {
        "bar": state.bar_index,
        "date": state.current_date,
        "cash": state.cash,
        "positions": msgspec.to_builtins(state.positions),
        "waiting_orders": len(state.waiting),
        "trades": len(state.trades),
        "fills": len(state.ledger),
        "recorded_values": len(state.recorded),
        "equity_samples": len(state.equity_samples),
        "strategy_state_bytes": len(state.strategy_state or b""),
        "resumed_from": state.resumed_from,
        "schema_version": state.schema_version,
        "state_digest": state.state_digest,
    }


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_text(each) for each in value) or "none"
    if isinstance(value, dict):
        return f"{value.get('symbol')} {value.get('lots'):,} lots from bar {value.get('entry_bar'):,}"
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def delete_checkpoint(
    operation: Annotated[str, Parameter(metavar="ID")],
    /,
    *,
    yes: bool = False,
    where: DatabaseOptions = USUAL_DATABASE,
    out: OutputOptions = USUAL_OUTPUT,
    context: Annotated[Context, Parameter(parse=False)],
) -> int:
    """Delete an unfinished operation's checkpoint and ledger: its next run starts at bar 0.

    Args:
        operation: the operation's whole id.
        yes: don't ask.
        where: the database.
        out: what is printed.
        context: this command line.
    """
    context.use(out)

    async def find(_: Database, operations: OperationsService) -> Operation:
        return await operations.get(operation)

    found = context.look(where, find)
    if found.checkpoint_bar is not None and found.status.value not in ("running", "completed"):
        question = f"Delete {operation}'s checkpoint of bar {found.checkpoint_bar:,}? Its next run starts at bar 0."
        if not yes and not context.confirm(question):
            return _kept(context)

    async def work(_: Database, operations: OperationsService) -> Operation:
        await operations.delete_checkpoint(operation)
        return await operations.get(operation)

    row = context.look(where, work)
    if context.output.json:
        from ktrdr_async.cli.described import described

        context.output.emit(described(row, where.dsn))
    had = found.checkpoint_bar is not None
    context.output.note(
        f"the checkpoint of {row.operation_id} is deleted" if had else f"{row.operation_id} has no checkpoint"
    )
    return 0


def clean(
    *,
    older_than_days: Annotated[float, Parameter(metavar="DAYS", allow_leading_hyphen=True, show_default=True)] = 30.0,
    dry_run: bool = False,
    yes: bool = False,
    where: DatabaseOptions = USUAL_DATABASE,
    out: OutputOptions = USUAL_OUTPUT,
    context: Annotated[Context, Parameter(parse=False)],
) -> int:
    """Delete operations that nobody touched for a long time, finished ones too, with checkpoints and results.

    Args:
        older_than_days: since an operation's last heartbeat or end.
        dry_run: only say which.
        yes: don't ask.
        where: the database.
        out: what is printed.
        context: this command line.
    """
    context.use(out)

    def swept(dry: bool) -> list[str]:
        return context.look(where, lambda _, operations: operations.clean(older_than_days=older_than_days, dry_run=dry))

    found = swept(True)
    if not dry_run and found:
        kinds = f"{len(found)} operations that nobody touched for {older_than_days:g} days, with their results"
        if not yes and not context.confirm(f"Delete {kinds}?"):
            return _kept(context)
        found = swept(False)
    if context.output.json:
        context.output.emit({"deleted": [] if dry_run else found, "would_delete": found if dry_run else []})
    else:
        for name in found:
            context.output.line(name)
    context.output.note(f"{len(found)} operations {'would be' if dry_run else 'were'} deleted")
    return 0


def _kept(context: Context) -> int:
    from ktrdr_async.cli.failures import Failure

    return context.fail(Failure("not_confirmed", "nothing was deleted", "--yes deletes without asking"))
