import os
from pathlib import Path

import pytest
from PIL import Image

from resprune.runtime.drawing import GAP, MARGIN, PANEL, draw_kept
from resprune.runtime.errors import ResPruneError
from resprune.runtime.show import drawing_paths, save_drawing
from tests.runtime.bundles import one_sentence


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
    save_drawing(draw_kept(Image.new("RGB", (9, 9)), [(0.0, 0.0, 3.0, 3.0)], [0]), path)
    with Image.open(path) as shown:
        shown.load()
        assert shown.width == 2 * PANEL + GAP + 2 * MARGIN
    assert [entry.name for entry in tmp_path.iterdir()] == [f"kept.{suffix}"]


def test_what_cannot_be_written_is_refused_before_the_answer(tmp_path: Path) -> None:
    photo = tmp_path / "photo-2.png"
    photo.write_bytes(b"mine")
    (tmp_path / "link.png").symlink_to(photo)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    assert "would replace the image" in refused(photo, photo)
    assert "would replace the image" in refused(tmp_path / "link.png", str(photo))
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
