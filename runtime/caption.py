"""The lines below a drawing: how many tokens are kept, the scale of the pick order, the question and the answer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# The colour of a pick, from the first to the last. serving/page/draw.js has the same; a test compares them.
RAMP: tuple[Color, ...] = ((255, 214, 64), (247, 139, 59), (232, 80, 127), (164, 63, 192), (90, 85, 224))
INK, SOFT = (27, 33, 48), (89, 99, 119)
SMALL, LARGE = 17, 24  # font sizes in pixels
MOST_LINES = 6  # of the question, and of the answer
LONGEST = 2000  # characters of each that are looked at
# Pillow's own font has ASCII and little more. The first of these that this machine has takes what it lacks.
OTHER_FONTS = ("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "Arial.ttf", "msyh.ttc")
NO_CHARACTER = "\uffff"  # drawn as every character that a font lacks


class Caption:
    """Lines of `width` pixels: their `height` in pixels is known before they are drawn."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.height = 0
        self._parts: list[Callable[[ImageDraw.ImageDraw, int, int], None]] = []

    def add_scale(self, words: str, count: int) -> None:
        """Add `words`, and at the right the colours of `count` picks."""
        font = ImageFont.load_default(size=SMALL)
        height, bar = 30, 160
        start = self._take(height, space=10)

        def draw(on: ImageDraw.ImageDraw, left: int, top: int) -> None:
            middle, right = top + start + height // 2, left + self.width
            on.text((left, middle), words, fill=SOFT, font=font, anchor="lm")
            if count < 2:
                return
            on.text((right, middle), str(count), fill=SOFT, font=font, anchor="rm")
            right -= round(font.getlength(str(count))) + 8 + bar
            for step in range(bar):
                on.line((right + step, middle - 6, right + step, middle + 6), fill=pick_color(step, bar))
            on.text((right - 8, middle), "pick 1", fill=SOFT, font=font, anchor="rm")

        self._parts.append(draw)

    def add_text(self, words: str, color: Color) -> None:
        """Add `words` in as many lines as they need, up to `MOST_LINES`."""
        words = " ".join(words[:LONGEST].split())
        font = font_for(words)
        lines, step = wrapped(words, font, self.width), round(1.35 * LARGE)
        start = self._take(step * len(lines), space=6)

        def draw(on: ImageDraw.ImageDraw, left: int, top: int) -> None:
            for number, line in enumerate(lines):
                on.text((left, top + start + number * step), line, fill=color, font=font)

        self._parts.append(draw)

    def draw(self, on: ImageDraw.ImageDraw, left: int, top: int) -> None:
        """Draw all lines; `left`, `top` in pixels is their corner."""
        for part in self._parts:
            part(on, left, top)

    def _take(self, height: int, space: int) -> int:
        start = self.height + space
        self.height = start + height
        return start


def pick_color(place: int, count: int) -> Color:
    """The colour, red, green and blue from 0 to 255, of the pick at `place` (0 is the first) of `count`."""
    position = place / max(count - 1, 1) * (len(RAMP) - 1)
    low = min(int(position), len(RAMP) - 2)
    first, second = RAMP[low], RAMP[low + 1]
    red, green, blue = (round(a + (b - a) * (position - low)) for a, b in zip(first, second, strict=True))
    return red, green, blue


def wrapped(words: str, font: Font, width: int) -> list[str]:
    """`words` in lines of at most `width` pixels, broken at spaces, else anywhere; at most `MOST_LINES`."""
    lines: list[str] = []
    while words and len(lines) < MOST_LINES:
        end = len(words)
        while end > 1 and font.getlength(words[:end]) > width:
            # First by as much as is surely too long, then by single characters.
            end = min(end - 1, round(end * width / font.getlength(words[:end])) + 1)
        space = words.rfind(" ", 0, end + 1)
        if end < len(words) and space > 0:
            end = space
        lines.append(words[:end])
        words = words[end:].lstrip()
    if words:
        lines[-1] = lines[-1][:-1].rstrip() + "…"
    return lines


def font_for(words: str) -> Font:
    """A font that has the characters of `words`: Pillow's own, or the one of this machine that has most of them."""
    own = ImageFont.load_default(size=LARGE)
    missing = _missing(words, own)
    if not missing:
        return own
    return min((own, *_other_fonts()), key=lambda font: _missing(words, font))


@lru_cache(maxsize=1)
def _other_fonts() -> tuple[Font, ...]:
    found: list[Font] = []
    for name in OTHER_FONTS:
        with suppress(OSError):
            found.append(ImageFont.truetype(name, LARGE))
    return tuple(found)


def _missing(words: str, font: Font) -> int:
    """How many characters of `words` the font lacks."""
    nothing = _drawn(NO_CHARACTER, font)
    return sum(_drawn(character, font) == nothing for character in {*words} if not character.isspace())


def _drawn(character: str, font: Font) -> bytes:
    image = Image.new("L", (2 * LARGE, 2 * LARGE))
    ImageDraw.Draw(image).text((0, 0), character, fill=255, font=font)
    return image.tobytes()
