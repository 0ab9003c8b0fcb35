from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel, image_size_to_num_patches
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

from resprune.runtime.errors import ResPruneError
from resprune.runtime.families.llava_next import PINPOINTS, AnyResolution, any_resolution
from tests.runtime.images import SIZES, named, noise

TILE, PATCH = 42, 7
# The proportions of the real resolutions, and one that is a single tile.
SMSIZES = {
    "image_processor_type": "LlavaNextImageProcessor",
    "image_grid_pinpoints": [[TILE * height // 336, TILE * width // 336] for height, width in PINPOINTS],
    "size": {"shortest_edge": TILE},
    "crop_size": {"height": TILE, "width": TILE},
}
ONE_TILE = SMSIZES | {"image_grid_pinpoints": [[TILE, TILE], [2 * TILE, TILE], [TILE, 4 * TILE]]}
LLAVA_16 = SMSIZES | {
    "image_grid_pinpoints": [list(pair) for pair in PINPOINTS],
    "size": {"shortest_edge": 336},
    "crop_size": {"height": 336, "width": 336},
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def small(config: dict[str, Any] = SMSIZES) -> AnyResolution:
    return any_resolution(config, image_size=TILE, patch_size=PATCH)


def rows_of_hugging_face(
    resolutions: list[list[int]], side: int, patch: int, sizes: list[Any]
) -> list[list[int]]:
    """Each picture's rows as `pack_image_features` orders them, when every feature is its own row's number."""
    tile = side * patch
    config = SimpleNamespace(
        image_grid_pinpoints=resolutions, vision_config=SimpleNamespace(image_size=tile, patch_size=patch)
    )
    counts = [image_size_to_num_patches([h, w], resolutions, tile) for w, h in sizes]
    rows = torch.arange(sum(counts) * side**2, dtype=torch.float64).reshape(-1, side**2, 1)
    newline = torch.tensor([float(rows.numel())], dtype=torch.float64)
    packed, lengths = LlavaNextModel.pack_image_features(
        SimpleNamespace(config=config),  # type: ignore[arg-type]
        torch.split(rows, counts),
        torch.tensor([[h, w] for w, h in sizes]),
        "default",
        newline,
    )
    assert [len(part) for part in packed] == lengths.tolist()
    return [part[:, 0].long().tolist() for part in packed]


@pytest.mark.parametrize("size", SIZES, ids=named)
@pytest.mark.parametrize("config", [SMSIZES, ONE_TILE], ids=["five", "one-tile"])
def test_pixels_equal_hugging_face(config: dict[str, Any], size: tuple[int, int]) -> None:
    assert len(set(SIZES)) >= 30
    image = noise(*size)
    theirs = LlavaNextImageProcessorPil(**config)(image, return_tensors="np")
    picture = small(config)(image)
    assert picture.arrays["pixel_values"].dtype == np.float32
    np.testing.assert_array_equal(picture.arrays["pixel_values"], theirs["pixel_values"][0])
    np.testing.assert_array_equal(theirs["image_sizes"][0], (size[1], size[0]))


@pytest.mark.parametrize("size", [(640, 480), (333, 2000), (1, 700), (336, 336), (1344, 224)], ids=named)
def test_pixels_of_real_tiles_equal_hugging_face(size: tuple[int, int]) -> None:
    theirs = LlavaNextImageProcessorPil(**LLAVA_16)(noise(*size), return_tensors="np")["pixel_values"][0]
    ours = any_resolution(LLAVA_16, image_size=336, patch_size=14)(noise(*size))
    np.testing.assert_array_equal(ours.arrays["pixel_values"], theirs)


@pytest.mark.parametrize("size", SIZES, ids=named)
@pytest.mark.parametrize("config", [SMSIZES, ONE_TILE], ids=["five", "one-tile"])
def test_packing_equals_hugging_face(config: dict[str, Any], size: tuple[int, int]) -> None:
    picture = small(config)(Image.new("RGB", size))
    packed = small(config).batch([picture])["pack_indices"]
    assert packed.dtype == np.int64
    (theirs,) = rows_of_hugging_face(config["image_grid_pinpoints"], TILE // PATCH, PATCH, [size])
    assert packed[0].tolist() == theirs
    assert picture.num_tokens == picture.advances[0] == len(theirs) <= small(config).max_tokens


@given(width=st.integers(1, 3000), height=st.integers(1, 3000), side=st.sampled_from([24, 27]))
@settings(max_examples=300, deadline=None)
def test_packing_of_real_tiles_equals_hugging_face(width: int, height: int, side: int) -> None:
    tile = side * 14
    resolutions = [[h // 336 * tile, w // 336 * tile] for h, w in PINPOINTS]
    config = LLAVA_16 | {
        "image_grid_pinpoints": resolutions,
        "size": {"shortest_edge": tile},
        "crop_size": {"height": tile, "width": tile},
    }
    anyres = any_resolution(config, image_size=tile, patch_size=14)
    (theirs,) = rows_of_hugging_face(resolutions, side, 14, [(width, height)])
    rows = anyres.packed_rows((width, height))
    assert np.where(rows < 0, max(theirs), rows).tolist() == theirs
    assert len(theirs) <= anyres.max_tokens


def test_token_count_is_that_of_the_hugging_face_processor() -> None:
    anyres = any_resolution(LLAVA_16, image_size=336, patch_size=14)
    assert anyres.max_tokens == 2928 == len(anyres.packed_rows((672, 672)))
    processor = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=LLAVA_16["image_grid_pinpoints"]),
        patch_size=14,
        num_additional_image_tokens=1,
    )
    processor._get_unpadded_features = LlavaNextProcessor._get_unpadded_features.__get__(processor)
    for width, height in [(20 * x, 20 * y) for x, y in SIZES]:
        count = LlavaNextProcessor._get_number_of_features(processor, height, width, 336, 336)
        assert len(anyres.packed_rows((width, height))) == count - 1  # their class token


def test_pictures_of_a_batch_share_the_newline_row_and_are_filled_up() -> None:
    sizes = [(100, 30), (42, 42), (1, 40)]
    anyres = small()
    pictures = [anyres(noise(*size)) for size in sizes]
    batch = anyres.batch(pictures)
    theirs = rows_of_hugging_face(SMSIZES["image_grid_pinpoints"], TILE // PATCH, PATCH, sizes)
    assert batch["pack_indices"].shape == (3, max(map(len, theirs)))
    for row, want in zip(batch["pack_indices"].tolist(), theirs, strict=True):
        assert row[: len(want)] == want
        assert set(row[len(want) :]) <= {-1}
    tiles = LlavaNextImageProcessorPil(**SMSIZES)([noise(*size) for size in sizes], return_tensors="np")
    counts = [len(picture.arrays["pixel_values"]) for picture in pictures]
    unpadded = [tiles["pixel_values"][row, :count] for row, count in enumerate(counts)]
    np.testing.assert_array_equal(batch["pixel_values"], np.concatenate(unpadded))


@pytest.mark.parametrize("size", [(100, 30), (42, 42), (17, 60), (1, 500)], ids=named)
def test_boxes_lie_where_the_tokens_looked(size: tuple[int, int]) -> None:
    """Each tile token's pixels, found by their brightness in a picture that brightens from corner to corner."""
    anyres = small()
    boxes = anyres.boxes(size)
    rows = anyres.packed_rows(size)
    assert len(boxes) == len(rows)
    assert [box is None for box in boxes] == (rows < 0).tolist()
    side = TILE // PATCH
    left, top, right, bottom = boxes[side + 1] or (0, 0, 0, 0)  # of the whole view, one in from the corner
    np.testing.assert_allclose(
        (left, top, right, bottom), np.array([1, 1, 2, 2]) / side * np.array([*size, *size])
    )
    of_tiles = [box for box in boxes[side**2 :] if box is not None]
    area = sum((box[2] - box[0]) * (box[3] - box[1]) for box in of_tiles)
    if of_tiles:  # whole patches of padding are gone, and what is left is the picture once
        assert 0.85 * size[0] * size[1] <= area <= size[0] * size[1] * (1 + 1e-9)
    for left, top, right, bottom in filter(None, boxes):
        assert 0 <= left <= right <= size[0]
        assert 0 <= top <= bottom <= size[1]


def test_a_box_holds_the_pixels_of_its_patch() -> None:
    """A white dot in black shows in the pixels of just those tokens whose boxes hold it."""
    size = (120, 70)
    anyres = small()
    boxes = anyres.boxes(size)
    for x, y in [(5, 5), (60, 33), (118, 64)]:
        image = Image.new("RGB", size)
        image.paste((255, 255, 255), (x - 2, y - 2, x + 3, y + 3))
        pixels = anyres(image).arrays["pixel_values"][:, 0]  # [tiles, H, W]
        side = TILE // PATCH
        patches = pixels.reshape(-1, side, PATCH, side, PATCH).max((2, 4)).reshape(-1)
        for row, box in zip(anyres.packed_rows(size), boxes, strict=True):
            if box is not None and box[0] + 2 < x < box[2] - 2 and box[1] + 2 < y < box[3] - 2:
                assert patches[row] > patches.min() + 1
            if box is not None and not (box[0] - 9 < x < box[2] + 9 and box[1] - 9 < y < box[3] + 9):
                assert patches[row] < patches.min() + 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image_grid_pinpoints": []}, "image_grid_pinpoints"),
        ({"image_grid_pinpoints": "672x672"}, "image_grid_pinpoints"),
        ({"image_grid_pinpoints": [[84]]}, "[84]"),
        ({"image_grid_pinpoints": [[84, 43]]}, "multiples of the tile's 42"),
        ({"image_grid_pinpoints": [[84, True]]}, "multiples"),
        ({"image_grid_pinpoints": [[0, 84]]}, "multiples"),
        ({"image_grid_pinpoints": [[42 * 13, 42 * 13]]}, "at most 144 tiles"),
        ({"image_processor_type": "CLIPImageProcessor"}, "CLIPImageProcessor"),
        ({"image_processor_type": None}, "LlavaNextImageProcessor"),
        ({"crop_size": {"height": 21, "width": 21}}, "tiles of 21"),
        ({"image_std": [0, 1, 1]}, "image_std"),
    ],
)
def test_settings_that_make_no_sense(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ResPruneError, match=said.replace("[", r"\[")) as caught:
        small(SMSIZES | change)
    assert "\n" not in str(caught.value)


def test_sizes_are_read_as_hugging_face_reads_them() -> None:
    """A height and width in place of the shortest edge (SigLIP towers), and defaults where there is nothing."""
    config = SMSIZES | {"size": {"height": TILE, "width": TILE}, "do_center_crop": False}
    image = noise(50, 90)
    theirs = LlavaNextImageProcessorPil(**config)(image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(small(config)(image).arrays["pixel_values"], theirs)
    bare = {"image_processor_type": "LlavaNextImageProcessorFast", "image_grid_pinpoints": [[224, 448]]}
    ours = any_resolution(bare, image_size=224, patch_size=14)(image)
    theirs = LlavaNextImageProcessorPil(image_grid_pinpoints=[[224, 448]])(image, return_tensors="np")
    np.testing.assert_array_equal(ours.arrays["pixel_values"], theirs["pixel_values"][0])
