"""What every family makes of an image: arrays for its vision graph, and the places its tokens have in a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from resprune.runtime.bundle.files import Bundle
from resprune.runtime.bundle.manifest import Range
from resprune.runtime.families.image import Box

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class PreparedImage:
    """One image, ready for the vision graph.

    `arrays` are what the family's `batch` joins into the graph's inputs. The image's N candidate tokens lie in one or
    more `spans` of the unpruned prompt, whose lengths sum to N, with text between them. `offsets` [N] or, for
    positions of three axes, [3, N] int64: how far each token stands from the first of its span; `advances`: of each
    span, how far the text after it stands from its first token. `expansion` is the text that stands for the
    image in place of the template's placeholder, with exactly one image token for each span; None for that token alone.
    `protected` [N] bool are tokens that every selection keeps; None for none. `attached_to` [N] int64 is the token that
    each is attached to, −1 for none: it is kept if and only if that one is, which is attached to none itself.

    Raises:
        ValueError: `protected` or `attached_to` has not N entries, or `attached_to` one that is neither −1 nor a token
            that is attached to none.

    """

    arrays: Arrays
    offsets: npt.NDArray[np.int64]
    advances: tuple[int, ...]
    spans: tuple[int, ...]
    expansion: str | None = None
    protected: npt.NDArray[np.bool_] | None = None
    attached_to: npt.NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        """Raise `ValueError` for what no selection could keep together."""
        to, count = self.attached_to, self.num_tokens
        if self.protected is not None and self.protected.shape != (count,):
            raise ValueError(f"protected should say of each of the {count} tokens whether it is always kept")
        if to is None:
            return
        if to.shape != (count,) or (to < -1).any() or (to >= count).any() or (to[to[to >= 0]] >= 0).any():
            raise ValueError(
                f"attached_to should say of each of the {count} tokens -1, or a token that is attached to none itself"
            )

    @staticmethod
    def one_span(arrays: Arrays, offsets: npt.NDArray[np.int64], advance: int) -> "PreparedImage":
        """An image whose tokens stand side by side: one span, `advance` is its entry of `advances`."""
        return PreparedImage(arrays, offsets, (advance,), (int(offsets.shape[-1]),))

    @property
    def num_tokens(self) -> int:
        """N."""
        return int(self.offsets.shape[-1])


class Preprocessor(Protocol):
    """Image preprocessor of one model family, made from a bundle."""

    @property
    def max_batch(self) -> int | None:
        """How many images one run of the vision graph takes; None: any number."""
        ...

    def __call__(self, image: Image.Image) -> PreparedImage:
        """Prepare an RGB image; `ResPruneError` for one that the family cannot see."""
        ...

    def batch(self, images: Sequence[PreparedImage]) -> Arrays:
        """Inputs of the vision graph, by name, for images that go through it together."""
        ...

    def axes(self, batch: Range, tokens: Range) -> dict[str, Range]:
        """(least, usual, most) of every named axis of the vision graph's inputs, by name: for TensorRT's profiles.

        `batch` is how many images go through it at once, `tokens` how many tokens one has, each as such a triple.
        """
        ...

    def boxes(self, image_size: tuple[int, int]) -> list[Box | None]:
        """Left, top, right, bottom in pixels of each of the N tokens of an image of `image_size` (width, height).

        None for a token that shows no part of the image.
        """
        ...


def image_processor_config(bundle: Bundle) -> dict[str, Any]:
    """The settings of the bundle's image processor: transformers 5 nests them, and that goes first."""
    if "processor_config.json" in bundle.manifest.files:
        nested = bundle.json("processor_config.json").get("image_processor")
        if nested and isinstance(nested, dict):
            return nested
    return bundle.json("preprocessor_config.json")
