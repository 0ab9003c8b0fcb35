"""What tests ask a pipeline: a question, images, and bundles with another manifest."""

import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from resprune import Pipeline
from resprune.runtime.bundle.files import read_bundle, write_manifest

QUESTION = "what colour is the square on the table?"
OTHER = "how many red circles are there?"


def picture(seed: int, size: tuple[int, int] = (60, 50)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


@cache
def loaded(bundle: Path) -> Pipeline:
    return Pipeline.load(bundle)


def with_manifest(bundle: Path, folder: Path, **changes) -> Path:
    """A copy of a bundle whose manifest says something else."""
    copy = Path(shutil.copytree(bundle, folder / "changed"))
    write_manifest(copy, replace(read_bundle(bundle).manifest, **changes))
    return copy
