"""`run`: starts a backtest, goes on with it, or returns its finished result; idempotent by id."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from ktrdr_async.cli.context import Context
from ktrdr_async.cli.options import (
    USUAL_DATABASE,
    USUAL_OUTPUT,
    USUAL_PACE,
    DatabaseOptions,
    OutputOptions,
    PaceOptions,
    RequestOptions,
    files_of,
    roots_of,
)
from ktrdr_async.errors import InputError

if TYPE_CHECKING:
    from ktrdr_async.cli.running import Ended


def run(
    *,
    what: RequestOptions,
    pace: PaceOptions = USUAL_PACE,
    id: Annotated[str | None, Parameter(metavar="OPERATION_ID")] = None,
    where: DatabaseOptions = USUAL_DATABASE,
    no_database: bool = False,
    allow: Annotated[tuple[str, ...], Parameter(metavar="MODULE[:CLASS]")] = (),
    out: OutputOptions = USUAL_OUTPUT,
    context: Annotated[Context, Parameter(parse=False)],
) -> int:
    """Run a backtest; its id is printed before the first bar, and whatever ends it, `resume` goes on.

    Args:
        id: the operation's id; another run with the same id and request goes on with it or returns its result.
        no_database: keep nothing and start no server.
        allow: as for `resume`; a strategy that is named here needs none.
        what: the backtest.
        pace: how it runs.
        where: the database.
        out: what is printed.
        context: this command line.
    """
    from ktrdr_async.cli.running import report

    context.use(out)
    if no_database and (where.dsn or id):
        raise InputError("--no-database goes with neither --database nor --id", hint="leave one of them out")
    request, policy = what.request(), pace.policy()

    async def bare() -> Ended:
        from ktrdr_async.cli.bare import carry_out

        return await carry_out(context, request, pace)

    async def kept() -> Ended:
        from ktrdr_async.cli.running import Runner
        from ktrdr_async.supervision.worker import BacktestWorker

        permitted = list(dict.fromkeys([*allow, *([what.strategy] if ":" in what.strategy else [])]))
        async with BacktestWorker.open(where.dsn, allow=allow, tier=pace.tier, alone=True) as worker:
            roots = () if worker.database.embedded else roots_of(request.data, files_of(request.to_dict()))
            runner = Runner(context, pace, dsn=where.dsn, allow=permitted, roots=roots)
            operation_id = id or secrets.token_hex(8)
            return await runner.carry_out(
                worker,
                operation_id,
                lambda: worker.run(
                    request, operation_id, policy=policy, throttle=pace.throttle, keep_state=pace.keep_state
                ),
            )

    return report(context, context.drive(bare if no_database else kept))
