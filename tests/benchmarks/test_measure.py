"""Turns: every process has as many, in an order that changes, and one that fails is a fault."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.measure import processes_take_turns, run


def test_processes_take_turns(tmp_path: Path) -> None:
    log = tmp_path / "log"
    reply = json.dumps({"samples": {"": {"decode": [1.0]}}})
    program = "import sys; open(sys.argv[1], 'a').write(sys.argv[2]); print(sys.argv[3])"
    commands = {name: [sys.executable, "-c", program, str(log), name, reply] for name in "ab"}
    fails = "raise ValueError('no such model')"
    replies = processes_take_turns({**commands, "c": [sys.executable, "-c", fails]}, rounds=6)
    assert list(replies) == ["a", "b", "c"]
    assert replies["a"]["samples"] == replies["b"]["samples"] == {"": {"decode": [1.0] * 6}}
    assert replies["c"] == {"fault": "ValueError: no such model"}
    rounds = [log.read_text()[turn : turn + 2] for turn in range(0, 12, 2)]
    assert set(rounds) == {"ab", "ba"}


def test_a_command_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"exited with 3: the disk is full$"):
        run([sys.executable, "-c", "import sys; print('the disk is full', file=sys.stderr); sys.exit(3)"])
