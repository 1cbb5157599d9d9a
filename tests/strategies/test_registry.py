"""Strategies by name, which code a name may load, and parameters as text."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from msgspec import Meta

from ktrdr_async.errors import CodeNotAllowedError, InputError, ParameterError, UnknownStrategyError
from ktrdr_async.strategies import (
    SmaCross,
    Strategy,
    WeightStrategy,
    describe,
    make,
    parse_parameter,
    registry,
    resolve,
    strategies,
    summary_of,
)

SOURCE = """
    import sys
    from ktrdr_async.strategies import Strategy, WeightStrategy, SmaCross

    class Mine(Strategy):
        '''Mine.'''
        def __init__(self, size: int = 1) -> None:
            if size == 13:
                raise ValueError("13 is not a size")
            self.size = size

    def function(): ...
    number = 3
    class Plain: ...
"""
NAMES = {"sma_cross", "buy_and_hold", "rsi_reversion", "donchian_breakout", "momentum_rotation", "signals"}


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Neither the path, nor loaded modules, nor the user's own settings outlive or enter a test."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    loaded = set(sys.modules)
    yield
    for name in set(sys.modules) - loaded:
        if name.startswith("try_"):
            del sys.modules[name]


def module(directory: Path, name: str = "try_mine", source: str = SOURCE) -> None:
    directory.mkdir(exist_ok=True)
    (directory / f"{name}.py").write_text(textwrap.dedent(source))


def installed(directory: Path, entries: str, name: str = "tried") -> None:
    """A package's metadata, as installing it would leave them."""
    info = directory / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[ktrdr_async.strategies]\n{entries}\n")
    if str(directory) not in sys.path:
        sys.path.append(str(directory))


def test_the_built_ins_are_registered_under_their_names() -> None:
    found = strategies()
    assert set(found) >= NAMES | {"async_reversion"}
    for name, kind in found.items():
        assert resolve(name) is kind
        if name in registry.BUILT_IN:
            assert kind.name == name
            assert kind.version == 1
        assert summary_of(kind).endswith(".")
        assert describe(kind) is not None


# Code that isn't registered.


def test_a_trusted_name_needs_no_permission(tmp_path: Path) -> None:
    module(tmp_path / "code")
    sys.path.append(str(tmp_path / "code"))
    kind = resolve("try_mine:Mine", trusted=True)
    assert issubclass(kind, Strategy)
    assert make("try_mine:Mine", {"size": 4}, trusted=True).parameters == {"size": 4}


def test_a_name_from_a_database_imports_nothing_before_it_is_permitted(tmp_path: Path) -> None:
    module(tmp_path / "code")
    sys.path.append(str(tmp_path / "code"))
    for allow in ((), ("try_other",), ("try_mine:Other",), ("try_mine.sub",)):
        with pytest.raises(CodeNotAllowedError, match="try_mine:Mine was read from a database") as caught:
            resolve("try_mine:Mine", allow=allow)
        assert "--allow try_mine" in caught.value.hint
        assert "try_mine" not in sys.modules
    for allow in (("try_mine",), ("try_mine:Mine",), ("x", "try_mine"), "try_mine"):
        assert resolve("try_mine:Mine", allow=allow).__name__ == "Mine"
    with pytest.raises(CodeNotAllowedError):
        resolve("os:system")
    with pytest.raises(CodeNotAllowedError):
        resolve("try_mine.sub:Mine", allow=("try_mine",))
    with pytest.raises(InputError, match=r"allow: '\*' is neither a module nor module:Class"):
        resolve("try_mine:Mine", allow=("*",))


