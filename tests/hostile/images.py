"""Images: the same pixels in other files, damaged files, and what is no image at all."""

import io
import os
import struct
import zlib
from pathlib import Path
from random import Random

from PIL import Image, PngImagePlugin

from tests.hostile.case import QUESTION, SHORT, Case, World, clean_answer
from tests.hostile.values import damaged

NAMES = (
    "photo",
    "-photo",
    "--json",
    "a b",
    "naïve 🎉",
    "new\nline",
    "\x1b[2Jescape",
    "x" * 200,
    "%s",
    "$(id)",
    "a\udcff\udcfe",
)
LOSSLESS = (("PNG", "png"), ("BMP", "bmp"), ("TIFF", "tif"), ("PPM", "ppm"), ("WEBP", "webp"))
LOSSY = (
    ("JPEG", "jpg"),
    ("GIF", "gif"),
    ("WEBP", "webp"),
    ("JPEG2000", "jp2"),
    ("TIFF", "tif"),
    ("PNG", "png"),
)


def make(random: Random, folder: Path, world: World) -> Case:
    """A case about images."""
    return random.choice([_same, _damaged, _damaged, _odd, _no_image, _size, _show])(random, folder, world)


def _ask(world: World, random: Random, path: Path, *words: str) -> tuple[Path, list[str]]:
    bundle = random.choice(list(world.bundles.values()))
    return bundle, ["ask", str(bundle), *SHORT, *words, "--", str(path), QUESTION]


def _same(random: Random, folder: Path, world: World) -> Case:
    """The photo's pixels, in another lossless format under an odd name."""
    form, suffix = random.choice(LOSSLESS)
    path = folder / f"{random.choice(NAMES)}.{random.choice([suffix, 'png', 'txt', 'mp4'])}"
    options = {"lossless": True} if form == "WEBP" else {}
    with Image.open(world.photo) as photo:
        photo.save(path, form, **options)
    bundle, words = _ask(world, random, path)
    return Case("image", f"same pixels, {form}", words, lambda: clean_answer(bundle, world.photo))


def _file(random: Random, world: World) -> bytes:
    form, _ = random.choice(LOSSY)
    content = io.BytesIO()
    with Image.open(world.photo) as photo:
        photo.save(content, form)
    return content.getvalue()


def _damaged(random: Random, folder: Path, world: World) -> Case:
    path = folder / "damaged.png"
    path.write_bytes(damaged(random, _file(random, world)))
    return _as_decoded(random, folder, world, path, "damaged")


def _as_decoded(random: Random, folder: Path, world: World, path: Path, what: str) -> Case:
    """An answer to it is the answer to the pixels that it decodes to."""
    bundle, words = _ask(world, random, path)

    def expected() -> str:
        from resprune.runtime.families.image import load_image

        load_image(path).save(folder / "decoded.png")
        return clean_answer(bundle, folder / "decoded.png")

    return Case("image", what, words, expected)


def _odd(random: Random, folder: Path, world: World) -> Case:
    """Modes, palettes, orientations, profiles and text that few files have."""
    path = folder / "odd.png"
    mode = random.choice(["1", "L", "LA", "P", "RGBA", "I;16", "I", "F", "CMYK", "YCbCr", "LAB"])
    with Image.open(world.photo) as photo:
        odd = (
            photo.convert("L").convert("I;16" if mode == "I;16" else mode)
            if mode[0] in "IF"
            else photo.convert(mode)
        )
    form = "PNG" if mode in ("1", "L", "LA", "P", "RGBA", "I;16") else "TIFF"
    exif = Image.Exif()
    exif[0x0112] = random.randrange(12)
    extra = {"exif": exif.tobytes()} if random.random() < 0.5 else {}
    if form == "PNG" and random.random() < 0.5:
        text = PngImagePlugin.PngInfo()
        text.add_text("comment", "x" * random.choice([1, 1_000, 2_000_000]), zip=True)
        extra["pnginfo"] = text
    odd.save(path, form, **extra)
    return _as_decoded(random, folder, world, path, f"mode {mode}")


def _no_image(random: Random, folder: Path, world: World) -> Case:
    """Things at the path of an image that are none."""
    path = folder / "no.png"
    contents = {
        "empty": b"",
        "text": b"hello",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="/etc/passwd"/></svg>',
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nrun\n%%EOF\n",
        "pdf": b"%PDF-1.7\n",
        "film": b"\0\0\0\x18ftypmp42" + bytes(40),
        "zip": b"PK\x03\x04" + bytes(40),
        "noise": random.randbytes(5000),
        "magic": random.choice([b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"II*\0", b"RIFF0000WEBP"])
        + random.randbytes(300),
    }
    what = random.choice(
        [*contents, "pipe", "folder", "missing", "loop", "zero", "no right", "long name", "memory"]
    )
    if what in contents:
        path.write_bytes(contents[what])
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "loop":
        path.symlink_to(path)
    elif what == "long name":
        path = folder / ("x" * 5000)
    elif what in ("zero", "memory"):
        path = Path({"zero": "/dev/zero", "memory": "/proc/self/mem"}[what])
    elif what == "no right":
        path.write_bytes(b"")
        path.chmod(0)
    _, words = _ask(world, random, path)
    return Case("image", what, words, refused=True)


def _size(random: Random, folder: Path, world: World) -> Case:
    """Sizes from one pixel to more than any memory."""
    path = folder / "size.png"
    sides = random.choice(
        [(1, 1), (1, 3000), (3000, 1), (2, 199), (200, 1), (5000, 13), (1, 65000), (60000, 60000)]
    )
    if sides[0] * sides[1] < 1 << 22:
        Image.new("RGB", sides, (random.randrange(256), 80, 20)).save(path)
        return _as_decoded(random, folder, world, path, f"{sides[0]} x {sides[1]}")
    header = b"IHDR" + struct.pack(">IIBBBBB", *sides, 8, 2, 0, 0, 0)
    chunks = b""
    for chunk in (header, b"IDAT" + zlib.compress(bytes(1 << 20)), b"IEND"):
        chunks += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    _, words = _ask(world, random, path)
    return Case("image", f"{sides[0]} x {sides[1]}", words, refused=True)


def _show(random: Random, folder: Path, world: World) -> Case:
    """Drawings where none can be written, or where they would replace something."""
    photo = folder / "photo.png"
    photo.write_bytes(world.photo.read_bytes())
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    names = [
        "kept.psd",
        "kept.mpg",
        "kept.fits",
        "kept.ico",
        "kept.pdf",
        "kept",
        "",
        "none/kept.png",
        "photo.png",
    ]
    names += ["folder.png", "pipe.png", "x" * 300 + ".png", "kept.png/", "/dev/full"]
    fine = ["kept.png", "kept.jpg", "naïve 🎉.webp", "a\udcff.png"]
    name = random.choice(names + fine)
    bundle, words = _ask(world, random, photo, "--show", str(folder / name) if name else "")
    if name in fine:
        return Case("image", f"--show {name!a}", words, lambda: clean_answer(bundle, world.photo))
    return Case(
        "image",
        f"--show {name!a}",
        words,
        refused=name != "kept.png/",
        reason="" if name != "kept.png/" else "the path is that of a file",
    )
