"""Checkpoints in PyTorch beside the bundles made from them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from resprune import Pipeline
from tests.runtime.pipelines import loaded
from tests.runtime.wire import Model


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint: Callable[[str], Path]) -> Model:
    """clip-llama in PyTorch."""
    return Model(tiny_checkpoint("clip-llama"))


@pytest.fixture(scope="session")
def tiny_qwen(tiny_checkpoint: Callable[[str], Path], tiny_bundle: Callable[..., Path]) -> tuple[Path, Model]:
    """A tiny Qwen2.5-VL's bundle, and the checkpoint in PyTorch."""
    return tiny_bundle("qwen25", share=0.4), Model(tiny_checkpoint("qwen25"))


@pytest.fixture
def split(tiny_bundle: Callable[..., Path]) -> Path:
    """A split bundle of clip-llama that keeps 7 tokens."""
    return tiny_bundle("clip-llama", k=7, split=True)


@pytest.fixture
def vlm(split: Path) -> Pipeline:
    """Its pipeline, which all tests of a process share."""
    return loaded(split)
