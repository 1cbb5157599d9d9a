"""Strategies by name: which are registered, which code a name may load, and parameters as text.

A name that comes from a database can't make this process import what nobody here permitted: nothing is imported
before it was checked.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import re
import stat
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktrdr_async.errors import CodeNotAllowedError, InputError, ParameterError, UnknownStrategyError
from ktrdr_async.strategies.async_reversion import AsyncReversion
from ktrdr_async.strategies.base import AnyStrategy, AsyncStrategy, Strategy, WeightStrategy
from ktrdr_async.strategies.buy_and_hold import BuyAndHold
from ktrdr_async.strategies.donchian_breakout import DonchianBreakout
from ktrdr_async.strategies.momentum_rotation import MomentumRotation
from ktrdr_async.strategies.parameters import describe, parse_parameter
from ktrdr_async.strategies.rsi_reversion import RsiReversion
from ktrdr_async.strategies.signals import Signals
from ktrdr_async.strategies.sma_cross import SmaCross

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = [
    "BUILT_IN", "GROUP", "allow_file", "describe", "make", "parse_parameter", "resolve", "strategies", "summary_of",
]  # fmt: skip

logger = logging.getLogger(__name__)

GROUP = "ktrdr_async.strategies"  # of entry points
BUILT_IN: Mapping[str, type[AnyStrategy]] = {
    kind.name: kind
    for kind in (SmaCross, BuyAndHold, RsiReversion, DonchianBreakout, MomentumRotation, Signals, AsyncReversion)
}

_KINDS = (WeightStrategy, Strategy, AsyncStrategy)
_MODULE = r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*"
_PATH = re.compile(rf"({_MODULE}):([A-Za-z_]\w*)")
_ENTRY = re.compile(rf"{_MODULE}(?::[A-Za-z_]\w*)?")
_MAX_ALLOW_BYTES = 65_536


def strategies() -> dict[str, type[AnyStrategy]]:
    """The registered strategies: built-ins, then those of installed packages, by name.

    A package's strategy that can't be loaded is left out with a logged warning; `resolve` says why.
    """
    found = dict(BUILT_IN)
    for name, points in sorted(_registered().items()):
        if name in found:
            continue
        try:
            found[name] = _load(name, points)
        except InputError as error:
            logger.warning("the strategy %s is left out: %s", name, error)
    return found


def resolve(name: str, *, allow: Iterable[str] = (), trusted: bool = False, cwd: bool = False) -> type[AnyStrategy]:
    """Finds the class that a name stands for.

    Args:
        name: a registered name, or `module:Class`.
        allow: which code a name that isn't trusted may load, each `module` or `module:Class`; a module's submodules
            aren't meant by it. A file of the user's own, `allow_file()`, adds to it, one entry a line.
        trusted: whether the calling code or the user's own command line named it, so that no permission is needed.
        cwd: whether a trusted `module:Class` may be found in the current directory too, after everything else.

    Raises:
        UnknownStrategyError: if there is no such strategy; it names those that are near.
        CodeNotAllowedError: if a name that isn't trusted asks for code that nobody permitted.
        InputError: if the module can't be imported, or what the name stands for is no strategy.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    match = None if ".py:" in name else _PATH.fullmatch(name)
    if match is None:
        registered = _registered()
        if name in registered:
            return _load(name, registered[name])
        raise _unknown(name, registered)
    module, attribute = match.groups()
    if not trusted:
        _check_allowed(name, module, allow)
    elif cwd and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return _class_of(name, module, attribute)


def make(
    name: str,
    parameters: Mapping[str, Any],
    *,
    allow: Iterable[str] = (),
    trusted: bool = False,
    cwd: bool = False,
    roots: Sequence[str | os.PathLike[str]] | None = None,
) -> AnyStrategy:
    """Makes the strategy that a request names.

    Args:
        name: as for `resolve`.
        parameters: values by name, as JSON holds them; texts of a command line go through `parse_parameter` first.
        allow: as for `resolve`.
        trusted: as for `resolve`.
        cwd: as for `resolve`.
        roots: directories that files which a built-in reads must lie in; None permits every file.

    Raises:
        ParameterError: if a parameter is unknown, missing, of another type or out of range.
        UnknownStrategyError: as `resolve`.
        CodeNotAllowedError: as `resolve`.
        InputError: as `resolve`.
    """
    kind = resolve(name, allow=allow, trusted=trusted, cwd=cwd)
    try:
        strategy = kind(**parameters)
    except ValueError as error:
        raise ParameterError(f"{name}: {error}") from error
    if isinstance(strategy, Signals) and roots is not None:
        object.__setattr__(strategy, "roots", tuple(os.fspath(root) for root in roots))
    return strategy


def summary_of(kind: type) -> str:
    """The first line of a strategy's docstring; empty where it has none of its own."""
    return (kind.__dict__.get("__doc__") or "").strip().partition("\n")[0].strip()


# What may be imported.


def allow_file() -> Path | None:
    """Where the user's own list of permitted code is, `ktrdr-async/allow` among the user's settings; None for root."""
    if not hasattr(os, "geteuid") or os.geteuid() == 0:
        return None
    configured = os.environ.get("XDG_CONFIG_HOME", "")
    home = Path(configured) if os.path.isabs(configured) else Path("~/.config").expanduser()
    return home / "ktrdr-async" / "allow"


