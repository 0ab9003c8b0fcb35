"""Hundreds of hostile inputs, each with the same promises; thousands by `make fuzz`."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hostile.case import World
from tests.hostile.fuzz import fuzz, report, write_photo
from tests.hostile.worker import SHARES

COUNT, SEED = 500, 20260321


@pytest.fixture
def world(tiny_bundle: Callable[..., Path], tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> World:
    options = {"clip-llama": {"k": 7, "split": True}, "next-llama": {"k": 7}, "qwen25": {"share": 0.4}}
    bundles = {name: tiny_bundle(name, **chosen) for name, chosen in options.items()}
    checkpoints = {name: tiny_checkpoint(name) for name in options}
    return World(bundles, checkpoints, write_photo(tmp_path / "photo.png"))


def test_hostile_inputs_keep_every_promise(world: World) -> None:
    start = time.monotonic()
    results = fuzz(world, SEED, range(COUNT), [*SHARES])
    said = report(results, time.monotonic() - start)
    print(said)
    assert len(results) == COUNT
    assert [result for result in results if result.wrong] == [], said
    for kind in SHARES:  # both are tried: what is accepted, and what is refused
        assert {0, 2} <= {result.status for result in results if result.kind == kind}, said


FAKES = """
import json, sys, tempfile
from pathlib import Path
from resprune.runtime import cli
from tests.hostile.case import Case, World
from tests.hostile.worker import Watch, run

def traceback(words): raise KeyError("x")
def chatter(words): print("a\\\\nresprune: b", file=sys.stderr); return 2
def silent(words): return 2
def noisy(words): print("warning", file=sys.stderr); return 0
def colours(words): print("\\\\x1b[2J"); return 0
def status(words): return 77
def wrong(words): print("other"); return 0
def reads(words): Path(tempfile.gettempdir(), "elsewhere").exists(); open("/root/elsewhere"); return 0
def writes(words): Path(tempfile.gettempdir(), "hostile-elsewhere").write_text("x"); print("same"); return 0
def connects(words):
    import socket
    socket.socket().connect(("192.0.2.1", 9))
def starts(words):
    import subprocess
    subprocess.run(["true"]); print("same"); return 0
def large(words): list(range(40_000_000)); print("same"); return 0
def good(words): print("same"); return 0

watch = Watch(World({}, {}, Path("photo.png")))
found = {}
for fake in (traceback, chatter, silent, noisy, colours, status, wrong, reads, writes, connects, starts, large, good):
    cli.main = fake
    folder = Path(tempfile.mkdtemp())
    found[fake.__name__] = run(Case("option", "", [], lambda: "same\\\\n"), 0, watch, folder).wrong
refused = Case("option", "", [], refused=True)
found["accepted"] = run(refused, 0, watch, folder).wrong
print(json.dumps(found))
"""


def test_a_broken_promise_is_found() -> None:
    program = FAKES.replace("\\\\n", "\\n").replace("\\\\x", "\\x")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("good") == []
    says = {
        "traceback": "a traceback",
        "chatter": "2 lines on stderr",
        "silent": "status 2 without a line",
        "noisy": "something on stderr",
        "colours": "control characters",
        "status": "status 77",
        "wrong": "the output should be",
        "reads": "'/root/elsewhere' read",
        "writes": "hostile-elsewhere' written",
        "connects": "connected to",
        "starts": "subprocess.Popen",
        "large": "MB more than at its start",
        "accepted": "it was accepted",
    }
    for fake, words in says.items():
        assert any(words in broken for broken in found.pop(fake)), fake
    assert found == {}