def test_the_current_directory_is_for_trusted_names_alone_and_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module(tmp_path / "here", "try_here")
    module(tmp_path / "here", "json", "raise RuntimeError('shadowed')")
    monkeypatch.chdir(tmp_path / "here")
    sys.path[:] = [each for each in sys.path if each not in ("", str(tmp_path / "here"))]
    with pytest.raises(InputError, match="there is no module 'try_here'"):
        resolve("try_here:Mine", trusted=True)
    with pytest.raises(InputError, match="there is no module 'try_here'"):
        resolve("try_here:Mine", allow=("try_here",), cwd=True)
    assert os.getcwd() not in sys.path
    assert resolve("try_here:Mine", trusted=True, cwd=True).__name__ == "Mine"
    assert sys.path[-1] == os.getcwd()
    resolve("try_here:Mine", trusted=True, cwd=True)
    assert sys.path.count(os.getcwd()) == 1


# The user's own file, as somebody who isn't root.

NOBODY = 65_534  # another user, where the tests run as root


def said(
    directory: Path,
    *,
    lines: str = "# mine\n\ntry_mine  # all of it\n",
    mode: int = 0o600,
    as_root: bool = False,
) -> str:
    """What a process of a user who isn't root (or is) says to `try_mine:Mine`, with this file of permitted code."""
    file = directory / "config" / "ktrdr-async" / "allow"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(lines)
    file.chmod(mode)
    module(directory / "code")
    user = os.geteuid()
    if user == 0 and not as_root:
        user = NOBODY
    if os.geteuid() == 0:
        os.chown(file, user, -1)
    elif as_root:
        pytest.skip("only root can look as root")
    for each in (directory, *list(directory.parents)[:2]):
        if each.stat().st_uid == os.geteuid():
            each.chmod(0o755)  # pytest's are 0700, and the other user must come through
    program = f"""
import os
from importlib.metadata import entry_points
from ktrdr_async.errors import KtrdrError
from ktrdr_async.strategies import resolve
entry_points(group="none")  # loads what the other user may not be able to read
if os.geteuid() != {user}:
    os.seteuid({user})
try:
    print(resolve("try_mine:Mine").__name__)
except KtrdrError as error:
    print(type(error).__name__, error, error.hint)
"""
    environment = os.environ | {
        "XDG_CONFIG_HOME": str(directory / "config"),
        "PYTHONPATH": os.pathsep.join([str(directory / "code"), *sys.path]),
    }
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_users_own_file_permits(tmp_path: Path) -> None:
    assert said(tmp_path) == "Mine"
    assert said(tmp_path, lines="try_mine:Mine") == "Mine"
    assert "a line in" in said(tmp_path, lines="try_other\ntry_mine:Other\ntry_mine.sub\n")
    assert "line 2: 'try-mine' is neither" in said(tmp_path, lines="ok\ntry-mine\n")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o666])
def test_a_file_that_others_can_open_is_refused(tmp_path: Path, mode: int) -> None:
    text = said(tmp_path, mode=mode)
    assert text.startswith("CodeNotAllowedError")
    assert f"mode {mode:04o}" in text
    assert "chmod 600" in text


def test_another_users_file_is_refused_even_where_it_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config" / "ktrdr-async" / "allow"
    file.parent.mkdir(parents=True)
    file.write_text("try_mine\n")
    file.chmod(0o600)
    monkeypatch.setattr(os, "geteuid", lambda: 54_321)
    assert registry.allow_file() == file
    with pytest.raises(
        CodeNotAllowedError, match=rf"isn't a file that only you .*\(owner {file.stat().st_uid}, mode 0600\)"
    ):
        resolve("try_mine:Mine")


def test_root_reads_no_such_file(tmp_path: Path) -> None:
    text = said(tmp_path, as_root=True)
    assert text.startswith("CodeNotAllowedError try_mine:Mine was read from a database")
    assert "a line in" not in text


# Entry points.


def test_an_installed_package_registers_its_strategies(tmp_path: Path) -> None:
    site = tmp_path / "site"
    module(site, "try_plugin")
    installed(site, "mine = try_plugin:Mine\nsma_cross = try_plugin:Mine")
    assert "try_plugin" not in sys.modules
    assert resolve("sma_cross") is SmaCross
    assert "try_plugin" not in sys.modules
    kind = resolve("mine")
    assert kind.__name__ == "Mine"
    assert strategies()["mine"] is kind
    assert strategies()["sma_cross"] is SmaCross
    assert resolve("try_plugin:Mine") is kind  # what is registered is permitted under its other name too
    with pytest.raises(CodeNotAllowedError):
        resolve("try_plugin:Plain")


