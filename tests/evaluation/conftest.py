"""Questions about a few made-up pictures, as a user writes them down."""

import gc
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

QUESTIONS = (
    ("what colour is the square on the table?", "red", "color"),
    ("how many red circles are there?", "two", "count"),
    ("is there a cat?", "yes", ""),
)


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> None:
    """lmms-eval looks for garbage after every run, among all that a process of many tests holds."""
    gc.freeze()


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSON Lines with three questions about each of three pictures, picture after picture in turn."""
    folder = tmp_path_factory.mktemp("questions")
    rows = []
    for seed in range(3):
        blocks = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(np.repeat(np.repeat(blocks, 8, axis=0), 8, axis=1)).save(folder / f"{seed}.png")
    for text, answer, kind in QUESTIONS:
        rows += [
            {"image": f"{seed}.png", "question": text, "answer": answer} | ({"type": kind} if kind else {})
            for seed in range(3)
        ]
    path = folder / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def bundle(tiny_bundle) -> Path:
    """A bundle whose selection takes every K up to its 16 tokens."""
    return tiny_bundle("clip-llama", k=16, split=True)
