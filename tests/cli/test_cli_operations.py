"""Operations at the command line: run, resume, cancel, list, show, export, checkpoints."""

from __future__ import annotations

import signal
import time

import pytest
from cli_processes import MARKET, Cli

from ktrdr_async.operations.service import OperationsService
from ktrdr_async.storage.database import Database

pytestmark = pytest.mark.anyio

RUN = ("run", "--data", MARKET, "--strategy", "sma_cross")


def csv(rows: int = 400) -> str:
    day = 1_577_836_800
    lines = ["Date,Open,High,Low,Close,Volume"]
    for i in range(rows):
        price = 100 + (i * 7 % 31) / 3
        lines.append(
            f"{time.strftime('%Y-%m-%d', time.gmtime(day + 86_400 * i))},{price},{price + 1},{price - 1},{price},9"
        )
    return "\n".join(lines) + "\n"


async def test_a_run_is_idempotent_by_id_and_its_result_stays(cli: Cli) -> None:
    ran = cli.run(*RUN, "--id", "one", "--json")
    assert ran.code == 0
    first = ran.json
    assert first["status"] == "completed"
    assert first["result_digest"] == cli.digest(*RUN[1:])
    assert "operation one" in ran.err.splitlines()
    for again in (
        cli.run(*RUN, "--id", "one", "--json"),
        cli.run("resume", "one", "--json"),
        cli.run("show", "one", "--json"),
    ):
        assert again.code == 0
        for field in ("operation_id", "status", "result_digest", "metrics", "trades", "bars", "resumed_from"):
            assert again.json[field] == first[field], field
    other = cli.run(*RUN, "--param", "fast=3", "--id", "one", "--json")
    assert (other.code, other.json["error"]["code"]) == (2, "operation_conflict")
    shown = cli.run("show", "o", env={"COLUMNS": "20"})
    assert first["result_digest"] in shown.out
    people = cli.run("resume", "one", env={"COLUMNS": "20"})
    assert people.code == 0
    assert first["result_digest"] in people.out
    cancelled = cli.run("cancel", "one", "--json")
    assert (cancelled.code, cancelled.json["error"]["code"]) == (1, "invalid_transition")


async def test_unknown_and_ambiguous_ids(cli: Cli, database: Database) -> None:
    for name in ("same-1", "same-2"):
        await OperationsService(database).create(name, {"data": MARKET, "strategy": "sma_cross"})
    for command in (["show"], ["resume"], ["cancel"], ["checkpoints", "delete"]):
        ran = cli.run(*command, "nobody", "--json")
        assert (ran.code, ran.json["error"]["code"]) == (2, "not_found"), command
    ran = cli.run("resume", "same", "--json")
    assert ran.code == 2
    assert "same-1, same-2" in ran.json["error"]["message"]
    assert cli.run(*RUN, "--id", "a/b", "--json").code == 2
    assert cli.run("cancel", "same-1", "--json").json["status"] == "cancelled"  # nobody runs it


async def test_cancel_from_another_process_returns_when_the_checkpoint_is_durable(cli: Cli) -> None:
    live = cli.start(*RUN, "--throttle", "50", "--progress-seconds", "0.05", "--json", "--id", "far")
    live.until("bar ")
    busy = cli.run("resume", "far", "--json")
    assert (busy.code, busy.json["error"]["code"]) == (1, "already_claimed")
    assert "--take-over" in busy.json["error"]["hint"]
    ran = cli.run("cancel", "far", "--json")
    assert ran.code == 0
    assert (ran.json["status"], ran.json["checkpoint"]["type"]) == ("cancelled", "cancellation")
    ended = live.end()
    assert (ended.code, ended.json["status"]) == (1, "cancelled")
    assert ended.json["checkpoint_bar"] == ran.json["checkpoint_bar"]
    assert "go on with: ktrdr-async resume far" in ended.err
    again = cli.run("cancel", "far")
    assert (again.code, again.out) == (0, "")


async def test_take_over_ends_the_process_that_ran_it(cli: Cli) -> None:
    live = cli.start(*RUN, "--throttle", "50", "--json", "--id", "two")
    live.operation()
    taken = cli.run("resume", "two", "--take-over", "--json")
    assert (taken.code, taken.json["status"]) == (0, "completed")
    lost = live.end()
    assert (lost.code, lost.json["error"]["code"]) == (1, "ownership_lost")


async def test_a_relative_path_is_stored_whole_and_resumes_elsewhere(cli: Cli, dsn: str) -> None:
    (cli.directory / "a.csv").write_text(csv())
    run = ("--data", "a.csv", "--strategy", "sma_cross", "--param", "fast=3", "slow=9")
    live = cli.start("run", *run, "--database", dsn, "--throttle", "50", "--progress-seconds", "0.05", "--json")
    name = live.operation()
    live.until("bar ")
    live.send(signal.SIGINT)
    hint = live.end().json["error"]["hint"]
    assert cli.show(name)["request"]["data"] == str(cli.directory / "a.csv")
    assert f"--data-root {cli.directory}" in hint
    assert "--database 'postgresql:///" in hint
    assert "ktrdr_async@" not in hint
    assert "KTRDR_ASYNC_DATABASE" in hint
    elsewhere = cli.directory / "elsewhere"
    elsewhere.mkdir()
    refused = cli.run("resume", name, "--json", cwd=elsewhere)
    assert (refused.code, refused.json["error"]["code"]) == (2, "data_not_allowed")
    assert "--data-root" in refused.json["error"]["hint"]
    resumed = cli.run("resume", name, "--data-root", str(cli.directory), "--json", cwd=elsewhere)
    assert resumed.code == 0
    assert resumed.json["result_digest"] == cli.digest(*run)
    exported = cli.run("export", name, "-o", "out", "--data-root", str(cli.directory), "--json", cwd=elsewhere)
    assert exported.code == 0
    assert (elsewhere / "out" / "equity.csv").read_text().count("\n") == 401


