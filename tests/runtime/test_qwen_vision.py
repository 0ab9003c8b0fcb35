import math
import random
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as hf_smart_resize
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from resprune.runtime.errors import ResPruneError
from resprune.runtime.families.qwen2_vl import (
    DynamicResolution,
    Grid,
    patch_positions,
    smart_resize,
    token_positions,
    windows,
)

# Merged rows and columns: whole windows of 4, one over, one under, single rows and columns, real pictures.
MERGED = [
    (1, 1), (1, 2), (2, 1), (1, 5), (7, 1), (2, 3), (3, 3), (3, 4), (4, 4), (4, 5), (5, 4), (5, 5), (4, 8), (8, 8),
    (7, 9), (9, 7), (6, 13), (13, 6), (11, 11), (12, 16), (16, 12), (15, 17), (1, 40), (40, 1), (3, 50), (18, 27),
    (23, 31), (36, 36), (37, 35), (29, 44), (64, 64), (2, 97), (63, 65),
]  # fmt: skip
GRIDS = [Grid(2 * rows, 2 * columns, 2) for rows, columns in MERGED]
ODD = [Grid(3 * rows, 3 * columns, 3) for rows, columns in MERGED[:20]]


@pytest.mark.parametrize(
    "grid", GRIDS + ODD, ids=lambda grid: f"{grid.rows}x{grid.columns}/{grid.merge_size}"
)
def test_what_the_graph_reads_of_a_grid_is_hugging_faces(grid):
    thw = torch.tensor([grid.thw])
    np.testing.assert_array_equal(
        patch_positions(grid), get_vision_position_ids(thw, grid.merge_size).numpy()
    )

    side, patch_size = 4, 14
    patches, slots = windows(grid, (side * grid.merge_size) ** 2)
    order, bounds = get_vision_window_index(
        thw, grid.merge_size, side * grid.merge_size * patch_size, patch_size
    )
    unit = grid.merge_size**2
    in_windows = (order[:, None] * unit + torch.arange(unit)).reshape(-1)
    np.testing.assert_array_equal(patches[patches >= 0], in_windows)
    np.testing.assert_array_equal((patches >= 0).sum(axis=1), torch.diff(bounds))
    np.testing.assert_array_equal(patches.reshape(-1)[slots], np.arange(grid.rows * grid.columns))


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid.rows}x{grid.columns}")
def test_token_positions_are_those_of_get_rope_index(grid):
    config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2, tokens_per_second=4))
    model = SimpleNamespace(config=config, get_vision_position_ids=None)
    model.get_vision_position_ids = lambda *args, **kwargs: Qwen2_5_VLModel.get_vision_position_ids(
        model, *args, **kwargs
    )
    n = grid.num_tokens
    kinds = torch.tensor([[0] * 3 + [1] * n + [0] * 2])
    positions, delta = Qwen2_5_VLModel.get_rope_index(
        model, torch.zeros_like(kinds), kinds, image_grid_thw=torch.tensor([grid.thw])
    )
    np.testing.assert_array_equal(positions[:, 0, 3 : 3 + n], 3 + token_positions(grid))
    np.testing.assert_array_equal(
        positions[:, 0, 3 + n :], 3 + max(grid.merged) + np.arange(2) + np.zeros((3, 1))
    )
    assert 3 + max(grid.merged) + 2 == int(delta) + kinds.shape[1]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


