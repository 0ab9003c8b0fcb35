"""Draws which patches of a picture were kept, and in which order they were picked."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from resprune.runtime.bundle.whole import write_whole
from resprune.runtime.errors import ResPruneError, one_line, shown
from resprune.runtime.families.image import Box, load_image

if TYPE_CHECKING:
    from resprune.runtime.answer import Answer
    from resprune.runtime.pipeline import Pipeline

# Pixels of the long side: a smaller picture is enlarged, a larger one shrunk, unless the numbers need more room.
LONG_SIDE = (768, 1280)
MAX_PIXELS = 24_000_000
MAX_SIDE = 16_383  # WebP's limit; viewers fail beyond it too
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
# Neither black nor white, so that dark and light patches both stand out from what it veils; the veiled part keeps
# a trace of its color, for shapes as light as their background would vanish in grey.
VEIL, VEIL_OPACITY = (112, 118, 128), 0.7
TAG, DIGITS = (255, 214, 64), (0, 0, 0)
FONT_SIZE = (13, 30)


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
                raise ResPruneError(f"there is no directory {target.parent}; make it, or draw to another")
            if (target.exists() or target.is_symlink()) and not target.is_file():
                raise ResPruneError(f"{target} is not a plain file; draw to another path")
            if not os.access(target if target.exists() else target.parent, os.W_OK):
                raise ResPruneError(f"{target} cannot be written; draw to another path")
            if any(_same_file(target, source) for source in sources):
                raise ResPruneError(f"the drawing would replace the picture {target}; draw to another path")
    except (OSError, ValueError) as error:  # ValueError: an empty path
        reason = error.strerror if isinstance(error, OSError) else one_line(error)
        raise ResPruneError(
            f"the drawing cannot be written to {shown(path)} ({reason}); give a path such as kept.png"
        ) from None
    return paths


def draw_answer(
    pipeline: Pipeline, sources: Sequence[str], answer: Answer, paths: Sequence[Path], max_pixels: int
) -> None:
    """Write each image with its kept tokens; `paths` are those that `drawing_paths` gave for `sources`."""
    for source, path, picks in zip(sources, paths, answer.images, strict=True):
        image = load_image(source, max_pixels=max_pixels)
        save_drawing(draw_kept(image, pipeline.boxes(image.size), picks.pick_order.tolist()), path)


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
            f"a drawing is {', '.join(FORMATS)}, and {path} ends as none of them; give a path such as kept.png"
        )
    return known


def _same_file(path: Path, source: object) -> bool:
    if isinstance(source, str | Path):
        with suppress(OSError, ValueError):
            return path.samefile(source)
    return False


def draw_kept(image: Image.Image, boxes: Sequence[Box | None], pick_order: Iterable[int]) -> Image.Image:
    """The RGB picture with its kept patches clear, outlined and numbered from 1 in pick order, the rest dimmed.

    `boxes` has the place of every visual token in pixels of `image`, as `ImageProcessor.patch_boxes` gives it,
    or None for a token that has none; `pick_order` indexes it, −1 standing for no token. The picture returned
    has the proportions of `image` and is large enough for the numbers to be read; where that would take more
    than `MAX_PIXELS`, or a side of more than `MAX_SIDE` (patches of less than a pixel of a long thin picture), the
    numbers are left out.
    """
    picks = [index for index in pick_order if index >= 0]
    patch_side = max(
        (min(right - left, bottom - top) for left, top, right, bottom in filter(None, boxes)), default=0
    )
    # The widest number in the smallest font, on no more than two thirds of a patch.
    widest = _tag_size(str(len(picks)), ImageFont.load_default(size=FONT_SIZE[0]))[0]
    readable = 1.5 * widest / patch_side if patch_side else 0.0
    wanted = max(min(max(max(image.size), LONG_SIDE[0]), LONG_SIDE[1]) / max(image.size), readable)
    scale = min(wanted, math.sqrt(MAX_PIXELS / (image.width * image.height)), MAX_SIDE / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    clear = image.resize(size, Image.Resampling.BICUBIC)
    shown = Image.blend(clear, Image.new("RGB", size, VEIL), VEIL_OPACITY)
    draw = ImageDraw.Draw(shown)
    corners = []
    # Large ones first: where an image is cut into tiles, tokens of the whole view lie below those of the tiles.
    for number, index in sorted(enumerate(picks, 1), key=lambda pick: -_area(boxes[pick[1]])):
        left, top, right, bottom = (round(edge * scale) for edge in boxes[index] or (0, 0, 0, 0))
        if left < right and top < bottom:  # else the patch saw nothing of the picture
            shown.paste(clear.crop((left, top, right, bottom)), (left, top))
            draw.rectangle((left, top, right - 1, bottom - 1), outline=TAG)
            corners.append((left, top, str(number)))
    if scale >= readable:
        font = ImageFont.load_default(
            size=min(max(FONT_SIZE[0], round(0.3 * patch_side * scale)), FONT_SIZE[1])
        )
        for left, top, text in corners:
            width, height = _tag_size(text, font)
            draw.rectangle((left, top, left + width - 1, top + height - 1), fill=TAG)
            draw.text((left + 3, top + 2), text, fill=DIGITS, font=font, anchor="lt")
    return shown


def _area(box: Box | None) -> float:
    return 0.0 if box is None else (box[2] - box[0]) * (box[3] - box[1])


def _tag_size(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> tuple[int, int]:
    left, top, right, bottom = font.getbbox(text, anchor="lt")
    return round(right - left) + 5, round(bottom - top) + 5
