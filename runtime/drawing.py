"""Draws an image beside its kept visual tokens, with the question and the answer below."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

from PIL import Image, ImageDraw, ImageFont

from resprune.runtime.caption import INK, Caption, Color, pick_color
from resprune.runtime.families.image import Box

Size = tuple[int, int]
Pixels = tuple[int, int, int, int]  # left, top, right, bottom

NUMBERED = 10
"""Picks that get a number; colour tells the order of the others."""
# Neither black nor white, so that dark and light patches both stand out from what it veils. The veiled part keeps
# a trace of its colour, for shapes as light as their background would vanish in grey.
VEIL, VEIL_OPACITY = (112, 118, 128), 0.7
LEFT_OPACITY = 0.35
"""Of patches that went through the whole vision tower and were not picked after it."""
PAPER, ACCENT = (255, 255, 255), (91, 70, 201)

PANEL = 768  # pixels of the longer side of a panel
LARGEST_PANEL = 1280  # of an image whose patches would be smaller than PATCH
THIN = (
    2.2  # an image this many times as long as it is short has its panels along each other, LONG pixels long
)
LONG = 1560
PATCH = 12  # pixels of a patch's shorter side
FONT = (13, 22)  # sizes of the numbers
GAP, MARGIN = 20, 24
LEAST_WIDTH = 620  # pixels, for the caption


def draw_kept(
    image: Image.Image,
    boxes: Sequence[Box | None],
    pick_order: Iterable[int],
    question: str = "",
    answer: str = "",
    candidates: Iterable[int] | None = None,
) -> Image.Image:
    """An RGB image: `image` itself, and beside it `image` with its kept patches clear and the rest dimmed.

    A patch is outlined in the colour of its place in the pick order, earlier picks above later ones; the first
    `NUMBERED` have their number. `boxes` has the place of every visual token in pixels of `image`, as
    `Preprocessor.boxes` gives it, or None for a token that has none. `pick_order` indexes it; −1 is no token.
    `candidates` are the tokens that a selection inside the vision tower left, which are dimmed half as much; None: all.
    An image too thin for its patches is stretched until they can be seen. No side is longer than about 2,700 pixels.
    """
    picks = [index for index in pick_order if index >= 0]
    size = panel_size(image.size, boxes)
    clear = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    left_over = None if candidates is None else list(candidates)
    panels = [clear, _kept_panel(clear, image.size, boxes, picks, left_over or ())]
    across = image.width <= THIN * image.height
    width = 2 * size[0] + GAP if across else size[0]
    height = size[1] if across else 2 * size[1] + GAP
    full = max(width, LEAST_WIDTH)
    below = Caption(full)
    stages = "" if left_over is None else f", {len(left_over)} of them through the whole vision tower"
    below.add_scale(f"{len(picks)} of {len(boxes)} visual tokens kept{stages}", len(picks))
    below.add_text(question, INK)
    below.add_text(answer, ACCENT)
    drawing = Image.new("RGB", (full + 2 * MARGIN, height + below.height + 2 * MARGIN), PAPER)
    left, top = MARGIN + (full - width) // 2, MARGIN
    for panel in panels:
        drawing.paste(panel, (left, top))
        left, top = (left + size[0] + GAP, top) if across else (left, top + size[1] + GAP)
    below.draw(ImageDraw.Draw(drawing), MARGIN, MARGIN + height)
    return drawing


def panel_size(image_size: Size, boxes: Sequence[Box | None]) -> Size:
    """Width and height in which an image of `image_size` (width, height) pixels is drawn."""
    long, short = max(image_size), min(image_size)
    thin = long > THIN * short
    scale = (LONG if thin else PANEL) / long
    patch = _patch(boxes)
    least = min(patch)
    if least and not thin and least * scale < PATCH:
        scale = min(PATCH / least, LARGEST_PANEL / long)
    sides = [scale, scale]
    if least and thin and least * scale < PATCH:  # until it is large enough, or square
        axis = 0 if image_size[0] < image_size[1] else 1
        sides[axis] = max(scale, min(PATCH, patch[1 - axis] * scale) / patch[axis])
    return max(1, round(image_size[0] * sides[0])), max(1, round(image_size[1] * sides[1]))


def _patch(boxes: Sequence[Box | None]) -> tuple[float, float]:
    """The usual width and height of a patch; 0 where there is none."""
    seen = [box for box in boxes if box is not None and box[0] < box[2] and box[1] < box[3]]
    if not seen:
        return 0.0, 0.0
    return median(box[2] - box[0] for box in seen), median(box[3] - box[1] for box in seen)


def _kept_panel(
    clear: Image.Image,
    image_size: Size,
    boxes: Sequence[Box | None],
    picks: Sequence[int],
    candidates: Sequence[int],
) -> Image.Image:
    scales = [drawn / own for drawn, own in zip(clear.size, image_size, strict=True)]
    placed: list[tuple[int, Pixels]] = []
    veil = Image.new("RGB", clear.size, VEIL)
    panel, dimmed = (Image.blend(clear, veil, opacity) for opacity in (VEIL_OPACITY, LEFT_OPACITY))

    def pixels(index: int) -> Pixels | None:
        box = boxes[index] or (0.0, 0.0, 0.0, 0.0)
        left, top, right, bottom = (round(edge * scales[axis % 2]) for axis, edge in enumerate(box))
        # else the patch saw nothing of the image
        return (left, top, right, bottom) if left < right and top < bottom else None

    for box in filter(None, map(pixels, candidates)):
        panel.paste(dimmed.crop(box), box[:2])
    for place, index in enumerate(picks):
        if (patch := pixels(index)) is not None:
            placed.append((place, patch))
            panel.paste(clear.crop(patch), patch[:2])
    draw = ImageDraw.Draw(panel)
    # From the last pick to the first: where a view of the whole image lies below its tiles, no earlier pick is hidden.
    for place, (left, top, right, bottom) in reversed(placed):
        width = min(max(1, min(right - left, bottom - top) // 10), 3)
        draw.rectangle((left, top, right - 1, bottom - 1), outline=pick_color(place, len(picks)), width=width)
    for place, box in reversed(placed):
        if place < NUMBERED:
            _draw_number(draw, place + 1, pick_color(place, len(picks)), box, clear.size)
    return panel


def _draw_number(draw: ImageDraw.ImageDraw, number: int, color: Color, box: Pixels, within: Size) -> None:
    """The number of a pick in the corner of its patch, or above a patch that it would hide."""
    text, side = str(number), min(box[2] - box[0], box[3] - box[1])
    font = ImageFont.load_default(size=min(max(FONT[0], round(0.3 * side)), FONT[1]))
    left, top, right, bottom = font.getbbox(text, anchor="lt")
    width, height = round(right - left) + 6, round(bottom - top) + 6
    hides = 3 * width * height > 2 * (box[2] - box[0]) * (box[3] - box[1])
    x = max(0, min(box[0], within[0] - width))
    y = max(0, min(box[1] - height if hides else box[1], within[1] - height))
    draw.rectangle((x, y, x + width - 1, y + height - 1), fill=color)
    dark = 0.3 * color[0] + 0.59 * color[1] + 0.11 * color[2] < 120
    draw.text((x + 3, y + 3), text, fill=PAPER if dark else INK, font=font, anchor="lt")
