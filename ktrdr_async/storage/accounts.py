"""As whom the embedded server runs: PostgreSQL refuses root, so root hands it to an account without other rights."""

from __future__ import annotations

import logging
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ktrdr_async.errors import EmbeddedServerError
from ktrdr_async.storage.places import can_enter, permits

OWN_ACCOUNT = "ktrdr_async"
_SHARED = frozenset({"nobody", "daemon"})  # other services run as these: they could read and signal the server

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Account:
    """The account that owns the data directory and runs the server's processes."""

    name: str
    uid: int
    gid: int
    drops: bool  # root starts the server's programs as this account; else they run as the user who asks

    @property
    def gids(self) -> frozenset[int]:
        """Groups whose permissions count: the account's own one only, no supplementary ones are passed on."""
        return frozenset({self.gid}) if self.drops else frozenset({self.gid, *os.getgroups()})


def choose_account(data: Path) -> Account:
    """The account for the server whose data directory is `data` (which need not exist yet).

    Raises:
        EmbeddedServerError: if the user is unknown to the system, or root finds and can make no account of its own.
    """
    uid = os.geteuid()
    if uid != 0:
        try:
            entry = pwd.getpwuid(uid)
        except KeyError:
            raise EmbeddedServerError(
                f"the user id {uid} has no entry in the system's user database, and PostgreSQL doesn't run without one",
                hint="run as a user that exists (in a container: add the user to the image), "
                "or use a server of your own with --database, or --no-database",
            ) from None
        return Account(entry.pw_name, uid, entry.pw_gid, drops=False)
    if data.exists():
        return _owner(data)
    for name in ("postgres", OWN_ACCOUNT):
        try:
            return _dropping(pwd.getpwnam(name))
        except KeyError:
            continue
    return _make_account()


def _owner(data: Path) -> Account:
    owner = data.lstat().st_uid
    try:
        entry = pwd.getpwuid(owner)
    except KeyError:
        raise EmbeddedServerError(
            f"{data} belongs to the user id {owner}, which this system doesn't know",
            hint=f"make an account with that id: useradd --system --uid {owner} {OWN_ACCOUNT}",
        ) from None
    if owner == 0 or entry.pw_name in _SHARED:
        raise EmbeddedServerError(
            f"{data} belongs to {entry.pw_name}, as whom no server is run",
            hint="move it away, or give it to its account",
        )
    return _dropping(entry)


def _dropping(entry: pwd.struct_passwd) -> Account:
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid, drops=True)


def _make_account() -> Account:
    command = ["useradd", "--system", "--user-group", "--no-create-home", "--home-dir", "/nonexistent"]
    command += ["--shell", "/usr/sbin/nologin", "--comment", "ktrdr_async embedded PostgreSQL", OWN_ACCOUNT]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603
        answer = f"useradd exited with {done.returncode}: {done.stderr.strip()}"
    except (OSError, subprocess.TimeoutExpired) as error:
        answer = str(error)
    try:
        account = _dropping(pwd.getpwnam(OWN_ACCOUNT))  # also where another process made it at the same moment
    except KeyError:
        raise EmbeddedServerError(
            "PostgreSQL doesn't run as root, there is no account 'postgres', "
            f"and '{OWN_ACCOUNT}' couldn't be made ({answer})",
            hint=f"make the system account {OWN_ACCOUNT}, run as an ordinary user, or use --database or --no-database",
        ) from None
    log.warning("made the system account %s (uid %d) to run the embedded PostgreSQL", account.name, account.uid)
    return account


def identity(account: Account) -> dict[str, object]:
    """Arguments for `subprocess` that make a program run as the account."""
    return {"user": account.uid, "group": account.gid, "extra_groups": []} if account.drops else {}


def environment() -> dict[str, str]:
    """The environment of the server's programs and its keeper.

    Made from nothing: a PG* variable would redirect them, and another account has no business with the user's secrets.
    """
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "TMPDIR") if name in os.environ}
    return {**kept, "LC_ALL": "C", "TZ": "UTC"}


def run_as(account: Account, command: Sequence[str], *, text: str = "", timeout: float = 120.0) -> tuple[int, str]:
    """Run one of the server's programs to its end; returns its exit status and what it printed.

    The output goes to a file, never a pipe: a child that lives on would keep the pipe open, and us waiting.
    """
    keywords: Mapping[str, object] = identity(account)
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out:
        given.write(text.encode())
        given.seek(0)
        done = subprocess.run(  # type: ignore[call-overload]  # noqa: S603
            list(command), stdin=given, stdout=out, stderr=subprocess.STDOUT, env=environment(), cwd="/",
            timeout=timeout, check=False, umask=0o077, **keywords,
        )  # fmt: skip
        out.seek(0)
        return done.returncode, out.read().decode(errors="replace")


def copy_for_account(installation: Path, root: Path, version: str, account: Account) -> Path:
    """The installation itself if the account can execute it, else a copy in `root`, made once.

    A virtual environment in root's home (0700) is out of the account's reach, and parents are never opened to it.
    """
    if not account.drops or _executable(installation, account):
        return installation
    package = installation.parent
    target = root / f"bin-{version}"
    copied = target / package.name / installation.name
    if copied.exists():
        return copied
    for old in (
        *root.glob("bin-*"),
        *root.glob("bin.new-*"),
    ):  # of other versions, or half-done: no server runs on them now
        shutil.rmtree(old)
    partial = Path(tempfile.mkdtemp(prefix="bin.new-", dir=root))
    shutil.copytree(installation, partial / package.name / installation.name, symlinks=True)
    libraries = package.parent / f"{package.name}.libs"  # found by the binaries relative to their own place
    if libraries.exists():
        shutil.copytree(libraries, partial / libraries.name, symlinks=True)
    for place, directories, files in os.walk(partial):
        for name in ("", *directories):
            os.chmod(os.path.join(place, name), 0o755)  # noqa: S103 - public programs, readable by the account
        for name in files:
            file = Path(place, name)
            if not file.is_symlink():
                file.chmod(0o755 if file.stat().st_mode & 0o100 else 0o644)
    partial.rename(target)
    return copied


def _executable(installation: Path, account: Account) -> bool:
    server = installation / "bin" / "postgres"
    share = next(installation.glob("share/**/postgres.bki"), installation / "share")
    return (
        can_enter(server.parent, account.uid, account.gids) is None
        and permits(server.stat(), account.uid, account.gids, 0o5)
        and can_enter(share.parent, account.uid, account.gids) is None
        and permits(share.stat(), account.uid, account.gids, 0o4)
    )
