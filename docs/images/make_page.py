"""Makes serve.png, serve-phone.png and serve.webp from the page of `resprune serve` in Debian's Chromium, and
browser.png from that of examples/web, where `npm ci` has been run.

Run: python -m docs.images.make_page BUNDLE (of the demo model, with --split and -k 144), after make_hero.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.hosts.npm import install_copy
from tests.hosts.serve import served
from tests.hosts.serve_page import Step, asked, slid

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BROWSER = ROOT / "tests" / "hosts" / "browser"
SQUARE, STAR = "What color is the large square?", "What color is the star?"
DESK, PHONE, SHORT = (
    {"width": 1280, "height": 800},
    {"width": 390, "height": 844},
    {"width": 1000, "height": 640},
)
FRAME_MS, LAST_MS = 260, 2200


def drive(steps: list[Step], viewport: dict[str, int]) -> None:
    """Take these steps in the browser."""
    plan = {"arguments": [], "context": {"viewport": viewport, "colorScheme": "light"}, "steps": steps}
    script = install_copy(BROWSER, "browser") / "drive.mjs"
    subprocess.run(
        ["node", str(script)], input=json.dumps(plan), text=True, check=True, stdout=subprocess.PIPE
    )


def opened(url: str) -> list[Step]:
    """The page, with an image on it."""
    return [
        {"do": "goto", "url": url},
        {"do": "see", "at": "#tokens:not(:disabled)"},
        {"do": "file", "at": "#file", "path": str(HERE / "scene.jpg")},
        {"do": "see", "at": "#thumbs li"},
    ]


def pictures(url: str) -> None:
    """serve.png and serve-phone.png: two answers, and budgets compared."""
    for viewport, name in ((DESK, "serve.png"), (PHONE, "serve-phone.png")):
        steps = [*opened(url), *slid(16), *asked(STAR, 1), *asked(SQUARE, 2)]
        steps += [
            {"do": "click", "at": "#compare"},
            {"do": "see", "at": "#rows tr:nth-child(6)"},
            {"do": "see", "at": "#compare:not(:disabled)"},
            # On a phone it stands over the page's end, which is all on a screenshot.
            {"do": "read", "of": "document.getElementById('ask').style.position = 'static'"},
            {"do": "screenshot", "path": str(HERE / name)},
        ]
        drive(steps, viewport)
        with Image.open(HERE / name) as image:
            image.convert("RGB").save(HERE / name, optimize=True)


def browser(bundle: str) -> None:
    """browser.png: the page that runs the bundle itself."""
    command = [sys.executable, ROOT / "examples" / "web" / "serve.py", bundle]
    command += ["--samples", ROOT / "demo" / "pictures", "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        steps: list[Step] = [
            {"do": "goto", "url": server.stdout.readline().strip()},
            {"do": "see", "at": "#samples button:nth-child(6)"},
            {"do": "file", "at": "#file", "path": str(HERE / "scene.jpg")},
            {"do": "fill", "at": "#question", "value": STAR},
            {"do": "see", "at": "#ask:not(:disabled)"},
            {"do": "click", "at": "#ask"},
            {"do": "wait", "until": "document.querySelector('#answer').dataset.ids"},
            *slid(16),
            {
                "do": "wait",
                "until": "JSON.parse(document.querySelector('#stage').dataset.picks).length === 16",
            },
            {"do": "screenshot", "path": str(HERE / "browser.png")},
        ]
        drive(steps, {"width": 1120, "height": 850})
    finally:
        server.terminate()
        server.wait()


def recording(url: str) -> None:
    """serve.webp: an image, a question as it is typed, its answer, and the slider from many tokens to few."""
    with tempfile.TemporaryDirectory() as folder:
        frames: list[Path] = []
        steps = opened(url)

        def shot() -> None:
            frames.append(Path(folder) / f"{len(frames)}.png")
            steps.append({"do": "screenshot", "path": str(frames[-1])})

        steps += slid(32)
        shot()
        for end in (5, 11, 18, len(STAR)):
            steps.append({"do": "fill", "at": "#question", "value": STAR[:end]})
            shot()
        steps += asked(STAR, 1)
        shot()
        for tokens in (24, 16, 12, 8, 4, 8, 12, 16):
            steps += slid(tokens)
            shot()
        steps += asked(SQUARE, 2)
        shot()
        drive(steps, SHORT)
        images = [Image.open(frame).convert("RGB") for frame in frames]
        first, *rest = images
        times = [FRAME_MS if number not in (0, 5) else 4 * FRAME_MS for number in range(len(frames) - 1)]
        first.save(
            HERE / "serve.webp",
            save_all=True,
            append_images=rest,
            duration=[*times, LAST_MS],
            loop=0,
            quality=80,
            method=6,
        )


def main() -> None:
    """Serve the bundle, and take them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", help="of the demo model")
    bundle = parser.parse_args().bundle
    with served(bundle) as url:
        pictures(url)
        recording(url)
    browser(bundle)


if __name__ == "__main__":
    main()
