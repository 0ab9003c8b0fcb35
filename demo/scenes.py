"""Seeded scenes: two to four objects on a textured or photographic background.

A scene is first a description (dataclasses), then a drawing of it. The description alone answers
every question of :mod:`demo.questions`, so an answer never depends on a look at the pixels.

The two splits share nothing but the shapes' outlines: held-out backgrounds are cut from the right
part of the photographs, training backgrounds from the left part, and the handwritten digits of
scikit-learn are divided by index.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

Split = Literal["train", "test"]
Pixels = npt.NDArray[np.uint8]

SIDE = 96
PATCH = 8
GRID = SIDE // PATCH

SHAPES = ("circle", "square", "triangle", "star")
KINDS = (*SHAPES, "digit")
SIZES = ("small", "large")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 38, 38),
    "green": (38, 150, 58),
    "blue": (38, 80, 214),
    "yellow": (245, 218, 48),
    "orange": (245, 135, 25),
    "purple": (140, 48, 172),
    "white": (245, 245, 245),
    "black": (22, 22, 22),
}
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")

_TRAIN_SHARE = 0.64  # of a photograph's width, and of the digits
_GAP = 2.0  # pixels between the boxes of two objects
_SUPERSAMPLE = 4
_CROWD = 8


@dataclass(frozen=True)
class SceneObject:
    """One object. ``cx``, ``cy`` and ``extent`` (side of its box) are in pixels of the picture.

    ``digit_index`` is the row of scikit-learn's ``load_digits`` that is drawn; ``value`` is what it
    shows. Both are -1 for a shape. A digit is always of size ``large``.
    """

    kind: str
    color: str
    size: str
    cx: float
    cy: float
    extent: float
    angle: float = 0.0
    value: int = -1
    digit_index: int = -1


@dataclass(frozen=True)
class Scene:
    """A description of one picture; ``seed`` and ``split`` also fix its background and its noise."""

    seed: int
    split: Split
    objects: tuple[SceneObject, ...]


@functools.cache
def digit_images() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Return scikit-learn's handwritten digits: images [1797, 8, 8] in 0..1 and their values."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images / 16.0).astype(np.float32), data.target.astype(np.int64)


def digit_indices(split: Split, value: int) -> npt.NDArray[np.int64]:
    """Return the rows of ``load_digits`` that show ``value`` and belong to ``split``."""
    rows = np.flatnonzero(digit_images()[1] == value)
    cut = round(0.8 * len(rows))
    return rows[:cut] if split == "train" else rows[cut:]


@functools.cache
def photograph(name: str, split: Split) -> Pixels:
    """Return the split's part [H, W, 3] of one of scikit-image's public-domain photographs."""
    import skimage.data

    picture: Pixels = getattr(skimage.data, name)()
    cut = round(_TRAIN_SHARE * picture.shape[1])
    return picture[:, :cut] if split == "train" else picture[:, cut:]


def sample_scene(seed: int, split: Split) -> Scene:
    """Return the scene of ``seed``; the same seed gives another scene in the other split."""
    rng = np.random.default_rng([seed, 0 if split == "train" else 1, 0])
    while True:
        objects = _sample_objects(rng, split)
        if objects is not None:
            return Scene(seed, split, objects)


def _sample_objects(rng: np.random.Generator, split: Split) -> tuple[SceneObject, ...] | None:
    count = int(rng.integers(2, 5))
    # Few colours and few shapes make repeats, so that counts above one are not rare.
    n_colors = int(rng.choice([2, 3, 8], p=[0.3, 0.3, 0.4]))
    n_shapes = int(rng.choice([1, 2, 4], p=[0.15, 0.35, 0.5]))
    colors = rng.choice(list(COLORS), n_colors, replace=False)
    shapes = rng.choice(SHAPES, n_shapes, replace=False)
    digits = int(rng.choice([0, 1, 2], p=[0.4, 0.5, 0.1]))
    placed: list[SceneObject] = []
    for i in range(count):
        kind = "digit" if i < digits else str(rng.choice(shapes))
        size = "large" if kind == "digit" else str(rng.choice(SIZES))
        if kind == "digit":
            extent = float(rng.uniform(25, 31))
        elif size == "large":
            extent = float(rng.uniform(26, 33))
        else:
            extent = float(rng.uniform(14, 18))
        center = _place(rng, extent, placed)
        if center is None:
            return None
        value = index = -1
        if kind == "digit":
            value = int(rng.integers(0, 10))
            index = int(rng.choice(digit_indices(split, value)))
        angle = float(rng.uniform(-9, 9))
        color = str(rng.choice(colors))
        placed.append(SceneObject(kind, color, size, *center, extent, angle, value, index))
    return tuple(placed[i] for i in rng.permutation(count))


def sample_crowd(seed: int) -> Scene:
    """Return a held-out scene of eight small shapes, twice as many objects as the training has.

    A question about one of them needs few of the picture's tokens, and which ones depends on the question.
    """
    rng = np.random.default_rng([seed, 1, 3])
    while True:
        placed: list[SceneObject] = []
        for _ in range(_CROWD):
            extent = float(rng.uniform(14, 18))
            center = _place(rng, extent, placed)
            if center is None:
                break
            kind, color = str(rng.choice(SHAPES)), str(rng.choice(list(COLORS)))
            placed.append(SceneObject(kind, color, "small", *center, extent, float(rng.uniform(-9, 9))))
        if len(placed) == _CROWD:
            return Scene(seed, "test", tuple(placed))


def _place(rng: np.random.Generator, extent: float, placed: list[SceneObject]) -> tuple[float, float] | None:
    half = extent / 2 + 1
    for _ in range(40):
        cx, cy = (float(rng.uniform(half, SIDE - half)) for _ in range(2))
        if all(max(abs(cx - o.cx), abs(cy - o.cy)) >= (extent + o.extent) / 2 + _GAP for o in placed):
            return cx, cy
    return None


def draw(scene: Scene) -> Pixels:
    """Return the picture [96, 96, 3] of a scene."""
    return draw_with_patches(scene)[0]


def draw_with_patches(scene: Scene) -> tuple[Pixels, npt.NDArray[np.uint8]]:
    """Return the picture [96, 96, 3] and what covers each 8 x 8 patch, [144].

    A patch holds 0 for background, 1 + the object's place in ``scene.objects`` where an object
    covers a fifth of it or more, and 255 where the cover is too thin to say.
    """
    rng = np.random.default_rng([scene.seed, 0 if scene.split == "train" else 1, 1])
    canvas = background(rng, scene.split)  # [96, 96, 3] float
    cover = np.zeros((len(scene.objects) + 1, GRID, GRID), np.float32)
    for i, item in enumerate(scene.objects):
        mask = object_mask(item)  # [96, 96] in 0..1
        base = np.asarray(COLORS[item.color], np.float32)
        color = np.clip(base + rng.normal(0, 8, 3) + rng.normal(0, 6), 0, 255)
        grown = mask.filter(ImageFilter.MaxFilter(3))
        rim = 20.0 if base.mean() > 110 else 235.0
        alpha = np.asarray(grown, np.float32)[..., None] * (0.55 / 255)
        canvas += alpha * (rim - canvas)
        alpha = np.asarray(mask, np.float32)[..., None] / 255
        canvas += alpha * (color.astype(np.float32) - canvas)
        solid = np.asarray(grown if item.kind == "digit" else mask, np.float32) / 255
        cover[i + 1] = solid.reshape(GRID, PATCH, GRID, PATCH).mean((1, 3))
    canvas += rng.normal(0, rng.uniform(1, 6), canvas.shape).astype(np.float32)
    best = cover.max(0)
    owner = np.where(best >= 0.2, cover.argmax(0), np.where(best > 0.02, 255, 0))
    return np.clip(canvas, 0, 255).astype(np.uint8), owner.reshape(-1).astype(np.uint8)


def background(rng: np.random.Generator, split: Split) -> npt.NDArray[np.float32]:
    """Return a background [96, 96, 3], float in 0..255: a crop of a photograph, or a texture."""
    if rng.random() < 0.6:
        photo = photograph(str(rng.choice(PHOTOGRAPHS)), split)
        side = int(rng.integers(80, min(photo.shape[:2]) + 1))
        top, left = (int(rng.integers(0, n - side + 1)) for n in photo.shape[:2])
        crop = photo[top : top + side, left : left + side]
        if rng.random() < 0.5:
            crop = crop[:, ::-1]
        image = Image.fromarray(np.ascontiguousarray(crop))
        field = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR), np.float32)
    else:
        cells = int(rng.integers(2, 24))
        low = rng.integers(0, 256, (cells, cells, 3)).astype(np.uint8)
        image = Image.fromarray(low).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        field = np.asarray(image, np.float32)
        field = field + float(rng.uniform(0, 30)) * _stripes(rng)[..., None]
        field = field.mean(-1, keepdims=True) * 0.5 + field * 0.5
    tint = field.mean((0, 1)) + rng.normal(0, 15, 3)
    keep = float(rng.uniform(0.35, 0.8))  # a background keeps this share of its own contrast
    return np.asarray(field * keep + tint * (1 - keep), np.float32)


def _stripes(rng: np.random.Generator) -> npt.NDArray[np.float32]:
    angle = rng.uniform(0, math.pi)
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)
    phase = (x * math.cos(angle) + y * math.sin(angle)) * rng.uniform(0.2, 1.2)
    return np.asarray(np.sin(phase), np.float32)


def object_mask(item: SceneObject) -> Image.Image:
    """Return an object's antialiased coverage as an 8-bit greyscale picture of 96 x 96."""
    mask = Image.new("L", (SIDE, SIDE), 0)
    # The box that holds the object at any angle, and its corner on the pixel grid.
    reach = math.ceil(item.extent * 0.75) + 1
    left, top = math.floor(item.cx) - reach, math.floor(item.cy) - reach
    box = 2 * reach + 1
    if item.kind == "digit":
        small = _digit_mask(item, box)
    else:
        scale = _SUPERSAMPLE
        large = Image.new("L", (box * scale, box * scale), 0)
        pen = ImageDraw.Draw(large)
        points = [((item.cx - left + dx) * scale, (item.cy - top + dy) * scale) for dx, dy in outline(item)]
        pen.polygon(points, fill=255)
        small = large.reduce(scale)
    mask.paste(small, (left, top))
    return mask


