"""The uninterrupted run that all others are compared with: its state after each bar, on disk while it is needed."""

from __future__ import annotations

import tempfile
from array import array
from typing import IO, TYPE_CHECKING

import msgspec

from ktrdr_async.verification.compare import (
    Parting,
    broken,
    differing_ending,
    differing_rows,
    differing_state,
)
from ktrdr_async.verification.legs import Leg, Ran, Snapshot

if TYPE_CHECKING:
    from ktrdr_async.strategies.base import AnyStrategy

_encoder, _decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Snapshot)


class Reference:
    """States by bar. Digests are in memory, the states that they are of in a file without a name."""

    def __init__(self, directory: str, strategy: AnyStrategy, symbols: tuple[str, ...]) -> None:
        self.digests: list[str] = []  # of the state at bar i
        self.ran = Ran(columns={})
        self._symbols = symbols
        self._state_type = None if strategy.state is None else type(strategy.state)
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - closed by `close`
        self._starts = array("Q", [0])

    def close(self) -> None:
        """Gives the file up."""
        self._file.close()

    def take(self, snapshot: Snapshot) -> bool:
        """Takes the next bar's state; never stops the run."""
        data = _encoder.encode(snapshot)
        self._file.write(data)
        self._starts.append(self._starts[-1] + len(data))
        self.digests.append(snapshot.digest)
        return False

    def at(self, bar: int) -> Snapshot:
        """The state at a bar."""
        self._file.seek(self._starts[bar])
        return _decoder.decode(self._file.read(self._starts[bar + 1] - self._starts[bar]))

    def compare(self, leg: Leg, ran: Ran, parted: Snapshot | None, *, upto: int | None = None) -> Parting | None:
        """Where a leg parts from this run; None where it doesn't.

        Args:
            leg: what was run.
            ran: how it ended.
            parted: the first boundary at which its state's digest wasn't this run's.
            upto: the last bar that counts; None: all, and the ending.
        """
        bars = len(self.digests)
        if ran.columns or not (ran.error or ran.struck):
            rows = differing_rows(self.ran.columns, ran.columns, self._symbols, bars - 1 if upto is None else upto)
            if rows is not None:
                return rows
        if parted is not None:
            restored = leg.state is not None and parted.bar == leg.state.bar_index
            found = differing_state(
                self.at(parted.bar), parted, self._symbols, self._state_type, grown=leg.block_bars == 1 and not restored
            )
            exact = restored or leg.block_bars == 1 or parted.bar == 0
            return msgspec.structs.replace(found, exact=exact)
        if ran.error:
            return broken(ran, -1 if leg.state is None else leg.state.bar_index)
        if upto is None and ran.ending is not None and self.ran.ending is not None:
            return differing_ending(self.ran.ending, ran.ending, bars)
        return None


class Watch:
    """Stops a leg at the first boundary at which its state isn't the reference's."""

    def __init__(self, reference: Reference) -> None:
        self.parted: Snapshot | None = None
        self._reference = reference

    def __call__(self, snapshot: Snapshot) -> bool:
        """Whether to stop here."""
        if snapshot.digest == self._reference.digests[snapshot.bar]:
            return False
        self.parted = snapshot
        return True
