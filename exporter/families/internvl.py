"""InternVL 3 and 3.5 in the Hugging Face layout: pixel shuffle after the tower, then a projector, tile by tile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import InternVLConfig, InternVLForConditionalGeneration

from resprune.exporter.checkpoint.checkpoint import Checkpoint
from resprune.exporter.checkpoint.side_files import image_processor_config
from resprune.exporter.components import Components
from resprune.exporter.families.tiles import tiles_component
from resprune.exporter.split import assemble, read_config, weightless_model
from resprune.runtime.families.internvl import Thumbnailed, tower_side


class _Rows(nn.Module):
    """pixel_values [tiles, 3, H, W] → rows [tiles, P, D], as `get_image_features` of transformers."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        config = model.config
        self.tower = model.model.vision_tower
        self.projector = model.model.multi_modal_projector
        self.shuffle = model.model.pixel_shuffle
        self.ratio = config.downsample_ratio
        self.layer = config.vision_feature_layer
        self.crop = config.vision_feature_select_strategy == "default"

    def forward(self, pixel_values: Tensor) -> tuple[Tensor]:
        if self.layer == -1:
            hidden = self.tower(pixel_values).last_hidden_state
        else:
            hidden = self.tower(pixel_values, output_hidden_states=True).hidden_states[self.layer]
        if self.crop:
            hidden = hidden[:, 1:]  # without the class token
        side = int(hidden.shape[1] ** 0.5)
        grid = self.shuffle(hidden.unflatten(1, (side, side)), scale_factor=self.ratio)
        return (self.projector(grid.flatten(1, 2)),)


def split_model(checkpoint: Checkpoint, dtype: torch.dtype, mode: FakeTensorMode) -> Components:
    """The three components of an InternVL checkpoint, weightless; `ResPruneError` for a config they cannot carry."""
    config = read_config(checkpoint, InternVLConfig)
    processor = Thumbnailed.from_config(image_processor_config(checkpoint), **tower_side(checkpoint.config))
    model = weightless_model(checkpoint, InternVLForConditionalGeneration, config, dtype, mode)
    blocks = model.model.vision_tower.encoder.layer
    vision = tiles_component(_Rows(model), blocks, processor.tiles, processor.prepared, _features, mode)
    return assemble(checkpoint, model, vision, dtype, max_tokens=processor.max_tokens, padding="pack_indices")


def _features(model: Any, pixel_values: Tensor) -> Tensor:
    features: Tensor = model.get_image_features(pixel_values).pooler_output
    return features
