"""Writes the drawings of an answer's kept tokens, to paths that are checked before the answer is asked for."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from resprune.runtime.bundle.whole import write_whole
from resprune.runtime.drawing import draw_kept
from resprune.runtime.errors import ResPruneError, one_line, shown
from resprune.runtime.families.image import load_image

if TYPE_CHECKING:
    from resprune.runtime.answer import Answer
    from resprune.runtime.pipeline import Pipeline

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")


def drawing_paths(path: str, sources: Sequence[object]) -> list[Path]:
    """Where the drawings of `sources` go: `kept.png`, then `kept-2.png`, ….

    Raises `ResPruneError` if one of them could not be written, or would replace one of the images asked about.
    """
    if "\0" in path:
        raise ResPruneError("a drawing has no path with a NUL; give one such as kept.png")
    try:
        first = Path(path)
        paths = [
            first if number == 1 else first.with_name(f"{first.stem}-{number}{first.suffix}")
            for number in range(1, len(sources) + 1)
        ]
        _format(first)
        for target in paths:
            if not target.parent.is_dir():
                raise ResPruneError(
                    f"there is no directory {one_line(target.parent)}; make it, or draw to another"
                )
            if (target.exists() or target.is_symlink()) and not target.is_file():
                raise ResPruneError(f"{target} is not a plain file; draw to another path")
            if not os.access(target if target.exists() else target.parent, os.W_OK):
                raise ResPruneError(f"{target} cannot be written; draw to another path")
            if any(_same_file(target, source) for source in sources):
                raise ResPruneError(f"the drawing would replace the image {target}; draw to another path")
    except (OSError, ValueError) as error:  # ValueError: an empty path
        reason = error.strerror if isinstance(error, OSError) else one_line(error)
        raise ResPruneError(
            f"the drawing cannot be written to {shown(path)} ({reason}); give a path such as kept.png"
        ) from None
    return paths


def draw_answer(
    pipeline: Pipeline,
    sources: Sequence[str],
    question: str,
    answer: Answer,
    paths: Sequence[Path],
    max_pixels: int,
) -> None:
    """Write each image with its kept tokens; `paths` are those that `drawing_paths` gave for `sources`.

    Of an answer that was stopped, the text is what had been written.
    """
    text = ""
    with suppress(ResPruneError):
        for piece in answer:
            text += piece
    for source, path, picks in zip(sources, paths, answer.images, strict=True):
        image = load_image(source, max_pixels=max_pixels)
        boxes = pipeline.boxes(image.size)
        order = picks.pick_order.tolist()
        save_drawing(draw_kept(image, boxes, order, question, text, picks.candidates), path)


def save_drawing(drawing: Image.Image, path: Path) -> None:
    """Write a drawing in the format of its suffix: the whole file, or a `ResPruneError` and none of it."""
    content = io.BytesIO()
    try:
        drawing.save(content, _format(path))
        write_whole(path, content.getvalue())
    except (OSError, ValueError) as error:
        raise ResPruneError(
            f"{path} cannot be written ({one_line(error)}); give a path such as kept.png"
        ) from None


def _format(path: Path) -> str:
    """Pillow's name of the format that goes by a path's suffix."""
    Image.init()
    suffixes = Image.registered_extensions()
    known = suffixes.get(path.suffix.lower())
    if known not in FORMATS or known not in Image.SAVE:
        raise ResPruneError(
            f"a drawing is {', '.join(FORMATS)}, and {one_line(path)} ends as none of them; "
            "give a path such as kept.png"
        )
    return known


def _same_file(path: Path, source: object) -> bool:
    if isinstance(source, str | Path):
        with suppress(OSError, ValueError):
            return path.samefile(source)
    return False
