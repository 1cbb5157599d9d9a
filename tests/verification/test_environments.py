"""X1 in other environments: hash seeds, CPU features, BLAS kernels and threads, Pythons, the oldest libraries.

The campaign: pytest -m campaign tests/verification/test_environments.py -s
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import environment_runs
import numpy as np
import pytest
from campaigns import Figures, sized

import ktrdr_async as kt
from ktrdr_async.strategies.registry import BUILT_IN

pytestmark = pytest.mark.anyio

HERE = Path(__file__).parent
CHECKOUT = Path(kt.__file__).parents[1]
BLOCKS = [1, 7, 100, environment_runs.BARS]
NAMES = sorted(BUILT_IN)


def ran(job: dict[str, Any], *, python: str = sys.executable, **variables: str) -> dict[str, Any]:
    """What a fresh process makes of a job; `python` is this one, or one that has the package installed."""
    ours = python == sys.executable
    paths = [str(CHECKOUT), str(HERE)] if ours else [str(HERE)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **variables}
    program = [python, "-P", "-W", "error", "-c", "import environment_runs; environment_runs.main()", json.dumps(job)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{python} {variables}: {done.stderr[-2000:]}"
    found: dict[str, Any] = json.loads(done.stdout)
    assert Path(found["package"]).is_relative_to(CHECKOUT) == ours
    return found


@pytest.fixture(scope="session")
def signals(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The file of `signals`: its path is a parameter, and so a part of the digest."""
    path = tmp_path_factory.mktemp("signals") / "signals.csv"
    environment_runs.write_signals(path)
    return str(path)


@pytest.fixture(scope="session")
def here(signals: str) -> dict[str, str]:
    """What each built-in comes to in a fresh process of this environment."""
    digests = ran({"digests": {"signals": signals, "blocks": [100], "dsn": None}})["digests"]
    assert sorted(digests) == NAMES
    assert len({digest for (digest,) in digests.values()}) == len(NAMES)
    return {name: digest for name, (digest,) in digests.items()}


@sized("processes", ci=1, whole=20)
async def test_one_digest_in_all_processes_with_all_blocks_and_with_checkpoints(
    processes: int, dsn: str, signals: str, here: dict[str, str], figures: Figures
) -> None:
    job = {"digests": {"signals": signals, "blocks": BLOCKS, "dsn": dsn}}
    found: dict[str, set[str]] = {name: set() for name in NAMES}
    for seed in range(processes):
        for name, digests in ran(job, PYTHONHASHSEED=str(seed * 1_000_003))["digests"].items():
            found[name].update(digests)
    runs = processes * len(NAMES) * len(BLOCKS) * 2
    figures.add(
        f"{processes} processes, each with its hash seed, blocks of {', '.join(map(str, BLOCKS))} bars, with "
        "checkpoints in PostgreSQL and without",
        f"{runs} runs of {len(NAMES)} built-ins, {max(map(len, found.values()))} digest each",
    )
    assert found == {name: {digest} for name, digest in here.items()}


def environments() -> Iterator[dict[str, str]]:
    """Environments whose numbers may differ from this one's, those that are sure to come first."""
    features: list[str] = np.show_config(mode="dicts")["SIMD Extensions"]["found"]
    for first in range(len(features)):
        yield {"NPY_DISABLE_CPU_FEATURES": " ".join(features[first:])}
    for threads in ("1", "2"):
        yield {"OPENBLAS_NUM_THREADS": threads}
    if sys.platform == "linux" and platform.machine() == "x86_64":
        yield {"GLIBC_TUNABLES": "glibc.cpu.hwcaps=-FMA,-FMA4,-AVX2"}
        if "OPENBLAS_CORETYPE" not in os.environ:  # where somebody has set it, other kernels may fail on this machine
            for core in ("Haswell", "SkylakeX", "Sandybridge", "Nehalem", "Prescott"):
                yield {"OPENBLAS_CORETYPE": core}


@sized("count", ci=1, whole=100)
async def test_no_environment_changes_a_built_in_or_a_users_numbers_without_a_word(
    count: int, signals: str, here: dict[str, str], tmp_path: Path, figures: Figures
) -> None:
    left = {"signals": signals, "folder": str(tmp_path), "dsn": None}
    mine = ran({"leave": {**left, "names": [*NAMES, "numeric"], "key": "base"}})["leave"]
    assert {name: mine[name] for name in NAMES} == here
    job = {
        "digests": {"signals": signals, "blocks": [100], "dsn": None},
        "leave": {**left, "names": ["numeric"], "key": "other"},
        "resume": {**left, "names": [*NAMES, "numeric"], "key": "base"},
    }
    tried = changed = refused = 0
    for variables in list(environments())[:count]:
        found = ran(job, **variables)
        tried += 1
        assert found["digests"] == {name: [digest] for name, digest in here.items()}, variables
        (resumed,) = found["resume"].pop("numeric")
        assert found["resume"] == {name: [digest] for name, digest in here.items()}, variables
        changed += found["leave"]["numeric"] != mine["numeric"]
        refused += resumed != mine["numeric"]
        check_noticed(resumed, mine["numeric"], found["leave"]["numeric"], variables)
    figures.add(
        f"{tried} environments: CPU features, BLAS kernels and threads, libm",
        f"built-ins unchanged in all; a user's numbers changed in {changed}, refused by name on resume in {refused}",
    )
    if platform.machine() == "x86_64" and np.show_config(mode="dicts")["SIMD Extensions"]["found"]:
        assert changed


