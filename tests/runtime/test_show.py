import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resprune.runtime.errors import ResPruneError
from resprune.runtime.families.image import Box, ImageProcessor
from resprune.runtime.show import MAX_PIXELS, MAX_SIDE, TAG, VEIL, draw_kept, drawing_paths, save_drawing
from tests.runtime.bundles import one_sentence


def grid(width: float, height: float, side: int) -> list[Box | None]:
    """Boxes of `side` x `side` patches, row by row."""
    x, y = width / side, height / side
    return [(c * x, r * y, (c + 1) * x, (r + 1) * y) for r in range(side) for c in range(side)]


def patches(shown: Image.Image, side: int) -> np.ndarray:
    """[side², height, width, 3] of a picture that `side` divides."""
    pixels = np.asarray(shown)
    height, width = pixels.shape[0] // side, pixels.shape[1] // side
    return pixels.reshape(side, height, side, width, 3).swapaxes(1, 2).reshape(side * side, height, width, 3)


@pytest.mark.parametrize(("side", "kept"), [(12, 16), (24, 64), (27, 120)])
@pytest.mark.parametrize("color", [(0, 0, 0), (255, 255, 255), (255, 255, 0), VEIL], ids=str)
def test_kept_patches_are_clear_and_numbered_and_the_rest_is_dimmed(
    side: int, kept: int, color: tuple[int, int, int]
) -> None:
    picks = np.random.default_rng(0).permutation(side * side)[:kept].tolist()
    shown = draw_kept(Image.new("RGB", (96, 96), color), grid(96, 96, side), picks)
    assert min(shown.size) >= 768
    shown = shown.resize((shown.width // side * side,) * 2, Image.Resampling.NEAREST)
    for index, patch in enumerate(patches(shown, side)):
        if index in picks:
            assert (patch[-4:-2, -4:-2] == color).all()
            assert (patch == TAG).all(axis=-1).mean() > 0.08
            assert patch[2:10, 2:9].sum(axis=-1).min() < 300  # digits on the tag
        else:
            assert (patch == patch[0, 0]).all()
            assert np.abs(patch[0, 0] - (0.3 * np.array(color) + 0.7 * np.array(VEIL))).max() <= 1


def test_numbers_are_the_pick_order() -> None:
    image = Image.new("RGB", (96, 96))
    first = patches(draw_kept(image, grid(96, 96, 12), [5, 7]), 12)
    second = patches(draw_kept(image, grid(96, 96, 12), [7, 5]), 12)
    assert (first[5] == second[7]).all()
    assert (first[7] == second[5]).all()
    assert (first[5] != first[7]).any()


@pytest.mark.parametrize(("side", "kept"), [(24, 576), (27, 729), (12, 9)])
def test_a_tag_stays_within_its_patch(side: int, kept: int) -> None:
    shown = draw_kept(Image.new("RGB", (500, 500)), grid(500, 500, side), [*range(kept - 1), side * side - 1])
    patch = np.asarray(shown)[-int(shown.height / side) :, -int(shown.width / side) :]
    rows, columns = np.nonzero((patch[2:-2, 2:-2] == TAG).all(axis=-1))
    assert 4 < rows.max() < 0.75 * len(patch)
    assert 4 < columns.max() < 0.75 * len(patch)


def test_proportions_are_kept_and_a_large_photo_is_shrunk() -> None:
    assert draw_kept(Image.new("RGB", (4000, 3000)), grid(4000, 3000, 24), [0]).size == (1280, 960)
    assert draw_kept(Image.new("RGB", (1000, 500)), grid(1000, 500, 12), [0]).size == (1000, 500)
    assert draw_kept(Image.new("RGB", (48, 96)), grid(48, 96, 4), [0]).size == (384, 768)


def test_tokens_without_a_place_are_passed_over_and_keep_their_number() -> None:
    image, boxes = Image.new("RGB", (96, 96)), grid(96, 96, 12)
    boxes[3], boxes[4] = None, (8.0, 8.0, 8.0, 16.0)
    shown = draw_kept(image, boxes, [3, 4, 9, -1, -1])
    numbered_three = draw_kept(image, grid(96, 96, 12), [9, 9, 9])
    assert (patches(shown, 12)[9] == patches(numbered_three, 12)[9]).all()
    assert all((patch == patch[0, 0]).all() for index, patch in enumerate(patches(shown, 12)) if index != 9)


def test_nothing_kept_is_all_dimmed() -> None:
    shown = draw_kept(Image.new("RGB", (10, 10)), grid(10, 10, 2), [-1])
    assert shown.getcolors() is not None
    assert len(shown.getcolors()) == 1


def test_a_long_thin_picture_stays_in_bounds_and_goes_without_numbers() -> None:
    processor = ImageProcessor.from_config({"image_processor_type": "SiglipImageProcessor"})
    image = Image.new("RGB", (60_000, 20), (255, 255, 255))
    shown = draw_kept(image, processor.patch_boxes(image.size, 14), range(64))
    assert shown.width * shown.height <= MAX_PIXELS
    assert shown.width == MAX_SIDE
    assert shown.getchannel("R").getextrema()[0] > 100  # no digits
    assert shown.getchannel("B").getextrema()[0] == TAG[2]  # but outlines


def test_the_picture_given_is_left_as_it_was() -> None:
    image = Image.effect_noise((900, 900), 50).convert("RGB")
    before = image.tobytes()
    draw_kept(image, grid(900, 900, 12), [1, 2, 3])
    assert image.tobytes() == before


def refused(path: object, *sources: object) -> str:
    with pytest.raises(ResPruneError) as error:
        drawing_paths(str(path), sources or ["photo.png"])
    return one_sentence(error.value)


@pytest.mark.parametrize(
    "name", ["kept.psd", "kept.mpg", "kept.fits", "kept.ico", "kept.pdf", "kept", ".png", "kept.png.gz", ""]
)
def test_a_format_that_is_not_written_is_refused_before_the_answer(tmp_path: Path, name: str) -> None:
    assert "give a path such as kept.png" in refused(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", ["png", "JPG", "jpeg", "webp", "bmp", "tif"])
def test_every_format_is_written(tmp_path: Path, suffix: str) -> None:
    (path,) = drawing_paths(str(tmp_path / f"kept.{suffix}"), ["photo.png"])
    save_drawing(draw_kept(Image.new("RGB", (9, 9)), grid(9, 9, 3), [1]), path)
    with Image.open(path) as shown:
        shown.load()
        assert shown.size == (768, 768)
    assert [entry.name for entry in tmp_path.iterdir()] == [f"kept.{suffix}"]


def test_what_cannot_be_written_is_refused_before_the_answer(tmp_path: Path) -> None:
    photo = tmp_path / "photo-2.png"
    photo.write_bytes(b"mine")
    (tmp_path / "link.png").symlink_to(photo)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    assert "would replace the picture" in refused(photo, photo)
    assert "would replace the picture" in refused(tmp_path / "link.png", str(photo))
    assert "photo-2.png" in refused(tmp_path / "photo.png", "other.png", photo), "the second drawing's name"
    assert "not a plain file" in refused(tmp_path / "pipe.png")
    assert "not a plain file" in refused(tmp_path / "folder.png")
    assert "there is no directory" in refused(tmp_path / "none" / "kept.png")
    assert "with a NUL" in refused("a\0.png")
    assert "cannot" in refused("a" * 300 + ".png")
    assert photo.read_bytes() == b"mine"


def test_a_drawing_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kept.png"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ResPruneError, match="cannot be written"):
        save_drawing(Image.new("RGB", (2, 2)), path)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept.png"]
