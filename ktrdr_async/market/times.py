"""Times as files write them: ISO 8601, epochs in any unit, a format that the user names, with and without a zone.

Nothing is guessed that could be read in two ways: 01/02/2017 needs a format, a doubled hour needs UTC or offsets.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

import numpy as np

from ktrdr_async.errors import DataError
from ktrdr_async.market.validation import Floats, Integers, Source

EPOCH_UNITS = {"s": 1_000_000_000, "ms": 1_000_000, "us": 1_000, "ns": 1}

_NUMBER = re.compile(r"-?\d+(\.\d+)?([eE]\+?\d+)?", re.ASCII)
_COMPACT_DATE = re.compile(r"(1[89]|2[01])\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])", re.ASCII)
# What numpy reads; of anything behind it numpy warns before it refuses.
_PLAIN = re.compile(r"\d{4}-\d\d-\d\d([T ]\d\d(:\d\d(:\d\d(\.\d{1,9})?)?)?)?", re.ASCII)
_ZONE = re.compile(r"\s*(?:Z|UTC|GMT|([+-])(\d\d):?(\d\d)?)$", re.ASCII)
_FIRST_YEAR, _YEAR_AFTER = "1678", "2262"  # what int64 ns can hold
_EARLIEST, _LATEST = -9_214_560_000 * 10**9, 9_214_646_400 * 10**9
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)  # noqa: UP017
_HINT = (
    "write ISO 8601 (2017-04-19 09:00) or an epoch, or name the format: date_format='%d.%m.%Y %H:%M' (--date-format)"
)


class TimeReader:
    """Reads a column of times, piece by piece; the first piece decides how they are written.

    Args:
        source: names the places of errors.
        column: the column's name.
        tz: zone of times that carry none; UTC where None.
        date_format: a format of `strptime`, the unit of an epoch (s, ms, us, ns), or None for ISO 8601 and epochs.

    Raises:
        DataError: if the zone or the format is none.
    """

    def __init__(self, source: Source, column: str, tz: str | None, date_format: str | None = None) -> None:
        self._source = source
        self._column = column
        self.zone = _zone(tz, source)
        self._format = date_format
        if date_format is not None and date_format not in EPOCH_UNITS and "%" not in date_format:
            raise source.error("date_format is a format such as '%d.%m.%Y %H:%M', or one of s, ms, us, ns")
        self._kind = "" if date_format is None else "epoch" if date_format in EPOCH_UNITS else "format"
        self._zoned = False
        self._pieces: list[Integers | Floats] = []
        self._rows = 0

    def feed(self, cells: Sequence[str]) -> None:
        """Reads the next rows' cells.

        Raises:
            DataError: if a cell is no time, or is written otherwise than the ones before.
        """
        if not cells:
            return
        if not self._kind:
            first = cells[0].strip()
            number = _NUMBER.fullmatch(first) and not _COMPACT_DATE.fullmatch(first)
            self._kind = "epoch" if number else "iso"
            self._zoned = self._kind == "iso" and _ZONE.search(first, 10) is not None
        reader = {"epoch": self._numbers, "iso": self._iso, "format": self._formatted}[self._kind]
        self._pieces.append(reader(cells))
        self._rows += len(cells)

    def feed_numbers(self, values: Integers | Floats) -> None:
        """Takes over an epoch that is numeric already; what has a format, such as 20170419 as %Y%m%d, is read by it."""
        if self._kind == "format":
            return self.feed([str(value) for value in values.tolist()])
        self._kind = "epoch"
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            at = int(np.argmax(~np.isfinite(values)))
            raise self._error("a time is missing", at, float(values[at]))
        self._pieces.append(values)
        self._rows += len(values)
        return None

    def finish(self) -> Integers:
        """Returns all times as int64 ns, UTC.

        Raises:
            DataError: if an epoch lies outside the years 1678 to 2261, or a local time comes twice or never.
        """
        if self._kind == "epoch":
            return self._epoch()
        times = np.concatenate(self._pieces).astype(np.int64, copy=False)
        return times if self._zoned or self.zone is None else localized(times, self.zone, self._source, self._column)

    def _numbers(self, cells: Sequence[str]) -> Integers | Floats:
        try:
            return np.array(list(map(int, cells)), dtype=np.int64)
        except (ValueError, OverflowError):
            pass
        for at, cell in enumerate(cells):
            if not _NUMBER.fullmatch(cell.strip()):
                raise self._error("every time must be a number, as the first one is", self._rows + at, cell)
        return np.array(list(map(float, cells)), dtype=np.float64)

    def _epoch(self) -> Integers:
        largest = max(max(abs(float(piece.max())), abs(float(piece.min()))) for piece in self._pieces)
        unit = self._format or (
            "s" if largest < 1e11 else "ms" if largest < 1e14 else "us" if largest < 1e17 else "ns"
        )  # fmt: skip
        factor = EPOCH_UNITS[unit]
        done = 0
        times = []
        for piece in self._pieces:
            outside = (piece < _EARLIEST // factor) | (piece >= _LATEST // factor)
            if outside.any():
                at = int(np.argmax(outside))
                raise self._error(f"an epoch in {unit} must lie in the years 1678 to 2261", done + at, piece[at].item())
            if piece.dtype.kind == "f":
                whole = np.floor(piece)
                part = np.rint((piece - whole) * factor)
                times.append(whole.astype(np.int64) * factor + part.astype(np.int64))
            else:
                times.append(piece.astype(np.int64, copy=False) * factor)
            done += len(piece)
        return np.concatenate(times)

    def _iso(self, cells: Sequence[str]) -> Integers:
        try:
            return self._iso_fast(cells)
        except ValueError:
            pass
        times = np.empty(len(cells), dtype=np.int64)
        for at, cell in enumerate(cells):
            try:
                times[at], zoned = _parsed(cell)
            except ValueError:
                missing = not cell.strip()
                rule = "a time is missing" if missing else "this can't be read as a time"
                raise self._error(rule, self._rows + at, cell, _HINT) from None
            if zoned != self._zoned:
                raise self._error("either every time has a zone or none has", self._rows + at, cell)
        return times

    def _iso_fast(self, cells: Sequence[str]) -> Integers:
        """Reads a piece whose cells are all of one plain kind at C speed; raises ValueError for others."""
        shift = 0
        if self._zoned:
            match = _ZONE.search(cells[0], 10)
            end = match[0] if match else ""
            if not match or not all(cell.endswith(end) for cell in cells):
                raise ValueError
            cells = [cell[: -len(end)] for cell in cells]
            shift = _offset(match)
        if cells[0][4:5] in ("/", "."):
            cells = [f"{cell[:4]}-{cell[5:7]}-{cell[8:]}" for cell in cells]
        # A permitted year, by the order of text: numpy would overflow silently.
        if not _alike(cells) or not (min(cells) >= _FIRST_YEAR and max(cells) < _YEAR_AFTER):
            raise ValueError
        return np.array(cells, dtype="datetime64[ns]").astype(np.int64) - shift

    def _formatted(self, cells: Sequence[str]) -> Integers:
        import pandas as pd

        form = self._format or ""
        self._zoned = "%z" in form or "%Z" in form
        try:
            index = pd.to_datetime(pd.Index(list(cells), dtype=object), format=form, errors="coerce", utc=self._zoned)
        except (ValueError, TypeError, KeyError, re.error) as error:
            raise self._source.error(f"the format {form[:80]!r} can't be used: {error}", column=self._column) from None
        missing = np.asarray(index.isna())
        if missing.any():
            at = int(np.argmax(missing))
            raise self._error(f"every time must be written as {form!r}", self._rows + at, cells[at])
        try:
            return nanoseconds(index)
        except ValueError:
            years = np.asarray(index.year)
            at = int(np.argmax((years < 1678) | (years > 2261)))
            raise self._error("a time must lie in the years 1678 to 2261", self._rows + at, cells[at]) from None

    def _error(self, rule: str, row: int, value: object, hint: str = "") -> DataError:
        return self._source.error(rule, row=row, column=self._column, value=value, hint=hint)


def nanoseconds(index: Any) -> Integers:
    """Gives a DatetimeIndex of any unit as int64 ns, in UTC where it has a zone, else as it stands.

    Raises:
        ValueError: if a time lies outside what int64 ns can hold.
    """
    return np.array(index.as_unit("ns").asi8, dtype=np.int64)


def localized(times: Integers, zone: Any, source: Source, column: str) -> Integers:
    """Turns local times (int64 ns, as if UTC) into UTC.

    Raises:
        DataError: if a time comes twice or never in the zone, because its clocks change.
    """
    import pandas as pd

    index = pd.DatetimeIndex(times.view("datetime64[ns]"))
    result = index.tz_localize(zone, ambiguous=np.zeros(len(times), dtype=bool), nonexistent="NaT")
    later = index.tz_localize(zone, ambiguous="NaT", nonexistent="NaT")
    bad = np.asarray(later.isna())
    if bad.any():
        at = int(np.argmax(bad))
        skipped = bool(result.isna()[at])
        why = "never came: its clocks went forward over it" if skipped else "came twice: its clocks went back"
        raise source.error(
            f"this time {why} (tz={str(zone)!r})",
            row=at,
            column=column,
            value=str(index[at]),
            hint="if the times aren't in this zone, give another `tz`; else export the data in UTC or with offsets "
            "such as +01:00",
        )
    return nanoseconds(later)


def _zone(tz: str | None, source: Source) -> Any:
    if tz is None or tz.upper() in ("UTC", "Z", "GMT"):
        return None
    from zoneinfo import ZoneInfo

    try:
        return ZoneInfo(tz)
    except (KeyError, ValueError, OSError):
        raise source.error(f"there is no time zone {tz!r}", hint="use a name such as Europe/Berlin or UTC") from None


def _alike(cells: Sequence[str]) -> bool:
    """Whether all cells have the plain shape of the first one; looked at column by column, at C speed."""
    first, count, text = cells[0], len(cells), "".join(cells)
    if not _PLAIN.fullmatch(first) or not text.isascii() or set(map(len, cells)) != {len(first)}:
        return False
    signs = [(at, sign) for at, sign in enumerate(first) if not sign.isdigit()]
    in_place = all(text[at :: len(first)].count(sign) == count for at, sign in signs)
    return in_place and len(text.encode().translate(None, b"0123456789")) == len(signs) * count


def _offset(match: re.Match[str]) -> int:
    if match[1] is None:
        return 0
    minutes = int(match[2]) * 60 + int(match[3] or 0)
    if minutes >= 24 * 60:
        raise ValueError
    return (minutes if match[1] == "+" else -minutes) * 60 * EPOCH_UNITS["s"]


def _parsed(cell: str) -> tuple[int, bool]:
    """Reads one ISO 8601 time of any kind; returns ns and whether it had a zone."""
    text = cell.strip()
    if text[4:5] in ("/", "."):
        text = f"{text[:4]}-{text[5:7]}-{text[8:]}"
    if not text.isascii() or not text[:4].isdigit() or not _FIRST_YEAR <= text < _YEAR_AFTER:
        raise ValueError
    match = _ZONE.search(text, 10)
    body = text[: match.start()] if match else text
    shift = _offset(match) if match else 0
    if "+" in body or "Z" in body or body.count("-") > 2:
        raise ValueError
    try:
        if not _PLAIN.fullmatch(body):  # numpy reads 20170419 as a year
            raise ValueError
        return int(np.datetime64(body, "ns").astype(np.int64)) - shift, match is not None
    except ValueError:
        moment = datetime.fromisoformat(body).replace(tzinfo=timezone.utc)  # noqa: UP017
        return (moment - _EPOCH) // timedelta(microseconds=1) * 1_000 - shift, match is not None
