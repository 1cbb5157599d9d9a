"""Where the embedded server may be and as whom it runs: homes, accounts, file systems, machines, namespaces."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from homes import make_home, remove_home
from storage_processes import CHECKOUT, child, ordinary_account, postmasters, python_for_everybody, query, until

from ktrdr_async.errors import EmbeddedServerError
from ktrdr_async.storage import accounts, places
from ktrdr_async.storage.embedded import EmbeddedServer

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
not_as_root = pytest.mark.skipif(os.geteuid() == 0, reason="root isn't an ordinary user")
WAYS_OUT = ("KTRDR_ASYNC_HOME", "volume", "--database", "--no-database")


def own_mounts() -> bool:
    command = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "true"]
    return (
        shutil.which("unshare") is not None
        and subprocess.run(command, capture_output=True, check=False).returncode == 0
    )


def in_namespace(script: str) -> tuple[str, ...]:
    """A command line that runs what is appended to it after `script`, with mounts of its own."""
    return ("unshare", "--mount", "sh", "-ec", f'{script}; exec "$@"', "sh")


def test_the_home_is_chosen_in_the_documented_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(places.HOME_VARIABLE, "~/named")
    assert places.default_home() == tmp_path / "named"
    monkeypatch.delenv(places.HOME_VARIABLE)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert places.default_home() == Path("/var/lib/ktrdr-async")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert places.default_home() == tmp_path / "state" / "ktrdr-async"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")  # the XDG specification: to be ignored
    assert places.default_home() == tmp_path / ".local" / "state" / "ktrdr-async"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert places.default_home() == tmp_path / "Library" / "Application Support" / "ktrdr-async"
    monkeypatch.setenv("HOME", "/")
    with pytest.raises(EmbeddedServerError, match="no home directory"):
        places.default_home()


def test_the_directory_is_made_private_and_its_parents_are_left_alone(home: Path) -> None:
    before = home.stat()
    places.prepare_home(home / "a" / "b", shared_with_account=False)
    for made in (home / "a", home / "a" / "b", places.version_directory(home / "a" / "b")):
        assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert (home.stat().st_mode, home.stat().st_uid) == (before.st_mode, before.st_uid)


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "virtiofs", "ceph"])
def test_a_network_file_system_is_refused(home: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = [SimpleNamespace(mountpoint="/", fstype="ext4"), SimpleNamespace(mountpoint=str(home), fstype=kind)]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)
    with pytest.raises(EmbeddedServerError, match=rf"network file system \({kind}\)") as caught:
        EmbeddedServer(home / "here").start()
    assert all(word in caught.value.message for word in WAYS_OUT)
    assert not (home / "here").exists()


def test_the_file_system_of_a_path_is_the_innermost_mounts() -> None:
    assert places.file_system(Path("/proc/self")) == "proc"


def test_a_directory_that_everybody_can_change_is_refused(home: Path) -> None:
    home.chmod(0o777)
    with pytest.raises(EmbeddedServerError, match="can be changed by every user"):
        EmbeddedServer(home).start()


@not_as_root
def test_a_directory_without_permission_gives_the_ways_out(home: Path) -> None:
    home.chmod(0o555)
    with pytest.raises(EmbeddedServerError, match="permission denied") as caught:
        EmbeddedServer(home / "here").start()
    assert all(word in caught.value.message for word in WAYS_OUT)


@as_root
def test_a_read_only_file_system_gives_the_ways_out(home: Path) -> None:
    if not own_mounts():
        pytest.skip("no mount namespaces here")
    (home / "ro").mkdir()
    before = in_namespace(f"mount -t tmpfs -o ro tmpfs {home}/ro")
    for place in (home / "ro", home / "ro" / "deeper"):
        with child(place, before=before) as process:
            answer = process.started()
        assert "read-only" in answer["error"]
        assert all(word in answer["error"] for word in WAYS_OUT)


@as_root
def test_a_home_of_another_user_is_refused(home: Path) -> None:
    account = ordinary_account()
    assert account is not None
    os.chown(home, account.pw_uid, account.pw_gid)
    with pytest.raises(EmbeddedServerError, match="isn't a directory of this user"):
        EmbeddedServer(home).start()


@as_root
def test_roots_server_runs_as_an_account_and_a_closed_parent_is_named_not_opened(home: Path) -> None:
    server = EmbeddedServer(home / "open")
    server.start()
    (process,) = postmasters(server.root)
    assert process.username() in ("postgres", accounts.OWN_ACCOUNT)
    assert set(process.uids()) == {(server.root / "data").stat().st_uid}
    assert 0 not in psutil.Process(process.pid).gids()
    assert not {name for name in process.environ() if name.startswith(("PG", "KTRDR"))} - {
        "PGDATA",
        "PG_GRANDPARENT_PID",
    }
    server.release()
    assert server.wait_until_stopped(20)
    shutil.rmtree(home / "open")
    closed = home / "closed"
    closed.mkdir(mode=0o700)
    with pytest.raises(EmbeddedServerError, match=rf"can't enter {closed}") as caught:
        EmbeddedServer(closed / "here").start()
    assert all(word in caught.value.message for word in WAYS_OUT)
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700


@as_root
def test_an_installation_that_the_account_can_not_reach_is_copied_once() -> None:
    home = make_home(on_disk=True)  # memory may be mounted noexec
    hidden = home / "hidden"
    hidden.mkdir(mode=0o700)
    package = places.installation().parent
    for name in (package.name, f"{package.name}.libs"):
        if (package.parent / name).exists():
            shutil.copytree(package.parent / name, hidden / name)
    inner = home / "inner"
    marks = []
    for _ in range(2):
        with child(inner, env={"PYTHONPATH": f"{hidden}{os.pathsep}{CHECKOUT}"}) as process:
            answer = process.started()
            assert "error" not in answer, answer
            (running,) = postmasters(Path(answer["root"]))
            program = Path(running.exe())
            assert program.is_relative_to(answer["root"])
            marks.append((program, program.stat().st_ino))
            process.go_on()
        assert EmbeddedServer(inner).wait_until_stopped(20)
    assert marks[0] == marks[1]
    remove_home(inner)
    shutil.rmtree(home)


@as_root
def test_without_an_account_root_makes_one_and_says_so(home: Path) -> None:
    if not own_mounts() or shutil.which("useradd") is None:
        pytest.skip("no mount namespaces or no useradd here")
    etc = home / "etc"
    shutil.copytree("/etc", etc, symlinks=True, ignore_dangling_symlinks=True)
    for name in ("passwd", "shadow", "group", "gshadow"):
        lines = (etc / name).read_text().splitlines(keepends=True)
        (etc / name).write_text("".join(line for line in lines if not line.startswith(("postgres:", "ktrdr_async:"))))
    inner = home / "inner"
    before = in_namespace(f"mount --bind {etc} /etc")
    with child(inner, before=before, stderr=subprocess.PIPE) as process:
        answer = process.started()
        assert "error" not in answer, answer
        (running,) = postmasters(Path(answer["root"]))
        entry = next(line for line in (etc / "passwd").read_text().splitlines() if line.startswith("ktrdr_async:"))
        assert running.uids().real == int(entry.split(":")[2])
        assert entry.endswith(("/nologin", "/false"))
        _, printed = process.process.communicate("\n", timeout=60)
        assert "made the system account ktrdr_async" in printed
    assert EmbeddedServer(inner).wait_until_stopped(20)
    sockets = Path(json.loads(next(inner.glob("pg*/server.json")).read_text())["sockets"])
    shutil.rmtree(sockets)
    shutil.rmtree(inner)


@as_root
def test_nobody_is_never_taken_where_no_account_can_be_made(home: Path) -> None:
    if not own_mounts():
        pytest.skip("no mount namespaces here")
    passwd = home / "passwd"
    lines = Path("/etc/passwd").read_text().splitlines(keepends=True)
    passwd.write_text("".join(line for line in lines if not line.startswith(("postgres:", "ktrdr_async:"))))
    before = in_namespace(f"mount --bind {passwd} /etc/passwd; PATH=/nowhere")
    with child(home / "inner", before=before) as process:
        answer = process.started()
    assert "no account 'postgres'" in answer["error"]
    assert "useradd" in answer["error"]
    assert "--no-database" in answer["hint"]


@as_root
def test_data_of_nobody_are_refused(home: Path) -> None:
    places.prepare_home(home, shared_with_account=True)
    data = places.version_directory(home) / "data"
    data.mkdir(mode=0o700)
    os.chown(data, pwd.getpwnam("nobody").pw_uid, -1)
    with pytest.raises(EmbeddedServerError, match="belongs to nobody"):
        EmbeddedServer(home).start()


@as_root
def test_a_user_without_an_entry_is_told_what_to_do(home: Path) -> None:
    found = python_for_everybody()
    if found is None:
        pytest.skip("no interpreter that another user could run")
    env = {"PYTHONPATH": f"{CHECKOUT}{os.pathsep}{found[1]}", "HOME": str(home)}
    with child(home, python=found[0], env=env, user=54321, group=54321, extra_groups=[], cwd="/") as process:
        answer = process.started()
    assert "user id 54321" in answer["error"]
    assert "--no-database" in answer["hint"]


@as_root
def test_an_ordinary_user_has_a_home_and_a_server_of_his_own() -> None:
    found, account = python_for_everybody(), ordinary_account()
    if found is None or account is None:
        pytest.skip("no interpreter or account for another user")
    home, runtime = make_home(), make_home()
    for place in (home, runtime):
        place.chmod(0o700)
        os.chown(place, account.pw_uid, account.pw_gid)
    try:
        env = {"PYTHONPATH": f"{CHECKOUT}{os.pathsep}{found[1]}", "HOME": str(home), "XDG_RUNTIME_DIR": str(runtime)}
        env |= {"XDG_STATE_HOME": "", places.HOME_VARIABLE: ""}
        who: dict[str, Any] = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": [], "cwd": "/"}
        with child(python=found[0], env=env, **who) as process:
            answer = process.started()
            assert answer.get("home") == str(home / ".local" / "state" / "ktrdr-async"), answer
            assert Path(answer["host"]).parent == runtime
            (running,) = postmasters(Path(answer["root"]))
            assert running.uids().real == account.pw_uid
            process.kill()
            until(lambda: not postmasters(Path(answer["root"])), "the server's end after its user's kill -9")
        (home / "shut").mkdir(mode=0o555)
        with child(home / "shut" / "here", python=found[0], env=env, **who) as process:
            answer = process.started()
        assert "permission denied" in answer["error"]
        assert all(word in answer["error"] for word in WAYS_OUT)
    finally:
        remove_home(home)
        shutil.rmtree(runtime)


@as_root
def test_a_server_of_another_pid_namespace_is_joined_or_refused_never_started_over(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not own_mounts():
        pytest.skip("no namespaces here")
    monkeypatch.setattr("ktrdr_async.storage.embedded.FOREIGN_PATIENCE", 0.3)
    server = EmbeddedServer(home)
    with child(home, before=("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")) as other:
        sockets = Path(other.started()["host"])
        query(server.start(), "CREATE TABLE kept AS SELECT 7 AS n")
        assert len(postmasters(server.root)) == 1
        server.release()
        hidden = sockets.rename(sockets.with_name(f"{sockets.name}-hidden"))
        with pytest.raises(EmbeddedServerError, match="another PID namespace") as caught:
            server.start()
        assert "--database" in caught.value.hint
        assert len(postmasters(server.root)) == 1
        hidden.rename(sockets)
        other.kill()  # its namespace ends with it: the kernel kills the keeper, the postmaster and all backends
        until(lambda: not postmasters(server.root), "the end of the other namespace")
    try:
        assert query(server.start(), "SELECT n FROM kept") == 7
    finally:
        server.release()
