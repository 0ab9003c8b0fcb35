"""What every family makes of an image: arrays for its vision graph, and the places its tokens have in a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from resprune.runtime.bundle.files import Bundle
from resprune.runtime.bundle.manifest import Range
from resprune.runtime.errors import ResPruneError, shown
from resprune.runtime.families.image import Box, ImageProcessor

Arrays = dict[str, npt.NDArray[Any]]

# patch_size and image_size where a checkpoint's config leaves them out, as in transformers 5.
TOWER_DEFAULTS = {
    "clip_vision_model": {"patch_size": 32, "image_size": 224},
    "siglip_vision_model": {"patch_size": 16, "image_size": 224},
    "dinov2": {"patch_size": 14, "image_size": 224},
}
MAX_SIDE = 1 << 14  # pixels, as of the processors' sizes
LLAVA_TOWER = {"patch_size": 14, "image_size": 336}  # of a config without a vision_config


@dataclass(frozen=True)
class PreparedImage:
    """One image, ready for the vision graph.

    `arrays` are what the family's `batch` joins into the graph's inputs. The image's N candidate tokens lie in one or
    more `spans` of the unpruned prompt, whose lengths sum to N, with text between them. `offsets` [N] or, for
    positions of three axes, [3, N] int64: how far each token stands from the first of its span; `advances`: of each
    span, how far the text after it stands from its first token. `expansion` is the text that stands for the
    image in place of the template's placeholder, with exactly one image token for each span; None for that token alone.
    `protected` [N] bool are tokens that every selection keeps; None for none.
    """

    arrays: Arrays
    offsets: npt.NDArray[np.int64]
    advances: tuple[int, ...]
    spans: tuple[int, ...]
    expansion: str | None = None
    protected: npt.NDArray[np.bool_] | None = None

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


@dataclass(frozen=True)
class FixedGrid:
    """LLaVA-1.5: every image is brought to one size and has N tokens."""

    processor: ImageProcessor
    num_tokens: int
    patch_size: int
    max_batch: int | None = None

    @staticmethod
    def from_bundle(bundle: Bundle) -> "FixedGrid":
        """From the bundle's image processor and manifest."""
        num_tokens = bundle.manifest.selection.num_tokens
        if num_tokens is None:
            raise ResPruneError(
                f"{bundle.root} does not say how many visual tokens an image has; export it again"
            )
        processor = ImageProcessor.from_config(image_processor_config(bundle))
        return FixedGrid(processor, num_tokens, tower_size(bundle)["patch_size"])

    def __call__(self, image: Image.Image) -> PreparedImage:
        """`pixel_values` [3, H, W] float32."""
        return PreparedImage.one_span(
            {"pixel_values": self.processor(image)}, np.arange(self.num_tokens), self.num_tokens
        )

    def batch(self, images: Sequence[PreparedImage]) -> Arrays:
        """`pixel_values` [B, 3, H, W]."""
        return {"pixel_values": np.stack([image.arrays["pixel_values"] for image in images])}

    def axes(self, batch: Range, tokens: Range) -> dict[str, Range]:
        """Any batch; the images differ in nothing."""
        return {"batch_size": batch, "num_tokens": (self.num_tokens, self.num_tokens, self.num_tokens)}

    def boxes(self, image_size: tuple[int, int]) -> list[Box | None]:
        """Patch by patch; a class token, which some checkpoints keep in front, lies nowhere."""
        patches = self.processor.patch_boxes(image_size, self.patch_size)
        return [*[None] * (self.num_tokens - len(patches)), *patches]


def image_processor_config(bundle: Bundle) -> dict[str, Any]:
    """The settings of the bundle's image processor: transformers 5 nests them, and that goes first."""
    if "processor_config.json" in bundle.manifest.files:
        nested = bundle.json("processor_config.json").get("image_processor")
        if nested and isinstance(nested, dict):
            return nested
    return bundle.json("preprocessor_config.json")


def tower_size(bundle: Bundle) -> dict[str, int]:
    """`patch_size` and `image_size` of the vision tower, in pixels."""
    config = bundle.json("config.json").get("vision_config")
    if not isinstance(config, dict):
        return dict(LLAVA_TOWER)
    sizes = TOWER_DEFAULTS.get(str(config.get("model_type", "clip_vision_model")), {})
    sizes = sizes | {key: config[key] for key in ("patch_size", "image_size") if key in config}
    for key in ("patch_size", "image_size"):
        value = sizes.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_SIDE:
            raise ResPruneError(
                f"vision_config.{key} in {bundle.root / 'config.json'} should be a number from 1 to {MAX_SIDE}, "
                f"not {shown(value)}; correct it in the checkpoint and export again"
            )
    return sizes
