"""SmolVLM2 and Idefics3: a SigLIP tower over tiles, pixel shuffle and one linear layer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from resprune.exporter.checkpoint.checkpoint import Checkpoint
from resprune.exporter.checkpoint.side_files import image_processor_config
from resprune.exporter.components import Components, Tower
from resprune.exporter.families.merging import merge_order, of_tokens
from resprune.exporter.families.tiles import tile_images, tiles_component
from resprune.exporter.split import assemble, read_config, weightless_model
from resprune.runtime.families.smolvlm import SplitImage, tower_side
from resprune.runtime.families.tiles import Grid

CLASSES: dict[str, tuple[Any, Any]] = {
    "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration),
    "idefics3": (Idefics3Config, Idefics3ForConditionalGeneration),
}


class _Rows(nn.Module):
    """pixel_values [tiles, 3, H, W] → rows [tiles, P, D], as `get_image_features` of transformers of whole tiles.

    There every patch of a tile is seen, so the places of the patches are constants and attention has no mask.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        vision = model.model.vision_model
        self.patches = vision.embeddings.patch_embedding
        self.positions = vision.embeddings.position_embedding
        self.encoder = vision.encoder
        self.norm = vision.post_layernorm
        self.projection = model.model.connector.modality_projection
        self.side = model.config.scale_factor
        self.places = _places(vision.embeddings.num_patches_per_side)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor]:
        patches = self.patches(pixel_values).flatten(2).transpose(1, 2)  # [tiles, patches, hidden]
        patches = merge_order(patches + self.positions(self.places), self.side)
        hidden = self.encoder(inputs_embeds=patches).last_hidden_state
        return (self.projection(of_tokens(self.norm(hidden), self.side).flatten(2)),)


def _places(side: int) -> Tensor:
    """[side · side]: the position of each patch, by its place from 0 to 1 as transformers rounds it."""
    boundaries = torch.arange(1 / side, 1.0, 1 / side)
    step = 1.0 / torch.tensor(side)
    along = torch.clamp(torch.arange(side, dtype=torch.float32) * step, max=1.0 - 1e-6)
    bucket = torch.bucketize(along, boundaries, right=True)
    return (bucket[:, None] * side + bucket[None, :]).flatten()


def split_model(checkpoint: Checkpoint, dtype: torch.dtype, mode: FakeTensorMode) -> Components:
    """The three components of such a checkpoint, weightless; `ResPruneError` for a config that they cannot carry."""
    config_class, model_class = CLASSES[str(checkpoint.config["model_type"])]
    config = read_config(checkpoint, config_class)
    processor = SplitImage.from_config(image_processor_config(checkpoint), side=tower_side(checkpoint.config))
    model = weightless_model(checkpoint, model_class, config, dtype, mode)
    blocks = model.model.vision_model.encoder.layers
    prepare = partial(processor.prepared, grid=Grid(0, 0))
    tower = Tower(
        tokens=processor.tiles.tokens,
        hidden_size=config.vision_config.hidden_size,
        layers=(len(blocks),),
        tower=lambda model: model.model.vision_model,
        projectors=lambda model: [model.model.connector],
        group=config.scale_factor**2,
        places=_token_places,
    )
    vision = tiles_component(_Rows(model), blocks, processor.tiles, prepare, _features, tower, mode)
    return assemble(
        checkpoint,
        model,
        vision,
        dtype,
        max_tokens=processor.max_tokens,
        padding="pack_indices",
        images=partial(tile_images, processor.tiles.tokens, prepare),
    )


def _features(model: Any, pixel_values: Tensor) -> Tensor:
    features: Tensor = model.get_image_features(pixel_values[None]).pooler_output[0]
    return features.reshape(len(pixel_values), -1, features.shape[-1])


def _token_places(model: Any, inputs: tuple[Tensor, ...]) -> Tensor:
    """Where the tower has the patches of each token, by its own pixel shuffle: [N, G]."""
    connector = model.model.connector
    patches = torch.arange(model.model.vision_model.embeddings.num_patches, dtype=torch.float32)
    shuffled: Tensor = connector.pixel_shuffle(patches[None, :, None], connector.scale_factor)
    return shuffled[0].long()
