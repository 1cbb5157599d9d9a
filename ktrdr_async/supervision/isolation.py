"""`isolate="process"`: what a strategy computes over all bars at once is computed in another process.

For strategies that hold the interpreter, which no thread helps with: beside them every loop of the process stands
still. The strategy is made again there, by its class and its parameters. Bars and what comes back go through files of a
private directory, written and read in threads: sent as arguments they would hold the loop.
"""

from __future__ import annotations

import asyncio
import copy
import importlib
import os
import shutil
import sys
import tempfile
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import anyio
import anyio.to_process
import msgspec
import numpy as np

from ktrdr_async.backtesting.decisions import Decided, Targets, checked_features, checked_targets
from ktrdr_async.errors import InputError, KtrdrError, ParameterError, StrategyError
from ktrdr_async.strategies.base import AsyncStrategy, WeightStrategy, _checked_parameters
from ktrdr_async.strategies.signals import Signals
from ktrdr_async.strategies.state import check_state, decode_state
from ktrdr_async.supervision.shielding import finish_or_raise, in_thread

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ktrdr_async.backtesting.engine import BacktestingEngine
    from ktrdr_async.market import Bars
    from ktrdr_async.strategies.base import AnyStrategy

Isolate = Literal["process"]

LOOK_SECONDS = 0.02  # between two looks whether a process that is to end has come up
_BEGUN, _BARS, _ANSWER = "begun", "bars", "answer"


class Spec(msgspec.Struct, frozen=True):
    """A strategy as another process makes it."""

    module: str
    name: str
    parameters: dict[str, Any]  # as JSON holds them
    roots: tuple[str, ...] | None  # directories that a built-in's files must lie in


class Answer(msgspec.Struct):
    """What came of it, with the strategy's state then."""

    state: bytes | None
    features: dict[str, Any] | None = None  # None: there are targets
    by_weight: bool = True
    places: Any = None  # int64[m]
    values: Any = None  # float64[m]


def checked_isolate(isolate: str | None) -> Isolate | None:
    """How a run is isolated. :raises ParameterError: if there is no such way."""
    if isolate not in (None, "process"):
        raise ParameterError(f"isolate is {isolate!r}; it can be 'process', or left out")
    return isolate  # type: ignore[return-value]


def spec_of(strategy: AnyStrategy) -> Spec:
    """How another process makes this strategy. :raises InputError: if it can't: its class or a parameter stays here."""
    kind = type(strategy)
    named = f"isolate='process': {kind.__module__}:{kind.__qualname__}"
    if isinstance(strategy, AsyncStrategy):
        raise InputError(f"{named} awaits on this loop", hint="let what it awaits compute elsewhere, and leave it out")
    module = sys.modules.get(kind.__module__)
    typed_in = kind.__module__ == "__main__" and not os.path.isfile(getattr(module, "__file__", None) or "")
    if typed_in or getattr(module, kind.__qualname__, None) is not kind:
        raise InputError(
            f"{named} can't be imported by another process",
            hint="define it at the top level of a module: not in a function, nor in a notebook's or prompt's own code",
        )
    main = sys.modules.get("__main__")
    if main is None or main.__name__ == "__mp_main__":  # as it is while the other process runs the script
        raise InputError(
            f"{named}: the other process imports this script; what it runs must stand under "
            '`if __name__ == "__main__":`',
        )
    plain: dict[str, Any] = {}
    for name, value in strategy._parameters.items():
        try:
            plain[name] = msgspec.json.decode(msgspec.json.encode(value))
        except (TypeError, ValueError):
            raise InputError(
                f"{named}: the parameter {name} is a {type(value).__name__}, which JSON can't hold"
            ) from None
    if _checked_parameters(kind, (), plain) != dict(strategy._parameters):
        raise InputError(
            f"{named} would get other parameters there: {plain}",
            hint="annotate them with their types, such as tuple[int, ...] instead of none",
        )
    roots = strategy.roots if isinstance(strategy, Signals) else None
    return Spec(kind.__module__, kind.__qualname__, plain, roots)


class Elsewhere:
    """Computes one strategy's large call in another process, instead of in the engine's.

    Raises:
        InputError: if the strategy can't be made there.
    """

    def __init__(self, strategy: AnyStrategy) -> None:
        self._spec = spec_of(strategy)

    async def __call__(self, engine: BacktestingEngine) -> Any:
        """The targets or features, kept in `engine.decided`, as the engine's own process would have them.

        Raises:
            CancelledError: if this task was cancelled; the process is gone.
            StrategyError: if the process ended by itself, or as the engine's checks say.
            Exception: what the strategy raised, with a note of where.
        """
        strategy, bars = engine.strategy, engine.bars
        directory = Path(tempfile.mkdtemp(prefix="ktrdr-async-"))
        try:
            await in_thread(lambda: _write_bars(directory / _BARS, bars))
            state, lot_size = check_state(strategy.state), engine.request.lot_size
            failed = await _in_process(directory, self._spec, state, lot_size)
            if failed is not None:
                raise failed
            answer = await in_thread(lambda: _read_answer(directory / _ANSWER))
        finally:
            await finish_or_raise(lambda: in_thread(lambda: shutil.rmtree(directory, ignore_errors=True)))
        strategy.state = decode_state(answer.state, None if strategy.state is None else type(strategy.state))
        if answer.features is not None:
            return checked_features(strategy, bars, answer.features, engine.decided)
        targets = Targets(answer.places, answer.values, (len(bars), bars.k))
        engine.decided.by_weight = answer.by_weight
        engine.decided.keep("target_weights" if answer.by_weight else "target_quantities", targets)
        return targets


