"""What an operation runs on: a request resolved to bars and a strategy, with the permissions of whoever asked."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import msgspec

from ktrdr_async.backtesting.provenance import identity_of
from ktrdr_async.backtesting.request import BacktestRequest
from ktrdr_async.errors import InputError, ParameterError
from ktrdr_async.market import Bars
from ktrdr_async.strategies.base import StrategyBase
from ktrdr_async.strategies.registry import make, strategies
from ktrdr_async.strategies.state import check_declared, check_state
from ktrdr_async.supervision.shielding import in_thread

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd

    from ktrdr_async.strategies.base import AnyStrategy

    Data = str | os.PathLike[str] | Bars | pd.DataFrame | Mapping[str, pd.DataFrame] | None

MEMORY = "memory:"  # a reference to bars that were handed over, by their fingerprint


class Permissions(msgspec.Struct, frozen=True):
    """What a request may name."""

    trusted: bool  # the calling code or its own command line made the request
    allow: tuple[str, ...] = ()  # module or module:Class
    data_roots: tuple[str, ...] | None = None  # None: data, and files that a strategy names, may be read anywhere
    own_data: bool = False  # the calling code named the data, and nothing else: they may be read anywhere
    cwd: bool = False  # look for modules in the current directory as well


class Job(msgspec.Struct):
    """A request with its bars and its strategy at hand."""

    request: BacktestRequest
    bars: Bars
    strategy: AnyStrategy


async def job_of(
    data: Data, strategy: AnyStrategy | str, request: BacktestRequest | None, terms: Mapping[str, Any], *, cwd: bool
) -> Job:
    """The job that the calling code means: data and strategy in any form, a request and terms that override its fields.

    Raises:
        InputError: if data, strategy or a term can't be used.
    """
    fields = {} if request is None else {name: getattr(request, name) for name in request.__struct_fields__}
    unknown = sorted(terms.keys() - set(BacktestRequest.__struct_fields__))
    if unknown:
        raise ParameterError(
            f"there is no {unknown[0]!r} in a request", hint=f"it has: {', '.join(BacktestRequest.__struct_fields__)}"
        )
    fields |= terms
    if isinstance(data, os.PathLike):
        data = os.fspath(data)
    if data is not None:
        fields["data"] = data if isinstance(data, str) else None
    if isinstance(strategy, str):
        fields["strategy"] = strategy
    made = BacktestRequest.from_dict(fields)
    bars = data if isinstance(data, Bars) else None
    if data is not None and not isinstance(data, str | Bars):
        frames = data
        options = {name: getattr(made, name) for name in ("symbols", "timeframe", "tz", "timestamps", "features")}
        bars = await in_thread(lambda: Bars.from_pandas(frames, **options))
    return await resolve(
        made, bars, None if isinstance(strategy, str) else strategy, Permissions(trusted=True, cwd=cwd)
    )


async def resolve(
    request: BacktestRequest, bars: Bars | None, strategy: AnyStrategy | None, permissions: Permissions
) -> Job:
    """Reads the data and makes the strategy. Nothing is started where one of them is wrong.

    The job's request names what was handed over: a strategy object by its identity, bars in memory by their
    fingerprint.

    Raises:
        InputError: if data, strategy or a parameter can't be used.
    """
    if not isinstance(request, BacktestRequest):
        raise InputError(f"the request is a {type(request).__name__}", hint="make a kt.BacktestRequest")
    if bars is not None and not isinstance(bars, Bars):
        raise InputError(f"bars are a {type(bars).__name__}", hint="make them with kt.Bars.from_pandas(...)")
    if bars is not None and request.data is not None and not request.data.startswith(MEMORY):
        raise InputError(
            "the request names its data, and bars were handed over too", hint="leave out one of `data` and `bars`"
        )
    made = _strategy(request, strategy, permissions)
    check_declared(made)
    check_state(made.state)
    identity = identity_of(made)
    found = bars if bars is not None else await read_bars(request, permissions)
    if bars is not None:
        found = await in_thread(lambda: narrowed(bars, request))
    reference = request.data
    if bars is not None and (reference is None or reference.startswith(MEMORY)):
        fingerprint = await in_thread(found.fingerprint)
        if reference is not None and reference != MEMORY + fingerprint:
            raise InputError(
                f"these bars ({fingerprint[:12]}) are not those of the operation ({reference[len(MEMORY) :][:12]})",
                hint="hand over the bars that it was started with",
            )
        reference = MEMORY + fingerprint
    named = msgspec.structs.replace(
        request, data=reference, strategy=request.strategy or identity.name, parameters=identity.parameters
    )
    return Job(named, found, made)


async def read_bars(request: BacktestRequest, permissions: Permissions) -> Bars:
    """Reads the bars that a request names. :raises InputError: if they can't be read, or mayn't be."""
    reference = request.data
    if reference is None or reference.startswith(MEMORY):
        raise InputError(
            "the request names no data that can be read again",
            hint="hand the bars over: bars=..., or set the request's data",
        )
    return await in_thread(
        lambda: Bars.read(
            reference,
            symbols=request.symbols,
            timeframe=request.timeframe,
            tz=request.tz,
            timestamps=request.timestamps,
            date_format=request.date_format,
            features=request.features,
            start=request.start,
            end=request.end,
            roots=None if permissions.own_data else permissions.data_roots,
        )
    )


def narrowed(bars: Bars, request: BacktestRequest) -> Bars:
    """Bars in memory, cut to the request's symbols and range."""
    if request.symbols and request.symbols != bars.symbols:
        bars = bars.select(request.symbols)
    return bars.between(request.start, request.end) if request.start or request.end else bars


def _is_named(name: str, strategy: AnyStrategy) -> bool:
    return name == identity_of(strategy).name or strategies().get(name) is type(strategy)


def _strategy(request: BacktestRequest, strategy: AnyStrategy | None, permissions: Permissions) -> AnyStrategy:
    if strategy is not None:
        given: object = strategy
        if not isinstance(given, StrategyBase):
            named = f"the class {given.__name__}" if isinstance(given, type) else f"a {type(given).__name__}"
            raise InputError(f"the strategy is {named}", hint="hand over an object, such as SmaCross(fast=10)")
        if permissions.trusted and request.parameters and request.parameters != strategy.parameters:
            raise ParameterError(
                f"the request's parameters are {request.parameters}, the object's {strategy.parameters}",
                hint="give the parameters to the object, or name the strategy instead",
            )
        if request.strategy is not None and not _is_named(request.strategy, strategy):
            raise ParameterError(
                f"the request names the strategy {request.strategy!r}, the object is {identity_of(strategy).name!r}"
            )
        return strategy
    if request.strategy is None:
        raise ParameterError("the request names no strategy", hint="set the request's strategy, or hand an object over")
    return make(
        request.strategy,
        request.parameters,
        allow=permissions.allow,
        trusted=permissions.trusted,
        cwd=permissions.cwd,
        roots=permissions.data_roots,
    )
