"""Graphs are traced once; tiny checkpoints as Hugging Face runs them, loaded once for the parity tests of a file."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.exporter.hugging_face import HuggingFace


@pytest.fixture(scope="session", autouse=True)
def _sharing(traced_once: None) -> None:
    """Of every export here, whatever its checkpoint."""


@pytest.fixture(scope="module")
def hugging_face(tiny_checkpoint: Callable[[str], Path]) -> Callable[[str], HuggingFace]:
    loaded: dict[str, HuggingFace] = {}

    def load(variant: str) -> HuggingFace:
        if variant not in loaded:
            loaded[variant] = HuggingFace(tiny_checkpoint(variant))
        return loaded[variant]

    return load
