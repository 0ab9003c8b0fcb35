"""Gemma 3: every image is stretched to one size and has 256 tokens, each the mean of a square of patches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from resprune.runtime.bundle.files import Bundle
from resprune.runtime.bundle.manifest import Range
from resprune.runtime.errors import ResPruneError
from resprune.runtime.families import llava
from resprune.runtime.families.fixed_grid import FixedGrid
from resprune.runtime.families.image import Box, ImageProcessor
from resprune.runtime.families.preprocessor import Arrays, PreparedImage, image_processor_config

START, IMAGE_TOKEN, END = "<start_of_image>", "<image_soft_token>", "<end_of_image>"
# As Gemma3Processor of transformers writes it in the place of the template's START.
EXPANSION = f"\n\n{START}{IMAGE_TOKEN}{END}\n\n"


@dataclass(frozen=True)
class Pooled:
    """`FixedGrid`, with tokens of several patches and marks around an image."""

    grid: FixedGrid
    max_batch: int | None = None

    @staticmethod
    def from_bundle(bundle: Bundle) -> "Pooled":
        """From the bundle's image processor, and the number of tokens of its manifest."""
        check_processor(image_processor_config(bundle))
        return Pooled(llava.preprocessor(bundle))

    def __call__(self, image: Image.Image) -> PreparedImage:
        """`pixel_values` [3, H, W] float32."""
        prepared = self.grid(image)
        return PreparedImage(prepared.arrays, prepared.offsets, prepared.advances, prepared.spans, EXPANSION)

    def batch(self, images: Sequence[PreparedImage]) -> Arrays:
        """As `FixedGrid`."""
        return self.grid.batch(images)

    def axes(self, batch: Range, tokens: Range) -> dict[str, Range]:
        """As `FixedGrid`."""
        return self.grid.axes(batch, tokens)

    def boxes(self, image_size: tuple[int, int]) -> list[Box | None]:
        """The squares of patches, row by row."""
        size = self.grid.processor.resize_to
        assert size is not None, "checked by check_processor"
        side = size[1] // self.grid.patch_size  # patches of a row
        patches = side // round(self.grid.num_tokens**0.5)  # of a token, each way
        return [*self.grid.processor.patch_boxes(image_size, patches * self.grid.patch_size)]


preprocessor = Pooled.from_bundle


def check_processor(config: Mapping[str, Any]) -> None:
    """`ResPruneError` for an image processor that makes something else than one square of each image."""
    if config.get("do_pan_and_scan"):
        raise ResPruneError(
            "do_pan_and_scan in preprocessor_config.json adds crops to an image, and the graphs take the image alone; "
            "set it to false"
        )
    size = ImageProcessor.from_config(config).resize_to
    if size is None or size[0] != size[1]:
        raise ResPruneError(
            "Gemma 3 stretches every image to a square, and preprocessor_config.json does not; correct its do_resize, "
            "and its size, which has one number as height and width"
        )
