"""The options of the commands, and the request that they add up to."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter

from ktrdr_async.errors import InputError

if TYPE_CHECKING:
    from ktrdr_async.backtesting.request import BacktestRequest
    from ktrdr_async.checkpoint.policy import CheckpointPolicy

StatusName = Literal["pending", "running", "completed", "failed", "cancelled", "interrupted"]

DATA, TERMS, HOW = Group("Data", sort_key=1), Group("Strategy and market", sort_key=2), Group("Options", sort_key=3)
_SCHEME = re.compile(r"synthetic:|[A-Za-z][A-Za-z0-9+.-]+:(//|\?)")
_PAIRS = re.compile(r"[^=,/\\]+=[^,]+(,[^=,/\\]+=[^,]+)*")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What is printed.

    Attributes:
        json: print exactly one JSON object on stdout, in one line, and everything else on stderr.
        quiet: no progress.
    """

    json: Annotated[bool, Parameter(group=HOW)] = False
    quiet: Annotated[bool, Parameter(group=HOW)] = False


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class DatabaseOptions:
    """Where operations are kept.

    Attributes:
        database: PostgreSQL to use, postgresql://...; without it KTRDR_ASYNC_DATABASE, else the embedded one.
    """

    database: Annotated[str | None, Parameter(group=HOW, metavar="DSN")] = None

    @property
    def dsn(self) -> str | None:
        """The DSN that was given, if it isn't empty."""
        return self.database or None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class TrustOptions:
    """What a stored operation may name.

    Attributes:
        allow: code that a stored operation's strategy may be imported from; may be given several times.
        data_root: directory that a stored operation's data may be read from, where the database isn't the embedded
            one; may be given several times.
    """

    allow: Annotated[tuple[str, ...], Parameter(group=HOW, metavar="MODULE[:CLASS]")] = ()
    data_root: Annotated[tuple[str, ...], Parameter(group=HOW, metavar="DIR")] = ()

    def find_in_cwd(self) -> None:
        """Lets what `--allow` names be found in the current directory too: one's own command line named it."""
        if self.allow and os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PaceOptions:
    """When to checkpoint, how fast to run, how often to tell.

    Attributes:
        checkpoint_bars: bars between two checkpoints.
        checkpoint_seconds: seconds between two checkpoints, whichever comes first; saves take at most 5 % of the time.
        throttle: bars a second at most, for demonstrations.
        keep_state: keep the final state with the result, so that `extend` can go on from it.
        tier: what computes; auto takes compiled code for long runs. Every bit is the same.
        progress_seconds: seconds between two lines of progress; 0.1 on a terminal and 5 elsewhere without it.
        output: directory to write fills, trades, equity and metrics to, as CSV, Parquet and JSON.
    """

    checkpoint_bars: Annotated[int | None, Parameter(group=HOW, metavar="N")] = None
    checkpoint_seconds: Annotated[float | None, Parameter(group=HOW, metavar="S")] = None
    throttle: Annotated[float | None, Parameter(group=HOW, metavar="BARS_PER_SECOND")] = None
    keep_state: Annotated[bool, Parameter(group=HOW, negative=())] = False
    tier: Annotated[Literal["auto", "interpreted", "compiled"], Parameter(group=HOW)] = "auto"
    progress_seconds: Annotated[float | None, Parameter(group=HOW, metavar="S")] = None
    output: Annotated[str | None, Parameter(name=["--output", "-o"], group=HOW, metavar="DIR")] = None

    def policy(self) -> CheckpointPolicy:
        """When to checkpoint. :raises ParameterError: if a value is out of its range."""
        from ktrdr_async.checkpoint.policy import CheckpointPolicy

        if self.throttle is not None and not self.throttle > 0:
            raise InputError(f"--throttle is {self.throttle:g}; it must be above 0 bars a second")
        if self.progress_seconds is not None and not self.progress_seconds > 0:
            raise InputError(f"--progress-seconds is {self.progress_seconds:g}; it must be above 0")
        given: dict[str, float] = {}
        if self.checkpoint_bars is not None:
            given["unit_interval"] = self.checkpoint_bars
        if self.checkpoint_seconds is not None:
            given["time_interval_seconds"] = self.checkpoint_seconds
        return CheckpointPolicy(**given)  # type: ignore[arg-type]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """One backtest.

    Attributes:
        data: a CSV or Parquet file, a directory of them, A=a.csv,B=b.csv, or synthetic:?bars=35000&seed=7.
        strategy: a name that `ktrdr-async strategies` lists, or your own as module:Class.
        symbol: symbol to trade; may be given several times; without it all that the data have.
        start: first bar, such as 2020-01-01 or 2020-01-01T09:00.
        end: last bar, inclusive; a date means that whole day.
        timeframe: a bar's length, such as 1h; without it the most common step.
        tz: zone of times that carry none; UTC without it.
        timestamps: whether times name a bar's opening or its end.
        date_format: how the file writes its times, as for strptime.
        feature: further column that travels with the bars; may be given several times.
        param: parameter of the strategy; several may follow, and it may be given several times.
        capital: starting capital, in account currency.
        commission: fraction of notional a side.
        slippage: fraction of price against the order.
        lot: units in a lot.
        min_trade: fraction of equity below which a rebalance is skipped.
        force_close: whether what is open is closed after the last bar.
        seed: of the strategy's random numbers.
    """

    data: Annotated[str, Parameter(group=DATA, metavar="FILE_OR_REFERENCE")]
    strategy: Annotated[str, Parameter(group=TERMS, metavar="NAME")]
    symbol: Annotated[tuple[str, ...], Parameter(group=DATA, metavar="S")] = ()
    start: Annotated[str | None, Parameter(group=DATA, metavar="D")] = None
    end: Annotated[str | None, Parameter(group=DATA, metavar="D")] = None
    timeframe: Annotated[str | None, Parameter(group=DATA)] = None
    tz: Annotated[str | None, Parameter(group=DATA)] = None
    timestamps: Annotated[Literal["open", "close"], Parameter(group=DATA, show_default=True)] = "open"
    date_format: Annotated[str | None, Parameter(group=DATA)] = None
    feature: Annotated[tuple[str, ...], Parameter(group=DATA, metavar="COLUMN")] = ()
    param: Annotated[tuple[str, ...], Parameter(group=TERMS, metavar="K=V", consume_multiple=True)] = ()
    capital: Annotated[float, Parameter(group=TERMS, metavar="X", allow_leading_hyphen=True, show_default=True)] = (
        100_000.0
    )
    commission: Annotated[float, Parameter(group=TERMS, metavar="X", allow_leading_hyphen=True, show_default=True)] = (
        0.001
    )
    slippage: Annotated[float, Parameter(group=TERMS, metavar="X", allow_leading_hyphen=True, show_default=True)] = (
        0.0005
    )
    lot: Annotated[float, Parameter(group=TERMS, metavar="X", allow_leading_hyphen=True, show_default=True)] = 1.0
    min_trade: Annotated[float, Parameter(group=TERMS, metavar="X", allow_leading_hyphen=True, show_default=True)] = 0.0
    force_close: Annotated[bool, Parameter(group=TERMS, negative="--no-force-close")] = True
    seed: Annotated[int, Parameter(group=TERMS, metavar="N", allow_leading_hyphen=True)] = 0

    def request(self) -> BacktestRequest:
        """The request, with absolute paths, so that `resume` works from any directory.

        Raises:
            InputError: if the strategy, a parameter or a cost can't be used.
        """
        from ktrdr_async.backtesting.request import BacktestRequest

        return BacktestRequest(
            data=absolute(self.data),
            symbols=self.symbol,
            start=self.start,
            end=self.end,
            timeframe=self.timeframe,
            tz=self.tz,
            timestamps=self.timestamps,
            date_format=self.date_format,
            features=self.feature,
            strategy=self.strategy,
            parameters=self._parameters(),
            initial_capital=self.capital,
            commission=self.commission,
            slippage=self.slippage,
            lot_size=self.lot,
            min_trade=self.min_trade,
            force_close=self.force_close,
            seed=self.seed,
        )

    def _parameters(self) -> dict[str, object]:
        from ktrdr_async.strategies.parameters import parse_parameter
        from ktrdr_async.strategies.registry import resolve

        # Named on one's own command line: trusted, and looked for in the current directory as well.
        kind = resolve(self.strategy, trusted=True, cwd=True)
        files = getattr(kind, "file_parameters", ())
        found: dict[str, object] = {}
        for text in self.param:
            name, equals, value = text.partition("=")
            if not equals or not name:
                raise InputError(f"--param {text!r} is not NAME=VALUE", hint="for example --param fast=10")
            if name in found:
                raise InputError(f"--param {name} is given twice")
            parsed = parse_parameter(kind, name, value)
            found[name] = os.path.abspath(parsed) if name in files and isinstance(parsed, str) else parsed
        return found


USUAL_DATABASE, USUAL_OUTPUT, USUAL_PACE, NO_TRUST = DatabaseOptions(), OutputOptions(), PaceOptions(), TrustOptions()


def absolute(reference: str) -> str:
    """A data reference that means the same in every directory; one that names no file stays as it is."""
    if not reference or "\0" in reference or os.path.exists(reference):
        return os.path.abspath(reference) if reference and "\0" not in reference else reference
    if _SCHEME.match(reference):
        return reference
    if _PAIRS.fullmatch(reference):
        pairs = (pair.partition("=") for pair in reference.split(","))
        return ",".join(f"{symbol.strip()}={os.path.abspath(path.strip())}" for symbol, _, path in pairs)
    return os.path.abspath(reference)


def roots_of(reference: str | None, files: Sequence[str] = ()) -> tuple[str, ...]:
    """The directories that a reference's files, and further ones, are in: what `--data-root` must name."""
    paths = [] if not reference or reference.startswith(("synthetic:", "memory:")) else [reference]
    if reference and paths and not os.path.exists(reference) and _PAIRS.fullmatch(reference):
        paths = [pair.partition("=")[2] for pair in reference.split(",")]
    paths += files
    return tuple(dict.fromkeys(path if os.path.isdir(path) else os.path.dirname(path) for path in paths))


def files_of(request: Mapping[str, Any]) -> list[str]:
    """The files that a stored request's strategy reads."""
    from ktrdr_async.strategies.registry import BUILT_IN

    named = getattr(BUILT_IN.get(request.get("strategy") or ""), "file_parameters", ())
    return [path for name in named if isinstance(path := request.get("parameters", {}).get(name), str)]
