"""Bursts: every engine makes as many tokens after as many prompts, side by side, and one that fails is a fault."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import bursts, decode
from benchmarks.bursts import Engine, take_bursts

WORKER = """
import sys, time
from benchmarks.bursts import serve
name, seconds, log = sys.argv[1], float(sys.argv[2]), open(sys.argv[3], "ab", buffering=0)
def begin(length):
    log.write(f"{name}{length} ".encode())
    time.sleep(seconds * length)
    def step():
        log.write(name.encode())
        time.sleep(seconds)
    return step
serve({"engine": name}, begin)
"""


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bursts, "PAUSE_SECONDS", 0.0)


def worker(name: str, seconds: float, log: Path) -> Engine:
    return Engine([sys.executable, "-c", WORKER, name, str(seconds), str(log)])


def test_engines_take_turns(tmp_path: Path) -> None:
    log = tmp_path / "log"
    slow, fast = worker("s", 0.02, log), worker("f", 0.01, log)
    take_bursts([slow, fast], {"long": 9, "short": 4}, processes=2, prompts=3, bursts=4, tokens=2)
    for engine in (slow, fast):
        assert {case: len(rates) for case, rates in engine.rates.items()} == {"long": 6, "short": 6}
        assert {case: len(rates) for case, rates in engine.prefills.items()} == {"long": 6, "short": 6}
        assert engine.megabytes.keys() == {"long", "short"}
    assert slow.versions == {"engine": "s"}
    ratios = [one / other for one, other in zip(slow.rates["long"], fast.rates["long"], strict=True)]
    assert decode.figures(slow, fast)["long"]["of theirs"].median == pytest.approx(np.median(ratios))
    assert decode.figures(slow, fast)["long"]["prefill, of theirs"].median < 1
    assert "of theirs" not in decode.figures(fast, fast)["long"]
    process = re.split("s4 f4 |f4 s4 ", log.read_text())[1]
    warm_up, *prompts = re.split("s9 f9 |f9 s9 ", process)
    assert sorted(warm_up) == sorted("ssff"), "one burst"
    pairs = prompts[0].replace("ss", "s").replace("ff", "f")
    assert len(prompts) == 3
    assert sorted(pairs) == sorted("sf" * 4)
    assert "sf" in log.read_text().replace("ss", "s").replace("ff", "f")
    assert "fs" in log.read_text().replace("ss", "s").replace("ff", "f")


def test_an_engine_that_fails_is_a_fault(tmp_path: Path) -> None:
    log = tmp_path / "log"
    good, absent = worker("g", 0.0, log), Engine([sys.executable, "-c", "import no_such_module"])
    dies = Engine(
        [sys.executable, "-c", WORKER.replace("time.sleep(seconds)", "sys.exit(3)"), "d", "0", str(log)]
    )
    take_bursts([good, absent, dies], {"all": 4}, processes=2, prompts=2, bursts=1, tokens=1)
    assert len(good.rates["all"]) == 4
    assert absent.fault == "ModuleNotFoundError: No module named 'no_such_module'"
    assert dies.fault == "exit status 3"
    assert decode.figures(dies, good) == {"fault": "exit status 3"}
    assert "of theirs" not in decode.figures(good, absent)["all"]
    assert log.read_text().count("d") == 2, "a prompt and a token of its first process"
