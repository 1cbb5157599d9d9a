"""Command lines of any kind, in process: exit 0, or exit 1 or 2 with one message, and nothing changed."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import asyncpg
import pytest
from campaigns import Figures, sized
from fuzzing import NUMBERS, STRINGS, bounded, near

from ktrdr_async.cli import main
from ktrdr_async.cli.output import wants_json
from ktrdr_async.storage.embedded import EmbeddedServer

SECRET = "Geheim77"
WHOLE = re.compile(rf"[^\s]*[a-z]://\w+:{SECRET}@\S*")  # where it can be told that it is one
DATA = ("--data", "synthetic:?bars=60&seed=1")
RUN = ("run", *DATA, "--strategy", "sma_cross", "--param", "fast=3", "slow=9", "--quiet")
COMMANDS: tuple[tuple[str, ...], ...] = (
    (*RUN, "--no-database"), (*RUN, "--no-database", "--json"), (*RUN, "--id", "one", "--json"), (*RUN, "--id", "two"),
    ("run", "--data", "bars.csv", "--strategy", "buy_and_hold", "--no-database", "--capital", "5000", "--json"),
    ("resume", "one", "--json"), ("resume", "--last", "--quiet"), ("list", "--json"), ("list", "--status", "completed"),
    ("show", "one"), ("show", "one", "--json"), ("cancel", "one", "--json"), ("export", "one", "-o", "out"),
    ("checkpoints", "list"), ("checkpoints", "show", "one"), ("checkpoints", "delete", "one", "--yes"),
    ("checkpoints", "clean", "--older-than-days", "30", "--dry-run"), ("strategies",), ("strategies", "--json"),
    ("extend", "one", "--data", "synthetic:?bars=70&seed=1"), ("fork", "one", "--commission", "0.002"), ("--version",),
    ("verify", *DATA, "--strategy", "none_of_these"), ("demo", "--no-such-option"), ("--help",), (), ("run", "--help"),
    ("list", "--database", f"postgresql://me:{SECRET}@127.0.0.1:1/x"), ("list", f"--bogus=postgresql://me:{SECRET}@h/x"),
    ("show", "one", "--database", f"mysql://me:{SECRET}@h/x", "--json"),
)  # fmt: skip
OPTIONS = (
    "--symbol", "--start", "--end", "--timeframe", "--tz", "--timestamps", "--date-format", "--feature", "--param",
    "--capital", "--commission", "--slippage", "--lot", "--min-trade", "--seed", "--id", "--allow", "--data-root",
    "--checkpoint-bars", "--checkpoint-seconds", "--progress-seconds", "--limit", "--older-than-days", "--strategy",
    "--data", "--accept-mismatch", "--take-over", "--keep-state", "--json", "--json=true", "--quiet", "--help", "--",
    "-x", "--no-force-close", "--force-close", "--output", "--database",
)  # fmt: skip
VALUES = (*(text.replace("\0", "").replace("\ud800", "\udc80")[:5_000] for text in STRINGS), *map(repr, NUMBERS[:-6]))


def command_line(rng: Random) -> list[str]:
    """A command line with some of its words changed, and none that computes for long."""
    tokens = list(rng.choice(COMMANDS))
    for _ in range(rng.choice((0, 1, 1, 1, 2, 4))):
        at = rng.randrange(len(tokens) + 1)
        kind = rng.randrange(6)
        if kind == 0:
            del tokens[at : at + 1]
        elif kind == 1 and at < len(tokens):
            tokens[at] = rng.choice(VALUES)
        elif kind == 2 and at < len(tokens):
            tokens[at] = near(rng, tokens[at])
        elif kind == 3:
            tokens[at:at] = tokens[at : at + 1]
        elif kind == 4:
            tokens[at:at] = [rng.choice(OPTIONS), *rng.choices(VALUES, k=rng.choice((0, 1, 1)))]
        else:
            rng.shuffle(tokens)
    if tokens and tokens[0] in ("demo", "verify"):
        tokens += ["--no-such-option"]
    return tokens


@contextmanager
def process() -> Iterator[tuple[int, int]]:
    """Descriptors that catch both streams; what the command set for its process is set back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    root, streams, path = logging.getLogger(), (sys.stdout, sys.stderr), list(sys.path)
    loggers, level = list(root.handlers), logging.getLogger("asyncio").level
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        kept = [os.dup(1), os.dup(2)]
        try:
            for file, number in ((out, 1), (err, 2)):
                os.dup2(file.fileno(), number)
            with open(1, "w", encoding="utf-8", closefd=False) as one, open(2, "w", closefd=False) as two:
                sys.stdout, sys.stderr = one, two
                yield out.fileno(), err.fileno()
        finally:
            sys.stdout, sys.stderr = streams
            for number, own in zip((1, 2), kept, strict=True):
                os.dup2(own, number)
                os.close(own)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            root.handlers[:], sys.path[:] = loggers, path
            logging.getLogger("asyncio").setLevel(level)


