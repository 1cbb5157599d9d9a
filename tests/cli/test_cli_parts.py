"""The parts that need no process: chart, secrets, references, printed commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ktrdr_async.cli.chart import EIGHTHS, chart, columns, sampled
from ktrdr_async.cli.failures import resumable, without_credentials
from ktrdr_async.cli.options import absolute, roots_of
from ktrdr_async.cli.output import Secrets, one_line, plain
from ktrdr_async.cli.progress import clock


def test_a_chart_keeps_first_rise_last_fall_and_both_ends() -> None:
    assert sampled(range(10), 5) == [1, 3, 5, 7, 9]
    assert sampled([3.0, 1.0], 5) == [3.0, 1.0]
    assert columns([0.0, 1.0, 2.0], width=3, height=1) == ["▁▄█"]
    assert columns([0.0, 2.0], width=2, height=2) == [" █", "▁█"]
    assert columns([5.0, 5.0], width=2, height=2) == ["  ", "██"]
    lines = chart([float(i) for i in range(1000)], width=40, height=4)
    assert len(lines) == 4
    assert all(len(line) == 40 for line in lines)
    assert lines[0].startswith("999 ")
    assert lines[-1].startswith("  0 ")
    assert chart([1e9, 2e9], width=20) == []
    assert not set("".join(chart([1.0, 2.0], width=20, encoding="ascii"))) & set(EIGHTHS[1:])


def test_secrets_are_hidden_and_nothing_else() -> None:
    secrets = Secrets(["--database", "postgresql://me:p%40ss-1@h/x", "host=h password='quoted 1' user=u"])
    for text in ("p%40ss-1", "p@ss-1", "postgresql://me:p%40ss-1@h/x", "password=other", "quoted 1"):
        hidden = secrets.hide(f"before {text} after")
        assert "ss-1" not in hidden
        assert "other" not in hidden
        assert "quoted" not in hidden
        assert hidden.startswith("before ")
    assert secrets.hide("postgresql://me:p%40ss-1@h/x is away") == "postgresql://h/x is away"
    assert secrets.hide("bar 1,299 of 3,000 in a@b") == "bar 1,299 of 3,000 in a@b"
    assert "p@ss1x" not in Secrets([]).hide("postgresql://me:p@ss1x@h/x")


@pytest.mark.parametrize(
    ("dsn", "shown", "cut"),
    [
        ("postgresql://db.example:5433/app", "postgresql://db.example:5433/app", False),
        ("postgresql://me:secret@db.example/app", "postgresql://db.example/app", True),
        ("postgresql://me@/app?host=/run/pg&port=5433", "postgresql:///app?host=/run/pg&port=5433", True),
        ("postgresql:///app?host=/run/pg&password=secret", "postgresql:///app?host=/run/pg", True),
    ],
)
def test_a_printed_dsn_has_no_credentials(dsn: str, shown: str, cut: bool) -> None:
    assert without_credentials(dsn) == (shown, cut)
    command, remark = resumable("x", dsn=dsn, allow=("m:C",), roots=("/a b",))
    assert command.startswith("ktrdr-async resume x --allow m:C --data-root '/a b' --database ")
    assert bool(remark) is cut
    assert "secret" not in command + remark


def test_references_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "A=1.csv").write_text("")
    for reference in ("synthetic:?bars=10&seed=1", "https://example.org/x.csv", "", str(tmp_path / "x.csv")):
        assert absolute(reference) == reference
    assert absolute("x.csv") == str(tmp_path / "x.csv")
    assert absolute("A=1.csv") == str(tmp_path / "A=1.csv")  # a file that is there is no list of symbols
    assert absolute("A=a.csv, B=d/b.csv".replace(" ", "")) == f"A={tmp_path}/a.csv,B={tmp_path}/d/b.csv"
    assert roots_of(f"A={tmp_path}/a.csv,B={tmp_path}/d/b.csv") == (str(tmp_path), f"{tmp_path}/d")
    assert roots_of("synthetic:?bars=10") == ()
    assert roots_of(str(tmp_path)) == (str(tmp_path),)


def test_json_is_one_line_without_nan() -> None:
    text = one_line({"a": float("nan"), "b": [float("inf"), 1.5, "x\ny"], "c": (1, None)})
    assert "\n" not in text
    assert json.loads(text) == {"a": None, "b": [None, 1.5, "x\ny"], "c": [1, None]}


def test_times_left() -> None:
    assert [clock(seconds) for seconds in (0.4, 75, 3_661)] == ["0:00", "1:15", "1:01:01"]


def test_control_characters_are_spelled_out() -> None:
    assert plain("a\x1b[31mb\x9bc\udcff\n\td") == "a\\x1b[31mb\\x9bc\\udcff\n\td"
    assert json.loads(one_line({"a": "x\udcff"})) == {"a": "x\\udcff"}
