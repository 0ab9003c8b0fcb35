"""Images that tests make, in memory and as files."""

import io
from typing import Any

import numpy as np
from PIL import Image


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
