"""An answer while it is read: in pieces, in turns, to its end, or to a fault."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from resprune import Pipeline, ResPruneError
from resprune.runtime.backends.onnxruntime import OrtSequence
from resprune.runtime.prompt.messages import Turn
from tests.runtime.pipelines import QUESTION, loaded, picture, with_manifest

STEPS = 40


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
