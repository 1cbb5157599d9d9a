"""The digest of a prefix of the bars: what a resume compares to prove that it reads the same past."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

_FORMAT = "ktrdr-bars-1"
_PIECE_BYTES = 262_144  # that are laid out at a time, and at most are hashed once more for a prefix of what was hashed


class PrefixHash:
    """Hashes rows in canonical bytes: little-endian, row after row, so that a prefix of the rows is one of the bytes.

    A running hash is kept at every piece, so any prefix of what was hashed before costs at most one piece. It changes
    nothing that the caller sees, and may be used from several threads.

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
        self._piece = max(1, _PIECE_BYTES // (8 * self._width))  # rows
        self._known = [hashlib.sha256(msgspec.json.encode([_FORMAT, header]) + b"\n")]  # after 0, 1, 2, ... pieces
        self._whole: str | None = None  # of all rows
        self._lock = threading.Lock()

    def hexdigest(self, rows: int) -> str:
        """Returns the SHA-256 of the header and the first `rows` rows."""
        with self._lock:
            whole, size = rows == len(self._timestamps), self._piece
            if whole and self._whole is not None:
                return self._whole
            for number in range(len(self._known), rows // size + 1):
                grown = self._known[-1].copy()
                grown.update(self._bytes((number - 1) * size, number * size))
                self._known.append(grown)
            rest = rows % size
            running = self._known[rows // size].copy()
            if rest:
                running.update(self._bytes(rows - rest, rows))
            found = running.hexdigest()
            self._whole = found if whole else self._whole
            return found

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
