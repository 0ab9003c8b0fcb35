"""Fixtures that several rooms share: tiny checkpoints and their bundles, made once a session."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported. The models are tiny: threads that wait for each other cost more than they bring, and on a
# busy machine a hundred times more.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before triton is: its kernels run in its interpreter, on the CPU. What is compiled is compiled in a child process.
os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a variant of the modules `tests.tiny*` → its checkpoint; to be copied before it is changed."""
    from tests import tiny, tiny_qwen, tiny_tiles

    made: dict[str, Path] = {}

    def checkpoint(variant: str) -> Path:
        if variant not in made:
            root = tmp_path_factory.mktemp("checkpoints") / variant
            module: Any = next(one for one in (tiny, tiny_qwen, tiny_tiles) if variant in one.VARIANTS)
            made[variant] = module.write_checkpoint(root, module.VARIANTS[variant])
        return made[variant]

    return checkpoint


@pytest.fixture(scope="session")
def tiny_bundle(
    tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Variant and the fields of `exporter.export.Options` → the bundle exported from it, once a session."""
    from resprune.exporter.export import Options, export

    made: dict[tuple[str, Options], Path] = {}

    def bundle(variant: str, **options: Any) -> Path:
        key = (variant, Options(**options))
        if key not in made:
            out = tmp_path_factory.mktemp("bundles") / variant
            made[key] = export(str(tiny_checkpoint(variant)), out, key[1])
        return made[key]

    return bundle


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained demo model, exported with a ninth of its visual tokens as the README exports it."""
    from resprune.exporter.export import Options, export

    return export("demo", tmp_path_factory.mktemp("demo") / "demo-k16", Options(k=16, split=True))
