"""What needs no database: help, bad usage, bad input, streams that are closed or full, narrow terminals."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli_processes import MARKET, Cli

CROSS = ("--data", MARKET, "--strategy", "sma_cross")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["run", "--help"], 0), (["strategies"], 0), (["run", "--json", "--bogus"], 2)],
)
def test_help_and_bad_usage_import_nothing_heavy(bare: Cli, arguments: list[str], code: int) -> None:
    text = (
        "import sys; from ktrdr_async.cli import main; code = main(sys.argv[1:]); "
        "print('LOADED', sorted({'pandas', 'asyncpg', 'pyarrow', 'numba'} & set(sys.modules)), file=sys.stderr); "
        "sys.exit(code)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", text, *arguments], env=bare.environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == code
    assert "LOADED []" in ran.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--bogus"],
        ["run", *CROSS, "--bogus", "1"],
        ["show"],
        ["list", "--status", "sleeping"],
        ["run", *CROSS, "--capital", "much"],
        ["bogus"],
        ["resume"],
        ["run", *CROSS, "--no-database", "--id", "x"],
    ],
)
def test_bad_usage_is_one_object_and_exit_2(bare: Cli, arguments: list[str]) -> None:
    ran = bare.run(*arguments, "--json")
    assert ran.code == 2
    found = ran.json
    assert found["operation_id"] is None
    assert found["error"]["code"]
    assert found["error"]["message"]
    assert found["error"]["message"] in ran.err
    assert found["error"]["hint"]


def test_bad_usage_for_people_goes_to_stderr(bare: Cli) -> None:
    ran = bare.run("run", "--bogus")
    assert (ran.code, ran.out) == (2, "")
    assert "error: " in ran.err
    assert "hint: ktrdr-async run --help" in ran.err


def test_version_and_no_command(bare: Cli) -> None:
    assert bare.run("--version").out.startswith("ktrdr-async ")
    helped = bare.run()
    assert helped.code == 0
    assert "demo" in helped.out


def test_strategies_are_listed_with_parameters_types_ranges_and_defaults(bare: Cli) -> None:
    ran = bare.run("strategies")
    assert ran.code == 0
    assert "sma_cross  Long while" in ran.out
    assert "--param fast=" in ran.out
    assert "int >= 1, default 10" in ran.out
    listed = {each["name"]: each for each in bare.run("strategies", "--json").json["strategies"]}
    assert {"sma_cross", "async_reversion", "signals"} <= listed.keys()
    assert listed["sma_cross"]["parameters"][0] == {"name": "fast", "type": "int", "range": ">= 1", "default": "10"}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--data", "bad.csv", "--strategy", "sma_cross"), "bad_data", ("bad.csv", "line 3", "Close", "oops")),
        (("--data", "nowhere.csv", "--strategy", "sma_cross"), "bad_data", ("nowhere.csv", "no such file")),
        (("--data", MARKET, "--strategy", "sma_cros"), "unknown_strategy", ("sma_cros", "did you mean sma_cross")),
        (("--data", MARKET, "--strategy", "mine:Nope"), "unknown_strategy", ("Nope", "Counting")),
        (("--data", MARKET, "--strategy", "nomodule:X"), "bad_input", ("nomodule", "PYTHONPATH")),
        ((*CROSS, "--param", "fast=x"), "bad_parameter", ("fast", "int")),
        ((*CROSS, "--param", "fats=3"), "bad_parameter", ("fats", "fast, slow")),
        ((*CROSS, "--param", "fast"), "bad_input", ("NAME=VALUE", "fast=10")),
        ((*CROSS, "--commission", "1.5"), "bad_parameter", ("commission", "1.5")),
        ((*CROSS, "--checkpoint-bars", "0"), "bad_parameter", ("unit_interval", "0")),
        ((*CROSS, "--start", "2099-01-01"), "bad_data", ("2099",)),
    ],
)
def test_bad_input_starts_nothing_and_says_why(
    bare: Cli, arguments: tuple[str, ...], code: str, words: tuple[str, ...]
) -> None:
    (bare.directory / "bad.csv").write_text(
        "Date,Open,High,Low,Close\n2020-01-01,1,2,0.5,1.5\n2020-01-02,1,2,0.5,oops\n"
    )
    ran = bare.run("run", *arguments, "--no-database", "--json")
    assert ran.code == 2
    error = ran.json["error"]
    assert error["code"] == code, ran
    for word in words:
        assert word in f"{error['message']} {error['hint']}", ran


def test_no_database_starts_no_server(bare: Cli) -> None:
    home = bare.directory / "home"
    ran = bare.run("run", *CROSS, "--no-database", "--json", env={"KTRDR_ASYNC_HOME": str(home)})
    assert ran.code == 0
    assert not home.exists()
    found = ran.json
    assert found["operation_id"] is None
    assert (found["status"], found["bars"]) == ("completed", 3000)
    assert len(found["result_digest"]) == 64
    assert found["trades"] == found["metrics"]["trades"] > 0
    assert found["resumed_from"] == []
    assert found["checkpoints"] == {"saved": 0, "failed": 0}


def test_several_parameters_after_one_option_and_files_written(bare: Cli) -> None:
    out = bare.directory / "out"
    run = ("run", *CROSS, "--param", "fast=5", "slow=20", "--param", "short=yes", "--no-database", "-o", str(out))
    ran = bare.run(*run)
    assert ran.code == 0
    assert "sma_cross fast=5, slow=20, short=True" in ran.out
    assert {"fills.csv", "trades.parquet", "equity.csv", "result.json"} <= {path.name for path in out.iterdir()}
    blocked = bare.directory / "file"
    blocked.write_text("")
    failed = bare.run("run", *CROSS, "--no-database", "--json", "-o", str(blocked / "out"))
    assert failed.code == 1
    assert failed.json["result_digest"]
    assert "can't write the results" in failed.json["error"]["message"]


def test_a_strategys_own_error_shows_its_frames_bar_and_time(bare: Cli) -> None:
    ran = bare.run("run", "--data", MARKET, "--strategy", "mine:Breaking", "--no-database", "--json")
    assert ran.code == 1
    error = ran.json["error"]  # although the strategy prints: its words are on stderr
    assert "a strategy's own words" in ran.err
    assert error["code"] == "strategy_error"
    for word in ("ValueError", "not at bar 500", "bar 500", "2020-01-21T20:00", "ASSET"):
        assert word in error["message"]
    assert "Traceback of the strategy" in ran.err
    assert "in breaks" in ran.err
    assert "supervision" not in ran.err
    assert "engine.py" not in ran.err


@pytest.mark.parametrize("json", [True, False])
def test_a_closed_or_full_stdout_is_no_traceback(bare: Cli, json: bool) -> None:
    run = ["run", *CROSS, "--no-database", *(["--json"] if json else [])]
    reader, writer = os.pipe()
    os.close(reader)
    ran = bare.run(*run, stdout=writer)
    os.close(writer)
    assert ran.code == 0
    assert "rror" not in ran.err
    if Path("/dev/full").exists():
        with open("/dev/full", "w") as full:
            ran = bare.run(*run, stdout=full)
        assert ran.code == 1
        assert "couldn't be written to standard output" in ran.err


def test_both_streams_closed(bare: Cli) -> None:
    command = f'"{sys.executable}" -m ktrdr_async run --data "{MARKET}" --strategy sma_cross --no-database'
    for streams in (">&-", "2>&-", ">&- 2>&-"):
        shell = subprocess.run(
            f"{command} --json {streams}", shell=True, env=bare.environment, capture_output=True, text=True, check=False
        )
        assert shell.returncode == 0, streams
        assert "Traceback" not in shell.stderr


@pytest.mark.parametrize("columns", ["20", "79"])
def test_a_digest_is_whole_at_any_width(bare: Cli, columns: str) -> None:
    digest = bare.digest(*CROSS)
    ran = bare.run("run", *CROSS, "--no-database", env={"COLUMNS": columns})
    assert digest in ran.out
    assert "final" in ran.out
    assert "█" in ran.out


def test_a_terminal_without_unicode_gets_a_chart_too(bare: Cli) -> None:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    ran = bare.run("run", *CROSS, "--no-database", env=plain)
    assert ran.code == 0
    assert "###" in ran.out
