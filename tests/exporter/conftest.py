"""Graphs are traced once; tiny checkpoints as Hugging Face runs them, loaded once for the parity tests of a file."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.exporter.hugging_face import HuggingFace, HuggingFaceTiles, HuggingFaceTwoWay
from tests.exporter.hugging_face_qwen import MODELS, HuggingFaceQwen

JUDGES: dict[str, Any] = dict.fromkeys(MODELS, HuggingFaceQwen) | {
    "internvl": HuggingFaceTiles,
    "smolvlm": HuggingFaceTiles,
    "idefics3": HuggingFaceTiles,
    "gemma3": HuggingFaceTwoWay,
}


@pytest.fixture(scope="session", autouse=True)
def _sharing(traced_once: None) -> None:
    """Of every export here, whatever its checkpoint."""


@pytest.fixture(scope="module")
def hugging_face(tiny_checkpoint: Callable[[str], Path]) -> Callable[[str], Any]:
    @cache
    def load(variant: str) -> HuggingFace | HuggingFaceQwen:
        root = tiny_checkpoint(variant)
        family = json.loads((root / "config.json").read_text())["model_type"]
        return JUDGES.get(family, HuggingFace)(root)

    return load
