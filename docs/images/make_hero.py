"""Makes hero.jpg: the demo model's picks in a drawn scene. Run: python -m docs.images.make_hero BUNDLE [--tokens K]."""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from demo.scenes import COLORS, SIDE, SceneObject, outline, photograph
from resprune import Pipeline
from resprune.runtime.drawing import draw_kept
from resprune.runtime.show import save_drawing

HERE = Path(__file__).parent
QUESTION = "What color is the star?"
PIXELS = 1536  # drawn in, and halved
OBJECTS = (
    SceneObject("star", "yellow", "large", 30, 32, 34, 6),
    SceneObject("circle", "blue", "large", 70, 26, 28),
    SceneObject("square", "green", "large", 66, 68, 27, -8),
    SceneObject("triangle", "purple", "small", 27, 74, 18, 5),
)


def scene() -> Image.Image:
    """Solid shapes on the wood of a photograph, scikit-image's `coffee` (CC0), of which a part is taken."""
    photo = photograph("coffee", "test")
    image = Image.fromarray(np.ascontiguousarray(photo[:110, -110:])).resize(
        (PIXELS, PIXELS), Image.Resampling.BICUBIC
    )
    image = Image.blend(image, Image.new("RGB", image.size, (150, 128, 110)), 0.35)
    for item in OBJECTS:
        mask = _mask(item, 0)
        for blur, shift, dark in ((30, 34, 0.55), (8, 10, 0.35)):
            shadow = _mask(item, shift).filter(ImageFilter.GaussianBlur(blur))
            image.paste((24, 16, 12), mask=shadow.point(lambda value, dark=dark: round(value * dark)))
        light = Image.linear_gradient("L").resize(image.size)
        body = Image.new("RGB", image.size, COLORS[item.color])
        body = Image.composite(
            ImageChops.multiply(body, Image.new("RGB", image.size, (215, 215, 215))), body, light
        )
        inner = mask.filter(ImageFilter.GaussianBlur(9))
        rim = ImageChops.subtract(mask, inner.point(lambda value: max(0, 2 * value - 255)))
        image.paste(body, mask=mask)
        image.paste((255, 255, 255), mask=ImageChops.multiply(rim, Image.new("L", image.size, 90)))
    return image.resize((PIXELS // 2, PIXELS // 2), Image.Resampling.LANCZOS)


def _mask(item: SceneObject, shift: int) -> Image.Image:
    scale = PIXELS / SIDE
    mask = Image.new("L", (PIXELS, PIXELS), 0)
    corners = [((item.cx + x) * scale + shift, (item.cy + y) * scale + shift) for x, y in outline(item)]
    ImageDraw.Draw(mask).polygon(corners, fill=255)
    return mask


def main() -> None:
    """Draw the scene, ask, and draw what was kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", help="of the demo model")
    parser.add_argument("--tokens", type=int, default=16, help="default: %(default)s")
    arguments = parser.parse_args()
    image = scene()
    with Pipeline.load(arguments.bundle) as pipeline:
        answer = pipeline.ask(image, QUESTION, tokens=arguments.tokens, stream=False)
        picks = answer.images[0].pick_order.tolist()
        drawing = draw_kept(image, pipeline.boxes(image.size), picks, QUESTION, answer.text)
    image.save(HERE / "scene.jpg", quality=88)
    save_drawing(drawing, HERE / "hero.jpg")
    print(answer.text)


if __name__ == "__main__":
    main()
