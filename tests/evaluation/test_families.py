"""Of every family, the checkpoint in PyTorch and the bundle answer an evaluation alike, and as the pipeline does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from resprune.evaluation.checkpoint import open_checkpoint
from resprune.evaluation.model import open_bundle
from resprune.runtime.families.table import FAMILIES
from resprune.runtime.pipeline import Pipeline
from tests.runtime.pipelines import QUESTION

STEPS = 20
# Each as its parity tests export it: the bundles are made once.
EXPORTED: dict[str, tuple[str, dict[str, Any]]] = {
    "llava": ("clip-llama", {"k": 7, "split": True}),
    "llava_next": ("next-llama", {"k": 88, "split": True}),
    "llava_onevision": ("onevision", {"share": 1.0, "split": True}),
    "qwen2_5_vl": ("qwen25", {"share": 1.0, "split": True}),
    "qwen2_vl": ("qwen2", {"k": 9, "max_pixels": 40 * 14 * 14, "split": True}),
    "qwen3_vl": ("qwen3", {"share": 1.0, "split": True}),
    "internvl": ("internvl-qwen3", {"share": 1.0, "split": True}),
    "smolvlm": ("smolvlm", {"share": 1.0, "split": True}),
    "idefics3": ("idefics3", {"share": 1.0, "optimize": "ort", "split": True}),
    "gemma3": ("gemma3", {"share": 1.0, "split": True}),
}


def test_every_family_is_here() -> None:
    assert EXPORTED.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", EXPORTED)
def test_answers_alike(
    family: str, tiny_bundle: Callable[..., Path], tiny_checkpoint: Callable[[str], Path]
) -> None:
    variant, options = EXPORTED[family]
    root = tiny_bundle(variant, **options)
    blocks = np.random.default_rng(3).integers(0, 256, (2, 5, 8, 3), dtype=np.uint8)
    images = [
        Image.fromarray(one).resize(size) for one, size in zip(blocks, [(70, 44), (40, 90)], strict=True)
    ]
    models = [open_bundle(root), open_checkpoint(str(tiny_checkpoint(variant)))]
    assert models[0].manifest.family == family
    texts, orders = [], []
    for model in models:
        encoded = [model.look([image])[0] for image in images]
        asked = [model.read(QUESTION, [one.image.expansion]) for one in encoded]
        kept = [[model.select(*pair, 5)] for pair in zip(encoded, asked, strict=True)]
        orders.append([order.tolist() for (order,) in kept])
        texts.append(model.answer(asked, [[one] for one in encoded], kept, STEPS))
    assert orders[0] == orders[1]
    assert texts[0] == texts[1]
    with Pipeline.load(root) as vlm:
        said = [vlm.ask(image, QUESTION, tokens=5, max_new_tokens=STEPS).text for image in images]
    assert said == texts[0]
    assert len(set(said)) == 2, "answers that do not depend on the image show nothing"
