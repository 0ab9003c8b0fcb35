"""InternVL 3 and 3.5 in the Hugging Face layout: pixel shuffle after the tower, then a projector, tile by tile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import InternVLConfig, InternVLForConditionalGeneration

from resprune.exporter.checkpoint.checkpoint import Checkpoint
from resprune.exporter.checkpoint.side_files import image_processor_config
from resprune.exporter.components import Components, Tower
from resprune.exporter.families.merging import merge_order, of_tokens
from resprune.exporter.families.tiles import tiles_component
from resprune.exporter.split import assemble, read_config, weightless_model
from resprune.runtime.families.internvl import Thumbnailed, tower_side


class _Rows(nn.Module):
    """pixel_values [tiles, 3, H, W] → rows [tiles, P, D], as `get_image_features` of transformers."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        config = model.config
        self.tower = model.model.vision_tower
        # No ModuleList: the weights are the tower's, under its names.
        self.blocks = tuple(map(_Block, self.tower.encoder.layer))
        self.projector = model.model.multi_modal_projector
        self.side = int(1 / config.downsample_ratio)  # patches a side of what becomes one token
        self.layer = config.vision_feature_layer
        self.crop = config.vision_feature_select_strategy == "default"

    def forward(self, pixel_values: Tensor) -> tuple[Tensor]:
        hidden = self.tower.embeddings(pixel_values)
        hidden = torch.cat([hidden[:, :1], merge_order(hidden[:, 1:], self.side)], dim=1)
        states = [hidden]
        for block in self.blocks:
            states.append(block(states[-1]))
        hidden = self.tower.layernorm(states[-1]) if self.layer == -1 else states[self.layer]
        if self.crop:
            hidden = hidden[:, 1:]  # without the class token
        return (self.projector(of_tokens(hidden, self.side).flatten(2)),)


class _Block(nn.Module):
    """A block of the tower [T, S, H] → [T, S, H] that takes what is added to its scores, [T, 1, 1, S]."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden: Tensor, bias: Tensor | None = None) -> Tensor:
        block = self.block
        mixed, _ = block.attention(block.layernorm_before(hidden), attention_mask=bias)
        hidden = hidden + block.lambda_1 * mixed
        widened: Tensor = hidden + block.lambda_2 * block.mlp(block.layernorm_after(hidden))
        return widened


def split_model(checkpoint: Checkpoint, dtype: torch.dtype, mode: FakeTensorMode) -> Components:
    """The three components of an InternVL checkpoint, weightless; `ResPruneError` for a config they cannot carry."""
    config = read_config(checkpoint, InternVLConfig)
    processor = Thumbnailed.from_config(image_processor_config(checkpoint), **tower_side(checkpoint.config))
    model = weightless_model(checkpoint, InternVLForConditionalGeneration, config, dtype, mode)
    rows, count = _Rows(model), config.vision_config.num_hidden_layers
    tower = Tower(
        tokens=processor.tiles.tokens,
        hidden_size=config.vision_config.hidden_size,
        layers=(count if rows.layer == -1 else rows.layer % (count + 1),),
        tower=lambda model: model.model.vision_tower,
        projectors=lambda model: [model.model.multi_modal_projector],
        leading=1,
        group=rows.side**2,
        places=_places,
    )
    vision = tiles_component(rows, rows.blocks, processor.tiles, processor.prepared, _features, tower, mode)
    return assemble(checkpoint, model, vision, dtype, max_tokens=processor.max_tokens, padding="pack_indices")


def _features(model: Any, pixel_values: Tensor) -> Tensor:
    features: Tensor = model.get_image_features(pixel_values).pooler_output
    return features


def _places(model: Any, inputs: tuple[Tensor, ...]) -> Tensor:
    """Where the tower has the patches of each token, by its own pixel shuffle: [N, G]."""
    config = model.config
    side = config.vision_config.image_size[0] // config.vision_config.patch_size[0]
    patches = torch.arange(side**2, dtype=torch.float32).reshape(1, side, side, 1)
    shuffled: Tensor = model.model.pixel_shuffle(patches, scale_factor=config.downsample_ratio)
    return shuffled.flatten(0, 2).long()
