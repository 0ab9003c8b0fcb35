import contextlib
import io
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.image_utils import load_image as hugging_face_load_image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from resprune.runtime.errors import ResPruneError
from resprune.runtime.families.image import DEFAULTS, ImageProcessor, load_image

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


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Smooth and rough parts, so that a filter that is off by a tap shows."""
    generator = np.random.default_rng(seed)
    rough = generator.integers(0, 256, (height, width, 4), dtype=np.uint8)
    smooth = Image.fromarray(generator.integers(0, 256, (3, 5, 4), dtype=np.uint8)).resize((width, height))
    return Image.blend(Image.fromarray(rough), smooth, 0.6).convert(mode)


def theirs(config: dict[str, Any], image: Image.Image | np.ndarray) -> np.ndarray:
    processor = HUGGING_FACE[config["image_processor_type"]](**config)
    return processor(image, return_tensors="np")["pixel_values"][0]


def ours(config: dict[str, Any], image: Image.Image | np.ndarray) -> np.ndarray:
    pixels = ImageProcessor.from_config(config)(load_image(image))
    assert pixels.dtype == np.float32
    return pixels


def refused(source: Any, **options: int) -> str:
    with pytest.raises(ResPruneError) as caught:
        load_image(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


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


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation: int) -> None:
    upright = noise(48, 32).resize((480, 320), Image.Resampling.NEAREST)
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    lying = upright.transpose(undo[orientation]) if orientation > 1 else upright
    data = encoded(lying, exif=exif)
    for source in (data, Image.open(io.BytesIO(data))):
        np.testing.assert_array_equal(np.asarray(load_image(source)), np.asarray(upright))


def test_sixteen_bit_grey_keeps_its_shades(tmp_path: Path) -> None:
    shades = np.arange(256, dtype=np.uint16).reshape(16, 16)
    for suffix in ("png", "tiff"):
        Image.fromarray(shades * 257).save(tmp_path / f"wide.{suffix}")
        loaded = np.asarray(load_image(tmp_path / f"wide.{suffix}"))
        np.testing.assert_array_equal(loaded, np.repeat(shades.astype(np.uint8)[:, :, None], 3, axis=2))


def test_a_path_text_and_bytes_are_the_same_picture(tmp_path: Path) -> None:
    data = encoded(noise(20, 30), "JPEG")
    path = tmp_path / "é photo.jpg"
    path.write_bytes(data)
    pictures = [load_image(source) for source in (path, str(path), data)]
    assert all(picture.mode == "RGB" and picture.size == (20, 30) for picture in pictures)
    assert len({picture.tobytes() for picture in pictures}) == 1


def test_the_picture_given_is_left_as_it_was() -> None:
    image = noise(20, 30)
    before = image.tobytes()
    load_image(image).paste((0, 0, 0), (0, 0, 5, 5))
    assert image.tobytes() == before


def png_header(width: int, height: int) -> bytes:
    """A whole PNG whose header promises `width` x `height` pixels and whose data holds none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    assert "9000 x 9000 pixels, more than the limit of 64000000" in refused(png_header(9000, 9000))
    assert "more than the limit of 99" in refused(encoded(noise(10, 10)), max_pixels=99)
    assert load_image(encoded(noise(10, 10)), max_pixels=100).size == (10, 10)
    assert "more than the limit of 99" in refused(noise(10, 10), max_pixels=99)
    # Beyond Pillow's own limit, whatever ours is.
    assert "more pixels than Pillow opens" in refused(png_header(60_000, 60_000), max_pixels=1 << 40)


def test_no_warning_for_a_size_that_is_refused(recwarn: pytest.WarningsRecorder) -> None:
    refused(png_header(11_000, 11_000))
    assert not list(recwarn)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "JPEG2000", "AVIF"])
def test_a_truncated_picture_is_refused(format: str) -> None:
    data = encoded(noise(64, 64), format)
    load_image(data)
    for part in (0.1, 0.5, 0.9):
        message = refused(data[: int(len(data) * part)])
        assert "cannot be read as an image" in message or "is not an image" in message


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_picture_is_read_or_refused(data: st.DataObject) -> None:
    format = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"]))
    content = bytearray(encoded(noise(9, 7, "P" if format == "GIF" else "RGB"), format))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, min(200, len(content) - 1)))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ResPruneError):
        load_image(bytes(content))


VIDEOS = {
    "film.mp4": b"\0\0\0\x18ftypmp42",
    "film.mov": b"\0\0\0\x14ftypqt  ",
    "film.avi": b"RIFF\1\2\3\4AVI LIST",
    "film.webm": b"\x1a\x45\xdf\xa3webm",
    "film.mpg": b"\0\0\1\xba",
    "film.ogv": b"OggS\0\2",
    "film.wmv": b"\x30\x26\xb2\x75\x8e\x66",
    "film.flv": b"FLV\1\5",
}


@pytest.mark.parametrize("name", VIDEOS)
def test_a_video_is_refused_as_one(name: str, tmp_path: Path) -> None:
    video = VIDEOS[name] + bytes(40)
    (tmp_path / name).write_bytes(video)
    assert refused(video).startswith("the image is a video, and this model answers about images")
    message = refused(tmp_path / name)
    assert message.endswith(f"{name} is a video, and this model answers about images; give one of its frames")


def test_an_array_of_frames_is_a_video() -> None:
    assert "[4, 30, 30, 3] is a video" in refused(np.zeros((4, 30, 30, 3), np.uint8))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_of_an_animation_the_first_frame_is_taken(format: str) -> None:
    """As Hugging Face takes it."""
    frames = [noise(20, 12, seed=seed) for seed in range(3)]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    opened = Image.open(io.BytesIO(data))
    assert opened.n_frames == 3  # type: ignore[attr-defined]
    np.testing.assert_array_equal(load_image(data), hugging_face_load_image(opened))
    assert not np.array_equal(load_image(data), load_image(encoded(frames[1], format)))


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    assert "not an image" in refused(b"")
    assert "not an image" in refused(b"not an image at all")
    assert "no file" in refused(tmp_path / "none.png")
    assert "not a plain file" in refused(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    assert "pipe.png is not a plain file" in refused(tmp_path / "pipe.png")
    (tmp_path / "text.png").write_text("hello")
    assert "text.png is not an image" in refused(str(tmp_path / "text.png"))
    assert "cannot be read" in refused("a\0b.png")
    assert "not NoneType" in refused(None)
    assert "max_pixels should be a whole number, not str '9'" in refused(b"", max_pixels="9")
    assert "32-bit pixels" in refused(Image.new("F", (4, 4)))
    assert "has no pixels" in refused(Image.new("RGB", (0, 4)))


def test_ghostscript_is_never_started() -> None:
    assert "not an image" in refused(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n"
    )


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((4, 4, 3), np.float32), "uint8 in 0..255, not float32"),
        (np.zeros((4, 4, 3), np.uint16), "not uint16"),
        (np.zeros((3, 40, 40), np.uint8), r"not \[3, 40, 40\]"),
        (np.zeros((4, 4, 2), np.uint8), "shape"),
        (np.zeros((1, 4, 4, 3), np.uint8), "shape"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        (np.zeros(4, np.uint8), "shape"),
    ],
    ids=lambda value: str(getattr(value, "shape", "")),
)
def test_an_array_that_is_no_picture_is_refused(array: np.ndarray, says: str) -> None:
    with pytest.raises(ResPruneError, match=says):
        load_image(array)


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
