"""Checkpoints: what they hold, when they are due, and the service that stores them."""

from ktrdr_async.checkpoint.policy import CheckpointPolicy
from ktrdr_async.checkpoint.position import LoadedLedger, Position, SaveReceipt
from ktrdr_async.checkpoint.service import CheckpointService

__all__ = ["CheckpointPolicy", "CheckpointService", "LoadedLedger", "Position", "SaveReceipt"]