SIZES = [
    (1, 1), (1, 150), (200, 1), (28, 28), (29, 27), (56, 56), (57, 55), (100, 100), (111, 333), (333, 111), (14, 700),
    (640, 480), (479, 641), (30, 900), (1000, 90), (500, 500), (42, 42), (70, 98), (97, 71), (1023, 6), (5, 990),
    (300, 301), (13, 13), (224, 224), (225, 223), (85, 400), (401, 86), (512, 64), (63, 511), (150, 640), (700, 350),
]  # fmt: skip
CONFIGS = [
    {"size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 300}},
    {"min_pixels": 100 * 100, "max_pixels": 28 * 28 * 64, "resample": 2, "image_mean": [0.1, 0.2, 0.3]},
    {
        "patch_size": 7,
        "merge_size": 3,
        "temporal_patch_size": 3,
        "max_pixels": 21 * 21 * 90,
        "do_normalize": False,
    },
]


# Thin and small images, which smart_resize takes past max_pixels, and the largest of each kind.
NEAR = ((1, 1), (4, 4), (10, 12), (60, 60), (4, 60), (256, 256), (1200, 1280), (1280, 1280), (4, 16384))


@pytest.mark.parametrize(("least", "most"), NEAR)
def test_the_limit_is_what_smart_resize_can_give(least, most):
    """No image is past it, and some image comes within 2 % of it."""
    limits = {"min_pixels": least * 784, "max_pixels": most * 784}
    ours = DynamicResolution.from_config(limits)
    theirs = partial(hf_smart_resize, factor=28, **limits)
    sides = {*range(1, 100, 7), *(28 * count + extra for count in range(1, 12) for extra in (-1, 1))}
    sizes = {(a, b) for a in sides for b in range(a, 200 * a + 1, max(1, a // 3))}
    largest = max(math.prod(theirs(*size)) // 784 for size in sizes | {(40, 8000), (3584, 3584)})
    assert 0.98 * ours.max_tokens <= largest <= ours.max_tokens


@pytest.mark.parametrize("config", CONFIGS)
def test_patches_are_those_of_the_hugging_face_processor_to_the_bit(config):
    theirs = Qwen2VLImageProcessorPil(**config)
    ours = DynamicResolution.from_config({"image_processor_type": "Qwen2VLImageProcessor"} | config)
    compared = 0
    for index, (width, height) in enumerate(SIZES):
        image = picture(width, height, index)
        wanted = theirs(image, return_tensors="np")
        rows, columns = wanted["image_grid_thw"][0, 1:] // ours.merge_size
        assert rows * columns <= ours.max_tokens
        patches, grid = ours.patches(image)
        assert grid.thw == tuple(wanted["image_grid_thw"][0])
        np.testing.assert_array_equal(patches, wanted["pixel_values"])
        assert len(ours.boxes(image.size)) == grid.num_tokens
        compared += 1
    assert compared >= 29


def test_smart_resize_is_hugging_faces():
    generator = random.Random(0)
    for _ in range(3000):
        height, width = (int(10 ** generator.uniform(0, 4)) for _ in range(2))
        if max(height, width) > 200 * min(height, width):
            continue
        factor = generator.choice([8, 21, 28, 32])
        low = generator.choice([1, 56 * 56, 100_000])
        high = low * generator.choice([1, 2, 50])
        assert smart_resize(height, width, factor=factor, min_pixels=low, max_pixels=high) == hf_smart_resize(
            height, width, factor, low, high
        )


def test_boxes_cover_the_picture_row_by_row():
    processor = DynamicResolution.from_config({"image_processor_type": "Qwen2VLImageProcessor"})
    boxes = processor.boxes((280, 140))
    assert (boxes[0], boxes[1]) == ((0, 0, 28, 28), (28, 0, 56, 28))
    assert boxes[-1] == (252, 112, 280, 140)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"do_resize": False}, "do_resize"),
        ({"patch_size": 0}, "patch_size"),
        ({"max_pixels": "many"}, "max_pixels"),
        ({"size": {"longest_edge": -3}}, "max_pixels"),
        ({"image_std": [0, 1, 1]}, "image_std"),
    ],
)
def test_a_config_that_makes_no_sense_is_named(config, words):
    with pytest.raises(ResPruneError, match=words):
        DynamicResolution.from_config({"image_processor_type": "Qwen2VLImageProcessor"} | config)


def test_a_picture_like_a_thread_is_refused():
    processor = DynamicResolution.from_config({"image_processor_type": "Qwen2VLImageProcessor"})
    with pytest.raises(ResPruneError, match="too long and thin"):
        processor(picture(1, 201))
    assert processor.grid((200, 1)).num_tokens > 0


def test_a_picture_brings_the_arrays_of_its_grid():
    processor = DynamicResolution.from_config(
        {"image_processor_type": "Qwen2VLImageProcessor"}, window_patches=64
    )
    made = processor(picture(5 * 28, 3 * 28))
    arrays = processor.batch([made])
    assert {name: array.shape for name, array in arrays.items()} == {
        "pixel_values": (60, 1176),
        "patch_positions": (60, 2),
        "window_patches": (2, 64),
        "window_slots": (60,),
    }
    assert (made.num_tokens, made.offsets.shape, made.advances) == (15, (3, 15), (5,))
