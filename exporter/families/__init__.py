"""One module for each model family: how such a checkpoint is split into components (`split.py` has what they share)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from resprune.exporter.checkpoint.checkpoint import family_of

if TYPE_CHECKING:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from resprune.exporter.checkpoint.checkpoint import Checkpoint
    from resprune.exporter.components import Components


def split_model(checkpoint: Checkpoint, dtype: torch.dtype, mode: FakeTensorMode) -> Components:
    """The components of a checkpoint, weightless, by its family's own module, which loads only now.

    Raises `ResPruneError` for a checkpoint of no known family, or with a config that the graphs cannot carry.
    """
    module = importlib.import_module(f"{__name__}.{family_of(checkpoint).module}")
    components: Components = module.split_model(checkpoint, dtype, mode)
    return components
