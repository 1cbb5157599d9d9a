"""One stored operation as `--json` prints it, and as people read it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ktrdr_async.cli.context import DATABASE_VARIABLE
from ktrdr_async.cli.failures import resumable
from ktrdr_async.cli.options import files_of, roots_of
from ktrdr_async.cli.output import Output, blank, plain
from ktrdr_async.cli.tables import (
    moment,
    number,
    owner_is_dead,
    print_digest,
    print_pairs,
    print_summary,
    progress_of,
    time_text,
    updated,
)

if TYPE_CHECKING:
    from ktrdr_async.operations.lifecycle import Operation


def described(row: Operation, dsn: str | None = None) -> dict[str, Any]:
    """An operation as plain values; `dsn` is the database that the command line named."""
    result, told = row.result or {}, row.progress or {}
    run, metrics = result.get("run") or {}, result.get("metrics")
    bar, bars = progress_of(row)
    found = blank() | {
        "operation_id": row.operation_id,
        "status": row.status.value,
        "result_digest": row.result_digest,
        "metrics": metrics,
        "trades": metrics["trades"] if metrics else told.get("trades"),
        "bars": bars,
        "resumed_from": run.get("resumed_from") or [],
        "checkpoints": {"saved": run.get("checkpoints_saved", 0), "failed": run.get("checkpoints_failed", 0)},
        "bar": bar,
        "equity": metrics["final_equity"] if metrics else told.get("equity"),
        "checkpoint_bar": row.checkpoint_bar,
        "checkpoint": None
        if row.checkpoint_bar is None
        else {
            "bar": row.checkpoint_bar,
            "type": row.checkpoint_type,
            "at": moment(row.checkpoint_at),
            "bytes": row.checkpoint_bytes,
        },
        "request": row.request,
        "parent": None if row.parent is None else row.parent.operation_id,
        "warnings": result.get("warnings") or [],
        "owner_dead": owner_is_dead(row),
        "attempts": row.attempts,
        "created_at": moment(row.created_at),
        "updated_at": moment(updated(row)),
    }
    if row.error is not None:
        found["error"] = {
            "code": "strategy_error",
            "message": f"{row.error.get('type')}: {row.error.get('message')}",
            "hint": f"go on with: {resume_command(row, dsn)}",
            "bar": row.error.get("bar"),
        }
    return found


def print_operation(output: Output, row: Operation, dsn: str | None) -> None:
    """An operation for people: the summary of a completed one, where another one stands."""
    if row.result is not None:
        from ktrdr_async.supervision.stored import outcome_of, request_of

        print_summary(output, row.operation_id, outcome_of(row), request_of(row).to_dict(), None)
        return
    told = row.progress or {}
    bar, bars = progress_of(row)
    rows = [
        ("status", row.status.value + (", cancel asked for" if row.cancel_requested else "")),
        ("strategy", f"{row.request.get('strategy')} {_parameters(row)}".strip()),
        ("data", str(row.request.get("data"))),
        ("progress", _standing(bar, bars, told)),
        ("equity", number(told.get("equity"))),
        (
            "checkpoint",
            "-"
            if row.checkpoint_bar is None
            else f"bar {row.checkpoint_bar:,}, {row.checkpoint_type}, {moment(row.checkpoint_at)} UTC, "
            f"{row.checkpoint_bytes or 0:,} bytes",
        ),
        ("owner", "-" if row.owner is None else f"process {row.owner.pid} on {row.owner.host}, attempt {row.attempts}"),
        ("created", f"{moment(row.created_at)} UTC"),
        ("updated", f"{moment(updated(row))} UTC"),
    ]
    if row.error is not None:
        notes = "; ".join(note for note in row.error.get("notes") or [])
        rows.append(
            ("error", plain(f"{row.error.get('type')}: {row.error.get('message')}" + (f" ({notes})" if notes else "")))
        )
    if row.parent is not None:
        rows.append(("parent", f"{row.parent.operation_id} at bar {row.parent.bar_index}"))
    print_pairs(output, rows, title=f"operation {row.operation_id}")
    if row.status.value in ("failed", "cancelled", "interrupted"):
        output.note(f"go on with: {resume_command(row, dsn)}")
    if row.result_digest is not None:
        print_digest(output, row.result_digest)


def resume_command(row: Operation, dsn: str | None) -> str:
    """What goes on with it, on the database that this command line looked at."""
    named, own = str(row.request.get("strategy")), not (dsn or os.environ.get(DATABASE_VARIABLE))
    roots = () if own else roots_of(row.request.get("data"), files_of(row.request))
    command, remark = resumable(row.operation_id, dsn=dsn, allow=(named,) if ":" in named else (), roots=roots)
    return command + (f"  ({remark})" if remark else "")


def _standing(bar: int | None, bars: int | None, told: Mapping[str, Any]) -> str:
    if bar is None:
        return "-"
    at = f", {time_text(told['timestamp'])} UTC" if told.get("timestamp") and told.get("bar_index") == bar else ""
    return f"bar {bar:,}" + (f" of {bars:,}" if bars else "") + at


def _parameters(row: Operation) -> str:
    return ", ".join(f"{name}={value}" for name, value in (row.request.get("parameters") or {}).items())
