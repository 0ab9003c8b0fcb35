"""Images of every kind are read, or refused in one sentence."""

import contextlib
import io
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

from resprune.runtime.errors import ResPruneError
from resprune.runtime.families.image import load_image
from tests.runtime.images import encoded, noise


def refused(source: Any, **options: int) -> str:
    with pytest.raises(ResPruneError) as caught:
        load_image(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
