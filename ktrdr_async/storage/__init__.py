"""Storage: the database that operations and checkpoints live in, embedded or the user's own."""

from ktrdr_async.storage.database import Database, Reserved, is_transient
from ktrdr_async.storage.embedded import ConnectArguments, EmbeddedServer

__all__ = ["ConnectArguments", "Database", "EmbeddedServer", "Reserved", "is_transient"]
