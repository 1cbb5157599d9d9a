"""Ends that couldn't be written when their runs ended: written as soon as the database answers again.

Else such an operation would stay `running` under an owner that is alive, and nobody else could go on with it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ktrdr_async.supervision.endings import SETTLED, End

if TYPE_CHECKING:
    from ktrdr_async.checkpoint.service import CheckpointService

logger = logging.getLogger("ktrdr_async.supervision")

PAY_SECONDS = 5.0


class Debts:
    """What this worker still has to write, by operation."""

    def __init__(self) -> None:
        self._owed: dict[str, tuple[CheckpointService, End]] = {}

    def __len__(self) -> int:
        return len(self._owed)

    def add(self, operation_id: str, checkpoints: CheckpointService, end: End) -> None:
        """Remembers an end; the service still holds the claim, and may have a write in doubt."""
        self._owed[operation_id] = (checkpoints, end)

    async def pay(self, seconds: float = PAY_SECONDS) -> None:
        """Writes what is owed, one after the other; the first one that fails ends the try. The checkpoints stand."""
        for operation_id in list(self._owed):
            if not await self.pay_one(operation_id, seconds):
                return

    async def pay_one(self, operation_id: str, seconds: float = PAY_SECONDS) -> bool:
        """Writes one operation's end, if it is owed; False where it couldn't be."""
        owed = self._owed.get(operation_id)
        if owed is None:
            return True
        checkpoints, end = owed
        try:
            await checkpoints.finish(end.status, state=None, error=end.error, deadline=seconds)
        except SETTLED as error:
            logger.info("%s: its end needs no writing any more: %s", operation_id, error)
        except Exception as error:
            logger.warning("%s: its end couldn't be written yet: %s: %s", operation_id, type(error).__name__, error)
            return False
        if self._owed.get(operation_id) is owed:
            del self._owed[operation_id]
        return True
