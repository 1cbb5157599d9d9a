"""Which errors of a database pass by themselves: the connection or the moment, not the statement, was at fault."""

from __future__ import annotations

import errno
import socket

import asyncpg

_PASSING_ERRNO = frozenset(
    {
        errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE, errno.ETIMEDOUT, errno.EHOSTUNREACH,
        errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTDOWN, errno.EAGAIN, errno.EINTR,
    }
)  # fmt: skip
_PASSING = (
    asyncpg.PostgresConnectionError,  # class 08
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.CannotConnectNowError,  # starting up, recovering, shutting down
    asyncpg.IdleSessionTimeoutError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.ReadOnlySQLTransactionError,  # after a failover the old primary's address may be a standby's for a while
    asyncpg.TooManyConnectionsError,
    asyncpg.QueryCanceledError,  # the server's statement_timeout, or its administrator; most often behind a lock
    asyncpg.LockNotAvailableError,  # its lock_timeout
    asyncpg.InvalidCachedStatementError,  # a rolling deploy's migration changed a type under a prepared statement
    asyncpg.InternalClientError,  # what asyncpg raises when the server is killed in the middle of an answer
)
# asyncpg has one class for misuse and for a lost connection; only its text tells them apart. A pool's connection that
# was lost while it was in use counts as released. Taking that misuse for a loss costs a retry, the reverse a save.
_LOST = (
    "connection is closed",
    "connection was closed",
    "connection has been closed",
    "connection has been released back to the pool",
)


def is_transient(error: BaseException) -> bool:
    """Whether the same work may succeed a little later, on another connection or on this one.

    True doesn't say that the work wasn't done: a commit whose answer was lost raises one of these.
    """
    if isinstance(error, asyncpg.ProtocolViolationError):
        # A pooler reports all of its own troubles with this code; a setting that it refuses is refused for ever.
        return "unsupported startup parameter" not in str(error)
    if isinstance(error, _PASSING):
        return True
    if isinstance(error, asyncpg.InterfaceError):
        return any(words in str(error) for words in _LOST)
    if isinstance(error, TimeoutError | ConnectionError | socket.gaierror):
        return True
    if isinstance(error, FileNotFoundError):
        return error.filename is None  # the socket of a server that is gone; a file that is opened has a name
    return isinstance(error, OSError) and error.errno in _PASSING_ERRNO
