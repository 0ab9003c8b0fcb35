"""Answers: one by one, in a batch, of several pictures, of a view and in a chat (models: tests/exporter)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from resprune import Pipeline, ResPruneError
from resprune.runtime.answer import Answer
from resprune.runtime.prompt.messages import Turn
from tests.exporter.hugging_face import HuggingFace
from tests.runtime.pipelines import QUESTION, picture, with_manifest

STEPS = 40


@pytest.fixture(scope="module")
def hugging_face(tiny_checkpoint: Callable[[str], Path]) -> HuggingFace:
    return HuggingFace(tiny_checkpoint("clip-llama"))


def check(
    hugging_face: HuggingFace,
    answer: Answer,
    images: list[Image.Image],
    *,
    k: int = 7,
    positions: str = "contiguous",
) -> None:
    """The picks, and all tokens, are those of the model in PyTorch."""
    expected = hugging_face.pruned(
        [np.asarray(image) for image in images],
        answer.prompt.ids,
        answer.prompt.text_token_ids,
        k=k,
        positions=positions,
        steps=STEPS,
    )
    assert [picks.pick_order.tolist() for picks in answer.images] == expected.pick_orders
    assert [picks.kept_indices.tolist() for picks in answer.images] == [
        sorted(order) for order in expected.pick_orders
    ]
    assert answer.token_ids == expected.token_ids


def test_the_text_steers_the_picks(vlm: Pipeline) -> None:
    orders = {
        tuple(vlm.ask(picture(4), QUESTION, about=words, max_new_tokens=1).images[0].pick_order.tolist())
        for words in (["square"], ["table"], ["colour", "what"], [])
    }
    assert len(orders) > 1


@pytest.mark.parametrize("tokens", [1, 4])
def test_fewer_tokens_than_exported(vlm: Pipeline, hugging_face: HuggingFace, tokens: int) -> None:
    answer = vlm.ask(picture(1), QUESTION, tokens=tokens, max_new_tokens=STEPS)
    check(hugging_face, answer, [picture(1)], k=tokens)
    view = vlm.look(picture(1)).ask(QUESTION, tokens=tokens, max_new_tokens=STEPS)
    assert view.token_ids == answer.token_ids


@pytest.mark.parametrize("positions", ["contiguous", "original"])
def test_several_pictures_in_one_prompt(
    split: Path, tmp_path: Path, hugging_face: HuggingFace, positions: str
) -> None:
    vlm = Pipeline.load(with_manifest(split, tmp_path, positions=positions))
    images = [picture(1), picture(2, (40, 90)), picture(3)]
    answer = vlm.ask(images, QUESTION, tokens=4, max_new_tokens=STEPS)
    assert answer.prompt.ids.count(vlm.manifest.image_token_id) == 3
    check(hugging_face, answer, images, k=4, positions=positions)
    assert vlm.look(images).ask(QUESTION, tokens=4, max_new_tokens=STEPS).token_ids == answer.token_ids


@pytest.mark.parametrize("positions", ["contiguous", "original"])
def test_a_batch_answers_as_one_by_one(split: Path, tmp_path: Path, positions: str) -> None:
    vlm = Pipeline.load(with_manifest(split, tmp_path, positions=positions))
    images = [picture(1), [picture(2), picture(3)], picture(4)]
    questions = [
        QUESTION,
        "how many?",
        "is the small red circle left of the large green square on the table?",
    ]
    about = [None, [], ["circle", "table"]]
    batch = vlm.ask_batch(images, questions, about=about, max_new_tokens=STEPS)
    assert len({len(answer.prompt.ids) for answer in batch}) == 3
    for answer, image, question, words in zip(batch, images, questions, about, strict=True):
        alone = vlm.ask(image, question, about=words, max_new_tokens=STEPS)
        assert answer.token_ids == alone.token_ids
        assert answer.text == alone.text
        assert answer.prompt == alone.prompt


def test_a_view_encodes_once_and_selects_anew_for_each_question(
    vlm: Pipeline, hugging_face: HuggingFace, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = []
    run = vlm._graphs.run
    monkeypatch.setattr(vlm._graphs, "run", lambda graph, *rest: graphs.append(graph) or run(graph, *rest))
    view = vlm.look(picture(1))
    for question in (QUESTION, "is there a cat?", QUESTION):
        check(hugging_face, view.ask(question, max_new_tokens=STEPS), [picture(1)])
    looked = [graph for graph in graphs if graph != "embed_tokens"]
    assert looked == ["vision_encoder"] + ["token_select"] * 3


@pytest.mark.parametrize("positions", ["contiguous", "original"])
def test_a_chat_answers_as_a_fresh_prompt_of_the_whole_conversation(
    split: Path, tmp_path: Path, hugging_face: HuggingFace, positions: str
) -> None:
    vlm = Pipeline.load(with_manifest(split, tmp_path, positions=positions))
    images = [picture(1), picture(2)]
    chat = vlm.look(images).chat()
    said: list[Turn] = []
    for question in (QUESTION, "is there a small cat?", "what colour is the cat?"):
        answer = chat.ask(question, max_new_tokens=STEPS)
        fresh = (
            Pipeline.load(tmp_path / "changed").look(images).ask(question, history=said, max_new_tokens=STEPS)
        )
        assert answer.prompt == fresh.prompt
        assert answer.token_ids == fresh.token_ids
        check(hugging_face, answer, images, positions=positions)
        assert answer.prompt.text.count("<image>") == 2
        said.append(Turn(question, answer.text.strip()))
    assert chat.history == said
    orders = [picks.pick_order.tolist() for picks in answer.images]
    first = vlm.ask(images, QUESTION, max_new_tokens=1)
    assert orders != [picks.pick_order.tolist() for picks in first.images], "the selection was not made anew"


def test_a_question_that_fails_leaves_the_chat_as_it_was(vlm: Pipeline) -> None:
    chat = vlm.look(picture(1)).chat()
    chat.ask(QUESTION, max_new_tokens=3)
    with pytest.raises(ResPruneError, match="empty"):
        chat.ask(" ")
    with pytest.raises(ResPruneError, match="1 to 7"):
        chat.ask(QUESTION, tokens=8)
    assert [turn.question for turn in chat.history] == [QUESTION]


def test_seeds_repeat_and_differ(vlm: Pipeline) -> None:
    def drawn(seed: int | None) -> list[int]:
        return vlm.ask(picture(1), QUESTION, temperature=1.5, seed=seed, max_new_tokens=12).token_ids

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert drawn(None) != drawn(None)


def test_every_kind_of_picture_source(vlm: Pipeline, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    picture(1).save(path)
    sources = [picture(1), path, str(path), path.read_bytes(), np.asarray(picture(1))]
    answers = [vlm.ask(source, QUESTION, max_new_tokens=5).token_ids for source in sources]
    assert answers.count(answers[0]) == len(sources)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"tokens": 8}, "keeps 7 tokens of an image, so tokens should be 1 to 7, not 8"),
        ({"tokens": 0}, "1 to 7, not 0"),
        ({"question": " \n"}, "question is empty"),
        ({"image": []}, "no image"),
        ({"image": b"no image at all"}, "image"),
        ({"temperature": -1.0}, "temperature"),
        ({"tokens": "0%"}, "no number of tokens"),
        ({"about": ["table", " "]}, "keyword of about is empty"),
    ],
)
def test_wrong_input_is_one_sentence(vlm: Pipeline, wrong: dict, sentence: str) -> None:
    arguments = {"image": picture(1), "question": QUESTION} | wrong
    with pytest.raises(ResPruneError, match=sentence):
        vlm.ask(**arguments)


def test_a_batch_of_unequal_lists_is_refused(vlm: Pipeline) -> None:
    with pytest.raises(ResPruneError, match="got 1 for 2 questions"):
        vlm.ask_batch([picture(1)], [QUESTION, QUESTION])
    with pytest.raises(ResPruneError, match="1 entries of about"):
        vlm.ask_batch([picture(1)] * 2, [QUESTION] * 2, about=[["table"]])
    assert vlm.ask_batch([], []) == []


def test_a_bundle_of_an_unknown_family_says_so(split: Path, tmp_path: Path) -> None:
    with pytest.raises(ResPruneError, match="family flamingo"):
        Pipeline.load(with_manifest(split, tmp_path, family="flamingo"))


def test_a_half_precision_bundle_keeps_its_cache_in_half_precision(tiny_bundle: Callable[..., Path]) -> None:
    with Pipeline.load(tiny_bundle("clip-llama", k=7, dtype="fp16")) as vlm:
        decoder = vlm._backend.decoder
        assert {value.data_type() for value in decoder.empty_cache(1)} == {"tensor(float16)"}
        assert len(vlm.ask(picture(1), QUESTION, max_new_tokens=2).token_ids) == 2


def test_a_conversation_of_any_form(vlm: Pipeline) -> None:
    """Images in any turn, in their place among the texts, whose nouns guide the selection wherever they stand."""
    view = vlm.look([picture(0), picture(1)])
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "be short"}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a dog"}]},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "a square"},
                {"type": "image"},
                {"type": "text", "text": "or a circle?"},
            ],
        },
    ]
    answer = view.answer(messages, max_new_tokens=2)
    assert answer.prompt.nouns == ["square", "circle"]
    assert answer.prompt.ids.count(vlm.manifest.image_token_id) == 2
    text = answer.prompt.text
    assert text.index("be short") < text.index("a dog") < text.index("a square") < text.index("or a circle?")
    assert len(answer.images) == 2
    with pytest.raises(ResPruneError, match="the messages show 2 images, and there are 1"):
        vlm.look(picture(0)).answer(messages)
    with pytest.raises(ResPruneError, match="question is empty"):
        view.answer([*messages[:-1], {"role": "user", "content": [{"type": "image"}]}])


def test_a_split_bundle_keeps_all_tokens_too(vlm: Pipeline, tiny_bundle: Callable[..., Path]) -> None:
    every = Pipeline.load(tiny_bundle("clip-llama", k=16, split=True))
    options: dict[str, Any] = {"tokens": "all", "max_new_tokens": STEPS, "stream": False}
    images: list[Any] = [picture(1), picture(2)]
    expected = every.ask(images, QUESTION, **options)
    for answer in (vlm.ask(images, QUESTION, **options), vlm.look(images).ask(QUESTION, **options)):
        assert answer.token_ids == expected.token_ids
        assert answer.prompt_tokens == expected.prompt_tokens
        assert [picks.kept_indices.tolist() for picks in answer.images] == [list(range(16))] * 2
    view = vlm.look(images)
    assert (view.budgets(), view.budgets("all"), view.budgets(3)) == ([7, 7], [16, 16], [3, 3])
    words = [view._encoded[0].tokens.rows[:1]] * 2
    mixed = vlm._walk.select(view._encoded, words, [16, 3])
    assert [len(image.picks.kept_indices) for image in mixed] == [16, 3]
    fused = Pipeline.load(tiny_bundle("clip-llama", k=7))
    with pytest.raises(ResPruneError, match="1 to 7, not 16"):
        fused.ask(images, QUESTION, **options)
