"""The digest of a prefix of the bars: what a resume compares to prove that it reads the same past."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

_FORMAT = "ktrdr-bars-1"
_PIECE = 16_384  # rows that are laid out at a time, so that hashing needs little memory


class PrefixHash:
    """Hashes rows in canonical bytes: little-endian, row after row, so that a prefix of the rows is one of the bytes.

    A running hash is kept for every position that was asked for last and at every piece, so a growing `upto` costs the
    new rows alone. It changes nothing that the caller sees, and may be used from several threads.

    Args:
        timestamps: int64[n].
        columns: float64[n] or float64[n, k] each, in the order in which a row's values are hashed.
        header: what else the digest covers.
    """

    def __init__(
        self,
        timestamps: NDArray[np.int64],
        columns: Sequence[NDArray[np.float64]],
        header: Mapping[str, object],
    ) -> None:
        self._timestamps = timestamps
        self._columns = columns
        self._width = 1 + sum(1 if column.ndim == 1 else column.shape[1] for column in columns)
        start = hashlib.sha256(msgspec.json.encode([_FORMAT, header]) + b"\n")
        self._known = [(0, start)]  # (rows hashed, hash), ascending
        self._latest = (0, start)
        self._lock = threading.Lock()

    def hexdigest(self, rows: int) -> str:
        """Returns the SHA-256 of the header and the first `rows` rows."""
        with self._lock:
            done, running = self._latest
            if rows < done:
                done, running = next(known for known in reversed(self._known) if known[0] <= rows)
            if done < rows:
                running = running.copy()
            while done < rows:
                end = min(rows, done - done % _PIECE + _PIECE)
                running.update(self._bytes(done, end))
                done = end
                if done % _PIECE == 0 and done > self._known[-1][0]:
                    self._known.append((done, running.copy()))
            if done > self._latest[0]:
                self._latest = (done, running)
            return running.hexdigest()

    def _bytes(self, start: int, end: int) -> memoryview:
        rows = np.empty((end - start, self._width), dtype="<f8")
        rows[:, 0].view("<i8")[:] = self._timestamps[start:end]
        at = 1
        for column in self._columns:
            piece = column[start:end]
            width = 1 if piece.ndim == 1 else piece.shape[1]
            rows[:, at : at + width] = piece.reshape(end - start, width)
            at += width
        return rows.data.cast("B")