def _digit_mask(item: SceneObject, box: int) -> Image.Image:
    glyph = Image.fromarray((digit_images()[0][item.digit_index] * 255).astype(np.uint8))
    side = round(item.extent)
    glyph = glyph.resize((side, side), Image.Resampling.BICUBIC)
    glyph = glyph.rotate(item.angle, Image.Resampling.BICUBIC)
    glyph = glyph.point([min(255, max(0, round((v - 64) * 1.9))) for v in range(256)])
    field = Image.new("L", (box, box), 0)
    field.paste(glyph, ((box - side) // 2, (box - side) // 2))
    return field


def outline(item: SceneObject) -> list[tuple[float, float]]:
    """Return the corners of a shape around its centre, in pixels."""
    turn = math.radians(item.angle)
    radius = item.extent / 2
    if item.kind == "circle":
        spokes = [(radius, k * math.tau / 48) for k in range(48)]
    elif item.kind == "square":
        spokes = [(radius * 1.2, math.pi / 4 + k * math.pi / 2) for k in range(4)]
    elif item.kind == "triangle":
        spokes = [(radius * 1.15, -math.pi / 2 + k * math.tau / 3) for k in range(3)]
    else:
        spokes = [(radius * (1.15 if k % 2 == 0 else 0.5), -math.pi / 2 + k * math.pi / 5) for k in range(10)]
    return [(r * math.cos(a + turn), r * math.sin(a + turn)) for r, a in spokes]
