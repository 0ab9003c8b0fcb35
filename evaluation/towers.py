"""Ways to have fewer tokens that change what the vision tower does: selection inside it, and a smaller image.

They stand among the selectors by name: `early 8:288` is the model's own selection after a tower that selects as
`resprune export --early 8:288` has it, and `resize` is every token of an image so small that it has about K.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from resprune.runtime.errors import ResPruneError

EARLY = "early "
RESIZE = "resize"
STEPS = 16
"""At most, of making an image smaller."""


def changes_tower(selector: str) -> bool:
    """Whether a selector is one of these, so that each budget encodes the image anew."""
    return selector == RESIZE or selector.startswith(EARLY)


def early_names(settings: list[str]) -> list[str]:
    """The selectors for settings of `resprune eval --early`, each like "8:288"."""
    return [f"{EARLY}{setting}" for setting in settings]


def smaller_image(image: Image.Image, count: Callable[[Image.Image], int], k: int) -> Image.Image:
    """An image scaled until `count`, its visual tokens, which go by its area, are about `k`; never enlarged.

    An image above the family's own limit has fewer tokens than its area says, so one step may not do.
    """
    small = image
    for _ in range(STEPS):
        scale = min(1.0, (k / count(small)) ** 0.5)
        size = max(1, round(small.width * scale)), max(1, round(small.height * scale))
        if size == small.size:
            break
        small = image.resize(size, Image.Resampling.BICUBIC)
    return small


def smaller_pixels(pixel_values: Any, patch: int, k: int) -> Any:
    """Normalised pixels of a square, [3, H, W] float32 array → [1, 3, S, S] float32 tensor, S = `patch` · round(√k).

    Bicubic, with antialiasing.
    """
    import torch

    side = patch * max(1, round(k**0.5))
    pixels = torch.from_numpy(np.ascontiguousarray(pixel_values))[None]
    return torch.nn.functional.interpolate(pixels, size=(side, side), mode="bicubic", antialias=True)


def refused(selector: str, model: str) -> ResPruneError:
    """The error for a selector that changes a tower which is fixed."""
    return ResPruneError(
        f"{selector} needs the vision tower itself, and {model} has it as it is; give the checkpoint that it was "
        "exported from, which then runs in PyTorch"
    )