async def _in_process(directory: Path, *arguments: Any) -> BaseException | None:
    """Runs `_compute` in a process of anyio's pool; a cancellation ends it. Gives what the strategy raised."""
    limiter = anyio.to_process.current_default_process_limiter()
    async with limiter:
        task = asyncio.ensure_future(
            anyio.to_process.run_sync(
                _compute, str(directory), *arguments, cancellable=True, limiter=anyio.CapacityLimiter(1)
            )
        )
        cancelled: asyncio.CancelledError | None = None
        told = False
        with anyio.CancelScope(shield=True):
            while not task.done():
                if cancelled is not None and not told:  # anyio leaves one behind that is cancelled as it starts
                    told = (directory / _BEGUN).exists() and task.cancel()
                try:
                    await asyncio.wait({task}, timeout=None if cancelled is None or told else LOOK_SECONDS)
                except asyncio.CancelledError as error:
                    cancelled = error
        if cancelled is not None:
            if not task.cancelled():
                task.exception()  # looked at: nobody else will
            raise cancelled
    try:
        return task.result()
    except anyio.BrokenWorkerProcess as error:
        cause = error.__cause__
        if isinstance(cause, KtrdrError):
            raise cause from None
        raise StrategyError("the process that computed for the strategy ended", hint=f"{cause or error}") from error


def _compute(directory: str, spec: Spec, state: bytes | None, lot_size: float) -> BaseException | None:
    """In the other process: answers by a file; gives what was raised."""
    (Path(directory) / _BEGUN).touch()
    try:
        bars = _read_bars(Path(directory) / _BARS)
        kind = getattr(importlib.import_module(spec.module), spec.name)
        strategy = kind(**spec.parameters)
        if spec.roots is not None:
            object.__setattr__(strategy, "roots", spec.roots)
        strategy.state = decode_state(state, None if strategy.state is None else type(strategy.state))
        decided = Decided(strategy.warmup)
        if isinstance(strategy, WeightStrategy):
            targets = checked_targets(strategy, bars, lot_size, decided)
            answer = Answer(None, None, decided.by_weight, targets.places, targets.values)
        else:
            features = checked_features(strategy, bars, strategy.prepare(bars), decided)
            answer = Answer(None, {name: rows for name, rows in features.items() if name not in bars.features})
        answer.state = check_state(strategy.state)
        _write_answer(Path(directory) / _ANSWER, answer)
    except BaseException as error:
        return _sendable(error)
    return None


def _sendable(error: BaseException) -> BaseException:
    """The error as it can be sent, with a note that says where in the other process it was raised."""
    where = "".join(traceback.format_tb(error.__traceback__)[1:]).rstrip()
    sent: BaseException = StrategyError(f"the strategy's code raised {type(error).__name__}: {error}")
    if isinstance(error, Exception) and not isinstance(error, StopIteration | StopAsyncIteration):
        kind = type(error)
        plain = all(isinstance(each, str | int | float | bytes | None) for each in error.args)
        known = getattr(sys.modules.get(kind.__module__), kind.__qualname__, None) is kind
        try:
            again = copy.copy(error)
            if plain and known and type(again) is kind and str(again) == str(error):
                sent = error.with_traceback(None)
                sent.__cause__ = sent.__context__ = None
        except Exception:  # an error whose class makes no other one out of its arguments
            for note in getattr(error, "__notes__", []):
                sent.add_note(note)
    sent.add_note(f"in another process:\n{where}")
    return sent


# Files: arrays, and what is plain beside them.


def _write(path: Path, plain: dict[str, Any], arrays: list[NDArray[Any]]) -> None:
    head = np.frombuffer(msgspec.msgpack.encode(plain), np.uint8)
    with path.open("wb") as stream:
        np.savez(stream, head, *arrays)


def _read(path: Path) -> tuple[dict[str, Any], list[NDArray[Any]]]:
    with np.load(path, allow_pickle=False) as stored:
        head, *arrays = [stored[f"arr_{number}"] for number in range(len(stored.files))]
    return msgspec.msgpack.decode(head.tobytes()), arrays


def _write_bars(path: Path, bars: Bars) -> None:
    plain = {
        "symbols": bars.symbols, "timeframe": bars.timeframe, "features": list(bars.features),
        "reference": bars.reference,
    }  # fmt: skip
    fields = [bars.open, bars.high, bars.low, bars.close, bars.volume]
    _write(path, plain, [bars.timestamps, *fields, *bars.features.values()])


def _read_bars(path: Path) -> Bars:
    from ktrdr_async.market.bars import Bars

    plain, (times, *columns) = _read(path)
    return Bars(
        times,
        columns[:5],
        symbols=tuple(plain["symbols"]),
        timeframe=plain["timeframe"],
        features=dict(zip(plain["features"], columns[5:], strict=True)),
        reference=plain["reference"],
    )


def _write_answer(path: Path, answer: Answer) -> None:
    features = answer.features
    plain = {
        "state": answer.state, "by_weight": answer.by_weight, "features": None if features is None else list(features)
    }  # fmt: skip
    _write(path, plain, [answer.places, answer.values] if features is None else list(features.values()))


def _read_answer(path: Path) -> Answer:
    plain, arrays = _read(path)
    if plain["features"] is None:
        return Answer(plain["state"], None, plain["by_weight"], *arrays)
    return Answer(plain["state"], dict(zip(plain["features"], arrays, strict=True)), plain["by_weight"])
