"""The embedded server's life, with real processes: who shares it, who stops it, and what it comes back from."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from homes import seed
from storage_processes import child, gone, keepers, kill_server, postmasters, query, until

from ktrdr_async.errors import EmbeddedServerError
from ktrdr_async.storage import keeper, places
from ktrdr_async.storage.accounts import Account, choose_account, identity
from ktrdr_async.storage.embedded import EmbeddedServer


def as_account(account: Account) -> dict[str, Any]:
    return dict(identity(account))


@pytest.fixture
def server(home: Path, initialized: Path) -> Iterator[EmbeddedServer]:
    """A server that was never started here, whose data directory exists."""
    seed(home, initialized)
    made = EmbeddedServer(home)
    yield made
    made.release()


@pytest.fixture
def cold(home: Path) -> Iterator[EmbeddedServer]:
    """A server of which nothing is there yet."""
    made = EmbeddedServer(home)
    yield made
    made.release()


def test_a_cold_start_makes_a_private_durable_server_whose_role_is_no_superuser(cold: EmbeddedServer) -> None:
    where = cold.start()
    assert query(where, "SELECT current_user::text") == "ktrdr_async"
    assert (
        query(where, "SELECT rolsuper OR rolcreaterole OR rolcreatedb FROM pg_roles WHERE rolname = current_user")
        is False
    )
    assert query(
        where, "SELECT datlocprovider::text || ' ' || datlocale FROM pg_database WHERE datname = current_database()"
    ) == ("b C.UTF-8")
    for setting, value in {
        "fsync": "on",
        "synchronous_commit": "on",
        "listen_addresses": "",
        "shared_buffers": "32MB",
    }.items():
        assert query(where, f"SHOW {setting}") == value
    for private in (Path(where.host), cold.root / "data"):
        assert stat.S_IMODE(private.lstat().st_mode) == 0o700
    assert cold.root.name == f"pg{places.major_version()}"
    assert stat.S_IMODE((cold.root / "run.lock").stat().st_mode) == 0o600


def test_the_server_stops_after_its_only_user_and_keeps_what_was_committed(server: EmbeddedServer) -> None:
    query(server.start(), "CREATE TABLE kept AS SELECT 7 AS n")
    server.release()
    assert server.wait_until_stopped(20)
    assert not postmasters(server.root)
    assert not keepers(server.root)
    assert not (server.root / "data" / "postmaster.pid").exists()  # an orderly end, not a crash
    assert query(server.start(), "SELECT n FROM kept") == 7


def test_two_processes_share_one_server_and_the_last_one_out_stops_it(home: Path, server: EmbeddedServer) -> None:
    with child(home) as first, child(home) as second:
        assert first.started() == second.started()
        (process,) = postmasters(server.root)
        first.go_on()
        assert server.start().host == second.answer["host"]
        server.release()
        assert [process] == postmasters(server.root)
        second.go_on()
    assert server.wait_until_stopped(20)
    assert gone(process)


def test_processes_that_start_at_the_same_moment_make_one_server(home: Path, cold: EmbeddedServer) -> None:
    with ExitStack() as stack:
        children = [stack.enter_context(child(home)) for _ in range(4)]
        assert len({json.dumps(one.started()) for one in children}) == 1
        assert len(postmasters(cold.root)) == len(keepers(cold.root)) == 1
        for one in children:
            one.go_on()


def test_threads_of_one_process_share_it_too(home: Path) -> None:
    servers = [EmbeddedServer(home) for _ in range(3)]
    threads = [threading.Thread(target=one.start) for one in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    try:
        assert len({one.arguments for one in servers}) == 1
        servers[0].release()
        assert query(servers[1].ensure_running(), "SELECT 1") == 1
    finally:
        for one in servers:
            one.release()


def test_kill_9_of_the_last_user_stops_the_server(home: Path, server: EmbeddedServer) -> None:
    with child(home) as only:
        only.started()
        assert len(postmasters(server.root)) == 1
        only.kill()
        assert server.wait_until_stopped(20)
    assert not postmasters(server.root)


def test_kill_9_of_the_server_is_repaired_and_committed_rows_are_there(server: EmbeddedServer) -> None:
    query(server.start(), "CREATE TABLE kept AS SELECT 7 AS n")
    kill_server(server.root)
    assert query(server.ensure_running(), "SELECT n FROM kept") == 7
    assert len(postmasters(server.root)) == len(keepers(server.root)) == 1


def test_kill_9_of_all_processes_is_repaired_by_the_next_start(home: Path, server: EmbeddedServer) -> None:
    with child(home) as only:
        only.started()
        query(server.start(), "CREATE TABLE kept AS SELECT 7 AS n")
        server.release()
        victims = keepers(server.root) + postmasters(server.root)
        victims += victims[-1].children()
        for victim in victims:
            with suppress(psutil.NoSuchProcess):
                victim.kill()
        only.kill()
    assert server.wait_until_stopped(20)
    assert (server.root / "data" / "postmaster.pid").exists()
    assert query(server.start(), "SELECT n FROM kept") == 7


@pytest.mark.parametrize("by", ["ensure_running", "release"])
def test_a_killed_keeper_is_replaced(server: EmbeddedServer, by: str) -> None:
    server.start()
    (process,) = postmasters(server.root)
    (old,) = keepers(server.root)
    old.kill()
    until(lambda: not keepers(server.root), "the keeper's end")
    if by == "ensure_running":
        server.ensure_running()
        assert [process] == postmasters(server.root)  # adopted, not started again
        (new,) = keepers(server.root)
        assert new != old
    server.release()
    assert server.wait_until_stopped(20)
    assert gone(process)


def test_a_server_that_is_killed_after_its_keeper_is_repaired(server: EmbeddedServer) -> None:
    query(server.start(), "CREATE TABLE kept AS SELECT 7 AS n")
    keepers(server.root)[0].kill()
    until(lambda: not keepers(server.root), "the keeper's end")
    server.ensure_running()
    kill_server(server.root)
    assert query(server.ensure_running(), "SELECT n FROM kept") == 7


def test_sigterm_to_everybody_leaves_the_server_to_its_users(home: Path, server: EmbeddedServer) -> None:
    server.start()
    (watching,) = keepers(server.root)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        watching.send_signal(number)
    assert query(server.arguments, "SELECT 1") == 1
    server.release()
    assert server.wait_until_stopped(20)
    assert gone(watching)


def test_an_interrupted_initdb_is_done_again(home: Path, cold: EmbeddedServer) -> None:
    partial = cold.root / "data.new"
    for _ in range(5):
        with child(home) as first:
            until(lambda: (partial / "PG_VERSION").exists() or (cold.root / "data").exists(), "the beginning of initdb")
            programs = psutil.Process(first.process.pid).children(recursive=True)
            first.kill()
            for program in programs:
                with suppress(psutil.NoSuchProcess):
                    program.kill()
        assert cold.wait_until_stopped(20)
        psutil.wait_procs(programs, timeout=10)
        if not (cold.root / "data").exists():
            break
        shutil.rmtree(cold.root)  # it was faster than we
    assert (partial / "PG_VERSION").exists()
    assert query(cold.start(), "SELECT 1") == 1
    assert not partial.exists()


def test_a_data_directory_that_is_not_ours_is_neither_used_nor_deleted(home: Path, cold: EmbeddedServer) -> None:
    places.prepare_home(home, shared_with_account=os.geteuid() == 0)
    data = cold.root / "data"
    data.mkdir()
    (data / "letter.txt").write_text("dear")
    account = choose_account(Path("/nonexistent"))
    os.chown(data, account.uid, account.gid)
    with pytest.raises(EmbeddedServerError, match="no PG_VERSION"):
        cold.start()
    assert (data / "letter.txt").read_text() == "dear"


@pytest.mark.parametrize("name", ["a b", 'it\'s, "so" \\ odd', "long" * 50])
def test_any_path_will_do(home: Path, name: str) -> None:
    server = EmbeddedServer(home / name)
    try:
        where = server.start()
        assert query(where, "SELECT 1") == 1
        assert len(os.fsencode(f"{where.host}/{places.SOCKET_NAME}")) <= places.SOCKET_PATH_LIMIT
    finally:
        server.release()
        assert server.wait_until_stopped(20)
        shutil.rmtree(where.host)


def test_a_private_runtime_directory_is_used_before_the_one_for_temporary_files(
    home: Path, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # with every character in it that one of the two quotings in the server's settings would trip over
    directories = [home / 'run, "time" \\ it\'s', home / 'temporary, "files" \\ it\'s']
    for directory in directories:
        directory.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(directories[0]))
    monkeypatch.setattr(tempfile, "tempdir", str(directories[1]))
    if os.geteuid() == 0:
        directories[1].chmod(0o1777)  # root's server runs as an account that can't pass the other
    where = server.start()
    assert Path(where.host).parent == directories[os.geteuid() == 0]
    assert query(where, "SELECT 1") == 1


def test_an_open_runtime_directory_is_not_used(
    home: Path, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = home / "runtime"
    runtime.mkdir()
    runtime.chmod(0o777)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    assert Path(server.start().host).parent != runtime


def test_a_link_planted_as_the_socket_directory_is_refused(home: Path, server: EmbeddedServer) -> None:
    sockets = Path(server.start().host)
    target = home / "target"
    target.mkdir(mode=0o700)
    before = target.lstat()
    moved = sockets.rename(sockets.with_name(sockets.name + "-moved"))
    sockets.symlink_to(target)
    try:
        with pytest.raises(EmbeddedServerError, match="isn't a directory"):  # beside a running server
            EmbeddedServer(home).start()
        server.release()
        assert server.wait_until_stopped(20)
        fresh = Path(server.start().host)  # for a new one
        assert fresh != sockets
        assert query(server.arguments, "SELECT 1") == 1
        assert list(target.iterdir()) == []
        assert (target.lstat().st_uid, target.lstat().st_mode) == (before.st_uid, before.st_mode)
    finally:
        sockets.unlink()
        shutil.rmtree(moved)


def test_a_socket_directory_that_others_can_enter_is_not_used_again(server: EmbeddedServer) -> None:
    first = Path(server.start().host)
    server.release()
    assert server.wait_until_stopped(20)
    first.chmod(0o755)
    assert Path(server.start().host) != first
    shutil.rmtree(first)


def test_a_deleted_socket_is_made_again(server: EmbeddedServer) -> None:
    where = server.start()
    query(where, "CREATE TABLE kept AS SELECT 7 AS n")
    (old,) = postmasters(server.root)
    shutil.rmtree(where.host)
    assert query(server.ensure_running(), "SELECT n FROM kept") == 7
    assert [old] != postmasters(server.root)


@pytest.mark.parametrize("kind", ["another process", "zombie"])
def test_a_reused_process_id_does_not_stop_the_start(server: EmbeddedServer, kind: str) -> None:
    query(server.start(), "CREATE TABLE kept AS SELECT 7 AS n")
    account = choose_account(server.root / "data")
    kill_server(server.root)
    server.release()
    assert server.wait_until_stopped(20)
    lock = server.root / "data" / "postmaster.pid"
    lines = lock.read_text().splitlines(keepends=True)
    with subprocess.Popen(
        ["sleep", "60" if kind == "another process" else "0"], cwd="/", **as_account(account)
    ) as other:
        if kind == "zombie":
            until(lambda: psutil.Process(other.pid).status() == psutil.STATUS_ZOMBIE, "the zombie")
        lock.write_text("".join([f"{other.pid}\n", *lines[1:]]))
        assert query(server.start(), "SELECT n FROM kept") == 7
        other.kill()


def test_a_server_that_comes_between_look_and_start_is_left_alone(tmp_path: Path) -> None:
    lock = tmp_path / "postmaster.pid"
    assert keeper.claim_lock_file(str(tmp_path), 0)  # there is none: PostgreSQL makes it exclusively
    lock.write_text("4711\nrest\nof it\n")
    assert not keeper.claim_lock_file(str(tmp_path), 0)
    assert not keeper.claim_lock_file(str(tmp_path), 42)
    assert lock.read_text() == "4711\nrest\nof it\n"
    assert keeper.claim_lock_file(str(tmp_path), 4711)
    assert lock.read_text() == f"{os.getpid()}\nrest\nof it\n"
    lock.write_text("")  # made and not written: somebody is starting
    writer = threading.Timer(0.2, lambda: lock.write_text("4711\n"))
    writer.start()
    assert not keeper.claim_lock_file(str(tmp_path), 0)
    writer.join()


def test_an_empty_lock_file_that_a_crash_left_does_not_stop_the_start(server: EmbeddedServer) -> None:
    (server.root / "data" / "postmaster.pid").write_text("")
    assert query(server.start(), "SELECT 1") == 1


def test_a_server_that_was_started_by_hand_is_left_alone(server: EmbeddedServer) -> None:
    server.start()
    server.release()
    assert server.wait_until_stopped(20)
    account = choose_account(server.root / "data")
    program = places.installation() / "bin" / "postgres"
    with subprocess.Popen(
        [str(program), "-D", str(server.root / "data")], cwd="/", stderr=subprocess.DEVNULL, **as_account(account)
    ) as by_hand:
        until((server.root / "data" / "postmaster.pid").exists, "the server started by hand")
        with pytest.raises(
            EmbeddedServerError, match=f"wasn't started by ktrdr_async .process {by_hand.pid}"
        ) as caught:
            server.start()
        assert str(by_hand.pid) in caught.value.hint
        assert by_hand.poll() is None
        by_hand.send_signal(signal.SIGINT)


def test_a_home_that_another_machine_did_not_leave_in_order_is_refused(server: EmbeddedServer) -> None:
    server.start()
    kill_server(server.root)
    server.release()
    assert server.wait_until_stopped(20)
    record = server.root / "server.json"
    written = json.loads(record.read_text())
    record.write_text(json.dumps({**written, "host": "elsewhere", "boot": "another"}))
    with pytest.raises(EmbeddedServerError, match=r"another machine \(elsewhere") as caught:
        server.start()
    assert str(record) in caught.value.hint
    record.write_text(json.dumps({**written, "boot": "before the power failed"}))  # the same machine, booted again
    assert query(server.start(), "SELECT 1") == 1


def test_a_broken_setting_gives_the_servers_own_words(server: EmbeddedServer) -> None:
    server.start()
    server.release()
    assert server.wait_until_stopped(20)
    with (server.root / "data" / "postgresql.conf").open("a") as file:
        file.write("no_such_setting_at_all = 1\n")
    with pytest.raises(EmbeddedServerError, match="no_such_setting_at_all"):
        server.start()
    with pytest.raises(EmbeddedServerError, match="isn't started"):  # a failed start counts no user
        server.ensure_running()


def test_the_log_is_bounded(tmp_path: Path) -> None:
    with (tmp_path / "log").open("ab+") as log:
        log.write(b"x" * (keeper.LOG_LIMIT - 5) + b"\n")
        log.flush()
        keeper.bound_log(log.fileno())
        assert os.fstat(log.fileno()).st_size == keeper.LOG_LIMIT - 4
        log.write(b"the end\n")
        log.flush()
        keeper.bound_log(log.fileno())
        assert os.fstat(log.fileno()).st_size < keeper.LOG_KEPT + 100
        log.write(b"and on\n")
        log.flush()
        assert (tmp_path / "log").read_bytes().endswith(b"the end\nand on\n")
