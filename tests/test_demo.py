"""The trained demo model proves the answers: the bundle's are Hugging Face's to the token, and they are right."""

import json
from pathlib import Path

import easy_vqa
import numpy as np
import pytest

from demo.questions import sample_question
from demo.scenes import draw, sample_scene
from resprune import Pipeline
from resprune.runtime.families.image import load_image
from tests.exporter.hugging_face import HuggingFace

MODEL = Path(__file__).parent.parent / "demo" / "model"
PICTURES = Path(__file__).parent.parent / "demo" / "pictures"
FIRST_SEED = 300_000  # held-out scenes that neither the training's checks nor its evaluation used
STEPS = 32
EACH = 30


def questions():
    """(picture, question, answer) of EACH held-out scenes and EACH pictures of easy-VQA's test split."""
    for seed in range(FIRST_SEED, FIRST_SEED + EACH):
        scene = sample_scene(seed, "test")
        question = next(
            filter(None, (sample_question(scene, np.random.default_rng([seed, n])) for n in range(9)))
        )
        yield draw(scene), question.text, question.answer
    texts, answers, rows = easy_vqa.get_test_questions()
    paths = easy_vqa.get_test_image_paths()
    step = len(texts) // EACH
    for n in range(0, EACH * step, step):
        yield np.asarray(load_image(paths[rows[n]])), texts[n], answers[n]


@pytest.fixture(scope="module")
def vlm(demo_bundle):
    with Pipeline.load(demo_bundle) as pipeline:
        yield pipeline


def test_answers_to_test_questions_are_hugging_faces(vlm):
    hugging_face = HuggingFace(MODEL)
    asked = 0
    for picture, question, _ in questions():
        answer = vlm.ask(picture, question, max_new_tokens=STEPS, stream=False)
        text = [answer.prompt.ids[position] for position in answer.prompt.text_positions]
        expected = hugging_face.pruned(
            [picture], answer.prompt.ids, text, k=16, positions="contiguous", steps=STEPS, may_end=True
        )
        assert answer.images[0].pick_order.tolist() == expected.pick_orders[0]
        assert answer.token_ids == expected.token_ids
        asked += 1
    assert asked >= 50


def test_answers_are_right_far_more_often_than_by_guessing(vlm):
    """A ninth of the tokens; the majority answer is right on two fifths of these questions at most."""
    right = [vlm.ask(picture, question).text.strip() == answer for picture, question, answer in questions()]
    assert np.mean(right[EACH:]) >= 0.8, "easy-VQA"
    assert np.mean(right) >= 0.65


def test_sample_pictures_have_questions_and_answers():
    listed = json.loads((PICTURES / "questions.json").read_text())
    assert len(listed) >= 5
    for entry in listed:
        assert (PICTURES / entry["image"]).is_file()
        assert entry["question"]
        assert entry["answer"]