def test_a_broken_package_breaks_itself_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    site = tmp_path / "site"
    module(site, "try_broken", "raise RuntimeError('no licence')")
    installed(site, "broken = try_broken:Mine\nodd = try_broken")
    with caplog.at_level(logging.WARNING):
        found = strategies()
    assert not {"broken", "odd"} & set(found)
    assert "broken is left out" in caplog.text
    with pytest.raises(
        InputError, match=r"importing try_broken raised RuntimeError: no licence \(.*try_broken.py, line 1\)"
    ):
        resolve("broken")
    with pytest.raises(InputError, match="it must be module:Class"):
        resolve("odd")


def test_two_packages_that_register_one_name_are_an_error_that_names_both(tmp_path: Path) -> None:
    site = tmp_path / "site"
    module(site, "try_one")
    module(site, "try_two")
    installed(site, "mine = try_one:Mine", "one")
    installed(site, "mine = try_two:Mine", "two")
    with pytest.raises(InputError, match="try_one:Mine, try_two:Mine"):
        resolve("mine")


# Errors.


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("sma_cros", "did you mean sma_cross"),
        ("SMA-Cross", "did you mean sma_cross"),
        ("zzz", "there are: async_reversion, buy_and_hold"),
        ("my_strategies.Reversal", "did you mean my_strategies:Reversal"),
        ("my_strategies.py:Reversal", "module:Class"),
        ("", "there are: "),
        ("__import__('os')", "there are: "),
    ],
)
def test_an_unknown_name_says_what_is_near(name: str, hint: str) -> None:
    for trusted in (True, False):
        with pytest.raises(UnknownStrategyError, match="there is no strategy") as caught:
            resolve(name, trusted=trusted)
        assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import does_not_exist_either", "importing try_bad raised ModuleNotFoundError: .*'does_not_exist_either'"),
        ("x = 1\n1 / 0", r"importing try_bad raised ZeroDivisionError: division by zero \(.*try_bad.py, line 2\)"),
        ("def f(:", r"importing try_bad raised SyntaxError: invalid syntax \(.*try_bad.py, line 1\)"),
        ("import sys\nsys.exit(3)", "importing try_bad raised SystemExit: 3"),
    ],
)
def test_an_import_that_fails_is_an_input_error_with_the_reason(tmp_path: Path, source: str, message: str) -> None:
    module(tmp_path / "code", "try_bad", source)
    sys.path.append(str(tmp_path / "code"))
    with pytest.raises(InputError, match=message):
        resolve("try_bad:Mine", trusted=True)


def test_what_is_no_strategy_is_refused(tmp_path: Path) -> None:
    module(tmp_path / "code")
    sys.path.append(str(tmp_path / "code"))
    for name, message in (
        ("function", "is a function, not a strategy"),
        ("number", "is a int, not a strategy"),
        ("Plain", "is the class Plain, not a strategy"),
        ("Strategy", "is the class Strategy, not a strategy"),
    ):
        with pytest.raises(InputError, match=message):
            resolve(f"try_mine:{name}", trusted=True)
    with pytest.raises(UnknownStrategyError, match="has no 'Mime'") as caught:
        resolve("try_mine:Mime", trusted=True)
    assert caught.value.hint == "it has: Mine"
    with pytest.raises(ParameterError, match="13 is not a size"):
        make("try_mine:Mine", {"size": 13}, trusted=True)


def test_make_checks_parameters() -> None:
    assert make("sma_cross", {"fast": 3, "quantity": 2}).parameters == {
        "fast": 3, "slow": 30, "short": False, "quantity": 2.0,
    }  # fmt: skip
    for parameters in ({"fast": 0}, {"fast": "3"}, {"speed": 1}, {"cls": 1}, {"self": 1}, {"fast": 31}):
        with pytest.raises(ParameterError):
            make("sma_cross", parameters)


