"""LLaVA-OneVision: LLaVA-NeXT's tiles over SigLIP, whose rows are interpolated past a limit.

The interpolation is a sum of four weighted rows for each token: the runtime computes which and by how much.
"""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from resprune.exporter.checkpoint.checkpoint import Checkpoint
from resprune.exporter.checkpoint.side_files import image_processor_config
from resprune.exporter.components import Components
from resprune.exporter.families.llava import check_tower
from resprune.exporter.families.llava_next import (
    any_resolution_component,
    check_resolutions,
    sample_sizes,
    square_tower,
)
from resprune.exporter.split import assemble, read_config, weightless_model
from resprune.runtime.bundle.manifest import TensorSpec
from resprune.runtime.families.llava_onevision import LimitedResolution, limited_resolution, tile_limit

PACKING = (
    TensorSpec("pack_indices", "int64", ("batch_size", "num_tokens", 4)),
    TensorSpec("pack_weights", "float32", ("batch_size", "num_tokens", 4)),
)


def split_model(checkpoint: Checkpoint, dtype: torch.dtype, mode: FakeTensorMode) -> Components:
    """The three components of such a checkpoint, weightless; `ResPruneError` for a config that they cannot carry."""
    config = read_config(checkpoint, LlavaOnevisionConfig)
    check_tower(config.vision_config)
    processor = limited_resolution(
        image_processor_config(checkpoint),
        **square_tower(config.vision_config),
        limit=tile_limit(checkpoint.config),
    )
    check_resolutions(config, processor)
    model = weightless_model(checkpoint, LlavaOnevisionForConditionalGeneration, config, dtype, mode)
    sizes = [*_interpolated(processor), *sample_sizes(processor)]
    vision = any_resolution_component(model, config, processor, PACKING, sizes, mode)
    return assemble(checkpoint, model, vision, dtype, max_tokens=processor.max_tokens, padding="pack_indices")


def _interpolated(processor: LimitedResolution) -> list[tuple[int, int]]:
    """(width, height) of the smallest image that fills a resolution past the limit; none if there is no such."""
    past = [
        (width, height) for height, width in processor.resolutions if processor.interpolates((width, height))
    ]
    return sorted(past, key=lambda size: size[0] * size[1])[:1]
