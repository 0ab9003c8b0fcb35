import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageDraw, ImageFont

import resprune.serving
from resprune.runtime import caption
from resprune.runtime.caption import LARGE, MOST_LINES, RAMP, SOFT, Caption, font_for, pick_color, wrapped
from resprune.runtime.drawing import GAP, INK, MARGIN, NUMBERED, VEIL, draw_kept, panel_size
from resprune.runtime.families.image import Box, ImageProcessor

Pixels = npt.NDArray[np.uint8]


def grid(width: float, height: float, columns: int, rows: int = 0) -> list[Box | None]:
    """Boxes of `columns` x `rows` patches (0: as many), row by row."""
    rows = rows or columns
    x, y = width / columns, height / rows
    return [(c * x, r * y, (c + 1) * x, (r + 1) * y) for r in range(rows) for c in range(columns)]


def panels(drawing: Image.Image, size: tuple[int, int]) -> tuple[Pixels, Pixels]:
    """[H, W, 3] of the image itself and of its kept tokens, of an image that is not thin, drawn in `size`."""
    left = (drawing.width - 2 * size[0] - GAP) // 2
    one, two = (
        drawing.crop((start, MARGIN, start + size[0], MARGIN + size[1]))
        for start in (left, left + size[0] + GAP)
    )
    return np.asarray(one), np.asarray(two)


def is_color(pixels: Pixels, color: object) -> npt.NDArray[np.bool_]:
    return (pixels == np.array(color)).all(axis=-1)


@pytest.mark.parametrize(("side", "kept"), [(12, 16), (24, 64), (24, 192)])
@pytest.mark.parametrize("color", [(0, 0, 0), (255, 255, 255), VEIL], ids=str)
def test_kept_patches_are_clear_and_outlined_and_the_rest_is_dimmed(
    side: int, kept: int, color: tuple[int, int, int]
) -> None:
    picks = np.random.default_rng(0).permutation(side * side)[:kept].tolist()
    image, boxes = Image.new("RGB", (96, 96), color), grid(96, 96, side)
    own, shown = panels(draw_kept(image, boxes, picks), panel_size(image.size, boxes))
    assert is_color(own, color).all(), "the image itself stands beside it"
    patch = len(shown) // side
    for index in range(side * side):
        row, column = divmod(index, side)
        inside = shown[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
        if index not in picks:
            tagged = index + side in picks[:NUMBERED]  # whose number may stand above it
            assert tagged or np.abs(inside - (0.3 * np.array(color) + 0.7 * np.array(VEIL))).max() <= 1
            continue
        place = picks.index(index)
        assert is_color(inside[-1], pick_color(place, kept)).all(), "the outline"
        assert is_color(inside[-6:-4, -6:-4], color).all(), "clear inside"


def test_the_first_ten_have_numbers_in_pick_order() -> None:
    image, boxes = Image.new("RGB", (96, 96), (0, 0, 0)), grid(96, 96, 12)

    def patch(picks: list[int], index: int) -> Pixels:
        _, shown = panels(draw_kept(image, boxes, picks), (768, 768))
        row, column = divmod(index, 12)
        return shown[row * 64 : row * 64 + 64, column * 64 : column * 64 + 64]

    assert (patch([5, 7], 5) == patch([7, 5], 7)).all()
    assert (patch([5, 7], 7) != patch([7, 5], 7)).any()
    picks = list(range(60, 72))
    for place, index in enumerate(picks):
        has_number = bool(is_color(patch(picks, index), INK).any()) or bool(
            is_color(patch(picks, index)[3:20, 3:20], pick_color(place, 12)).mean() > 0.2
        )
        assert has_number == (place < NUMBERED)


def test_no_earlier_pick_is_hidden_by_a_later_one() -> None:
    """Tiles: a token of the whole view is twice as large as those of the tiles that lie upon it."""
    image = Image.new("RGB", (96, 96), (0, 0, 0))
    boxes = [*grid(96, 96, 6), *grid(96, 96, 12)]
    for picks in ([0, 36, 37, 48, 49], [36, 0, 37, 48, 49]):
        _, shown = panels(draw_kept(image, boxes, picks), (768, 768))
        first = pick_color(0, 5)
        edges = (slice(-1, None), 127) if picks[0] == 0 else (slice(-1, None), 63)
        bottom = shown[edges[1], : edges[1] + 1]
        assert is_color(bottom, first).all(), "the bottom line of the first pick is whole"


def test_a_number_does_not_hide_its_patch() -> None:
    image = Image.new("RGB", (96, 96), (0, 0, 0))
    boxes = grid(96, 96, 64)
    size = panel_size(image.size, boxes)
    _, shown = panels(draw_kept(image, boxes, [64 * 32 + 32]), size)
    patch = size[0] // 64
    inside = shown[32 * patch + 1 : 33 * patch - 1, 32 * patch + 1 : 33 * patch - 1]
    assert is_color(inside, (0, 0, 0)).all()
    assert is_color(shown[31 * patch - 6 : 32 * patch], RAMP[0]).any(), "it stands above"


def test_tokens_without_a_place_are_passed_over_and_keep_their_number() -> None:
    image, boxes = Image.new("RGB", (96, 96)), grid(96, 96, 12)
    boxes[3], boxes[4] = None, (8.0, 8.0, 8.0, 16.0)
    _, shown = panels(draw_kept(image, boxes, [3, 4, 9, -1, -1]), (768, 768))
    outlined = is_color(shown, pick_color(2, 3))
    rows, columns = np.nonzero(outlined)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, 63, 9 * 64, 9 * 64 + 63)
    assert not is_color(shown, pick_color(0, 3)).any()
    assert not is_color(shown, pick_color(1, 3)).any()


