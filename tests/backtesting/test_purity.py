"""Nothing that makes a result reads a clock, the global random state, the order of a set or a hash (AST, not text)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import ktrdr_async

ROOT = Path(ktrdr_async.__file__).parent
ENGINE = sorted((ROOT / "backtesting").glob("*.py"))
# registry.py finds classes by name, before there is a run.
STRATEGIES = sorted(set((ROOT / "strategies").glob("*.py")) - {ROOT / "strategies" / "registry.py"})
EXECUTION = ROOT / "backtesting" / "execution.py"

BANNED_MODULES = {"time", "random", "secrets", "os", "uuid", "socket", "asyncio", "threading", "anyio", "locale"}
# state.py names uuid as a type of constants; async_reversion's stand-in for a model waits by need.
ALLOWED_IMPORTS = {("state.py", "uuid"), ("async_reversion.py", "anyio")}
BANNED_CALLS = {"hash", "id", "input", "open", "eval", "exec", "globals"}
ALLOWED_CALLS = {("state.py", "id")}
CLOCKS = {"now", "utcnow", "today", "perf_counter", "monotonic", "time_ns", "getenv", "environ", "urandom"}
METRIC_FILES = {"metrics.py", "results.py", "summary.py", "audit.py", "export.py"}  # what is derived for people
NUMPY_RANDOM_ALLOWED = {"Generator", "Philox"}  # keyed ones
VECTOR_UNITS = {"exp", "log", "log2", "log10", "log1p", "expm1", "tanh", "sin", "cos", "power", "cbrt", "float_power"}


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def violations(source: str, name: str, *, metric: bool) -> list[str]:
    """What a module does that a result must not depend on."""
    found = []
    for node in ast.walk(ast.parse(source)):
        line = f"{name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for module in modules:
                top = module.split(".")[0]
                if top in BANNED_MODULES and (name, top) not in ALLOWED_IMPORTS:
                    found.append(f"{line} imports {module}")
        elif isinstance(node, ast.Call):
            called = dotted(node.func)
            if called in BANNED_CALLS and (name, called) not in ALLOWED_CALLS:
                found.append(f"{line} calls {called}()")
        elif isinstance(node, ast.Attribute):
            if node.attr in CLOCKS:
                found.append(f"{line} reads {dotted(node)}")
            if dotted(node.value) in ("np.random", "numpy.random") and node.attr not in NUMPY_RANDOM_ALLOWED:
                found.append(f"{line} uses {dotted(node)}")
            if not metric and dotted(node.value) in ("np", "numpy", "math") and node.attr in VECTOR_UNITS:
                found.append(f"{line} uses {dotted(node)}, whose bits differ between machines")
        elif isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.Pow):
            # A power of two integers is exact.
            operands = (node.left, node.right) if isinstance(node, ast.BinOp) else (node.target, node.value)
            exact = all(isinstance(o, ast.Constant) and isinstance(o.value, int) for o in operands)
            if not exact and not metric:
                found.append(f"{line} takes a power")
        iterated = [node.iter] if isinstance(node, ast.For | ast.comprehension) else []
        for each in iterated:
            is_call = isinstance(each, ast.Call) and dotted(each.func) in ("set", "frozenset")
            if is_call or isinstance(each, ast.Set | ast.SetComp):
                found.append(f"{line} iterates over a set")
    return found


@pytest.mark.parametrize("path", ENGINE + STRATEGIES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_no_clock_no_global_random_no_unordered_set(path: Path) -> None:
    assert violations(path.read_text(encoding="utf-8"), path.name, metric=path.name in METRIC_FILES) == []


@pytest.mark.parametrize(
    "source",
    [
        "import time", "from time import perf_counter", "import random", "from os import environ", "x = hash('a')",
        "import numpy as np\nx = np.random.random()", "import numpy as np\nr = np.random.default_rng()",
        "from datetime import datetime\nt = datetime.now()", "y = x ** 0.5", "x **= 2", "for a in {1, 2}: pass",
        "b = [a for a in set(c)]", "import numpy as np\ny = np.exp(x)", "import math\ny = math.tanh(x)",
    ],
)  # fmt: skip
def test_the_check_can_fail(source: str) -> None:
    assert violations(source, "engine.py", metric=False)


def test_what_is_permitted_is_used() -> None:
    """An exception that nobody needs any more is one too many."""
    for name, module in ALLOWED_IMPORTS:
        path = ROOT / "strategies" / name
        imported = {
            alias.name.split(".")[0] for node in nodes(path) if isinstance(node, ast.Import) for alias in node.names
        } | {(node.module or "").split(".")[0] for node in nodes(path) if isinstance(node, ast.ImportFrom)}
        assert module in imported, (name, module)
    for name, called in ALLOWED_CALLS:
        path = ROOT / "strategies" / name
        assert called in {dotted(node.func) for node in nodes(path) if isinstance(node, ast.Call)}, (name, called)


def test_execution_imports_math_and_typing_alone() -> None:
    for node in nodes(EXECUTION):
        if isinstance(node, ast.Import):
            assert {alias.name for alias in node.names} <= {"math"}
        elif isinstance(node, ast.ImportFrom):
            assert node.module in ("__future__", "typing")


def test_execution_keeps_to_the_subset_that_compiles() -> None:
    """+ - * / floor and comparisons on scalars and flat columns: no power, no `sum`, no sets or dicts."""
    permitted = {"abs", "min", "max", "int", "float", "range", "math.floor"}
    known = {node.name for node in nodes(EXECUTION) if isinstance(node, ast.FunctionDef)}
    for node in nodes(EXECUTION):
        line = getattr(node, "lineno", 0)
        assert not isinstance(node, ast.Set | ast.SetComp | ast.Dict | ast.DictComp | ast.Lambda | ast.Yield), line
        assert not isinstance(node, ast.ListComp | ast.GeneratorExp | ast.Try | ast.With | ast.Raise), line
        assert not isinstance(node, ast.AsyncFunctionDef | ast.Global | ast.Nonlocal | ast.JoinedStr), line
        if isinstance(node, ast.BinOp):
            fixed = isinstance(node.left, ast.Constant) and isinstance(node.right, ast.Constant)
            permitted_ops = ast.Add | ast.Sub | ast.Mult | ast.Div | ast.BitOr  # | joins types
            assert isinstance(node.op, permitted_ops) or (isinstance(node.op, ast.Pow) and fixed), line
        if isinstance(node, ast.AugAssign):
            assert isinstance(node.op, ast.Add | ast.Sub), line
        if isinstance(node, ast.Call):
            assert dotted(node.func) in permitted | known, f"line {line}: {dotted(node.func)}"
