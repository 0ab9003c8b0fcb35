"""LLaVA-OneVision's images: pixels as its processor's, and rows interpolated as `pack_image_features` does."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.llava_onevision.modeling_llava_onevision import (
    LlavaOnevisionModel,
    image_size_to_num_patches,
)
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from resprune.runtime.errors import ResPruneError
from resprune.runtime.families.llava_onevision import (
    PINPOINTS,
    LimitedResolution,
    bilinear,
    limited_resolution,
    tile_limit,
)
from tests.runtime.images import SIZES, named, noise

TILE, PATCH = 42, 7
SMSIZES: dict[str, Any] = {
    "image_processor_type": "LlavaOnevisionImageProcessor",
    "size": {"height": TILE, "width": TILE},
    "image_grid_pinpoints": [
        [TILE * rows, TILE * columns] for rows in range(1, 4) for columns in range(1, 6)
    ],
}
REAL: dict[str, Any] = {
    "image_processor_type": "LlavaOnevisionImageProcessor",
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def small(limit: int = 4, **changes: Any) -> LimitedResolution:
    return limited_resolution(SMSIZES | changes, image_size=TILE, patch_size=PATCH, limit=limit)


def real() -> LimitedResolution:
    return limited_resolution(REAL, image_size=384, patch_size=14, limit=9)


def packed_by_hugging_face(
    ours: LimitedResolution, size: tuple[int, int], rows: torch.Tensor
) -> torch.Tensor:
    """What transformers makes of the rows [tiles, P, D] of an image of `size`; the newline row is all 7."""
    resolutions = [list(pair) for pair in ours.resolutions]
    config = SimpleNamespace(
        image_grid_pinpoints=resolutions,
        vision_config=SimpleNamespace(image_size=ours.tiles.tile, patch_size=ours.patch_size),
    )
    width, height = size
    assert len(rows) == image_size_to_num_patches([height, width], resolutions, ours.tiles.tile)
    (packed,), _ = LlavaOnevisionModel.pack_image_features(
        SimpleNamespace(config=config),  # type: ignore[arg-type]
        [rows],
        torch.tensor([[height, width]]),
        torch.full((rows.shape[2],), 7.0),
        f"anyres_max_{ours.limit}",
    )
    return packed


def check_packing(ours: LimitedResolution, size: tuple[int, int]) -> None:
    tiles = 1 + int(np.prod(ours.tile_grid(size)))
    rows = torch.randn(tiles, ours.tiles.tokens, 3, generator=torch.Generator().manual_seed(tiles))
    taps, weights = ours.taps(size)
    table = np.concatenate([rows.flatten(0, 1).numpy(), np.full((1, 3), 7, np.float32)])
    packed = (table[taps] * weights[:, :, None]).sum(axis=1)  # −1, a newline, is the last row
    theirs = packed_by_hugging_face(ours, size, rows).numpy()
    if ours.interpolates(size):
        np.testing.assert_allclose(packed, theirs, atol=2e-6)
    else:
        np.testing.assert_array_equal(packed, theirs)
    assert len(packed) <= ours.max_tokens


@pytest.mark.parametrize("size", SIZES, ids=named)
def test_pixels_equal_hugging_face(size: tuple[int, int]) -> None:
    image = noise(*size)
    theirs = LlavaOnevisionImageProcessorPil(**SMSIZES)(image, return_tensors="np")
    picture = small()(image)
    assert picture.arrays["pixel_values"].dtype == np.float32
    np.testing.assert_array_equal(picture.arrays["pixel_values"], theirs["pixel_values"][0])


@pytest.mark.parametrize("size", [(640, 480), (1, 700), (384, 384), (2400, 500)], ids=named)
def test_pixels_of_real_tiles_equal_hugging_face(size: tuple[int, int]) -> None:
    theirs = LlavaOnevisionImageProcessorPil(**REAL)(noise(*size), return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(real()(noise(*size)).arrays["pixel_values"], theirs)


@pytest.mark.parametrize("limit", [1, 4, 15])
def test_packing_equals_hugging_face(limit: int) -> None:
    ours = small(limit)
    for size in SIZES:
        check_packing(ours, size)
    past = [ours.interpolates(size) for size in SIZES]
    assert any(past) == (limit < 15)
    assert not all(past)


@given(width=st.integers(1, 4000), height=st.integers(1, 4000))
@settings(max_examples=40, deadline=None)
def test_packing_of_real_tiles_equals_hugging_face(width: int, height: int) -> None:
    check_packing(real(), (width, height))


@given(size=st.integers(2, 162), share=st.floats(0.05, 1.0))
@settings(max_examples=200, deadline=None)
def test_weights_are_torchs_to_the_last_bit(size: int, share: float) -> None:
    wanted = max(int(size * share), 1)
    rows, weights = bilinear(size, wanted)
    ours = np.zeros((wanted, size), np.float32)
    for place in range(2):
        np.add.at(ours, (np.arange(wanted), rows[:, place]), weights[:, place])
    theirs = torch.nn.functional.interpolate(torch.eye(size)[None, :, :, None], [wanted, 1], mode="bilinear")
    np.testing.assert_array_equal(ours, theirs[0, :, :, 0].T.numpy())


@given(width=st.integers(1, 4000), height=st.integers(1, 4000))
@settings(max_examples=200, deadline=None)
def test_token_count_is_that_of_the_hugging_face_processor(width: int, height: int) -> None:
    ours = real()
    processor = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=PINPOINTS),
        num_image_tokens=729,
        vision_aspect_ratio="anyres_max_9",
    )
    processor._get_unpadded_features = lambda *sizes: LlavaOnevisionProcessor._get_unpadded_features(
        processor,  # type: ignore[arg-type]
        *sizes,
    )
    count = LlavaOnevisionProcessor._get_number_of_features(processor, height, width, 384, 384)  # type: ignore[arg-type]
    assert len(ours.taps((width, height))[0]) == count <= ours.max_tokens


def test_the_most_tokens_are_those_of_a_grid_just_within_the_limit() -> None:
    """98 x 81 rows are 1.09996 limits a side. 162 x 49 are as many, but an image of that shape takes fewer tiles."""
    assert len(real().taps((1152, 1392))[0]) == 729 + 98 * 81 + 98
    assert real().max_tokens == 729 + 162 * 49 + 162


def test_a_batch_is_filled_up_with_nothing() -> None:
    ours = small()
    pictures = [ours(Image.new("RGB", size)) for size in ((60, 50), (200, 120))]
    inputs = ours.batch(pictures)
    few, many = sorted(picture.num_tokens for picture in pictures)
    assert inputs["pack_indices"].shape == inputs["pack_weights"].shape == (2, many, 4)
    shorter = [picture.num_tokens for picture in pictures].index(few)
    assert (inputs["pack_indices"][shorter, few:] == -1).all()
    assert not inputs["pack_weights"][shorter, few:].any()
    assert (inputs["pack_indices"][shorter, :few] >= 0).all()


@pytest.mark.parametrize("size", SIZES, ids=named)
def test_boxes_cover_the_image_once_beside_the_whole_view(size: tuple[int, int]) -> None:
    ours = small()
    boxes = ours.boxes(size)
    taps, _ = ours.taps(size)
    assert len(boxes) == len(taps)
    assert [box is None for box in boxes] == (taps[:, 0] < 0).tolist()
    whole = ours.tiles.tokens
    area = sum((right - left) * (bottom - top) for left, top, right, bottom in filter(None, boxes[whole:]))
    # The patches of a row or column that padding shares are cut at the image's edge, and dropped if mostly padding.
    if min(size) > 20:
        assert area == pytest.approx(size[0] * size[1], rel=0.2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image_processor_type": "LlavaNextImageProcessor"}, "needs a LlavaOnevisionImageProcessor"),
        ({"size": {"height": 30, "width": 30}}, "the vision tower takes 42 x 42 pixels"),
        ({"size": {"shortest_edge": TILE}}, "the vision tower takes 42 x 42 pixels"),
        ({"do_center_crop": True, "crop_size": 30}, "uncropped"),
        ({"image_grid_pinpoints": [[42, 43]]}, "multiples of the tile's 42"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ResPruneError, match=said):
        small(**changes)


def test_a_limit_that_leaves_no_row_is_refused() -> None:
    ours = limited_resolution(SMSIZES, image_size=TILE, patch_size=TILE, limit=1)
    with pytest.raises(ResPruneError, match="a grid of 1 x 5 patches has no row left"):
        ours.taps((500, 100))


@pytest.mark.parametrize("value", ["square", "anyres", "anyres_max_0", "anyres_max_x", 9, None])
def test_another_aspect_ratio_is_refused(value: object) -> None:
    with pytest.raises(ResPruneError, match="anyres_max_ and a number"):
        tile_limit({"vision_aspect_ratio": value})
    assert tile_limit({}) == 9
