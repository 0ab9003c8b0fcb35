"""Images that tests make, in memory and as files."""

import io
from typing import Any

import numpy as np
from PIL import Image

# Width by height: ratios from 1:6 to 6:1, both ways round, at sizes below, at and above the tile's.
RATIOS = [
    (1, 6),
    (1, 5),
    (2, 9),
    (1, 4),
    (2, 7),
    (1, 3),
    (3, 8),
    (3, 7),
    (1, 2),
    (5, 9),
    (2, 3),
    (3, 4),
    (4, 5),
]
RATIOS += [(9, 10), (30, 31), (1, 1)]
USUAL = [(7 * x, 7 * y) for x, y in RATIOS] + [(23 * y + 1, 23 * x) for x, y in RATIOS]
DEGENERATE = [(1, 1), (1, 40), (40, 1), (1, 500), (500, 1), (2, 41), (42, 42), (84, 42), (41, 43)]
SIZES = USUAL + DEGENERATE


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Smooth and rough parts, so that a filter that is off by a tap shows."""
    generator = np.random.default_rng(seed)
    rough = generator.integers(0, 256, (height, width, 4), dtype=np.uint8)
    smooth = Image.fromarray(generator.integers(0, 256, (3, 5, 4), dtype=np.uint8)).resize((width, height))
    return Image.blend(Image.fromarray(rough), smooth, 0.6).convert(mode)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def blocks(seed: int, size: tuple[int, int] = (60, 50)) -> Image.Image:
    """Seven by nine blocks of colour, blurred."""
    pixels = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def named(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
