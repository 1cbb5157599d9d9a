"""Errors as people and programs get them: message, hint, code, exit code; of a strategy's error its own frames."""

from __future__ import annotations

import os
import traceback
from pathlib import Path

import msgspec

from ktrdr_async.errors import (
    AlreadyClaimedError,
    DataNotAllowedError,
    InputError,
    KtrdrError,
    OperationError,
    StrategyError,
)

BAD_INPUT, FAILED = 2, 1
TRACEBACK_VARIABLE = "KTRDR_ASYNC_TRACEBACK"  # set: errors that aren't foreseen show where they come from

_PACKAGE = str(Path(__file__).resolve().parents[1]) + os.sep
_HINTS = {
    DataNotAllowedError: "if you trust it, name the directory that the data are in: --data-root DIR",
    AlreadyClaimedError: "ktrdr-async cancel ID ends it; if you know that its process is gone: resume with --take-over",
}


class Failure(msgspec.Struct):
    """What went wrong."""

    code: str
    message: str
    hint: str = ""
    details: str = ""  # a strategy's own frames
    exit_code: int = FAILED

    def to_dict(self) -> dict[str, str]:
        """What `--json` prints as `error`."""
        return {"code": self.code, "message": self.message, "hint": self.hint}


def failure_of(error: BaseException, *, started: bool = False) -> Failure:
    """An error in words.

    Args:
        error: what was raised.
        started: whether the operation had been claimed: then a bad input is a failed run.
    """
    notes = [note for note in getattr(error, "__notes__", []) if not note.startswith("go on with:")]
    if isinstance(error, KtrdrError) and not (started and isinstance(error, StrategyError)):
        hint = next((text for kind, text in _HINTS.items() if isinstance(error, kind)), error.hint)
        message = "; ".join([error.message, *notes])
        if isinstance(error, OperationError):
            hint = hint.replace("ID", error.operation_id) if " ID" in hint else hint
        bad = isinstance(error, InputError) and not started
        details = "" if isinstance(error, InputError) else _frames(error)
        return Failure(error.code, message, hint, details, BAD_INPUT if bad else FAILED)
    if isinstance(error, TimeoutError) and not started:
        return Failure(
            "timeout", f"no answer in time{f': {error}' if str(error) else ''}", "try again, or look at the database"
        )
    named = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    details = _frames(error)
    hint = error.hint if isinstance(error, KtrdrError) else ""
    if details or started:
        code = error.code if isinstance(error, KtrdrError) else StrategyError.code
        return Failure(code, "; ".join([named, *notes]), hint, details)
    if os.environ.get(TRACEBACK_VARIABLE):
        details = "".join(traceback.format_exception(error))
    return Failure(
        "unexpected", f"unexpected {named}", f"with {TRACEBACK_VARIABLE}=1 it says where it comes from", details
    )


def _frames(error: BaseException) -> str:
    """The traceback of the frames that a strategy adds to ours, or empty."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = (i for i in range(1, len(frames)) if _calls_strategies(frames[i - 1]) and not _is_ours(frames[i]))
    first = next(inside, None)
    if first is None:
        return ""
    theirs = [frame for frame in frames[first:] if not _is_ours(frame) and not _is_runtime(frame)]
    lines = ["Traceback of the strategy (most recent call last):\n", *traceback.StackSummary.from_list(theirs).format()]
    return "".join(lines) if theirs else ""


def _calls_strategies(frame: traceback.FrameSummary) -> bool:
    """Whether it is of the code that calls what a user wrote."""
    path = os.path.abspath(frame.filename)
    return path.startswith((_PACKAGE + "backtesting" + os.sep, _PACKAGE + "strategies" + os.sep))


def _is_ours(frame: traceback.FrameSummary) -> bool:
    return os.path.abspath(frame.filename).startswith(_PACKAGE)


def _is_runtime(frame: traceback.FrameSummary) -> bool:
    """Whether it is of what carries us: the loop, threads, anyio, the driver; no part of a strategy's story."""
    name = frame.filename.replace(os.sep, "/")
    return name.startswith("<frozen") or any(
        part in name
        for part in ("/asyncio/", "/site-packages/anyio/", "/site-packages/asyncpg/", "/concurrent/futures/")
    )


def resumable(operation_id: str, *, dsn: str | None, allow: tuple[str, ...], roots: tuple[str, ...]) -> tuple[str, str]:
    """The command that resumes an operation, and a remark on it where its DSN was shown without credentials."""
    import shlex

    words = ["ktrdr-async", "resume", operation_id]
    for entry in allow:
        words += ["--allow", entry]
    for root in roots:
        words += ["--data-root", root]
    remark = ""
    if dsn:
        shown, cut = without_credentials(dsn)
        words += ["--database", shown]
        if cut:
            remark = (
                "the database is shown without user and password: set KTRDR_ASYNC_DATABASE to the whole DSN and leave "
                "--database out"
            )
    return shlex.join(words), remark


def without_credentials(dsn: str) -> tuple[str, bool]:
    """A DSN without user, password and what may hold one, and whether something was left out."""
    from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

    try:
        parts = urlsplit(dsn)
    except ValueError:
        return "postgresql://...", True
    host = parts.netloc.rpartition("@")[2]
    given = parse_qsl(parts.query)
    kept = [
        (key, value) for key, value in given if key in ("host", "port", "dbname", "database", "sslmode", "sslrootcert")
    ]
    shown = urlunsplit((parts.scheme, host, parts.path, urlencode(kept, safe="/,:"), ""))
    if not host and shown.startswith(f"{parts.scheme}:/") and not shown.startswith(f"{parts.scheme}://"):
        shown = shown.replace(":/", ":///", 1)
    return shown, host != parts.netloc or kept != given
