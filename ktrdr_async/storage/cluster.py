"""Makes a data directory, and writes the server's settings: the files of the embedded server, not its life."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ktrdr_async.errors import EmbeddedServerError
from ktrdr_async.storage import places
from ktrdr_async.storage.accounts import Account, run_as
from ktrdr_async.storage.record import DATABASE, ROLE

ADMINISTRATOR = "postgres"
# Small, and durable: nothing here trades safety for speed. No TCP, no replication, no worker processes that one user's
# server doesn't need. Errors are logged without the statement, whose text is ours, and never with parameters.
SETTINGS = """\
listen_addresses = ''
unix_socket_directories = {sockets}
unix_socket_permissions = 0700
port = 5432
max_connections = 100
shared_buffers = 32MB
max_wal_size = 256MB
min_wal_size = 32MB
wal_level = minimal
max_wal_senders = 0
max_logical_replication_workers = 0
max_parallel_workers_per_gather = 0
autovacuum_max_workers = 1
io_method = sync
jit = off
fsync = on
synchronous_commit = on
logging_collector = off
log_min_messages = warning
log_min_error_statement = panic
log_checkpoints = off
log_line_prefix = '%m [%p] '
log_timezone = 'UTC'
timezone = 'UTC'
"""


def write_settings(root: Path, sockets: Path) -> None:
    """Write `server.conf`, which the data directory's postgresql.conf includes.

    It is new at each start, so that new code's settings count.
    """
    write_file(root / "server.conf", SETTINGS.format(sockets=_directory_list(str(sockets))), 0o644)


def _directory_list(directory: str) -> str:
    # Two quotings, one in the other: of an element in a list (a comma would part it), of a string in the file.
    element = '"' + directory.replace('"', '""') + '"'
    return "'" + element.replace("\\", "\\\\").replace("'", "''") + "'"


def initialize(root: Path, installation: Path, account: Account) -> None:
    """Make the data directory under another name, and rename it when it is whole.

    A half-done one is never mistaken for it, and is deleted by the next start.

    Raises:
        EmbeddedServerError: if one of PostgreSQL's programs fails; the message has what it printed.
    """
    partial = root / "data.new"
    if os.path.lexists(partial):
        shutil.rmtree(partial)
    partial.mkdir(mode=0o700)
    places.give(partial, account.uid, account.gid)
    binaries = installation / "bin"
    command = [str(binaries / "initdb"), "-D", str(partial), "-U", ADMINISTRATOR, "-E", "UTF8", "--auth=trust"]
    # The builtin provider sorts the same on every system; libc's order changed under people's indexes.
    command += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C", "--no-instructions"]
    _run(account, command)
    descriptor = os.open(partial / "postgresql.conf", os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(descriptor, "w") as file:
        file.write("\ninclude_if_exists = '../server.conf'\n")
        file.flush()
        os.fsync(descriptor)
    # In single-user mode there is no socket: the role and the database are there before anybody can connect.
    statements = f"CREATE ROLE {ROLE} LOGIN;\nCREATE DATABASE {DATABASE} OWNER {ROLE};\n"
    _run(account, [str(binaries / "postgres"), "--single", "-D", str(partial), "postgres"], statements)
    partial.rename(root / "data")
    descriptor = os.open(root, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_version(data: Path) -> None:
    """Refuse a data directory that isn't one of this major version; it is never deleted or changed.

    Raises:
        EmbeddedServerError: if it isn't.
    """
    try:
        found = f"version {(data / 'PG_VERSION').read_text().strip()}"
    except OSError:
        found = "no PG_VERSION in it"
    if found != f"version {places.major_version()}":
        raise EmbeddedServerError(
            f"{data} isn't a data directory of PostgreSQL {places.major_version()}: {found}",
            hint=f"move it away, and a new one is made in its place; or {places.ELSEWHERE}",
        )


def write_file(path: Path, text: str, mode: int) -> None:
    """Replace a file as a whole; a link in its place is replaced, not followed."""
    partial = path.with_name(f"{path.name}.new")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    with open(descriptor, "w") as file:
        os.fchmod(descriptor, mode)
        file.write(text)
        file.flush()
        os.fsync(descriptor)
    partial.rename(path)


def _run(account: Account, command: list[str], text: str = "") -> None:
    status, printed = run_as(account, command, text=text)
    if status:
        raise EmbeddedServerError(
            f"{Path(command[0]).name} exited with {status}: {' '.join(printed.split())[-1000:]}", hint=places.ELSEWHERE
        )
