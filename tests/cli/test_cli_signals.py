"""Ctrl-C, SIGTERM and `kill -9`, at every stage of a run."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import asyncpg
import pytest
from cli_processes import MARKET, PATIENCE, Cli, Live

pytestmark = pytest.mark.anyio

RUN = ("run", "--data", MARKET, "--strategy", "sma_cross")
SLOW = (*RUN, "--throttle", "100", "--progress-seconds", "0.05")


def under_way(live: Live) -> None:
    live.until(lambda line: line.startswith("bar "))


async def test_ctrl_c_saves_says_how_to_go_on_and_the_digest_is_the_same(cli: Cli) -> None:
    live = cli.start(*SLOW, "--json")
    name = live.operation()
    under_way(live)
    live.send(signal.SIGINT)
    ran = live.end()
    assert ran.code == 130
    found = ran.json
    assert (found["operation_id"], found["status"], found["result_digest"]) == (name, "cancelled", None)
    assert found["checkpoints"] == {"saved": 1, "failed": 0}
    assert found["error"]["hint"] == f"go on with: ktrdr-async resume {name}"
    assert f"go on with: ktrdr-async resume {name}" in ran.err
    assert "saving a checkpoint ..." in ran.err
    shown = cli.show(name)
    assert (shown["status"], shown["checkpoint"]["type"]) == ("cancelled", "cancellation")
    resumed = cli.run("resume", name[:6], "--json")  # by a unique prefix
    assert resumed.code == 0
    assert resumed.json["resumed_from"] == [found["checkpoint_bar"]]
    assert resumed.json["result_digest"] == cli.digest(*RUN[1:])


async def test_a_second_ctrl_c_during_the_save_loses_nothing(cli: Cli, dsn: str) -> None:
    live = cli.start(*SLOW, "--json")
    name = live.operation()
    under_way(live)
    holder, watcher = await asyncpg.connect(dsn), await asyncpg.connect(dsn)
    try:
        async with holder.transaction():
            pid = await holder.fetchval("SELECT pg_backend_pid()")
            await holder.execute("SELECT 1 FROM ktrdr.operations WHERE operation_id = $1 FOR UPDATE", name)
            live.send(signal.SIGINT)
            live.until("saving a checkpoint")
            waiting = "SELECT count(*) FROM pg_stat_activity WHERE $1::int = ANY (pg_blocking_pids(pid))"
            while not await watcher.fetchval(waiting, pid):
                pass
            live.send(signal.SIGINT)
            live.until("still saving")
            live.send(signal.SIGINT)
            live.until("still saving")
            assert await watcher.fetchval(waiting, pid)
    finally:
        await holder.close()
        await watcher.close()
    ran = live.end()
    assert ran.code == 130
    assert ran.json["status"] == "cancelled"
    assert ran.json["checkpoints"] == {"saved": 1, "failed": 0}
    assert cli.show(name)["checkpoint_bar"] == ran.json["checkpoint_bar"] >= 99


async def test_sigterm_interrupts_with_a_shutdown_checkpoint(cli: Cli) -> None:
    live = cli.start(*SLOW)
    name = live.operation()
    under_way(live)
    live.send(signal.SIGTERM)
    ran = live.end()
    assert (ran.code, ran.out) == (143, "")
    assert f"go on with: ktrdr-async resume {name}" in ran.err
    shown = cli.show(name)
    assert (shown["status"], shown["checkpoint"]["type"]) == ("interrupted", "shutdown")


async def test_ctrl_c_works_where_sigint_was_inherited_as_ignored(cli: Cli) -> None:
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        live = cli.start(*SLOW, "--json")
    finally:
        signal.signal(signal.SIGINT, ignored)
    live.operation()
    under_way(live)
    live.send(signal.SIGINT)
    assert live.end().code == 130


async def test_kill_9_and_resume_give_the_digest_of_an_uninterrupted_run(cli: Cli) -> None:
    live = cli.start(
        *RUN, "--throttle", "500", "--progress-seconds", "0.05", "--checkpoint-bars", "200", "--id", "killed"
    )
    live.operation()
    live.until("  checkpoint ")
    live.kill()
    left = cli.show("killed")
    assert left["status"] == "running"
    assert left["checkpoint"]["type"] == "periodic"
    resumed = cli.run("resume", "--last", "--json")
    assert resumed.code == 0
    assert resumed.json["operation_id"] == "killed"
    assert resumed.json["resumed_from"] == [left["checkpoint_bar"]]
    assert resumed.json["result_digest"] == cli.digest(*RUN[1:])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
async def test_a_signal_while_connecting_starts_nothing(bare: Cli, number: int, code: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # it listens, and never answers
        server.settimeout(PATIENCE)
        port = server.getsockname()[1]
        live = bare.start(*RUN, "--json", "--database", f"postgresql://u:s3cret-w0rd@127.0.0.1:{port}/x")
        client, _ = server.accept()
        live.send(number)
        ran = live.end()
        client.close()
    assert ran.code == code
    assert ran.json["operation_id"] is None
    assert ran.json["error"]["code"] == "interrupted"
    assert "Traceback" not in ran.err
    assert "s3cret-w0rd" not in ran.out + ran.err


async def test_a_signal_while_importing_a_strategy_starts_nothing(bare: Cli) -> None:
    (bare.directory / "slow.py").write_text(
        "import sys, time\nprint('importing', file=sys.stderr, flush=True)\ntime.sleep(600)\n"
    )
    live = bare.start("run", "--data", MARKET, "--strategy", "slow:X", "--json")
    live.until("importing")
    live.send(signal.SIGINT)
    ran = live.end()
    assert ran.code == 130
    assert ran.json["error"]["message"] == "Ctrl-C: nothing was started"
    assert "Traceback" not in ran.err


async def test_a_strategy_that_does_not_give_way_is_named_and_still_saved(cli: Cli) -> None:
    gate = cli.directory / "gate"
    run = ("run", "--data", MARKET, "--strategy", "mine:Stuck", "--param", f"file={gate}")
    live = cli.start(*run, "--json")
    live.operation()
    live.until("stuck")
    for _ in range(3):
        live.send(signal.SIGINT)
        # Three that arrive together are one to the kernel: the next comes when this one was seen.
        wait_for_pending(live)
    live.until(f"kill -9 {live.process.pid}")
    gate.touch()
    ran = live.end()
    assert ran.code == 130
    assert ran.json["checkpoint_bar"] == 99


async def test_a_signal_while_the_interpreter_ends_changes_nothing(bare: Cli) -> None:
    """The interpreter takes handlers away before its last objects go: a signal then killed a completed run."""
    gate = bare.directory / "gate"
    (bare.directory / "late.py").write_text(
        "import os, time\nfrom mine import Counting\n"
        "class Late:\n"
        f"    def __del__(self, write=os.write, exists=os.path.exists, sleep=time.sleep, gate={str(gate)!r}):\n"
        "        write(2, b'late\\n')\n"
        "        while not exists(gate):\n"
        "            sleep(0.01)\n"
        "LATE = Late()\n"
    )
    live = bare.start("run", "--data", MARKET, "--strategy", "late:Counting", "--no-database", "--json")
    live.until("late")
    for number in (signal.SIGINT, signal.SIGTERM):
        live.send(number)
    wait_for_pending(live)
    gate.touch()
    ran = live.end()
    assert ran.code == 0
    assert ran.json["status"] == "completed"


def wait_for_pending(live: Live) -> None:
    """Waits until no signal is pending at a process, or it has ended."""
    status = Path(f"/proc/{live.process.pid}/status")
    if not status.exists():
        pytest.skip("needs /proc")
    pending = True
    while pending and live.process.poll() is None:
        lines = status.read_text().splitlines()
        pending = any(int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd", "ShdPnd")))


async def test_ctrl_c_without_a_database_says_that_nothing_was_kept(bare: Cli) -> None:
    live = bare.start(*RUN, "--no-database", "--json", "--throttle", "500", "--progress-seconds", "0.01")
    under_way(live)
    live.send(signal.SIGINT)
    ran = live.end()
    assert ran.code == 130
    assert ran.json["status"] == "cancelled"
    assert "nothing was kept" in ran.json["error"]["message"]
    assert "nothing was kept" in ran.err


async def test_quiet_tells_only_the_id(cli: Cli) -> None:
    ran = cli.run(*RUN, "--quiet", "--json", "--id", "hush")
    assert ran.err == "operation hush\n"
    assert ran.json["status"] == "completed"
