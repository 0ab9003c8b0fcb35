"""Answers: one by one, in a batch, of several pictures, of a view and in a chat (models: tests/exporter)."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from resprune import Pipeline, ResPruneError
from resprune.runtime.answer import Answer
from resprune.runtime.backends.onnxruntime import OrtSequence
from resprune.runtime.bundle.files import read_bundle, write_manifest
from resprune.runtime.prompt.messages import Turn
from tests.exporter.hugging_face import HuggingFace

QUESTION = "what colour is the square on the table?"
STEPS = 40


def picture(seed: int, size: tuple[int, int] = (60, 50)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


@cache
def loaded(bundle: Path) -> Pipeline:
    return Pipeline.load(bundle)


def with_manifest(bundle: Path, folder: Path, **changes) -> Path:
    """A copy of a bundle whose manifest says something else."""
    copy = Path(shutil.copytree(bundle, folder / "changed"))
    write_manifest(copy, replace(read_bundle(bundle).manifest, **changes))
    return copy


@pytest.fixture
def split(tiny_bundle: Callable[..., Path]) -> Path:
    return tiny_bundle("clip-llama", k=7, split=True)


@pytest.fixture
def vlm(split: Path) -> Pipeline:
    return loaded(split)


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


def test_streamed_pieces_are_the_text(vlm: Pipeline) -> None:
    answer = vlm.ask(picture(1), QUESTION, max_new_tokens=30)
    pieces = list(answer)
    assert len(pieces) > 5
    assert "".join(pieces) == answer.text == "".join(answer)
    whole = vlm._prompter.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
    assert answer.text == whole.lstrip()


def test_an_answer_is_made_only_as_far_as_it_is_read(vlm: Pipeline) -> None:
    answer = vlm.ask(picture(1), QUESTION, max_new_tokens=30)
    next(iter(answer))
    assert len(answer._row.token_ids) < 10
    assert len(answer.token_ids) == 30
    finished = vlm.ask(picture(1), QUESTION, max_new_tokens=30, stream=False)
    assert len(finished._row.token_ids) == 30


def test_two_answers_can_be_read_by_turns(vlm: Pipeline) -> None:
    alone = [vlm.ask(picture(seed), QUESTION, max_new_tokens=20).token_ids for seed in (1, 2)]
    first = vlm.ask(picture(1), QUESTION, max_new_tokens=20)
    reading = iter(first)
    begin = next(reading)
    second = vlm.ask(picture(2), QUESTION, max_new_tokens=20)
    next(iter(second))
    assert begin + "".join(reading) == first.text
    assert [first.token_ids, second.token_ids] == alone
    assert alone[0] != alone[1]


def test_an_answer_nobody_holds_costs_no_more_steps(vlm: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    step = OrtSequence.step
    monkeypatch.setattr(OrtSequence, "step", lambda self, tokens: steps.append(1) or step(self, tokens))
    for _ in vlm.ask(picture(1), QUESTION, max_new_tokens=200):
        break
    given_up = len(steps)
    vlm.ask(picture(1), QUESTION, max_new_tokens=2, stream=False)
    assert given_up < 20
    assert len(steps) == given_up + 1


@pytest.fixture
def failing(vlm: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Callable[[type[BaseException]], None]:
    """The next answer fails in its second step."""

    def fail(kind: type[BaseException]) -> None:
        steps: list[OrtSequence] = []
        step = OrtSequence.step

        def failed(self: OrtSequence, tokens: np.ndarray) -> None:
            if not steps or steps[0] is self:
                steps.append(self)
            if len(steps) == 2 and steps[0] is self:
                raise kind("out of memory")
            step(self, tokens)

        monkeypatch.setattr(OrtSequence, "step", failed)

    return fail


@pytest.mark.parametrize(
    ("kind", "later"), [(ResPruneError, "out of memory"), (KeyboardInterrupt, "stopped before its end")]
)
def test_an_answer_that_failed_never_reads_as_a_whole_one(
    vlm: Pipeline, failing: Callable[[type[BaseException]], None], kind: type[BaseException], later: str
) -> None:
    failing(kind)
    answer = vlm.ask(picture(1), QUESTION, max_new_tokens=STEPS)
    with pytest.raises(kind, match="out of memory"):
        _ = answer.text
    with pytest.raises(ResPruneError, match=later):
        _ = answer.text
    with pytest.raises(ResPruneError, match=later):
        list(answer)


def test_a_fault_is_its_own_answers_alone(
    vlm: Pipeline, failing: Callable[[type[BaseException]], None]
) -> None:
    whole = vlm.ask(picture(2), QUESTION, max_new_tokens=STEPS).token_ids
    failing(ResPruneError)
    answer = vlm.ask(picture(1), QUESTION, max_new_tokens=STEPS)
    next(iter(answer))
    with pytest.raises(ResPruneError, match="out of memory"):
        answer.finish()
    assert vlm.ask(picture(2), QUESTION, max_new_tokens=STEPS).token_ids == whole
    with pytest.raises(ResPruneError, match="out of memory"):
        answer.finish()


@pytest.mark.parametrize("kind", [ResPruneError, KeyboardInterrupt])
def test_an_answer_that_failed_is_no_part_of_the_chat(
    vlm: Pipeline, failing: Callable[[type[BaseException]], None], kind: type[BaseException]
) -> None:
    chat = vlm.look(picture(1)).chat()
    first = chat.ask(QUESTION, max_new_tokens=3)
    assert len(chat.history) == 1
    failing(kind)
    failed = chat.ask("is there a cat?", max_new_tokens=STEPS)
    with pytest.raises(kind, match="out of memory"):
        _ = failed.text
    third = chat.ask("how many?", max_new_tokens=3)
    assert "cat" not in third.prompt.text
    assert chat.history == [Turn(QUESTION, first.text.strip()), Turn("how many?", third.text.strip())]
    with pytest.raises(ResPruneError, match=r"out of memory|stopped"):
        _ = failed.text


def test_a_pipeline_that_is_closed_says_so(split: Path) -> None:
    with Pipeline.load(split) as vlm:
        view = vlm.look(picture(1))
        whole = vlm.ask(picture(1), QUESTION, max_new_tokens=STEPS, stream=False)
        begun = vlm.ask(picture(1), QUESTION, max_new_tokens=STEPS)
        next(iter(begun))
        vlm.close()
    assert whole.text
    for _ in range(2):
        with pytest.raises(ResPruneError, match="closed before this answer was read to its end"):
            _ = begun.text
    for ask in (partial(vlm.ask, picture(1)), view.ask, view.chat().ask):
        with pytest.raises(ResPruneError, match="the pipeline is closed; load it again"):
            ask(QUESTION)
    with pytest.raises(ResPruneError, match="the pipeline is closed; load it again"):
        vlm.look(picture(1))
    assert not vlm._graphs._sessions


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


def test_timings_name_the_stages(vlm: Pipeline) -> None:
    timings = vlm.ask(picture(1), QUESTION, max_new_tokens=5).timings
    assert list(timings) == ["pixels", "prompt", "vision", "prefill", "decode"]
    assert all(value > 0 for value in timings.values())
    assert vlm.load_ms > 0


def test_generation_ends_where_the_context_does(split: Path, tmp_path: Path) -> None:
    plain = loaded(split).ask(picture(1), QUESTION, max_new_tokens=STEPS)
    length = len(plain.prompt.ids) - 1 + 7
    for positions, extra in [("contiguous", 0), ("original", 16 - 7)]:
        folder = tmp_path / positions
        folder.mkdir()
        limit = length + extra + 3
        vlm = Pipeline.load(with_manifest(split, folder, positions=positions, context_length=limit))
        answer = vlm.ask(picture(1), QUESTION, max_new_tokens=STEPS)
        assert len(answer.token_ids) == 3
        with pytest.raises(
            ResPruneError, match=rf"past the context: \d+ tokens with its images, limit {limit}"
        ):
            vlm.ask(picture(1), QUESTION + " red green", max_new_tokens=STEPS)


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


def test_steps_tell_tokens_as_they_are_written(vlm: Pipeline) -> None:
    answer = vlm.ask(picture(0), QUESTION, max_new_tokens=12)
    counts, pieces = [], []
    for piece in answer.steps():
        counts.append(answer.tokens_written)
        pieces.append(piece)
        assert answer.timings_so_far["prefill"] > 0
    assert counts[:-1] == list(range(len(counts) - 1)), "one token a step, before the first none"
    assert counts[-1] == len(answer.token_ids)
    assert "".join(pieces) == answer.text
    spliced = len(answer.prompt.ids) - 1 + len(answer.images[0].kept_indices)
    assert answer.prompt_tokens == spliced


def test_an_answer_says_why_it_ended(vlm: Pipeline) -> None:
    cut = vlm.ask(picture(0), QUESTION, max_new_tokens=3)
    assert cut.finish_reason == "length"
    ended = vlm.ask(picture(0), QUESTION, max_new_tokens=3, min_new_tokens=0)
    ended._row.eos = frozenset(ended.token_ids[-1:])  # the bundle's model has random weights and seldom ends
    assert ended.finish_reason == "stop"


def test_a_conversation_of_any_form(vlm: Pipeline) -> None:
    """Images in any turn, in their place among the texts, whose nouns steer the selection wherever they stand."""
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
    every = Pipeline.load(tiny_bundle("clip-llama", share=1.0, split=True))
    options: dict[str, Any] = {"tokens": "all", "max_new_tokens": STEPS, "stream": False}
    images: list[Any] = [picture(1), picture(2)]
    expected = every.ask(images, QUESTION, **options)
    for answer in (vlm.ask(images, QUESTION, **options), vlm.look(images).ask(QUESTION, **options)):
        assert answer.token_ids == expected.token_ids
        assert answer.prompt_tokens == expected.prompt_tokens
        assert [picks.kept_indices.tolist() for picks in answer.images] == [list(range(16))] * 2
    view = vlm.look(images)
    assert (view.budgets(), view.budgets("all"), view.budgets(3)) == ([7, 7], [16, 16], [3, 3])
    features = view._encoded.features
    assert features is not None
    words = [features[0].rows[:1]] * 2
    mixed = vlm._walk.select(view._encoded, words, [16, 3])
    assert [len(image.picks.kept_indices) for image in mixed] == [16, 3]
    fused = Pipeline.load(tiny_bundle("clip-llama", k=7))
    with pytest.raises(ResPruneError, match="1 to 7, not 16"):
        fused.ask(images, QUESTION, **options)
