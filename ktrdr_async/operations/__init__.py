"""Operations: their life cycle and the service that keeps it in the database."""

from ktrdr_async.operations.lifecycle import (
    CHANNEL,
    ENDINGS,
    LEASE_SECONDS,
    TRANSITIONS,
    Answer,
    Beat,
    Claim,
    Operation,
    Owner,
    Parent,
    Status,
    is_alive,
)
from ktrdr_async.operations.service import OperationsService, validated_id

__all__ = [
    "CHANNEL",
    "ENDINGS",
    "LEASE_SECONDS",
    "TRANSITIONS",
    "Answer",
    "Beat",
    "Claim",
    "Operation",
    "OperationsService",
    "Owner",
    "Parent",
    "Status",
    "is_alive",
    "validated_id",
]
