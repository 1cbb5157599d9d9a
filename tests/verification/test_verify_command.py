"""`ktrdr-async verify` as a person and a program see it: real processes, exit codes, one object, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from verification_runs import FILE

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
DATA = ("--data", str(FILE), "--symbol", "EURUSD", "--end", "2017-06-30")


def environment(tmp_path: Path) -> dict[str, str]:
    given = {name: value for name, value in os.environ.items() if not name.startswith("KTRDR_ASYNC_")}
    return given | {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "TMPDIR": str(tmp_path), "COLUMNS": "200"}


def run(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, in the directory where the zoo is."""
    ran = subprocess.run(
        [sys.executable, "-m", "ktrdr_async", "verify", *arguments],
        cwd=HERE, env=environment(tmp_path), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "Traceback" not in ran.stderr, ran.stderr
    assert os.listdir(tmp_path) == []
    return ran


def one(ran: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert ran.stdout.count("\n") == 1
    found = json.loads(ran.stdout)
    assert isinstance(found, dict)
    return found


def test_a_strategy_of_ones_own_is_verified(tmp_path: Path) -> None:
    ran = run(tmp_path, *DATA, "--strategy", "zoo:Sound", "--param", "every=5", "--kills", "1", "--json")
    assert ran.returncode == 0, ran.stderr
    found = one(ran)
    assert found["status"] == "verified"
    assert found["result_digest"] == found["certificate"]["digest"]
    assert found["certificate"]["parameters"] == {"every": 5}
    assert found["certificate"]["untried"] == []
    tiers = next(trial for trial in found["certificate"]["trials"] if trial["what"] == "tiers")
    assert (tiers["count"], tiers["detail"]) == (1, "compiled: equal")
    for what in ("uninterrupted", "hash seeds: 1 of 2", "kill -9", "look-ahead: 1 of 30"):
        assert what in ran.stderr


def test_a_difference_is_told_to_people_and_exit_1(tmp_path: Path) -> None:
    ran = run(tmp_path, *DATA, "--strategy", "zoo:NextReturn", "--kills", "0", "--hash-seeds", "0", "--quiet")
    assert (ran.returncode, ran.stderr) == (1, "")
    assert ran.stdout.startswith("FAILED: zoo:NextReturn\n")
    assert "the runs part at bar " in ran.stdout
    assert "look_ahead: with the bars after" in ran.stdout
    assert "target_weights[EURUSD]" in ran.stdout


def test_a_difference_is_told_to_programs(tmp_path: Path) -> None:
    ran = run(tmp_path, *DATA, "--strategy", "zoo:ModuleGlobal", "--json")
    found = one(ran)
    assert (ran.returncode, found["status"], found["error"]["code"]) == (1, "failed", "hidden_state")
    assert found["certificate"]["difference"]["bar"] == 130
    assert found["certificate"]["difference"]["fields"][0].keys() == {"name", "reference", "found"}


def test_what_may_not_start_has_failed(tmp_path: Path) -> None:
    ran = run(tmp_path, *DATA, "--strategy", "zoo:Static", "--json")
    found = one(ran)
    assert (ran.returncode, found["status"], found["error"]["code"]) == (1, "failed", "undeclared_state")


@pytest.mark.parametrize(
    "wrong",
    [
        ("--strategy", "zoo:Nobody"),
        ("--strategy", "sma_cross", "--kills", "-1"),
        ("--strategy", "sma_cross", "--interruptions", "many"),
        ("--strategy", "sma_cross", "--block-sizes", "0"),
        ("--strategy", "sma_cross", "--param", "fast=0"),
        ("--strategy", "sma_cross", "--commission", "2"),
        (),
    ],
)
def test_bad_input_is_exit_2(wrong: tuple[str, ...], tmp_path: Path) -> None:
    ran = run(tmp_path, *DATA, *wrong, "--json")
    assert ran.returncode == 2
    assert one(ran)["error"]["message"]


@pytest.mark.parametrize(
    ("number", "phase"), [(signal.SIGINT, "hash seeds"), (signal.SIGINT, "interruptions"), (signal.SIGTERM, "kill -9")]
)
def test_a_signal_ends_it_cleanly(number: int, phase: str, tmp_path: Path) -> None:
    arguments = [*DATA, "--strategy", "zoo:SoundAsync", "--interruptions", "all", "--json"]
    if phase == "kill -9":
        arguments[-2] = "3"
    process = subprocess.Popen(
        [sys.executable, "-m", "ktrdr_async", "verify", *arguments],
        cwd=HERE, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    while phase not in (line := process.stderr.readline()):
        assert line
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number, err
    assert json.loads(out)["error"]["code"] == "interrupted"
    assert "Traceback" not in err
    assert psutil.wait_procs(children, timeout=5)[1] == []
    assert os.listdir(tmp_path) == []
