"""examples/transformers-js: transformers.js answers from a pruned bundle as Python does."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from resprune import Pipeline
from tests.hosts.demo import PICTURES, QUESTIONS, copy_of
from tests.hosts.npm import EXAMPLES, install, node


@pytest.fixture(scope="module")
def ask() -> Path:
    return install(EXAMPLES / "transformers-js") / "ask.mjs"


@pytest.fixture(scope="module")
def bundle(exported: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As docs/node.md says: the selecting vision graph under the name that transformers.js opens."""
    copy = copy_of(exported(k=16, positions="contiguous"), tmp_path_factory.mktemp("js") / "demo-k16")
    shutil.copy(copy / "onnx" / "vision_select.onnx", copy / "onnx" / "vision_encoder.onnx")
    return copy


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("example", QUESTIONS, ids=lambda example: example["image"])
def test_demo_images(ask: Path, bundle: Path, example: dict[str, str], guided: bool) -> None:
    image, question = PICTURES / example["image"], example["question"]
    with Pipeline.load(bundle) as pipeline:
        nouns = pipeline.ask(image, question, stream=False).prompt.nouns if guided else []
        answer = pipeline.ask(image, question, about=nouns, stream=False)
    done = node(ask, bundle, image, question, ",".join(nouns))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{answer.text}\n" != "\n"


def test_original_positions_are_refused(ask: Path, exported: Callable[..., Path]) -> None:
    done = node(ask, exported(k=16, positions="original"), PICTURES / "shapes.png", "What is it?")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--positions contiguous" in done.stderr
