"""Images → pixel values, as the checkpoint's Hugging Face processor makes them, with Pillow and numpy.

Equal to the processors' PIL backend (transformers 5) to the last bit, but for what `load_image` says. Where
torchvision is installed, Hugging Face resizes with it, and that differs from its own PIL backend by rounding.
"""

import io
import os
import stat
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from resprune.runtime.arguments import whole
from resprune.runtime.defaults import MAX_PIXELS
from resprune.runtime.errors import ResPruneError, one_line, shown

MAX_INTERMEDIATE_PIXELS = 4 * MAX_PIXELS  # a panorama of the largest size, padded to a square, still passes
# Raster formats alone: Pillow would hand an EPS file to Ghostscript, and knows many formats nobody fuzzes.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")

ImageSource: TypeAlias = str | Path | bytes | Image.Image | npt.NDArray[np.uint8]
LARGEST = 1e30  # of the settings' numbers: far above any in use, far below where float32 ends
Box: TypeAlias = tuple[float, float, float, float]  # left, top, right, bottom, in pixels of the image


def load_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open an image as 8-bit RGB, turned upright by its EXIF orientation.

    `source` is a path, the bytes of a file, a Pillow image, or a uint8 array [H, W], [H, W, 1], [H, W, 3] or
    [H, W, 4] (RGBA); float arrays are refused, as their range cannot be known. Transparent pixels are blended
    onto white and every other mode is converted by Pillow, as the Hugging Face processors do; 16-bit grey is
    scaled to 8 bits, where they clip it to white. Of an animation the first frame is taken, as they take it.

    Raises `ResPruneError` for what is no image (a video is called one), is cut short, or has more than
    `max_pixels`, which is read from the header before anything is decoded (Pillow's own limit, twice
    `PIL.Image.MAX_IMAGE_PIXELS`, stands above it). A path has to lead to a plain file: a pipe may never end.
    """
    name = one_line(source) if isinstance(source, str | Path) else "the image"
    max_pixels = whole(max_pixels, "max_pixels", 1)
    try:
        with warnings.catch_warnings():  # Pillow warns of broken EXIF and of sizes that are checked below
            warnings.simplefilter("ignore")
            image = _open(source, name)
            if image.width * image.height > max_pixels:
                raise ResPruneError(
                    f"{name} has {image.width} x {image.height} pixels, more than the limit of {max_pixels}; "
                    f"make it smaller or raise the limit"
                )
            if 0 in image.size:
                raise ResPruneError(f"{name} has no pixels; give an image with some")
            image.load()
            return _rgb(ImageOps.exif_transpose(image), name)
    except (ResPruneError, KeyboardInterrupt):
        raise
    except FileNotFoundError:
        raise ResPruneError(f"there is no file {name}; check the path of the image") from None
    except UnidentifiedImageError:
        if _is_video(source):
            raise ResPruneError(
                f"{name} is a video, and this model answers about images; give one of its frames"
            ) from None
        raise ResPruneError(
            f"{name} is not an image that can be read (formats: {', '.join(FORMATS)})"
        ) from None
    except Image.DecompressionBombError:
        raise ResPruneError(
            f"{name} has more pixels than Pillow opens ({2 * (Image.MAX_IMAGE_PIXELS or 0)}); make it smaller"
        ) from None
    except Exception as error:  # on a damaged file Pillow's decoders raise what they like
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        raise ResPruneError(f"{name} cannot be read as an image ({reason}); give an undamaged file") from None


def _open(source: ImageSource, name: str) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, bytes):
        file: Path | io.BytesIO = io.BytesIO(source)
    elif isinstance(source, str | Path):
        file = Path(source)
        if not stat.S_ISREG(os.stat(file).st_mode):  # noqa: PTH116 - as load_image catches its faults
            raise ResPruneError(f"{name} is not a plain file; save the image to one and give that")
    else:
        raise ResPruneError(
            f"an image is a path, bytes, a Pillow image or a numpy array, not {type(source).__name__}"
        )
    Image.init()
    return Image.open(file, formats=[known for known in FORMATS if known in Image.OPEN])


def _is_video(source: ImageSource) -> bool:
    """Whether what Pillow cannot read begins as MP4, MOV or 3GP, AVI, Matroska or WebM, MPEG, Ogg, ASF or FLV do."""
    if isinstance(source, bytes):
        head = source[:12]
    elif isinstance(source, str | Path):
        with Path(source).open("rb") as file:
            head = file.read(12)
    else:
        return False
    images = (b"heic", b"heix", b"mif1", b"msf1", b"avif", b"avis")  # the same container
    return (
        (head[4:8] == b"ftyp" and head[8:12] not in images)
        or (head[:4] == b"RIFF" and head[8:12] == b"AVI ")
        or head[:4]
        in (b"\x1a\x45\xdf\xa3", b"\x00\x00\x01\xba", b"\x00\x00\x01\xb3", b"OggS", b"\x30\x26\xb2\x75")
        or head[:4] == b"FLV\x01"
    )


def _from_array(array: npt.NDArray[np.uint8]) -> Image.Image:
    if array.dtype != np.uint8:
        raise ResPruneError(
            f"a numpy image has to be uint8 in 0..255, not {array.dtype}; "
            f"for floats in 0..1 give (255 * array).round().astype(np.uint8)"
        )
    if array.ndim == 4:
        raise ResPruneError(
            f"an array of the shape {list(array.shape)} is a video, and this model answers about images; "
            "give one of its frames, or a list of images"
        )
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ResPruneError(
            f"a numpy image has the shape [H, W], [H, W, 3] or [H, W, 4], not {list(array.shape)}; transpose it"
        )
    return Image.fromarray(np.ascontiguousarray(array))


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ResPruneError(
            f"{name} has 32-bit pixels whose range is unknown; convert it to 8 bits a channel"
        )
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


OPENAI_CLIP = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
IMAGENET_STANDARD = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
COMMON = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
    "resample": 3,
}
CROPPED = COMMON | {"do_center_crop": True, "size": {"shortest_edge": 224}, "crop_size": 224}

# What each processor takes for a key that preprocessor_config.json leaves out, as in transformers 5.
DEFAULTS: dict[str, dict[str, Any]] = {
    "CLIPImageProcessor": CROPPED | OPENAI_CLIP,
    "BitImageProcessor": CROPPED | OPENAI_CLIP,  # the one DINOv2 checkpoints name
    "LlavaImageProcessor": CROPPED | OPENAI_CLIP,
    "SiglipImageProcessor": COMMON | IMAGENET_STANDARD | {"size": {"height": 224, "width": 224}},
    "Gemma3ImageProcessor": COMMON
    | IMAGENET_STANDARD
    | {"size": {"height": 224, "width": 224}, "resample": 2, "default_to_square": True},
}


@dataclass(frozen=True)
class ImageProcessor:
    """Pad, resize, crop, rescale, normalise: the steps of one preprocessor_config.json; None leaves one out.

    `pad_color` (RGB, 0 to 255) pads to a square. `shortest_edge` pixels, or `resize_to` (height, width) in its place;
    `crop` (height, width) is cut from the middle. `normalize` is mean and standard deviation of each channel, after
    the multiplication by `rescale_factor`.
    """

    pad_color: tuple[int, ...] | None  # LLaVA's own processor pads to a square first
    shortest_edge: int | None
    resize_to: tuple[int, int] | None  # (height, width), in place of shortest_edge
    resample: Image.Resampling
    crop: tuple[int, int] | None  # (height, width)
    rescale_factor: float | None
    normalize: tuple[tuple[float, ...], tuple[float, ...]] | None  # mean and std of each channel

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> "ImageProcessor":
        """From the content of a preprocessor_config.json, of transformers 5 or of any version before it.

        Raises `ResPruneError` for an unknown processor type, naming it, and for a value that makes no sense.
        """
        kind = _processor_type(config)
        if kind not in DEFAULTS:
            raise ResPruneError(
                f"the image processor {kind} is not supported; supported are {', '.join(DEFAULTS)}"
            )
        settings = DEFAULTS[kind] | dict(config)  # a null switches a step off, as it does in transformers
        llava = kind == "LlavaImageProcessor"
        if settings.get("do_pad") and settings.get("pad_size") is not None and not llava:
            raise setting_fault("pad_size", settings["pad_size"])
        pad_color, normalize = None, None
        if settings.get("do_pad") and llava:
            pad_color = tuple(int(255 * value) for value in _channels(settings, "image_mean"))
        if settings["do_normalize"]:
            normalize = (_channels(settings, "image_mean"), _channels(settings, "image_std"))
            if min(normalize[1]) <= 0:
                raise setting_fault("image_std", settings["image_std"])
        shortest_edge, resize_to, crop, resample = None, None, None, Image.Resampling.BICUBIC
        if settings["do_resize"]:
            square = settings.get("default_to_square", False)
            shortest_edge, resize_to = _size(settings["size"], "size", square=square)
            resample = _resample(settings["resample"])
        if settings.get("do_center_crop"):
            crop = _size(settings.get("crop_size"), "crop_size", square=True)[1]
            if crop is None:
                raise setting_fault("crop_size", settings.get("crop_size"))
        if crop is None and resize_to is None and not (pad_color and shortest_edge):
            raise ResPruneError(
                "preprocessor_config.json leaves images of different sizes, and the vision graph takes one; "
                "set do_center_crop and crop_size, or height and width in size"
            )
        rescales = settings["do_rescale"]
        return ImageProcessor(
            pad_color=pad_color,
            shortest_edge=shortest_edge,
            resize_to=resize_to,
            resample=resample,
            crop=crop,
            rescale_factor=_number(settings["rescale_factor"], "rescale_factor") if rescales else None,
            normalize=normalize,
        )

    def __call__(self, image: Image.Image) -> npt.NDArray[np.float32]:
        """RGB image → `pixel_values` [3, H, W] float32."""
        steps = self._steps(image.size)
        if self.pad_color is not None:
            square = Image.new("RGB", steps.padded, self.pad_color)
            square.paste(image, steps.pad_offset)
            image = square
        if image.size != steps.resized:
            image = image.resize(steps.resized, self.resample)
        left, top = steps.crop_offset
        if image.size != steps.size:  # beyond the edges, crop fills with black as Hugging Face does
            image = image.crop((left, top, left + steps.size[0], top + steps.size[1]))
        pixels = np.asarray(image)  # [H, W, 3] uint8
        values = self._values()
        return np.stack([values[channel][pixels[:, :, channel]] for channel in range(3)])  # [3, H, W]

    def patch_boxes(self, image_size: tuple[int, int], patch_size: int) -> list[Box]:
        """Left, top, right, bottom in pixels of each patch in an image of `image_size` (width, height).

        A patch is `patch_size` pixels of what the tower gets. Row by row as the tower numbers its tokens (a class token
        has no place and is not counted); a patch that the crop or the pad puts partly outside is cut at the edge, one
        wholly outside has no area.
        """
        steps = self._steps(image_size)
        columns, rows = steps.size[0] // patch_size, steps.size[1] // patch_size

        def edges(axis: int, count: int) -> list[float]:
            scale = steps.padded[axis] / steps.resized[axis]
            places = [
                (index * patch_size + steps.crop_offset[axis]) * scale - steps.pad_offset[axis]
                for index in range(count + 1)
            ]
            return [min(max(place, 0.0), float(image_size[axis])) for place in places]

        x, y = edges(0, columns), edges(1, rows)
        return [
            (x[column], y[row], x[column + 1], y[row + 1]) for row in range(rows) for column in range(columns)
        ]

    def _values(self) -> npt.NDArray[np.float32]:
        """[3, 256]: what each 8-bit value of each channel becomes, rounded at each step as Hugging Face does."""
        values = np.tile(np.arange(256, dtype=np.float32), (3, 1))
        if self.rescale_factor is not None:
            values = (values.astype(np.float64) * self.rescale_factor).astype(np.float32)
        if self.normalize is not None:
            mean, std = (np.array(part, dtype=np.float32)[:, None] for part in self.normalize)
            values = (values - mean) / std
        return values

    def _steps(self, image_size: tuple[int, int]) -> "_Steps":
        width, height = image_size
        padded, pad_offset = image_size, (0, 0)
        if self.pad_color is not None:
            side = max(width, height)
            padded, pad_offset = (side, side), ((side - width) // 2, (side - height) // 2)
        resized = padded
        if self.resize_to is not None:
            resized = (self.resize_to[1], self.resize_to[0])
        elif self.shortest_edge is not None:
            short, long = min(padded), max(padded)
            longer = int(self.shortest_edge * long / short)
            resized = (self.shortest_edge, longer) if padded[0] <= padded[1] else (longer, self.shortest_edge)
        # An image one pixel high is small, and made a square or enlarged by its height it is not.
        if max(padded[0] * padded[1], resized[0] * resized[1]) > MAX_INTERMEDIATE_PIXELS:
            raise ResPruneError(
                f"the image is too long and thin ({width} x {height} pixels); cut a part out of it"
            )
        size = resized if self.crop is None else (self.crop[1], self.crop[0])
        # Floor division of a negative number: a crop larger than the image starts outside it.
        crop_offset = ((resized[0] - size[0]) // 2, (resized[1] - size[1]) // 2)
        return _Steps(padded, pad_offset, resized, crop_offset, size)


@dataclass(frozen=True)
class _Steps:
    """Geometry of the steps for one image: (width, height) and (x, y) in pixels."""

    padded: tuple[int, int]
    pad_offset: tuple[int, int]  # of the image in the padded square
    resized: tuple[int, int]
    crop_offset: tuple[int, int]  # of the crop in the resized image; may be negative
    size: tuple[int, int]


def _processor_type(config: Mapping[str, Any]) -> str:
    """Name of the processor in any spelling of its time: CLIPFeatureExtractor, CLIPImageProcessorFast, …Pil."""
    name = config.get("image_processor_type") or config.get("feature_extractor_type")
    if not isinstance(name, str):
        raise ResPruneError("preprocessor_config.json names no image_processor_type; add it")
    return name.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")


def _size(value: object, key: str, *, square: bool) -> tuple[int | None, tuple[int, int] | None]:
    """(shortest edge, None) or (None, (height, width)) from a number, a pair or an object of old and new configs."""
    if isinstance(value, Mapping) and set(value) == {"shortest_edge"}:
        return _side(value["shortest_edge"], key), None
    if isinstance(value, Mapping) and set(value) == {"height", "width"}:
        return None, (_side(value["height"], key), _side(value["width"], key))
    if isinstance(value, list | tuple) and len(value) == 2:
        return None, (_side(value[0], key), _side(value[1], key))
    if isinstance(value, int) and not isinstance(value, bool):
        side = _side(value, key)
        return (None, (side, side)) if square else (side, None)
    raise setting_fault(key, value)


def _side(value: object, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 16384:
        raise setting_fault(key, value)
    return value


def _number(value: object, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST:
        raise setting_fault(key, value)
    return float(value)


def _channels(settings: Mapping[str, Any], key: str) -> tuple[float, ...]:
    value = settings.get(key)
    if isinstance(value, list | tuple) and len(value) == 3:
        return tuple(_number(part, key) for part in value)
    return (_number(value, key),) * 3


def _resample(value: Any) -> Image.Resampling:
    try:
        return Image.Resampling(value)
    except (ValueError, TypeError):
        raise setting_fault("resample", value) from None


def setting_fault(key: str, value: object) -> ResPruneError:
    """The error of a setting that no image processor can have."""
    return ResPruneError(
        f"{key} in preprocessor_config.json cannot be {shown(value)}; correct it in the checkpoint"
    )
