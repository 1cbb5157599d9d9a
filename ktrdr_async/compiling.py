"""Compiles the package's numeric sources with numba, where it is at hand: the same source, the same bits, no fastmath.

A module is executed a second time under another name, and its functions there are compiled ones. Their machine code is
kept in a directory of our own that is named by a hash of all these sources, of Python and of numba: numba itself
doesn't notice that a function in another file has changed. numba's files are pickles, so the directory must belong to
this user and be writable by nobody else; where there can be none, code is compiled anew in each process.

`load` takes about half a second and holds the interpreter, so it belongs before a loop has others to serve.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import logging
import os
import stat
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import msgspec

logger = logging.getLogger("ktrdr_async.compiling")

SOURCES = (  # in the order in which they import each other
    "ktrdr_async.strategies.kernels",
    "ktrdr_async.backtesting.execution",
    "ktrdr_async.backtesting.packed",
)
CACHE_VARIABLE = "XDG_CACHE_HOME"

_modules: dict[str, ModuleType] = {}
_broken: str | None = None
_lock = threading.Lock()


class Loaded(msgspec.Struct, frozen=True):
    """How loading went."""

    seconds: float
    cached: bool  # machine code came from the cache, all of it
    why_not: str | None = None  # None: it is loaded


def installed() -> bool:
    """Whether numba is at hand, without importing it."""
    return _broken is None and importlib.util.find_spec("numba") is not None


def compiled(source: str) -> ModuleType | None:
    """The compiled double of a module; None before `load`."""
    return _modules.get(source)


def load(rehearse: Callable[[], None]) -> Loaded:
    """Compiles `SOURCES`, or loads their machine code. Once a process; without numba it says so and does nothing.

    Args:
        rehearse: calls what will be called, with the types that it will be called with.
    """
    global _broken
    with _lock:
        started = time.perf_counter()
        if _modules:
            return Loaded(0.0, cached=True)
        if not installed():
            if _broken is None:
                _broken = "numba isn't installed"
                logger.warning("%s; runs are interpreted", _broken)
            return Loaded(0.0, cached=False, why_not=_broken)
        try:
            cached = _load(rehearse)
        except Exception as error:  # numba is never required: whatever is wrong with it, the interpreted tier runs
            _broken = f"numba doesn't work here: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            logger.warning("%s; runs are interpreted", _broken)
            return Loaded(time.perf_counter() - started, cached=False, why_not=_broken)
        done = Loaded(time.perf_counter() - started, cached=cached)
        logger.info("the compiled tier took %.2f s %s", done.seconds, "from its cache" if cached else "to compile")
        return done


def _load(rehearse: Callable[[], None]) -> bool:
    """Whether all machine code came from the cache. A cache that is damaged is left alone, and done without."""
    import numba

    if getattr(numba.config, "DISABLE_JIT", 0):
        raise RuntimeError("NUMBA_DISABLE_JIT is set")
    directory = _cache_directory(numba.__version__)
    while True:
        functions: list[Any] = []
        try:
            for source in SOURCES:
                _modules[source], found = _double(source, numba, directory)
                functions += found
            rehearse()
        except Exception as error:
            _modules.clear()
            if directory is None:
                raise
            logger.warning("the compiled code in %s can't be used (%s): delete it", directory, type(error).__name__)
            directory = None
            continue
        return directory is not None and not sum(sum(each.stats.cache_misses.values()) for each in functions)


def _double(source: str, numba: ModuleType, directory: Path | None) -> tuple[ModuleType, list[Any]]:
    original = importlib.import_module(source)
    name = f"{source}__compiled"
    spec = importlib.util.spec_from_file_location(name, original.__file__)  # another name, the same file
    if spec is None or spec.loader is None:
        raise ImportError(f"{source} has no source file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # numba looks a function's globals up there
    spec.loader.exec_module(module)
    functions = []
    # Nothing is allocated in them: without numba's reference counts on arrays they run three times as fast.
    options = {"cache": directory is not None, "_nrt": False, "forceinline": True, "nogil": True}
    before = numba.config.CACHE_DIR
    try:
        if directory is not None:
            numba.config.CACHE_DIR = str(directory)  # for our own functions only: it is read when they are decorated
        for each, value in list(vars(module).items()):
            if isinstance(value, FunctionType) and value.__module__ == name:
                setattr(module, each, made := numba.njit(value, **options))
                functions.append(made)
            elif isinstance(value, ModuleType) and value.__name__ in _modules:
                setattr(module, each, _modules[value.__name__])  # compiled code calls compiled code
            elif isinstance(value, type) and value.__module__ == name:
                setattr(module, each, getattr(original, each))  # records are one type in both
    finally:
        numba.config.CACHE_DIR = before
    return module, functions


def _cache_directory(version: str, sources: Sequence[str] = SOURCES) -> Path | None:
    """A directory for exactly these sources, Python and numba, that nobody else can write to; None: there is none."""
    import llvmlite

    key = hashlib.sha256(f"{version} {llvmlite.__version__} {sys.version}".encode())
    for source in sources:
        spec = importlib.util.find_spec(source)
        if spec is None or spec.origin is None or not os.path.exists(spec.origin):
            return None
        key.update(Path(spec.origin).read_bytes())
    given = os.environ.get(CACHE_VARIABLE, "")
    try:
        base = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
        directory = base / "ktrdr-async" / "compiled" / key.hexdigest()[:24]
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for part in (directory, directory.parent, directory.parent.parent):
            found = part.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
                logger.warning("%s isn't a directory of this user alone; compiled code isn't cached", part)
                return None
        if not os.access(directory, os.W_OK):
            return None
    except (OSError, RuntimeError):
        return None
    return directory