async def test_own_code_is_trusted_for_run_and_asked_for_by_resume(cli: Cli) -> None:
    run = ("--data", MARKET, "--strategy", "mine:Counting")
    live = cli.start("run", *run, "--throttle", "100", "--progress-seconds", "0.05", "--json")
    name = live.operation()
    live.until("bar ")
    live.send(signal.SIGINT)
    assert live.end().json["error"]["hint"] == f"go on with: ktrdr-async resume {name} --allow mine:Counting"
    refused = cli.run("resume", name, "--json")
    assert (refused.code, refused.json["error"]["code"]) == (2, "code_not_allowed")
    assert cli.show(name)["status"] == "cancelled"
    resumed = cli.run("resume", name, "--allow", "mine:Counting", "--json")
    assert resumed.code == 0, resumed
    assert resumed.json["result_digest"] == cli.digest(*run)


async def test_a_failed_run_is_kept_with_its_error(cli: Cli) -> None:
    ran = cli.run("run", "--data", MARKET, "--strategy", "mine:Breaking", "--id", "broken", "--json")
    assert ran.code == 1
    found = ran.json
    assert (found["status"], found["checkpoint_bar"]) == ("failed", 499)
    assert found["error"]["hint"] == "go on with: ktrdr-async resume broken --allow mine:Breaking"
    assert "in breaks" in ran.err
    shown = cli.run("show", "broken")
    assert shown.code == 0
    assert "ValueError: not at bar 500" in shown.out
    assert cli.show("broken")["error"]["bar"] == 500


async def test_list_and_checkpoints(cli: Cli) -> None:
    assert cli.run("list", "--json").json == {"operations": []}
    assert cli.run(*RUN, "--id", "done", "--quiet").code == 0
    assert cli.run("run", "--data", MARKET, "--strategy", "mine:Breaking", "--id", "broken").code == 1
    listed = cli.run("list", "--json").json["operations"]
    assert [(each["operation_id"], each["status"]) for each in listed] == [("broken", "failed"), ("done", "completed")]
    only = cli.run("list", "--status", "completed", "--limit", "1", env={"COLUMNS": "20"}).out
    assert "sma_cross" in only
    assert "broken" not in only
    assert "499 failure" in cli.run("checkpoints", "list").out.replace("  ", " ")
    state = cli.run("checkpoints", "show", "broken", "--json").json["state"]
    assert (state["bar"], state["fills"]) == (499, 0)
    assert state["state_digest"] in cli.run("checkpoints", "show", "broken", env={"COLUMNS": "20"}).out
    refused = cli.run("checkpoints", "delete", "done", "--json")
    assert (refused.code, refused.json["error"]["code"]) == (1, "invalid_transition")
    assert cli.run("checkpoints", "delete", "broken", "--yes", "--json").json["checkpoint"] is None
    dry = cli.run("checkpoints", "clean", "--older-than-days", "0", "--dry-run", "--json").json
    assert sorted(dry["would_delete"]) == ["broken", "done"]
    asked = cli.run("checkpoints", "clean", "--older-than-days", "0", "--json")  # and nobody is there to answer
    assert (asked.code, asked.json["error"]["code"]) == (1, "not_confirmed")
    swept = cli.run("checkpoints", "clean", "--older-than-days", "0", "--yes")
    assert sorted(swept.out.split()) == ["broken", "done"]
    assert cli.run("checkpoints", "clean", "--json").json == {"deleted": [], "would_delete": []}


async def test_a_password_is_never_shown(bare: Cli) -> None:
    secret = "pässwörd-7Q"
    cases = [
        (["show", "x", "--database", f"postgresql://me:{secret}@127.0.0.1:1/x"], 1),
        (["show", "x", "--database", f"me:{secret}@127.0.0.1:1/x"], 2),
        (["list", "--bogus", f"postgresql://me:{secret}@127.0.0.1:1/x"], 2),
        (["list", f"host=h password={secret}"], 2),
    ]
    for arguments, code in cases:
        ran = bare.run(*arguments, "--json")
        assert ran.code == code, ran
        assert secret not in ran.out + ran.err
        assert secret not in ran.json["error"]["message"] + ran.json["error"]["hint"]
    ran = bare.run(*RUN, env={"KTRDR_ASYNC_DATABASE": f"postgresql://me:{secret}@127.0.0.1:1/x"})
    assert ran.code == 1
    assert secret not in ran.out + ran.err
    assert "127.0.0.1:1/x" in ran.err
