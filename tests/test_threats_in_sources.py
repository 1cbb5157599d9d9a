"""What no source may hold: SQL that is put together, unpickling, evaluation, shells, another place of `sys.path`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import ktrdr_async as kt

ROOT = Path(kt.__file__).parent
SOURCES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(ROOT.rglob("*.py"))}


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def calls(source: str) -> Iterator[ast.Call]:
    return (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))


# SQL takes parameters only.

RUNS_SQL = {"execute", "executemany", "fetch", "fetchrow", "fetchval", "prepare", "cursor"}
NO_SQL = {"strategy.prepare", "self._turn.prepare", "self._inner.prepare"}
# What isn't a text of the package as it stands, and why none of it comes from outside.
MADE = {
    ("storage/migrations.py", "f'CREATE SCHEMA \"{schema}\"'"),  # a name that `validated_schema` has let through
    ("storage/database.py", "self._on_acquire"),  # made of the constants in `connect.SESSION`
    ("storage/database.py", "self._database._on_acquire"),
    ("cli/demonstration.py", "statement"),  # one of the constants beside it
}


def made_of_more(name: str, source: str) -> list[str]:
    """The SQL texts that are neither constants nor named queries."""
    constants = {
        target.id
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    found = []
    for call in calls(source):
        if not isinstance(call.func, ast.Attribute) or call.func.attr not in RUNS_SQL or dotted(call.func) in NO_SQL:
            continue
        text = call.args[0] if call.args else None
        while isinstance(text, ast.Call) and dotted(text.func) == "with_schema":
            text = text.args[0]
        named = isinstance(text, ast.Call) and isinstance(text.func, ast.Attribute) and text.func.attr == "sql"
        plain = isinstance(text, ast.Constant) or (isinstance(text, ast.Name) and text.id in constants)
        said = "" if text is None else ast.unparse(text)
        if not (named or plain or said == "following.text" or (name, said) in MADE):
            found.append(f"{name}:{call.lineno}: {said}")
    return found


def test_sql_takes_parameters_only() -> None:
    assert [each for name, source in SOURCES.items() for each in made_of_more(name, source)] == []
    for name, text in MADE:
        assert text in {ast.unparse(arg) for call in calls(SOURCES[name]) for arg in call.args}, f"nobody needs {text}"


@pytest.mark.parametrize(
    "text", ['f"SELECT {x}"', '"SELECT %s" % x', '"SELECT {}".format(x)', '"SELECT " + x', "x", "self.text", "Q"]
)
def test_the_look_at_sql_sees_what_is_put_together(text: str) -> None:
    assert made_of_more("a.py", f"Q = f'{{1}}'\nasync def f(c, x):\n    await c.fetchrow({text}, 1)")
    assert not made_of_more("a.py", "Q = 'SELECT $1'\nasync def f(c, x):\n    await c.fetchrow(Q, x)")


# Nothing is unpickled, evaluated, or run by a shell.

BANNED_MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "joblib", "cloudpickle", "yaml", "code", "runpy"}
BANNED_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "pd.eval", "pd.read_pickle"}
# The one that checks names first; our own names; the class of a strategy that the calling code gave as an object.
IMPORTERS = {
    "strategies/registry.py", "__init__.py", "compiling.py", "supervision/warming.py", "supervision/isolation.py",
}  # fmt: skip


def runs_what_it_is_given(name: str, source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        where = f"{name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"{where}: {each}" for each in modules if each.split(".")[0] in BANNED_MODULES]
        if isinstance(node, ast.Call):
            called = dotted(node.func)
            keywords = {each.arg: each.value for each in node.keywords}
            unsafe = any(
                isinstance(value := keywords.get(word), ast.Constant) and value.value
                for word in ("shell", "allow_pickle")
            )
            loads = called == "np.load" and "allow_pickle" not in keywords
            imports = called.startswith("importlib.import_module") and name not in IMPORTERS
            if called in BANNED_CALLS or unsafe or loads or imports:
                found.append(f"{where}: {ast.unparse(node)[:80]}")
    return found


def test_nothing_is_unpickled_evaluated_or_run_by_a_shell() -> None:
    assert [each for name, source in SOURCES.items() for each in runs_what_it_is_given(name, source)] == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from marshal import loads", "eval('1')", "exec(x)", "__import__(x)", "np.load(x)",
        "np.load(x, allow_pickle=True)", "subprocess.run(x, shell=True)", "importlib.import_module(x)",
    ],
)  # fmt: skip
def test_the_look_at_sources_sees_it(source: str) -> None:
    assert runs_what_it_is_given("a.py", source)


# The current directory.


def test_the_current_directory_is_for_command_lines() -> None:
    """It is appended in two places, by what only the command line asks for."""
    touched = {
        name
        for name, source in SOURCES.items()
        for call in calls(source)
        if dotted(call.func) in ("sys.path.append", "sys.path.insert", "sys.path.extend")
    }
    assert touched == {"strategies/registry.py", "cli/options.py"}
    asked = {
        name
        for name, source in SOURCES.items()
        for call in calls(source)
        for keyword in call.keywords
        if keyword.arg == "cwd" and isinstance(keyword.value, ast.Constant) and keyword.value.value is True
    }
    assert all(name.startswith("cli/") for name in asked), asked
