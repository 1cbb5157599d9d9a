"""Every error that the package raises by itself: a small tree whose members carry their values as attributes.

A message says what is wrong, where, with the values, and what to do. `code` is stable and meant for programs, `hint` is
the sentence that tells a person what to do.
"""

from __future__ import annotations

LONGEST = 10_000  # characters of a message or hint, whatever was handed over


class KtrdrError(Exception):
    """Root of the tree. `code` names the kind of error, `hint` says what to do about it."""

    code = "error"

    def __init__(self, message: str, *, hint: str = "") -> None:
        message, hint = (text if len(text) <= LONGEST else text[:LONGEST] + " ..." for text in (message, hint))
        super().__init__(message)
        self.message = message
        self.hint = hint


class InputError(KtrdrError):
    """What the user handed over can't be used; nothing was started. The command line exits with 2."""

    code = "bad_input"


class DataError(InputError):
    """Market data break a rule: `where` names file, row, column and value as far as they are known."""

    code = "bad_data"

    def __init__(self, message: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(f"{where}: {message}" if where else message, hint=hint)
        self.where = where


class ParameterError(InputError):
    """A parameter of a strategy or a request is missing, unknown, of the wrong type or out of its range."""

    code = "bad_parameter"


class UnknownStrategyError(InputError):
    """No strategy has this name."""

    code = "unknown_strategy"


class CodeNotAllowedError(InputError):
    """A name that was read from a database asks for code that no allow-list names."""

    code = "code_not_allowed"


class DataNotAllowedError(InputError):
    """A data reference that was read from a database lies outside the permitted roots."""

    code = "data_not_allowed"


class StrategyError(KtrdrError):
    """A strategy broke a rule or raised; `bar_index` and `timestamp` say where."""

    code = "strategy_error"

    def __init__(self, message: str, *, bar_index: int = -1, timestamp: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.bar_index = bar_index
        self.timestamp = timestamp


class UndeclaredStateError(StrategyError):
    """A strategy keeps something that changes outside `state`, where no checkpoint would see it."""

    code = "undeclared_state"


class OrderError(StrategyError):
    """A decision breaks a rule of the market: an unknown symbol, a weight out of range."""

    code = "bad_order"


class OperationError(KtrdrError):
    """Something about one operation; `operation_id` names it."""

    code = "operation_error"

    def __init__(self, operation_id: str, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.operation_id = operation_id


class OperationNotFoundError(OperationError, InputError):
    """No operation has this id."""

    code = "not_found"


class OperationConflictError(OperationError, InputError):
    """The id belongs to an operation with another request."""

    code = "operation_conflict"


class AlreadyClaimedError(OperationError):
    """The operation is running under an owner that is alive, or another claim came first."""

    code = "already_claimed"


class InvalidTransitionError(OperationError):
    """The operation's status doesn't permit what was asked."""

    code = "invalid_transition"


class OwnershipLostError(OperationError):
    """A newer owner holds the operation: nothing was written, and this run ends."""

    code = "ownership_lost"


class CancellationError(OperationError):
    """The operation was cancelled through the mailbox or from another process; its checkpoint is durable."""

    code = "cancelled"


class OperationFailedError(OperationError):
    """The operation ended with an error in another process or task; the message is that error's."""

    code = "operation_failed"


class CheckpointError(OperationError):
    """Something about an operation's checkpoint."""

    code = "checkpoint_error"


class CheckpointConflictError(CheckpointError):
    """The stored checkpoint isn't the one that this owner last saw: never overwritten, never ignored."""

    code = "checkpoint_conflict"


class CheckpointCorruptedError(CheckpointError):
    """A stored checkpoint fails its digest, its continuity or its types; the message says which."""

    code = "checkpoint_corrupted"


class CheckpointMismatchError(CheckpointError):
    """The checkpoint was made from other data, code or numbers: `differences` maps a field to (stored, found)."""

    code = "checkpoint_mismatch"

    def __init__(
        self, operation_id: str, message: str, *, differences: dict[str, tuple[str, str]], hint: str = ""
    ) -> None:
        super().__init__(operation_id, message, hint=hint)
        self.differences = differences


class CheckpointTooLargeError(CheckpointError):
    """A state is larger than PostgreSQL or the bounds of decoding allow; the message gives the size."""

    code = "checkpoint_too_large"


class SaveTimeoutError(CheckpointError):
    """A save wasn't acknowledged within its deadline; whether it is durable is resolved before the next one."""

    code = "save_timeout"


class DatabaseError(KtrdrError):
    """The database can't be reached or used; the message names it without credentials."""

    code = "database_error"


class SchemaVersionError(DatabaseError):
    """The database was migrated by newer code than this, or needs a migration that wasn't permitted."""

    code = "schema_version"


class EmbeddedServerError(DatabaseError):
    """The embedded PostgreSQL can't be started where it was asked to be; the message says why and what to do."""

    code = "embedded_server"
