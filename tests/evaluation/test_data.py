"""The data sets, and one sentence for each fault of a file."""

import json
import shutil

import easy_vqa
import numpy as np
import pytest

from demo import questions as demo_questions
from demo import scenes
from resprune.evaluation.data import DataSet, Question, load_data, read_jsonl
from resprune.runtime.errors import ResPruneError
from resprune.runtime.families.image import load_image


def test_jsonl_is_read_in_the_order_of_its_pictures(questions):
    data = read_jsonl(questions)
    assert data.name == "mine"
    assert [(q.number, q.image[-5:]) for q in data.questions] == [
        *((n, "0.png") for n in (1, 4, 7)),
        *((n, "1.png") for n in (2, 5, 8)),
        *((n, "2.png") for n in (3, 6, 9)),
    ]
    first = data.questions[0]
    assert (first.text, first.answers, first.type) == (
        "what colour is the square on the table?",
        ("red",),
        "color",
    )
    assert load_image(first.load()).size == (40, 32)


def test_another_file_has_another_fingerprint(questions, tmp_path):
    line = {"image": str(questions.parent / "0.png"), "question": "what?", "answers": ["a", "b"]}
    other = tmp_path / "mine.jsonl"
    other.write_text(json.dumps(line) + "\n\n")
    data = read_jsonl(other)
    assert data.questions[0].answers == ("a", "b")
    assert data.fingerprint != read_jsonl(questions).fingerprint


def test_another_picture_of_the_same_name_is_another_fingerprint(questions, tmp_path):
    copy = shutil.copytree(questions.parent, tmp_path / "copy") / questions.name
    before = read_jsonl(copy).fingerprint
    assert read_jsonl(copy).fingerprint == before
    shutil.copyfile(copy.parent / "1.png", copy.parent / "0.png")
    assert read_jsonl(copy).fingerprint != before


@pytest.mark.parametrize("name", ["scenes", "crowd", "easyvqa"])
def test_a_change_of_what_is_made_is_another_fingerprint(name, monkeypatch):
    """A few questions are enough: of another answer, and of another drawing of the same scenes."""
    monkeypatch.setattr("resprune.evaluation.data.SCENES", 4)
    before = load_data(name).fingerprint
    assert load_data(name).fingerprint == before
    with monkeypatch.context() as changed:
        if name == "easyvqa":
            texts, answers, rows = easy_vqa.get_test_questions()
            wrong = texts, [*answers[:-1], "else"], rows
            changed.setattr(easy_vqa, "get_test_questions", lambda: wrong)
        else:
            changed.setitem(demo_questions._MAKERS, "color", lambda scene, rng: None)
        assert load_data(name).fingerprint != before
    if name != "easyvqa":
        draw = scenes.draw
        monkeypatch.setattr(scenes, "draw", lambda scene: draw(scene) ^ 1)
        assert load_data(name).fingerprint != before


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("\ud800", "not valid JSON"),
        ("[1]", "should be an object"),
        ('{"image": "0.png", "question": "q?"}', '"answer"'),
        ('{"image": "0.png", "question": "q?", "answers": []}', '"answers"'),
        ('{"image": "0.png", "question": "q?", "answers": [1]}', '"answers"'),
        ('{"image": "0.png", "question": " ", "answer": "a"}', '"question"'),
        ('{"image": 1, "question": "q?", "answer": "a"}', '"image"'),
        ('{"image": "0.png", "question": "q?", "answer": "a", "type": 1}', '"type"'),
        ('{"image": "none.png", "question": "q?", "answer": "a"}', "there is no image"),
        (
            json.dumps({"image": "aGk=" * 999, "question": "q?", "answer": "a"}),
            "should be the path of an image",
        ),
    ],
)
def test_a_malformed_line_is_named(questions, line, named):
    path = questions.parent / "bad.jsonl"
    good = json.dumps({"image": "0.png", "question": "q?", "answer": "a"})
    path.write_bytes(f"{good}\n{line}\n".encode(errors="surrogatepass"))
    with pytest.raises(ResPruneError, match=r"bad.jsonl, line 2: ") as error:
        read_jsonl(path)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_no_questions_no_file_no_such_name(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ResPruneError, match="has no questions"):
        read_jsonl(tmp_path / "empty.jsonl")
    with pytest.raises(ResPruneError, match="cannot be read"):
        read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(ResPruneError, match="easyvqa, scenes, crowd"):
        load_data("coco")


@pytest.mark.parametrize(
    ("answer", "right"),
    [("Red", True), (" red. ", True), ("dark  red", True), ("reddish", False), ("", False)],
)
def test_exact_match_looks_past_case_space_and_a_full_stop(answer, right):
    assert Question(0, "p", lambda: "p", "q", ("red", "Dark red")).right(answer) is right


def test_a_limit_is_spread_over_the_set():
    data = DataSet("d", "", tuple(Question(n, "p", lambda: "p", "q", ("a",)) for n in range(10)))
    assert [q.number for q in data.spread(4)] == [0, 2, 5, 7]
    assert data.spread(None) == data.spread(10) == data.spread(99) == data.questions


def test_easy_vqa_is_its_whole_test_split():
    data = load_data("easyvqa")
    assert len(data.questions) == 9673
    assert len({question.image for question in data.questions}) == 1000
    assert {question.type for question in data.questions} == {"yes/no", "shape", "color"}
    assert load_image(data.questions[0].load()).size == (64, 64)


@pytest.mark.parametrize("name", ["scenes", "crowd"])
def test_scenes_are_drawn_when_they_are_asked_for(name):
    data = load_data(name)
    assert len(data.questions) == 2000
    assert [question.number for question in data.questions] == list(range(2000))
    drawn = data.questions[7].load()
    assert drawn.shape == (96, 96, 3)
    np.testing.assert_array_equal(drawn, data.questions[7].load())