@pytest.mark.parametrize(
    ("size", "columns", "rows", "patch"),
    [
        ((60_000, 20), 24, 24, 12),  # squeezed into a square by its family
        ((20, 60_000), 24, 24, 12),
        ((1280, 160), 24, 24, 12),
        ((2800, 28), 100, 1, 15),  # square patches
        ((4000, 3000), 24, 24, 24),
        ((48, 96), 4, 8, 96),
        ((1000, 1000), 128, 128, 9),  # of 16,384 tokens: the largest panel
    ],
)
def test_patches_can_be_seen_in_a_drawing_of_bounded_size(
    size: tuple[int, int], columns: int, rows: int, patch: int
) -> None:
    boxes = grid(*size, columns, rows)
    width, height = panel_size(size, boxes)
    assert min(width / columns, height / rows) >= patch
    drawing = draw_kept(Image.new("RGB", size), boxes, range(min(64, len(boxes))), "?" * 5000, "!" * 5000)
    assert max(drawing.size) < 2700
    assert drawing.width * drawing.height < 5_000_000


def test_the_patches_of_a_center_crop_stay_square() -> None:
    processor = ImageProcessor.from_config({"image_processor_type": "SiglipImageProcessor"})
    width, height = panel_size((4000, 400), processor.patch_boxes((4000, 400), 14))
    assert width == 1560
    assert height <= 30 * 14


def test_the_image_given_is_left_as_it_was() -> None:
    image = Image.effect_noise((900, 900), 50).convert("RGB")
    before = image.tobytes()
    draw_kept(image, grid(900, 900, 12), [1, 2, 3])
    assert image.tobytes() == before


def test_question_answer_and_scale_stand_below() -> None:
    image, boxes = Image.new("RGB", (96, 96), (0, 0, 0)), grid(96, 96, 12)
    bare, full = draw_kept(image, boxes, [1, 2]), draw_kept(image, boxes, [1, 2], "What is it?", "a square")
    assert full.width == bare.width
    assert full.height >= bare.height + 2 * LARGE
    lines = np.asarray(full)[MARGIN + 768 :]
    middle = pick_color(80, 160)
    for color in RAMP[0], middle, RAMP[-1]:
        assert is_color(lines, color).any()
    assert not is_color(np.asarray(draw_kept(image, boxes, [1]))[MARGIN + 768 :], middle).any(), "one pick"
    assert (np.asarray(full.crop((0, 0, full.width, bare.height))) == np.asarray(bare))[: MARGIN + 800].all()


def test_long_texts_are_wrapped_and_cut() -> None:
    font = ImageFont.load_default(size=LARGE)
    words = "every word of it stands in one line or the next"
    lines = wrapped(words, font, 200)
    assert " ".join(lines) == words
    assert all(font.getlength(line) <= 200 for line in lines)
    assert wrapped("", font, 200) == []
    long = wrapped("x" * 10_000, font, 200)
    assert len(long) == MOST_LINES
    assert long[-1].endswith("…")
    assert wrapped("WW", font, 5) == ["W", "W"], "at least one character a line"


def test_what_no_font_can_write_is_still_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    assert font_for("What is it?").getname() == ImageFont.load_default(size=LARGE).getname()  # type: ignore[union-attr]
    monkeypatch.setattr(caption, "OTHER_FONTS", ("no-such-font.ttf",))
    caption._other_fonts.cache_clear()
    lines = Caption(300)
    lines.add_text("这是什么? \0\n 🎉 \u202e", SOFT)
    page = Image.new("RGB", (300, lines.height), (255, 255, 255))
    lines.draw(ImageDraw.Draw(page), 0, 0)
    assert page.getextrema()[0][0] < 255
    caption._other_fonts.cache_clear()


def test_the_page_draws_in_the_same_colors() -> None:
    script = (Path(resprune.serving.__file__).parent / "page" / "draw.js").read_text()
    ramp = re.search(r"const RAMP = (\[.*\]);", script)
    assert ramp is not None
    assert ramp[1] == str([list(color) for color in RAMP])
    assert f"const NUMBERED = {NUMBERED};" in script
    assert f"rgb({' '.join(map(str, VEIL))} / 0.7)" in script


def test_what_only_the_tower_kept_is_dimmed_half_as_much() -> None:
    image, boxes = Image.new("RGB", (96, 96)), grid(96, 96, 12)
    _, shown = panels(draw_kept(image, boxes, [20], candidates=[20, 100]), (768, 768))
    veiled = {index: shown[index // 12 * 64 + 40, index % 12 * 64 + 40] for index in (20, 100, 5)}
    for index, opacity in ((20, 0.0), (100, 0.35), (5, 0.7)):
        assert np.abs(veiled[index] - opacity * np.array(VEIL)).max() <= 1
