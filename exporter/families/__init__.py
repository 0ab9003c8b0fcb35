"""The model families that can be exported: one file each, and one row of FAMILIES."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from resprune.runtime.errors import ResPruneError

if TYPE_CHECKING:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from resprune.exporter.checkpoint.checkpoint import Checkpoint
    from resprune.exporter.components import Components


@dataclass(frozen=True)
class Family:
    """One row: the config's `model_type`, the module that splits such a model, and its position policies."""

    name: str
    title: str
    module: str
    positions: tuple[str, ...]
    """Legal policies, the default first."""
    any_size: bool = False
    """Whether a picture has as many tokens as its pixels ask for, up to --max-pixels."""

    @property
    def split_model(self) -> Callable[[Checkpoint, torch.dtype, FakeTensorMode], Components]:
        """The family's `split_model(checkpoint, dtype, mode)`; its module, and so transformers, loads only now."""
        function: Callable[[Checkpoint, torch.dtype, FakeTensorMode], Components]
        function = importlib.import_module(f"{__name__}.{self.module}").split_model
        return function


FAMILIES = {
    family.name: family
    for family in (
        Family("llava", "LLaVA-1.5", "llava", ("contiguous", "original")),
        Family("llava_next", "LLaVA-NeXT", "llava_next", ("contiguous", "original")),
        Family("qwen2_5_vl", "Qwen2.5-VL", "qwen2_vl", ("original",), any_size=True),
        Family("qwen2_vl", "Qwen2-VL", "qwen2_vl", ("original",), any_size=True),
    )
}


def family_of(checkpoint: Checkpoint) -> Family:
    """The row for a checkpoint's config; `ResPruneError`, listing the families, if there is none."""
    model_type = str(checkpoint.config.get("model_type"))
    if model_type not in FAMILIES:
        known = ", ".join(f"{family.title} ({family.name})" for family in FAMILIES.values())
        raise ResPruneError(
            f"{checkpoint.root} holds a model of type {model_type}, which is not supported; supported are {known}"
        )
    if "quantization_config" in checkpoint.config:
        raise ResPruneError(f"{checkpoint.root} is quantized; export the checkpoint that it was made from")
    return FAMILIES[model_type]
