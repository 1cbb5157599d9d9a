"""Where a run begins: its own checkpoint, or the state of another operation that it extends or was forked from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from ktrdr_async.backtesting.provenance import Accept, nothing
from ktrdr_async.backtesting.request import BacktestRequest
from ktrdr_async.checkpoint.schemas import BacktestCheckpointState
from ktrdr_async.checkpoint.service import CheckpointService
from ktrdr_async.errors import CheckpointMismatchError, InvalidTransitionError, ParameterError
from ktrdr_async.operations.lifecycle import Parent, Status
from ktrdr_async.supervision.stored import outcome_of, request_of

if TYPE_CHECKING:
    from ktrdr_async.operations.lifecycle import Operation
    from ktrdr_async.operations.service import OperationsService
    from ktrdr_async.storage.database import Database

EXTENSION, FORK = "extension", "fork"  # an operation's type; any other one begins at bar 0
FORKABLE = ("commission", "slippage", "min_trade", "force_close", "parameters", "seed")


class Descent(msgspec.Struct, frozen=True):
    """What a new operation goes on from."""

    kind: str  # EXTENSION or FORK
    parent: Parent


class Start(msgspec.Struct, frozen=True):
    """Where a run begins."""

    state: BacktestCheckpointState | None = None  # None: at bar 0
    accept: Accept = nothing  # which fields of its manifest may differ
    inherited: bool = False  # it is another operation's; the differences are what was asked for


def extends(field: str) -> bool:
    """What may differ in an extension: where the bars come from, and where they end."""
    return field in ("request.data", "request.end")


def forks(field: str) -> bool:
    """What may differ in a fork: costs, parameters, and what follows from them."""
    return field == "decisions" or field.removeprefix("request.") in FORKABLE


async def inherited_state(database: Database, parent: Operation) -> BacktestCheckpointState:
    """The state that another operation can hand on: of a completed one as it was before the closing step.

    Raises:
        InvalidTransitionError: if it has none.
    """
    named = parent.operation_id
    reader = CheckpointService(database, None)
    if parent.status is not Status.COMPLETED:
        state = await reader.load_checkpoint(named)
        if state is None:
            raise InvalidTransitionError(named, f"{named} has no checkpoint to go on from")
        return state
    state = outcome_of(parent).final_state
    if state is None:
        raise InvalidTransitionError(
            named,
            f"{named} was completed without keeping its final state",
            hint="run it with keep_state (--keep-state)",
        )
    loaded = await reader.load_ledger(named)
    return msgspec.structs.replace(
        state,
        ledger=loaded.ledger[: state.ledger_from],
        equity_samples=loaded.equity_samples[: state.samples_from],
        recorded=loaded.recorded[: state.recorded_from],
        ledger_from=0,
        samples_from=0,
        recorded_from=0,
    )


async def start_of(database: Database, operations: OperationsService, row: Operation) -> Start:
    """Where an operation begins that has no checkpoint of its own.

    Raises:
        InvalidTransitionError: if what it descends from has no state to hand on any more.
        CheckpointMismatchError: if that state is another one by now.
    """
    if row.parent is None or row.type not in (EXTENSION, FORK):
        return Start()
    state = await inherited_state(database, await operations.get(row.parent.operation_id))
    if state.state_digest != row.parent.digest:
        raise CheckpointMismatchError(
            row.operation_id,
            f"{row.parent.operation_id} has moved on from the state that {row.operation_id} was to go on from",
            differences={"parent.digest": (str(row.parent.digest), state.state_digest)},
            hint=f"make a new {row.type}",
        )
    return Start(state, extends if row.type == EXTENSION else forks, inherited=True)


async def descend(
    database: Database, parent: Operation, kind: str, changes: dict[str, Any]
) -> tuple[BacktestRequest, Descent]:
    """The request of an extension or a fork, and what it goes on from.

    Raises:
        InvalidTransitionError: if the parent has no state to hand on, or isn't finished (extension).
        ParameterError: if a change isn't one that this kind permits.
    """
    named = parent.operation_id
    if kind == EXTENSION and parent.status is not Status.COMPLETED:
        raise InvalidTransitionError(named, f"{named} is {parent.status.value}: only a completed run can be extended")
    permitted = ("data", "end") if kind == EXTENSION else FORKABLE
    for name in changes:
        if name not in permitted:
            raise ParameterError(f"{kind}: {name} can't be changed", hint=f"these can: {', '.join(permitted)}")
    if "parameters" in changes:
        changes = changes | {"parameters": request_of(parent).parameters | changes["parameters"]}
    state = await inherited_state(database, parent)
    request = BacktestRequest.from_dict(request_of(parent).to_dict() | changes)
    return request, Descent(kind, Parent(named, state.bar_index, state.state_digest))
