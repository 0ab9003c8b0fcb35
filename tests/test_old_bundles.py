"""Bundles that commit d1bb50a exported still load, and answer as they answered there.

Each archive holds a bundle with random weights and `answers.json`: what `Pipeline.ask` of that commit gave. Where the
precision is narrow, these are of 96 answers those whose every token had the widest margin to the next likely one, so
that another processor's arithmetic does not decide between them.
"""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from resprune import Pipeline

ARCHIVES = sorted((Path(__file__).parent / "old_bundles").glob("*.zip"))
STEPS = 12


def picture(seed, size):
    """A picture [H, W, 3] of coloured squares of 8 pixels: the same on every machine."""
    height, width = size
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return np.repeat(np.repeat(blocks, 8, axis=0), 8, axis=1)


def test_the_archives_are_here():
    assert [path.stem for path in ARCHIVES] == [
        "llava-fused-q4",
        "llava-fused",
        "llava-next-unrolled",
        "llava-split-fp16",
        "llava-split-int8",
        "llava-split",
        "qwen25-split",
    ]


@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda path: path.stem)
def test_an_old_bundle_answers_as_it_did(archive, tmp_path):
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(tmp_path)
    expected = json.loads((tmp_path / "answers.json").read_text())
    assert expected
    with Pipeline.load(tmp_path / "bundle") as vlm:
        for case in expected:
            fewer = {} if case["tokens"] is None else {"tokens": case["tokens"]}
            image = picture(case["seed"], case["size"])
            answer = vlm.ask(image, case["question"], max_new_tokens=STEPS, stream=False, **fewer)
            assert [kept.pick_order.tolist() for kept in answer.images] == case["picks"]
            assert list(answer.token_ids) == case["token_ids"]
