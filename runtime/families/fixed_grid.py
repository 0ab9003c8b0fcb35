"""Images that are all brought to one size, and have as many tokens each."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from resprune.runtime.bundle.files import Bundle
from resprune.runtime.bundle.manifest import Range
from resprune.runtime.errors import ResPruneError
from resprune.runtime.families.image import Box, ImageProcessor
from resprune.runtime.families.preprocessor import Arrays, PreparedImage, image_processor_config


@dataclass(frozen=True)
class FixedGrid:
    """Every image is brought to one size and has N tokens; `patch_size` in pixels."""

    processor: ImageProcessor
    num_tokens: int
    patch_size: int
    max_batch: int | None = None

    @staticmethod
    def from_bundle(bundle: Bundle, patch_size: int) -> "FixedGrid":
        """From the bundle's image processor and manifest."""
        num_tokens = bundle.manifest.selection.num_tokens
        if num_tokens is None:
            raise ResPruneError(
                f"{bundle.root} does not say how many visual tokens an image has; export it again"
            )
        processor = ImageProcessor.from_config(image_processor_config(bundle))
        return FixedGrid(processor, num_tokens, patch_size)

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
