"""`extend`, `fork`, `--keep-state` and `--accept-mismatch` at the command line."""

from __future__ import annotations

import signal

import pytest
from cli_processes import Cli

pytestmark = pytest.mark.anyio

LONG, SHORT = "synthetic:?bars=6000&seed=3", "synthetic:?bars=4000&seed=3"
RUN = ("--strategy", "rsi_reversion", "--commission", "0.0001")


async def test_extend_gives_the_result_of_one_run_over_all_bars(cli: Cli) -> None:
    assert cli.run("run", "--data", SHORT, *RUN, "--id", "short", "--keep-state", "--json").code == 0
    longer = cli.run("extend", "sho", "--data", LONG, "--id", "long", "--json")
    assert longer.code == 0
    assert "operation long" in longer.err.splitlines()
    assert longer.json["result_digest"] == cli.digest("--data", LONG, *RUN)
    assert longer.json["resumed_from"] == [3999]
    bare = cli.run("run", "--data", SHORT, *RUN, "--id", "bare", "--json")
    assert bare.code == 0
    refused = cli.run("extend", "bare", "--data", LONG, "--json")
    assert (refused.code, refused.json["error"]["code"]) == (1, "invalid_transition")
    assert "--keep-state" in refused.json["error"]["hint"]


async def test_fork_changes_costs_and_parameters_from_a_checkpoint_on(cli: Cli) -> None:
    live = cli.start(
        "run", "--data", LONG, *RUN, "--id", "one", "--throttle", "2000", "--checkpoint-bars", "300", "--json"
    )
    live.operation()
    cli.until_shown("one", lambda shown: shown["checkpoint_bar"] is not None)
    live.send(signal.SIGINT)
    ended = live.end()
    assert ended.code == 130
    forked = cli.run("fork", "one", "--commission", "0.02", "--param", "low=25", "--id", "two", "--json")
    assert forked.code == 0
    assert forked.json["resumed_from"] == [ended.json["checkpoint_bar"]]
    same = cli.run("resume", "one", "--json")
    assert same.json["result_digest"] == cli.digest("--data", LONG, *RUN)
    assert forked.json["result_digest"] != same.json["result_digest"]
    assert cli.run("fork", "one", "--json").json["error"]["code"] == "bad_input"
    wrong = cli.run("fork", "one", "--param", "nothing=3", "--json")
    assert (wrong.code, wrong.json["error"]["code"]) == (2, "bad_parameter")


async def test_accept_mismatch_goes_on_and_says_so_for_ever(cli: Cli) -> None:
    path = cli.directory / "own.py"
    source = (
        "import ktrdr_async as kt\n"
        "class Own(kt.Strategy):\n"
        "    def on_bar(self, bar):\n"
        "        bar.target_weight(0, 0.5 if bar.index % 50 < 25 else 0.0)\n"
    )
    path.write_text(source)
    live = cli.start(
        "run",
        "--data",
        LONG,
        "--strategy",
        "own:Own",
        "--id",
        "one",
        "--throttle",
        "2000",
        "--checkpoint-bars",
        "300",
        "--json",
    )
    live.operation()
    cli.until_shown("one", lambda shown: shown["checkpoint_bar"] is not None)
    live.send(signal.SIGINT)
    assert live.end().code == 130
    path.write_text(source.replace("0.5", "0.4"))
    refused = cli.run("resume", "one", "--allow", "own", "--json")
    assert (refused.code, refused.json["error"]["code"]) == (1, "checkpoint_mismatch")
    assert "strategy_source" in refused.json["error"]["message"]
    went_on = cli.run("resume", "one", "--allow", "own", "--accept-mismatch", "--json")
    assert went_on.code == 0
    assert any("strategy_source" in warning for warning in went_on.json["warnings"])
    assert any("strategy_source" in warning for warning in cli.run("show", "one", "--json").json["warnings"])