# Parameters as text.


class Everything(WeightStrategy):
    def __init__(
        self,
        required: int,
        anything,  # type: ignore[no-untyped-def]
        count: Annotated[int, Meta(ge=1, le=9)] = 5,
        share: Annotated[float, Meta(gt=0, le=1)] = 0.5,
        flag: bool = False,
        text: str = "a",
        limit: Annotated[float, Meta(gt=0)] | None = None,
        label: str | None = None,
        side: Literal["long", "short"] = "long",
        lengths: tuple[int, ...] = (1, 2),
        pair: tuple[int, str] = (1, "a"),
        names: list[str] = ["x"],  # noqa: B006
        either: int | str = 1,
        table: dict[str, int] = {},  # noqa: B006
        word: Annotated[str, Meta(max_length=3)] = "",
    ) -> None: ...


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("count", "3", 3), ("count", " 3 ", 3), ("count", "+3", 3), ("share", "1", 1.0), ("share", "1e-3", 0.001),
        ("flag", "true", True), ("flag", "No", False), ("flag", "1", True), ("flag", "off", False),
        ("text", "none", "none"), ("text", "3", "3"), ("text", "a,b", "a,b"), ("text", "", ""),
        ("limit", "none", None), ("limit", "2", 2.0), ("label", "None", None), ("label", "x", "x"),
        ("side", "short", "short"), ("lengths", "1,2,3", (1, 2, 3)), ("lengths", "(4,)", (4,)),
        ("lengths", "[5, 6]", (5, 6)), ("lengths", "", ()),
        ("pair", "3,b", (3, "b")), ("names", "a, b", ["a", "b"]), ("either", "3", 3), ("either", "x", "x"),
        ("table", '{"a": 1}', {"a": 1}), ("word", "abc", "abc"),
        ("anything", "3", 3), ("anything", "3.5", 3.5), ("anything", "true", True), ("anything", "none", None),
        ("anything", "x", "x"),
    ],
)  # fmt: skip
def test_a_text_is_read_by_the_annotated_type(name: str, text: str, value: Any) -> None:
    found = parse_parameter(Everything, name, text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("count", "0", "Everything: count='0' is not int, >= 1, <= 9"), ("count", "3.0", "is not int"),
        ("count", "1_0", "is not int"), ("count", "", "is not int"), ("share", "nan", "is not float, > 0, <= 1"),
        ("share", "inf", "is not float"), ("share", "2", "is not float, > 0, <= 1"), ("flag", "2", "is not bool"),
        ("limit", "-1", "is not float or none, > 0"), ("side", "flat", r"is not long \| short"),
        ("lengths", "1,x", r"is not tuple\[int, ...\]"), ("pair", "1", r"is not tuple\[int, str\]"),
        ("table", "{", "is not "), ("word", "abcd", "is not str, at most 3 long"),
        ("slow", "3", "Everything has no parameter 'slow'"),
    ],
)  # fmt: skip
def test_a_text_that_does_not_fit_names_parameter_value_type_and_range(name: str, text: str, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        parse_parameter(Everything, name, text)


def test_a_listing_describes_parameters() -> None:
    assert describe(SmaCross) == [
        ("fast", "int", ">= 1", "10"),
        ("slow", "int", ">= 1", "30"),
        ("short", "bool", "", "false"),
        ("quantity", "float or none", "> 0", "none"),
    ]
    found = {each.name: each for each in describe(Everything)}
    assert found["required"] == ("required", "int", "", "")
    assert found["lengths"] == ("lengths", "tuple[int, ...]", "", "1,2")
    assert found["side"] == ("side", "long | short", "", "long")
    assert found["anything"].type == "any"


def test_what_a_listing_shows_can_be_typed() -> None:
    for kind in strategies().values():
        for each in describe(kind):
            if each.default:
                parse_parameter(kind, each.name, each.default)
