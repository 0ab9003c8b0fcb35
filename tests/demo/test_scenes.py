"""The scene generator: the same from the same seed, answers that follow from the description."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest

from demo import questions, scenes
from demo.questions import Phrase, Question
from demo.scenes import Scene, SceneObject

SEEDS = range(60)


def asked(scene: Scene, count: int = 20) -> list[Question]:
    rng = np.random.default_rng([scene.seed, 7])
    drawn = [questions.sample_question(scene, rng) for _ in range(count)]
    return [question for question in drawn if question is not None]


def parse(words: str) -> Phrase:
    """Read a noun phrase back from a question's text."""
    *adjectives, noun = words.split()
    size = next((w for w in adjectives if w in scenes.SIZES), "")
    color = next((w for w in adjectives if w in scenes.COLORS), "")
    assert len(adjectives) == bool(size) + bool(color)
    singular = noun.removesuffix("s") if noun not in ("shapes", "objects") else noun[:-1]
    return Phrase(singular, color, size)


def fitting(scene: Scene, words: str) -> list[SceneObject]:
    phrase = parse(words)
    return [item for item in scene.objects if phrase.fits(item)]


@pytest.mark.parametrize("split", ["train", "test"])
def test_same_seed_same_picture(split: scenes.Split) -> None:
    for seed in range(5):
        first, second = (scenes.sample_scene(seed, split) for _ in range(2))
        assert first == second
        np.testing.assert_array_equal(scenes.draw(first), scenes.draw(second))
        assert asked(first) == asked(second)


def test_seeds_and_splits_differ() -> None:
    pictures = {
        scenes.draw(scenes.sample_scene(seed, s)).tobytes() for seed in range(10) for s in ("train", "test")
    }
    assert len(pictures) == 20


def test_splits_share_no_digit_and_no_photograph() -> None:
    for value in range(10):
        train, test = (set(scenes.digit_indices(s, value)) for s in ("train", "test"))
        assert train
        assert test
        assert not train & test
    for name in scenes.PHOTOGRAPHS:
        import skimage.data

        whole = getattr(skimage.data, name)()
        left, right = scenes.photograph(name, "train"), scenes.photograph(name, "test")
        np.testing.assert_array_equal(np.concatenate([left, right], axis=1), whole)


def test_scene_holds_what_it_says() -> None:
    for seed in SEEDS:
        scene = scenes.sample_scene(seed, "test")
        assert 2 <= len(scene.objects) <= 4
        picture, owner = scenes.draw_with_patches(scene)
        assert picture.shape == (96, 96, 3)
        assert picture.dtype == np.uint8
        for i, item in enumerate(scene.objects):
            assert item.extent / 2 <= min(item.cx, item.cy)
            assert max(item.cx, item.cy) <= scenes.SIDE - item.extent / 2
            assert (owner == i + 1).any(), "every object covers a patch"
            assert (item.value >= 0) == (item.kind == "digit")
            for other in scene.objects[:i]:
                apart = max(abs(item.cx - other.cx), abs(item.cy - other.cy))
                assert apart > (item.extent + other.extent) / 2


def test_answers_follow_from_the_description() -> None:
    """Every answer is worked out a second time from the text alone; referents are unique."""
    seen = set()
    for seed in SEEDS:
        scene = scenes.sample_scene(seed, "test")
        for question in asked(scene):
            assert answer(scene, question) == question.answer, (scene, question)
            seen.add(question.type)
    assert seen == set(questions.TYPES)


def one(scene: Scene, words: str) -> SceneObject:
    (item,) = fitting(scene, words)
    return item


def answer(scene: Scene, question: Question) -> str:
    return globals()[f"answer_{question.type}"](scene, question.text)  # type: ignore[no-any-return]


def answer_color(scene: Scene, text: str) -> str:
    match = re.fullmatch(r"(?:What|Which) (?:is the )?color (?:is|of|does) the (.+?)(?: have)?\?", text)
    assert match, text
    return one(scene, match[1]).color


def answer_shape(scene: Scene, text: str) -> str:
    match = re.fullmatch(r"What (?:shape |kind of \w+ )?is the (.+)\?", text)
    assert match, text
    return one(scene, match[1]).kind


def answer_count(scene: Scene, text: str) -> str:
    match = re.fullmatch(r"How many (.+?) (?:are there|are in the picture|can you see)\?", text)
    assert match, text
    return str(len(fitting(scene, match[1])))


def answer_existence(scene: Scene, text: str) -> str:
    match = re.fullmatch(
        r"(?:Is there|Can you see|Does the picture show) an? (.+?)(?: in the picture)?\?", text
    )
    assert match, text
    return "yes" if fitting(scene, match[1]) else "no"


def answer_position(scene: Scene, text: str) -> str:
    words = re.search(r"(?:is|Is) the (.+?)(?: on the| at the|\?)", text)
    assert words, text
    item = one(scene, words[1])
    middle = scenes.SIDE / 2
    vertical = "top" if item.cy < middle else "bottom"
    horizontal = "left" if item.cx < middle else "right"
    if "left or" in text:
        assert abs(item.cx - middle) >= questions.PLACE_MARGIN
        return horizontal
    if "top or" in text:
        assert abs(item.cy - middle) >= questions.PLACE_MARGIN
        return vertical
    assert min(abs(item.cx - middle), abs(item.cy - middle)) >= questions.PLACE_MARGIN
    return f"{vertical} {horizontal}"


def answer_relation(scene: Scene, text: str) -> str:
    relation = "(to the left of|left of|to the right of|right of|above|below)"
    match = re.fullmatch(rf"Is the (.+?) {relation} the (.+)\?", text)
    if match:
        along = questions.distance_along(match[2], one(scene, match[1]), one(scene, match[3]))
        assert abs(along) >= questions.RELATION_MARGIN
        return "yes" if along > 0 else "no"
    match = re.fullmatch(rf"What (is|color is the \w+) {relation} the (.+)\?", text)
    assert match, text
    anchor = one(scene, match[3])
    (found,) = [
        item
        for item in scene.objects
        if item is not anchor and questions.distance_along(match[2], item, anchor) > 0
    ]
    return found.kind if match[1] == "is" else found.color


def answer_digit(scene: Scene, text: str) -> str:
    colors = [word for word in re.findall(r"\w+", text) if word in scenes.COLORS]
    digits = [
        item for item in scene.objects if item.kind == "digit" and (not colors or item.color == colors[0])
    ]
    (item,) = digits
    return str(item.value)


@pytest.mark.parametrize("type_", questions.TYPES)
def test_no_answer_is_a_good_guess(type_: str) -> None:
    answers: list[str] = []
    for seed in range(250):
        scene = scenes.sample_scene(seed, "test")
        rng = np.random.default_rng([seed, 9])
        question = questions.sample_question(scene, rng, type_)
        answers += [question.answer] if question is not None else []
    most = max(answers.count(a) for a in set(answers)) / len(answers)
    assert len(answers) >= 80
    assert most <= {"existence": 0.6, "relation": 0.5, "count": 0.4}.get(type_, 0.35)


def test_a_crowd_is_eight_small_objects_apart() -> None:
    for seed in range(20):
        scene = scenes.sample_crowd(seed)
        assert scene == scenes.sample_crowd(seed)
        assert [(item.size, item.kind in scenes.SHAPES) for item in scene.objects] == [("small", True)] * 8
        for a, b in itertools.combinations(scene.objects, 2):
            assert max(abs(a.cx - b.cx), abs(a.cy - b.cy)) >= (a.extent + b.extent) / 2
