"""Pixels, settings and boxes of the image processors, against Hugging Face's."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from resprune.runtime.errors import ResPruneError
from resprune.runtime.families.image import DEFAULTS, ImageProcessor, load_image
from tests.runtime.images import encoded, noise

HUGGING_FACE = {
    "CLIPImageProcessor": CLIPImageProcessorPil,
    "BitImageProcessor": BitImageProcessorPil,
    "LlavaImageProcessor": LlavaImageProcessorPil,
    "SiglipImageProcessor": SiglipImageProcessorPil,
    "Gemma3ImageProcessor": Gemma3ImageProcessorPil,
}
LLAVA_15 = {
    "image_processor_type": "CLIPImageProcessor",
    "do_convert_rgb": True,
    "size": {"shortest_edge": 336},
    "crop_size": {"height": 336, "width": 336},
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def theirs(config: dict[str, Any], image: Image.Image | np.ndarray) -> np.ndarray:
    processor = HUGGING_FACE[config["image_processor_type"]](**config)
    return processor(image, return_tensors="np")["pixel_values"][0]


def ours(config: dict[str, Any], image: Image.Image | np.ndarray) -> np.ndarray:
    pixels = ImageProcessor.from_config(config)(load_image(image))
    assert pixels.dtype == np.float32
    return pixels


SIZES = [(336, 336), (640, 480), (481, 641), (97, 300), (1, 1), (1, 40), (57, 3), (1023, 337), (224, 225)]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("pad", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("kind", HUGGING_FACE)
def test_pixels_equal_hugging_face(kind: str, pad: bool, size: tuple[int, int]) -> None:
    config = {"image_processor_type": kind, "do_pad": pad}
    image = noise(*size)
    np.testing.assert_array_equal(ours(config, image), theirs(config, image))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr", "PA", "RGBa"])
@pytest.mark.parametrize("kind", ["CLIPImageProcessor", "SiglipImageProcessor"])
def test_every_mode_equals_hugging_face(kind: str, mode: str) -> None:
    config = {"image_processor_type": kind}
    image = noise(260, 190, "RGBA" if mode in ("PA", "RGBa") else mode)
    image = image.convert("P").convert("PA") if mode == "PA" else image.convert(mode)
    np.testing.assert_array_equal(ours(config, image), theirs(config, image))


def test_transparent_palette_and_colour_key_are_blended_onto_white() -> None:
    palette = noise(50, 40).quantize(16)
    for image in (palette, noise(50, 40).convert("RGB"), noise(50, 40, "L")):
        key = {"P": 3, "RGB": image.getpixel((0, 0)), "L": image.getpixel((0, 0))}[image.mode]
        stored = Image.open(io.BytesIO(encoded(image, transparency=key)))
        assert stored.info["transparency"] is not None
        np.testing.assert_array_equal(ours(LLAVA_15, stored), theirs(LLAVA_15, stored))
        loaded = load_image(encoded(image, transparency=key))
        assert (np.asarray(loaded) == 255).all(axis=-1).any()


@pytest.mark.parametrize("shape", [(60, 90), (60, 90, 1), (60, 90, 3), (60, 90, 4)], ids=str)
def test_arrays_equal_hugging_face(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    config = {**LLAVA_15, "do_resize": False, "crop_size": 80, "do_normalize": False}
    with_channels = array[:, :, None] if array.ndim == 2 else array
    # Alpha is blended in whole numbers here and in floats there.
    np.testing.assert_allclose(
        ours(config, array), theirs(config, with_channels), rtol=0, atol=1.001 / 255 if shape[-1] == 4 else 0
    )


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(sorted(HUGGING_FACE.keys() - {"Gemma3ImageProcessor"})),  # it never crops
    width=st.integers(1, 150),
    height=st.integers(1, 150),
    size=st.one_of(
        st.integers(1, 90),
        st.integers(1, 90).map(lambda edge: {"shortest_edge": edge}),
        st.tuples(st.integers(1, 90), st.integers(1, 90)).map(list),
        st.tuples(st.integers(1, 90), st.integers(1, 90)).map(lambda s: {"height": s[0], "width": s[1]}),
    ),
    crop=st.one_of(st.integers(1, 99), st.tuples(st.integers(1, 99), st.integers(1, 99)).map(list)),
    resample=st.sampled_from(range(6)),
    switches=st.fixed_dictionaries(
        {
            key: st.sampled_from([True, False, None])
            for key in ("do_resize", "do_rescale", "do_normalize", "do_pad", "default_to_square")
        }
    ),
    mean=st.sampled_from([0.25, [0.1, 0.2, 0.3]]),
    factor=st.sampled_from([1 / 255, 0.00392156862745098, 1 / 127.5]),
)
def test_any_configuration_equals_hugging_face(
    kind: str,
    width: int,
    height: int,
    size: Any,
    crop: Any,
    resample: Any,
    switches: Any,
    mean: Any,
    factor: Any,
) -> None:
    config = {
        "image_processor_type": kind,
        "size": size,
        "do_center_crop": True,
        "crop_size": crop,
        "resample": resample,
        "image_mean": mean,
        "image_std": 0.5 if isinstance(mean, float) else [0.2, 0.3, 0.4],
        "rescale_factor": factor,
        **switches,
    }
    if isinstance(mean, float) and switches["do_pad"]:
        config["image_mean"] = [mean] * 3  # Hugging Face's padding fails on a single number
    image = noise(width, height)
    np.testing.assert_array_equal(ours(config, image), theirs(config, image).astype(np.float32))


@pytest.mark.parametrize(
    "names",
    [
        {"image_processor_type": "CLIPImageProcessor"},
        {"image_processor_type": "CLIPImageProcessorFast"},
        {"image_processor_type": "CLIPImageProcessorPil"},
        {"feature_extractor_type": "CLIPFeatureExtractor"},
        {"feature_extractor_type": "CLIPFeatureExtractor", "image_processor_type": "CLIPImageProcessor"},
    ],
)
def test_names_of_every_age_are_one_processor(names: dict[str, str]) -> None:
    old = {"size": 336, "crop_size": 336, **names}
    assert ImageProcessor.from_config(old) == ImageProcessor.from_config(LLAVA_15)


@pytest.mark.parametrize("kind", HUGGING_FACE)
def test_what_hugging_face_saves_is_read(kind: str, tmp_path: Path) -> None:
    HUGGING_FACE[kind]().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert ImageProcessor.from_config(saved) == ImageProcessor.from_config({"image_processor_type": kind})


def test_every_supported_processor_is_compared() -> None:
    assert DEFAULTS.keys() == HUGGING_FACE.keys()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"image_processor_type": "Qwen2VLImageProcessor"}, "Qwen2VLImageProcessor"),
        ({"image_processor_type": None}, "names no image_processor_type"),
        ({"image_processor_type": 3}, "names no image_processor_type"),
        ({"size": {"longest_edge": 336}}, "size"),
        ({"size": {"shortest_edge": 0}}, "size"),
        ({"size": "336"}, "size"),
        ({"size": True}, "size"),
        ({"size": 1 << 40}, "size"),
        ({"size": [1, 2, 3]}, "size"),
        ({"crop_size": {"shortest_edge": 336}}, "crop_size"),
        ({"do_center_crop": False}, "different sizes"),
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        ({"image_mean": ["a", 0, 0]}, "image_mean"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std"),
        ({"image_std": float("nan")}, "image_std"),
        ({"image_mean": None}, "image_mean"),
        ({"size": None}, "size"),
        ({"crop_size": None}, "crop_size"),
        ({"rescale_factor": None}, "rescale_factor"),
        ({"resample": 9}, "resample"),
        ({"resample": None}, "resample"),
        ({"resample": [3]}, "resample"),
        ({"rescale_factor": float("inf")}, "rescale_factor"),
        ({"do_pad": True, "pad_size": {"height": 9, "width": 9}}, "pad_size"),
    ],
    ids=str,
)
def test_a_configuration_that_makes_no_sense_is_named(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ResPruneError, match=says):
        ImageProcessor.from_config(LLAVA_15 | change)


@pytest.mark.parametrize("size", [(40_000_000, 1), (1, 40_000_000)])
@pytest.mark.parametrize("kind", ["CLIPImageProcessor", "LlavaImageProcessor"])
def test_a_long_thin_picture_does_not_fill_the_memory(kind: str, size: tuple[int, int]) -> None:
    processor = ImageProcessor.from_config({"image_processor_type": kind, "do_pad": True})
    with pytest.raises(ResPruneError, match="too long and thin"):
        processor(Image.new("RGB", size))


def test_boxes_of_a_square_picture_are_its_patches() -> None:
    processor = ImageProcessor.from_config({"image_processor_type": "SiglipImageProcessor", "size": [32, 32]})
    boxes = processor.patch_boxes((64, 64), 16)
    assert boxes == [(0, 0, 32, 32), (32, 0, 64, 32), (0, 32, 32, 64), (32, 32, 64, 64)]


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("size", [(400, 300), (300, 400), (336, 336), (90, 331)])
def test_a_box_is_where_its_patch_came_from(size: tuple[int, int], pad: bool) -> None:
    """Paint one box of the picture white: after the processor its patch is white and its neighbours are not."""
    config = LLAVA_15 | {
        "image_processor_type": "LlavaImageProcessor",
        "do_normalize": False,
        "do_pad": pad,
        "resample": 2,
        "image_mean": 0.0,
    }
    processor = ImageProcessor.from_config(config)
    boxes = processor.patch_boxes(size, 28)
    assert len(boxes) == 144
    for index in (0, 5, 40, 78, 91, 143):
        left, top, right, bottom = boxes[index]
        if min(right - left, bottom - top) < max(size) / 12 * 0.7:
            continue  # cut off by the edge of the picture
        image = Image.new("RGB", size)
        image.paste((255, 255, 255), (round(left), round(top), round(right), round(bottom)))
        bright = processor(image)[0].reshape(12, 28, 12, 28).mean(axis=(1, 3)).reshape(-1)
        assert bright.argmax() == index
        assert bright[index] > 0.8
        assert np.delete(bright, index).max() < 0.25


def test_boxes_stay_in_the_picture_and_a_patch_of_padding_has_no_area() -> None:
    processor = ImageProcessor.from_config(
        {**LLAVA_15, "image_processor_type": "LlavaImageProcessor", "do_pad": True}
    )
    boxes = np.array(processor.patch_boxes((400, 100), 14))
    assert boxes.min() >= 0
    assert (boxes[:, [0, 2]] <= 400).all()
    assert (boxes[:, [1, 3]] <= 100).all()
    areas = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).reshape(24, 24)
    assert (areas[:9] == 0).all()
    assert (areas[10:14] > 0).all()
    assert areas.sum() == pytest.approx(400 * 100)


def test_a_picture_that_patches_do_not_divide_loses_its_last_pixels() -> None:
    processor = ImageProcessor.from_config(
        {"image_processor_type": "SiglipImageProcessor", "size": [384, 384]}
    )
    boxes = processor.patch_boxes((384, 384), 14)
    assert len(boxes) == 27 * 27
    assert boxes[-1] == (364, 364, 378, 378)
