"""`extend` and `fork`: new operations that go on from another one's state."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from ktrdr_async.cli.context import Context
from ktrdr_async.cli.options import (
    NO_TRUST,
    TERMS,
    USUAL_DATABASE,
    USUAL_OUTPUT,
    USUAL_PACE,
    DatabaseOptions,
    OutputOptions,
    PaceOptions,
    TrustOptions,
    absolute,
)
from ktrdr_async.errors import InputError

if TYPE_CHECKING:
    from ktrdr_async.cli.running import Ended

Cost = Annotated[float | None, Parameter(group=TERMS, metavar="X", allow_leading_hyphen=True)]


def extend(
    operation: Annotated[str, Parameter(metavar="ID|PREFIX")],
    /,
    *,
    data: Annotated[str | None, Parameter(metavar="FILE_OR_REFERENCE")] = None,
    end: Annotated[str | None, Parameter(metavar="D")] = None,
    id: Annotated[str | None, Parameter(metavar="OPERATION_ID")] = None,
    trust: TrustOptions = NO_TRUST,
    pace: PaceOptions = USUAL_PACE,
    where: DatabaseOptions = USUAL_DATABASE,
    out: OutputOptions = USUAL_OUTPUT,
    context: Annotated[Context, Parameter(parse=False)],
) -> int:
    """Go on with a completed run over new bars; it must have been run with --keep-state.

    Args:
        operation: the completed one's id, or what no other id begins with.
        data: where the longer data are; without it where the old ones were.
        end: last bar, inclusive; without it as before.
        id: the new operation's id; without it a random one.
        trust: what it may name.
        pace: how it runs.
        where: the database.
        out: what is printed.
        context: this command line.
    """
    changes: dict[str, Any] = {}
    if data is not None:
        changes["data"] = absolute(data)
    if end is not None:
        changes["end"] = end
    return _descend("extend", operation, id, changes, (trust, pace, where, out, context))


def fork(
    operation: Annotated[str, Parameter(metavar="ID|PREFIX")],
    /,
    *,
    param: Annotated[tuple[str, ...], Parameter(group=TERMS, metavar="K=V", consume_multiple=True)] = (),
    commission: Cost = None,
    slippage: Cost = None,
    min_trade: Cost = None,
    seed: Annotated[int | None, Parameter(group=TERMS, metavar="N")] = None,
    id: Annotated[str | None, Parameter(metavar="OPERATION_ID")] = None,
    trust: TrustOptions = NO_TRUST,
    pace: PaceOptions = USUAL_PACE,
    where: DatabaseOptions = USUAL_DATABASE,
    out: OutputOptions = USUAL_OUTPUT,
    context: Annotated[Context, Parameter(parse=False)],
) -> int:
    """Go on from an operation's checkpoint as a new operation with other costs or parameters.

    Args:
        operation: its id, or what no other id begins with.
        param: parameter of the strategy that changes; may be given several times.
        commission: fraction of notional a side.
        slippage: fraction of price against the order.
        min_trade: fraction of equity below which a rebalance is skipped.
        seed: of the strategy's random numbers.
        id: the new operation's id; without it a random one.
        trust: what it may name.
        pace: how it runs.
        where: the database.
        out: what is printed.
        context: this command line.
    """
    given = {"commission": commission, "slippage": slippage, "min_trade": min_trade, "seed": seed}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    pairs = {}
    for text in param:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise InputError(f"--param {text!r} is not NAME=VALUE", hint="for example --param fast=10")
        pairs[name] = value
    if not changes and not pairs:
        raise InputError(
            "a fork changes something", hint="give --commission, --slippage, --min-trade, --seed or --param"
        )
    return _descend(
        "fork", operation, id, changes | ({"parameters": pairs} if pairs else {}), (trust, pace, where, out, context)
    )


def _descend(
    verb: str,
    operation: str,
    id: str | None,
    changes: dict[str, Any],
    options: tuple[TrustOptions, PaceOptions, DatabaseOptions, OutputOptions, Context],
) -> int:
    from ktrdr_async.cli.running import report

    trust, pace, where, out, context = options
    context.use(out)
    trust.find_in_cwd()
    policy = pace.policy()

    async def work() -> Ended:
        from ktrdr_async.cli.running import Runner
        from ktrdr_async.strategies.parameters import parse_parameter
        from ktrdr_async.strategies.registry import resolve
        from ktrdr_async.supervision.worker import BacktestWorker

        async with BacktestWorker.open(
            where.dsn, allow=trust.allow, data_roots=trust.data_root, tier=pace.tier, alone=True
        ) as worker:
            parent = await worker.operations.find(operation)
            if "parameters" in changes:
                kind = resolve(parent.request["strategy"], allow=trust.allow)
                changes["parameters"] = {k: parse_parameter(kind, k, v) for k, v in changes["parameters"].items()}
            name = id or secrets.token_hex(8)
            begin = worker.extend_handle if verb == "extend" else worker.fork_handle
            await begin(
                parent.operation_id,
                name,
                changes=changes,
                policy=policy,
                throttle=pace.throttle,
                keep_state=pace.keep_state,
            )
            runner = Runner(context, pace, dsn=where.dsn, allow=trust.allow, roots=trust.data_root)
            return await runner.carry_out(worker, name, lambda: worker.resume(name))

    return report(context, context.drive(work))
