"""LLaVA-NeXT: the tower and projector of LLaVA over tiles, whose rows are packed into one sequence an image.

Which rows an image's sequence has depends on its size alone, so the runtime computes their numbers (in integers, as
transformers does) and the graph gathers them: exact by construction, for any resolution, and the graph
has no branch, no loop and no shape that depends on the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

from resprune.exporter.checkpoint.checkpoint import Checkpoint
from resprune.exporter.checkpoint.side_files import image_processor_config
from resprune.exporter.components import Component, Components, Sizes
from resprune.exporter.families.llava import Vision, check_tower, tower_facts, tower_output
from resprune.exporter.families.tiles import PackedTiles
from resprune.exporter.split import assemble, read_config, weightless_model
from resprune.names import IMAGE_FEATURES, VISION_ENCODER
from resprune.runtime.bundle.manifest import TensorSpec
from resprune.runtime.errors import ResPruneError
from resprune.runtime.families.llava_next import AnyResolution, any_resolution


def split_model(checkpoint: Checkpoint, dtype: torch.dtype, mode: FakeTensorMode) -> Components:
    """The three components of a LLaVA-NeXT checkpoint, weightless; `ResPruneError` for a config they cannot carry."""
    config = read_config(checkpoint, LlavaNextConfig)
    check_tower(config.vision_config)
    anyres = _any_resolution(checkpoint, config)
    model = weightless_model(checkpoint, LlavaNextForConditionalGeneration, config, dtype, mode)
    packing = (TensorSpec("pack_indices", "int64", ("batch_size", "num_tokens")),)
    vision = any_resolution_component(model, config, anyres, packing, sample_sizes(anyres), mode)
    return assemble(checkpoint, model, vision, dtype, max_tokens=anyres.max_tokens, padding="pack_indices")


def _any_resolution(checkpoint: Checkpoint, config: Any) -> AnyResolution:
    """What the runtime will do with images; `ResPruneError` where the processor's resolutions are not the model's."""
    anyres = any_resolution(image_processor_config(checkpoint), **square_tower(config.vision_config))
    check_resolutions(config, anyres)
    return anyres


def square_tower(tower: Any) -> dict[str, int]:
    """`image_size` and `patch_size` of the tower's config, in pixels; `ResPruneError` unless tiles are square."""
    if not all(isinstance(size, int) and size > 0 for size in (tower.image_size, tower.patch_size)):
        raise ResPruneError(
            "the vision tower's image_size or patch_size is not one number from 1; tiles are square"
        )
    return {"image_size": tower.image_size, "patch_size": tower.patch_size}


def check_resolutions(config: Any, anyres: AnyResolution) -> None:
    """`ResPruneError` where the processor's resolutions are not the model's."""
    resolutions = [list(pair) for pair in anyres.resolutions]
    if config.image_grid_pinpoints != resolutions:
        raise ResPruneError(
            "image_grid_pinpoints differ between config.json and preprocessor_config.json "
            f"({config.image_grid_pinpoints} and {resolutions}); make them the same"
        )


def any_resolution_component(
    model: Any,
    config: Any,
    anyres: AnyResolution,
    packing: tuple[TensorSpec, ...],
    sizes_compared: Sequence[tuple[int, int]],
    mode: FakeTensorMode,
) -> Component:
    """The vision component of images that `anyres`, the runtime's preprocessor, cuts and packs.

    `packing` are the graph's inputs beside `pixel_values`; `sizes_compared` the (width, height) of the images that it
    is compared with, in turn. `ResPruneError` where the tower's rows are not as many as the runtime packs.
    """
    tiles = Vision(
        model.model.vision_tower,
        model.model.multi_modal_projector,
        config.vision_feature_layer,
        config.vision_feature_select_strategy == "default",
    )
    size = anyres.tile_size

    def chosen(count: int) -> list[tuple[int, int]]:
        return [sizes_compared[index % len(sizes_compared)] for index in range(count)]

    def samples(sizes: Sizes, generator: torch.Generator) -> tuple[Tensor, ...]:
        images = []
        for width, height in chosen(sizes["batch_size"]):
            rows, columns = anyres.tile_grid((width, height))
            pixels = torch.randn((1 + rows * columns, 3, *size), generator=generator).numpy()
            images.append(anyres.prepared((width, height), pixels))
        batch = anyres.batch(images)
        return tuple(torch.from_numpy(batch[spec.name]) for spec in inputs)

    def reference(model: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        pixel_values, pack_indices, *_ = inputs
        sizes = [[height, width] for width, height in chosen(len(pack_indices))]
        packed = model.get_image_features(pixel_values, torch.tensor(sizes)).pooler_output
        return (nn.utils.rnn.pad_sequence(list(packed), batch_first=True),)

    patches, hidden_size = tower_output(tiles, size, mode)
    if patches != anyres.tiles.tokens:
        raise ResPruneError(
            f"the vision tower gives {patches} rows a tile where {anyres.tiles.tokens} patches are packed; correct "
            "vision_feature_select_strategy in config.json (default drops a class token, full keeps all)"
        )
    inputs = (TensorSpec("pixel_values", "float32", ("num_tiles", 3, *size)), *packing)
    features = TensorSpec(IMAGE_FEATURES, "float32", ("batch_size", "num_tokens", hidden_size))
    module = PackedTiles(tiles, model.model.image_newline)
    return Component(
        VISION_ENCODER,
        module,
        inputs,
        (features,),
        samples,
        reference,
        tiles.blocks,
        tower=tower_facts(tiles, config.vision_config, patches),
    )


def sample_sizes(anyres: AnyResolution) -> list[tuple[int, int]]:
    """(width, height) of images to compare with: wide, tall, and within one tile, unpadded differently."""
    tile = anyres.tiles.tile
    return [(2 * tile, tile), (tile, 2 * tile + tile // 3), (tile // 2 + 1, tile // 2)]