def _check_allowed(name: str, module: str, allow: Iterable[str]) -> None:
    given = (allow,) if isinstance(allow, str) else tuple(allow)
    for entry in given:
        _check_entry(entry, "allow")
    if name in given or module in given:
        return
    if any(name == f"{kind.__module__}:{kind.__qualname__}" for kind in BUILT_IN.values()):
        return
    if any(name == point.value for points in _registered().values() for point in points):
        return
    mine = _allowed_by_user()
    if name in mine or module in mine:
        return
    file = allow_file()
    raise CodeNotAllowedError(
        f"{name} was read from a database, and nothing here permits this code",
        hint=f"if you trust it: --allow {module} (allow=({module!r},)){f', or a line in {file}' if file else ''}; "
        "or register it as an entry point",
    )


def _allowed_by_user() -> tuple[str, ...]:
    file = allow_file()
    if file is None:
        return ()
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return ()
    except OSError as error:
        raise CodeNotAllowedError(f"{file} can't be read: {error.strerror}") from None
    with os.fdopen(descriptor, "rb") as stream:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise CodeNotAllowedError(
                f"{file} permits code, and isn't a file that only you can read and write (owner {status.st_uid}, "
                f"mode {stat.S_IMODE(status.st_mode):04o})",
                hint=f"look through it, then: chmod 600 {file}",
            )
        if status.st_size > _MAX_ALLOW_BYTES:
            raise CodeNotAllowedError(f"{file} has {status.st_size} bytes, more than {_MAX_ALLOW_BYTES}")
        lines = stream.read(_MAX_ALLOW_BYTES).decode(errors="replace").splitlines()
    entries = [(number, line.partition("#")[0].strip()) for number, line in enumerate(lines, 1)]
    for number, entry in entries:
        if entry:
            _check_entry(entry, f"{file}, line {number}")
    return tuple(entry for _, entry in entries if entry)


def _check_entry(entry: str, where: str) -> None:
    if not _ENTRY.fullmatch(entry):
        raise InputError(f"{where}: {entry!r} is neither a module nor module:Class")


# From a name to a class.


def _registered() -> dict[str, list[EntryPoint]]:
    from importlib.metadata import entry_points

    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        same = found.setdefault(point.name, [])
        if all(point.value != other.value for other in same):  # one installation may be found twice on the path
            same.append(point)
    return found


def _load(name: str, points: list[EntryPoint]) -> type[AnyStrategy]:
    if len(points) > 1:
        values = ", ".join(sorted(point.value for point in points))
        raise InputError(f"several installed packages register {name!r}: {values}", hint="name one as module:Class")
    match = _PATH.fullmatch(points[0].value.replace(" ", ""))
    if match is None:
        raise InputError(f"the entry point {name!r} is {points[0].value!r}; it must be module:Class")
    return _class_of(name, *match.groups())


def _class_of(name: str, module: str, attribute: str) -> type[AnyStrategy]:
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            raise InputError(
                f"{name}: there is no module {error.name!r}",
                hint=f"it is looked for where Python looks for modules; put its directory on PYTHONPATH, or install it "
                f"(the current directory is {os.getcwd()})",
            ) from error
        raise _import_failed(name, module, error) from error
    except (Exception, SystemExit) as error:
        raise _import_failed(name, module, error) from error
    found = getattr(loaded, attribute, None)
    if found is None:
        here = [each for each, value in vars(loaded).items() if _is_strategy(value)]
        near = difflib.get_close_matches(attribute, here) or here[:10]
        raise UnknownStrategyError(
            f"{name}: the module {module} has no {attribute!r}",
            hint=f"it has: {', '.join(near)}" if near else "it has no strategy",
        )
    if not _is_strategy(found):
        what = f"the class {found.__name__}" if isinstance(found, type) else f"a {type(found).__name__}"
        raise InputError(
            f"{name} is {what}, not a strategy",
            hint="a strategy is a class derived from WeightStrategy, Strategy or AsyncStrategy",
        )
    kind: type[AnyStrategy] = found
    return kind


def _is_strategy(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, _KINDS) and value not in _KINDS


def _import_failed(name: str, module: str, error: BaseException) -> InputError:
    where = ""
    frame = error.__traceback__
    while frame is not None:
        file = frame.tb_frame.f_code.co_filename
        if not file.startswith("<frozen") and file != importlib.__file__ and file != __file__:
            where = f" ({file}, line {frame.tb_lineno})"
        frame = frame.tb_next
    if isinstance(error, SyntaxError) and error.filename:
        where = f" ({error.filename}, line {error.lineno})"
    reason = error.msg if isinstance(error, SyntaxError) else str(error)
    return InputError(f"{name}: importing {module} raised {type(error).__name__}: {reason}{where}")


def _unknown(name: str, registered: Mapping[str, object]) -> UnknownStrategyError:
    names = sorted({*BUILT_IN, *registered})
    near = difflib.get_close_matches(name, names) or difflib.get_close_matches(name.lower().replace("-", "_"), names)
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    elif ".py" in name or "/" in name:
        hint = "name a class in a file as module:Class, such as my_strategies:Reversal for my_strategies.py"
    elif "." in name:
        hint = f"did you mean {name.rpartition('.')[0]}:{name.rpartition('.')[2]}?"
    else:
        hint = f"there are: {', '.join(names)}; your own are named module:Class"
    return UnknownStrategyError(f"there is no strategy {name!r}", hint=hint)
