"""Pillow as the runtime finds it; and checkpoints in PyTorch beside the bundles made from them."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import ImageFile

from resprune.exporter.export import Options, export
from tests.runtime.wire import Model
from tests.tiny_qwen import VARIANTS, write_checkpoint


@pytest.fixture(autouse=True)
def _strict_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """lmms-eval, which other tests import, tells Pillow to fill up pictures that are cut off."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint: Callable[[str], Path]) -> Model:
    """clip-llama in PyTorch."""
    return Model(tiny_checkpoint("clip-llama"))


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model]:
    """A tiny Qwen2.5-VL's bundle, and the checkpoint in PyTorch."""
    root = write_checkpoint(tmp_path_factory.mktemp("qwen25"), VARIANTS["qwen25"])
    out = tmp_path_factory.mktemp("bundles") / "qwen25"
    return export(str(root), out, Options(share=0.4)), Model(root)
