"""What a run says of itself: a bar on a terminal, a line now and then in a log."""

import io
import sys

import pytest

from resprune.evaluation.progress import progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the test lets pass."""
    now = [0.0]
    monkeypatch.setattr("resprune.evaluation.progress.perf_counter", lambda: now[0])

    def sleep(seconds):
        now[0] += seconds

    return sleep


@pytest.mark.parametrize(
    ("seconds", "lines"),
    [
        (0.1, []),
        (3, [("400", "12"), ("800", "24")]),
        (40, [(f"{100 * n:,}", str(40 * n)) for n in range(1, 11)]),
    ],
)
def test_lines_come_with_the_tenths_but_not_many_at_once(clock, capsys, seconds, lines):
    with progress(1000, "scenes") as update:
        for _ in range(10):
            clock(seconds)
            update(100)
    wanted = "".join(f"scenes: {done} of 1,000 answers in {passed} s\n" for done, passed in lines)
    assert capsys.readouterr().err == wanted


def test_a_line_comes_each_minute(clock, capsys):
    with progress(1000, "scenes") as update:
        for _ in range(5):
            clock(30)
            update(1)
    assert capsys.readouterr().err == (
        "scenes: 2 of 1,000 answers in 60 s\nscenes: 4 of 1,000 answers in 120 s\n"
    )


def test_a_terminal_has_a_bar(clock, monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress(10, "scenes") as update:
        clock(99)
        update(5)
    assert "scenes:   0%|" in terminal.getvalue()
    assert "answers in" not in terminal.getvalue()
