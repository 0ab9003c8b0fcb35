"""What a device pays: no PyTorch, few modules before they are needed, and no growth from question to question."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

HEAVY = ("torch", "transformers", "onnx", "onnxscript", "safetensors", "huggingface_hub", "resprune.exporter")
ASK = """
from resprune.runtime.cli import main
assert main(["ask", {bundle!r}, {photo!r}, "what colour is the square?", "--max-new-tokens", "5"]) == 0
"""
LOOP = """
import gc, psutil
from resprune import Pipeline

vlm, process, seen = Pipeline.load({bundle!r}), psutil.Process(), []
view = vlm.look({photo!r})
questions = ["what colour is the square?", "is there a cat?", "how many red circles are there on the table?"]
for number in range(360):
    about = view if number % 2 else vlm
    extra = [] if number % 2 else [{photo!r}]
    about.ask(*extra, questions[number % 3], max_new_tokens=3 + number % 4, stream=False)
    if number in (119, 359):
        gc.collect()
        seen.append((process.memory_info().rss, len(gc.get_objects())))
result = {{"bytes": seen[1][0] - seen[0][0], "objects": seen[1][1] - seen[0][1]}}
"""


@pytest.fixture
def places(tiny_bundle: Callable[..., Path], tmp_path: Path) -> dict[str, str]:
    photo = tmp_path / "photo.png"
    Image.linear_gradient("L").convert("RGB").save(photo)
    return {"bundle": str(tiny_bundle("clip-llama", k=7, split=True)), "photo": str(photo)}


def child(program: str) -> Any:
    """`result` of a program that runs in a process of its own."""
    program += "\nimport json, sys\nprint()\nprint(json.dumps(result))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_whole_answer_loads_no_pytorch(places: dict[str, str]) -> None:
    modules = child(ASK.format(**places) + "\nimport sys\nresult = sorted(sys.modules)")
    assert "onnxruntime" in modules
    assert "tokenizers" in modules
    loaded = [name for name in HEAVY if name in modules]
    # the command finds `resprune export` through its entry point only when that is what it is asked for
    assert loaded == []


def test_an_answer_takes_less_than_250_megabytes(places: dict[str, str]) -> None:
    resident = child(ASK.format(**places) + "\nimport psutil\nresult = psutil.Process().memory_info().rss")
    assert resident < 250e6


def test_the_package_and_inspect_load_next_to_nothing(places: dict[str, str]) -> None:
    program = (
        "import resprune.runtime\nfrom resprune.runtime.cli import main\n"
        f"assert main(['inspect', {places['bundle']!r}]) == 0\nimport sys\nresult = sorted(sys.modules)"
    )
    modules = child(program)
    assert not {"numpy", "onnxruntime", "PIL", "tokenizers", "jinja2", "HanTa"} & set(modules)


def test_questions_leave_nothing_behind(places: dict[str, str]) -> None:
    grown = child(LOOP.format(**places))
    assert grown["bytes"] < 3e6, grown
    assert grown["objects"] < 200, grown