def ran(tokens: list[str]) -> tuple[int, str, str]:
    """Exit code and both streams."""
    with process() as streams:
        try:
            with bounded():
                code = main(tokens)
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
        return code, *(os.pread(stream, 10_000_000, 0).decode("utf-8", "replace") for stream in streams)


CONTENT = "SELECT md5(string_agg(o::text, '|' ORDER BY operation_id)) FROM ktrdr.operations o"


@sized("trials", ci=40, whole=6_000, minutes=30)
def test_any_command_line_ends_in_order(
    trials: int,
    campaign_seed: int,
    figures: Figures,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    embedded_server: EmbeddedServer,
) -> None:
    place = tmp_path / "some" / "where" / "deep"  # `..` stays inside
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    (place / "bars.csv").write_text("time,open,high,low,close\n2020-01-01,1,2,1,2\n2020-01-02,2,2,1,1\n")
    codes: Counter[int] = Counter()
    where = embedded_server.arguments
    with asyncio.Runner() as runner:
        assert ran([*RUN, "--id", "one", "--keep-state"])[0] == 0
        connection = runner.run(
            asyncpg.connect(host=where.host, port=where.port, user=where.user, database=where.database, ssl=False)
        )
        content = runner.run(connection.fetchval(CONTENT))
        files = sorted(tmp_path.rglob("*"))
        for number in range(trials):
            tokens = command_line(Random(f"commands {campaign_seed} {number}"))
            try:
                code, out, err = ran(tokens)
                codes[code] += 1
                in_order(tokens, code, out, err)
                now, found = runner.run(connection.fetchval(CONTENT)), sorted(tmp_path.rglob("*"))
                assert code == 0 or (now, found) == (content, files), f"exit {code}, and something changed"
            except BaseException as failure:
                failure.add_note(f"input {number}: {tokens!r:.1500}")
                raise
            content, files = now, found
        runner.run(connection.close())
    assert min(codes[0], codes[2]) > trials // 10, codes
    counted = ", ".join(f"exit {code} {count:,}" for code, count in sorted(codes.items()))
    figures.add("command lines", f"{trials:,} ({counted}): no traceback, no change by a refused one")


def in_order(tokens: list[str], code: int, out: str, err: str) -> None:
    assert code in (0, 1, 2), f"exit {code}"
    assert "Traceback" not in out + err, err
    assert "unexpected" not in err, err
    if all(WHOLE.fullmatch(token) for token in tokens if SECRET in token):
        assert SECRET not in out + err
    assert err.count("\nerror: ") + err.startswith("error: ") == (code != 0), err
    assert len(err) < 25_000, "an endless message"
    if wants_json(tokens) and "context" not in out and "--help" not in tokens and "--version" not in tokens:
        found = json.loads(out)
        assert out.count("\n") == 1
        assert code == 0 or found["error"]["code"] != "unexpected"
