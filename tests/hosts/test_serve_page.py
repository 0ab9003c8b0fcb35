"""The page of `resprune serve` in Debian's Chromium: show, ask, slide, chat, fail; on a desk and on a phone."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from resprune import Pipeline
from tests.hosts import serve_page
from tests.hosts.conftest import Drive
from tests.hosts.demo import PICTURES
from tests.hosts.serve import served
from tests.hosts.serve_page import Step, slid

SQUARE, CIRCLE = "What color is the large square?", "Is there a circle?"
SIZES = {"desk": {"width": 1280, "height": 800}, "phone": {"width": 390, "height": 844}}
FOUND = """(() => {
  const texts = (query) => [...document.querySelectorAll(query)].map((one) => one.textContent);
  const shown = (id) => !document.getElementById(id).hidden;
  return {
    answers: texts(".assistant p"), questions: texts(".user"), facts: texts(".facts > *"), kept: texts("#kept")[0],
    rows: [...document.querySelectorAll("#rows tr")].map((row) => [...row.cells].map((cell) => cell.textContent)),
    stage: document.getElementById("canvas").getAttribute("aria-label"), images: texts("#thumbs li").length,
    alert: shown("alert") ? document.getElementById("alert").firstElementChild.textContent : "", key: shown("key"),
    wide: document.documentElement.scrollWidth > window.innerWidth, theme: document.documentElement.dataset.theme,
  };
})()"""


@pytest.fixture(scope="module")
def demo(exported: Callable[..., Path]) -> Path:
    return exported(k=144, split=True, positions="original")


@pytest.fixture(scope="module")
def address(demo: Path) -> Iterator[str]:
    with served(demo) as url:
        yield url


def opened(url: str, *images: str) -> list[Step]:
    return [{"do": "goto", "url": url}, {"do": "see", "at": "#tokens:not(:disabled)"}, *shown(*images)]


def shown(*images: str) -> list[Step]:
    return [{"do": "file", "at": "#file", "path": str(PICTURES / image)} for image in images]


def asked(question: str, turn: int) -> list[Step]:
    return [*serve_page.asked(question, turn), {"do": "read", "of": FOUND}]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_show_ask_slide_and_chat(
    drive: Drive, address: str, demo: Path, size: str, scheme: str, tmp_path: Path
) -> None:
    picture = tmp_path / f"{size}.png"
    steps = [
        *opened(address, "shapes.png"),
        *slid(16),
        *asked(SQUARE, 1),
        *slid(5),
        {"do": "read", "of": FOUND},
        *slid(16),
        *shown("relation.png"),
        *asked(CIRCLE, 2),
        {"do": "click", "at": "#compare"},
        {"do": "see", "at": "#rows tr:nth-child(6)"},
        {"do": "see", "at": "#compare:not(:disabled)"},
        {"do": "read", "of": FOUND},
        {"do": "screenshot", "path": str(picture)},
    ]
    read = [one for one in drive(steps, viewport=SIZES[size], colorScheme=scheme)["read"] if one]
    first, smaller, second, compared = read
    with Pipeline.load(demo) as pipeline:
        one = pipeline.ask(PICTURES / "shapes.png", SQUARE, tokens=16, stream=False)
        chat = pipeline.look([PICTURES / "shapes.png", PICTURES / "relation.png"])
        image, words = {"type": "image"}, lambda text: {"type": "text", "text": text}
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": [image, words(SQUARE)]},
            {"role": "assistant", "content": [words(one.text)]},
            {"role": "user", "content": [image, words(CIRCLE)]},
        ]
        two = chat.answer(messages, tokens=16, stream=False)
    assert first["answers"] == [one.text]
    assert first["facts"][:2] == [
        "16 of 144 visual tokens",
        f"prompt {one.prompt_tokens} in place of {one.prompt_tokens + 128} tokens",
    ]
    assert first["kept"] == "16 of 144"
    assert first["stage"] == "shapes.png: 16 of 144 visual tokens kept"
    assert smaller["stage"] == "shapes.png: 5 of 144 visual tokens kept", "the slider shows the first picks"
    assert second["answers"] == [one.text, two.text]
    assert second["questions"][1].endswith(CIRCLE)
    assert (second["images"], second["facts"][4]) == (2, "32 of 288 visual tokens")
    rows = {int(row[0]): row for row in compared["rows"]}
    assert sorted(rows) == [9, 16, 18, 36, 72, 144]
    prompts = {k: int(row[2]) for k, row in rows.items()}
    assert all(prompts[k] == two.prompt_tokens + 2 * (k - 16) for k in rows)
    assert all(re.search(r"[\d.]+ m?s$", row[1]) for row in rows.values())
    assert rows[16][3] == two.text
    assert not any(found["wide"] or found["alert"] for found in read)
    assert compared["theme"] == scheme
    with Image.open(picture) as drawn:
        assert drawn.width == SIZES[size]["width"]
        assert len(np.unique(np.asarray(drawn.convert("RGB")).reshape(-1, 3), axis=0)) > 1000


def test_what_goes_wrong_is_told_and_the_page_goes_on(drive: Drive, address: str, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no image")
    steps = [
        *opened(address),
        {"do": "file", "at": "#file", "path": str(text)},
        {"do": "see", "at": "#alert:not([hidden])"},
        {"do": "read", "of": FOUND},
        *shown("shapes.png"),
        {"do": "fill", "at": "#question", "value": "square " * 1200},
        {"do": "see", "at": "#send:not(:disabled)"},
        {"do": "click", "at": "#send"},
        {"do": "see", "at": "#alert:not([hidden])"},
        {"do": "see", "at": "#send:not(:disabled)"},
        {"do": "read", "of": FOUND},
        *asked(SQUARE, 1),
    ]
    no_image, too_long, well = drive(steps, viewport=SIZES["desk"])["read"]
    assert no_image["alert"] == "notes.txt is not an image."
    assert "past the context" in too_long["alert"]
    assert too_long["answers"] == [], "what failed is no part of the chat"
    assert (well["alert"], well["answers"]) == ("", ["black"])


def test_a_key(drive: Drive, demo: Path) -> None:
    with served(demo, RESPRUNE_SERVE_KEY="sesame") as url:
        steps = [
            {"do": "goto", "url": url},
            {"do": "see", "at": "#key:not([hidden])"},
            {"do": "fill", "at": "#secret", "value": "sesame"},
            {"do": "press", "key": "Enter"},
            {"do": "see", "at": "#tokens:not(:disabled)"},
            *shown("shapes.png"),
            *asked(SQUARE, 1),
        ]
        (found,) = drive(steps, viewport=SIZES["phone"])["read"]
    assert (found["key"], found["answers"]) == (False, ["black"])