def check_noticed(resumed: Any, before: str, now: str, where: object) -> None:
    """A user's run either goes on to what it would have been, or is refused with the name of the reason."""
    if resumed != before:
        assert isinstance(resumed, list), f"{where}: silently another result"
        assert "numeric_probe" in resumed, f"{where}: {resumed}"
    if now != before:
        assert isinstance(resumed, list), f"{where}: its numbers are others, and nobody said so"


# Other Pythons and other libraries.

Venv = Callable[..., str]


@pytest.fixture(scope="session")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Venv:
    """Makes environments with the package in them; returns their Python."""
    source = tmp_path_factory.mktemp("source")  # building writes into it
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, source)
    shutil.copytree(CHECKOUT / "ktrdr_async", source / "ktrdr_async", ignore=shutil.ignore_patterns("__pycache__"))

    def make(version: str, *requirements: str) -> str:
        found = interpreter(version)
        if found is None:
            pytest.skip(f"there is no Python {version} here: neither python{version} nor one of pyenv's")
        folder = tmp_path_factory.mktemp(f"python{version}")
        subprocess.run([found, "-m", "venv", str(folder)], check=True)
        made = str(folder / "bin" / "python")
        pip = subprocess.run(
            [made, "-m", "pip", "install", "-q", str(source), *requirements],
            capture_output=True, text=True, timeout=900, check=False,
        )  # fmt: skip
        assert pip.returncode == 0, pip.stderr[-3000:]
        return made

    return make


def interpreter(version: str) -> str | None:
    """A Python of a version that starts: a shim may be there of one that doesn't."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    places = [shutil.which(f"python{version}"), *sorted(map(str, root.glob(f"versions/{version}.*/bin/python")))]
    for place in filter(None, places):
        said = subprocess.run([place, "-c", "import venv, sys; print(sys.version)"], capture_output=True, text=True)
        if said.returncode == 0 and said.stdout.startswith(f"{version}."):
            return place
    return None


def both_ways(python: str, dsn: str, signals: str, folder: Path, here: Mapping[str, str]) -> tuple[int, str]:
    """Runs, and checkpoints in files and PostgreSQL that the other one goes on with. How many resumes; who it is."""
    names = [*NAMES, "numeric"]
    terms = {"signals": signals, "folder": str(folder), "dsn": dsn, "names": names}
    mine = ran({"leave": {**terms, "key": "here"}})["leave"]
    job = {
        "digests": {"signals": signals, "blocks": BLOCKS, "dsn": dsn},
        "leave": {**terms, "key": "there"},
        "resume": {**terms, "key": "here"},
    }
    there = ran(job, python=python)
    back = ran({"resume": {**terms, "key": "there"}})["resume"]
    assert there["digests"] == {name: [digest] for name, digest in here.items()}
    for way, left, now in ((there["resume"], mine, there["leave"]), (back, there["leave"], mine)):
        for resumed in way.pop("numeric"):
            check_noticed(resumed, left["numeric"], now["numeric"], python)
        assert way == {name: [digest, digest] for name, digest in here.items()}
    about = {name: there["environment"][name] for name in ("python", "numpy", "pandas")}
    return 2 * 2 * len(NAMES), ", ".join(f"{name} {version}" for name, version in about.items())


@pytest.mark.campaign
@pytest.mark.timeout(1_800)
@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13", "3.14"])
async def test_another_python_goes_on_where_this_one_stopped(
    version: str, venv: Venv, dsn: str, signals: str, here: dict[str, str], tmp_path: Path, figures: Figures
) -> None:
    resumes, about = both_ways(venv(version), dsn, signals, tmp_path, here)
    figures.add(
        f"{about}, against Python {platform.python_version()}",
        f"1 digest for each of {len(NAMES)} built-ins; {resumes} resumes both ways, by file and PostgreSQL, equal",
    )


@pytest.mark.campaign
@pytest.mark.timeout(1_800)
async def test_the_oldest_libraries_that_are_declared_give_the_same_digests(
    venv: Venv, dsn: str, signals: str, here: dict[str, str], tmp_path: Path, figures: Figures
) -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert all(re.match(r"[a-z]+>=[0-9.]+(;|$)", each) for each in project["dependencies"])
    oldest = [each.replace(">=", "==", 1) for each in project["dependencies"]]
    tools = [*project["optional-dependencies"]["embedded"], "pytest", "pytest-timeout"]
    python = venv(project["requires-python"].removeprefix(">="), *oldest, *tools)
    resumes, about = both_ways(python, dsn, signals, tmp_path, here)
    figures.add(
        f"the oldest libraries that are declared ({about})",
        f"1 digest for each of {len(NAMES)} built-ins, {resumes} resumes equal; golden digests: {pinned(python)}",
    )


def pinned(python: str) -> str:
    """What pytest says of the pinned digests there."""
    done = subprocess.run(
        [python, "-m", "pytest", "-p", "no:cacheprovider", "-k", "golden_digest or same_bits_for_ever",
         "tests/backtesting/test_results_outside.py", "tests/market/test_synthetic.py"],
        cwd=CHECKOUT, capture_output=True, text=True, timeout=600, check=False,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout.splitlines()[-1].strip("= ")
