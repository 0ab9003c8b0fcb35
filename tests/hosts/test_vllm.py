"""A real vLLM behind a bundle of the demo model: its answers are the bundle's, token for token."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from resprune.runtime.backends.servers import server
from resprune.runtime.pipeline import Pipeline
from tests.hosts.host import Running
from tests.hosts.vllm_host import published, vllm

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "demo" / "pictures"
ASKED = json.loads((PICTURES / "questions.json").read_text())
QUESTIONS = [
    "What color is the large square?",
    "How many circles are there?",
    "Is the small square at the top or at the bottom?",
    "What is the white number?",
]
PAIRS = [
    (PICTURES / case["image"], question) for case in ASKED for question in [case["question"], *QUESTIONS]
]


@pytest.fixture(scope="module")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    work = tmp_path_factory.mktemp("vllm")
    with vllm(published(ROOT / "demo" / "model", work / "demo"), work / "demo.log") as running:
        yield running


@pytest.fixture(scope="module")
def near(demo_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(demo_bundle, threads=1) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def far(demo_bundle: Path, demo_server: Running) -> Iterator[Pipeline]:
    with Pipeline.load(demo_bundle, threads=1, generator=server(demo_server.url)) as pipeline:
        yield pipeline


def test_every_answer_is_the_bundles(near: Pipeline, far: Pipeline) -> None:
    assert len(PAIRS) >= 24
    for picture, question in PAIRS:
        here, there = (pipeline.ask(picture, question, stream=False) for pipeline in (near, far))
        assert there.token_ids == here.token_ids, (picture.name, question)
        assert there.text == here.text
