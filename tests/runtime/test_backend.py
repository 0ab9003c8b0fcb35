"""The seam above the language model: whatever answers, the same answers come out of the pipeline."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from resprune import Pipeline
from resprune.runtime.backends.backend import Backend, Embedding, Piece, Reading, Request, together
from resprune.runtime.backends.onnxruntime import onnxruntime_backend
from resprune.runtime.backends.session import SessionOptions
from resprune.runtime.bundle.files import Bundle
from resprune.runtime.sampling import Sampling
from tests.runtime.pipelines import QUESTION, picture


class Recorder:
    """Another backend, with what it was asked; it may hide the ids, as some servers do."""

    def __init__(self, inner: Backend, decode: Callable[[list[int]], str] | None) -> None:
        self.inner = inner
        self.decode = decode
        self.requests: list[tuple[Request, Sampling]] = []
        self.closed = False

    def start(self, request: Request, sampling: Sampling) -> Iterator[list[Piece]]:
        self.requests.append((request, sampling))
        for pieces in self.inner.start(request, sampling):
            if self.decode is None:
                yield pieces
            else:
                yield [self.decode(piece) for piece in pieces if not isinstance(piece, str)]

    def close(self) -> None:
        self.inner.close()
        self.closed = True


@pytest.fixture
def bundle(tiny_bundle: Callable[..., Path]) -> Path:
    return tiny_bundle("clip-llama", k=7, split=True)


def recorded(bundle: Path, decode: Callable[[list[int]], str] | None = None) -> tuple[Pipeline, Recorder]:
    made: list[Recorder] = []

    def factory(bundle: Bundle, embedding: Embedding, options: SessionOptions) -> Backend:
        made.append(Recorder(onnxruntime_backend(bundle, embedding, options), decode))
        return made[0]

    return Pipeline.load(bundle, generator=factory), made[0]


def test_a_request_has_the_prompts_in_every_form(bundle: Path) -> None:
    vlm, recorder = recorded(bundle)
    image_token = vlm.manifest.image_token_id
    with vlm:
        answers = vlm.ask_batch([picture(1), [picture(2), picture(3)]], [QUESTION, "how many?"], tokens=3)
    ((request, sampling),) = recorder.requests
    assert recorder.closed
    assert sampling == Sampling(top_k=50)  # as the checkpoint says, which is nothing
    assert list(request.prompts) == [answer.prompt for answer in answers]
    assert [len(kept) for kept in request.images] == [1, 2]
    for row, (prompt, kept) in enumerate(zip(request.prompts, request.images, strict=True)):
        assert prompt.ids.count(image_token) == len(kept)
        embeds = request.spliced.inputs_embeds[row][request.spliced.attention_mask[row] == 1]
        assert len(embeds) == len(prompt.ids) - len(kept) + sum(len(picture.rows) for picture in kept)
        at = prompt.ids.index(image_token)
        np.testing.assert_array_equal(embeds[at : at + 3], kept[0].rows)


def test_text_without_ids_is_taken_as_it_comes(bundle: Path) -> None:
    local = Pipeline.load(bundle)
    ids = local.ask(picture(1), QUESTION, max_new_tokens=12).token_ids
    tokenizer = local._prompter.tokenizer
    vlm, _ = recorded(bundle, decode=lambda piece: f" {tokenizer.id_to_token(piece[0])}")
    answer = vlm.ask(picture(1), QUESTION, max_new_tokens=12)
    pieces = list(answer)
    assert pieces[0] == tokenizer.id_to_token(ids[0]), "white space at the start of an answer is dropped"
    assert pieces[1] == f" {tokenizer.id_to_token(ids[1])}"
    assert answer.text == " ".join(tokenizer.id_to_token(token) for token in ids)
    assert answer.token_ids == []


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("how", ["closed", "dropped", "read to its end", "failed"])
def test_what_an_answer_is_read_from_is_freed_once(begun: bool, how: str) -> None:
    freed: list[int] = []

    def tokens() -> Iterator[Piece]:
        yield [1]
        if how == "failed":
            raise RuntimeError("broken")
        yield [2]

    def stream(number: int) -> Reading[Piece]:
        return Reading(tokens(), lambda: freed.append(number))

    answers: Any = together([stream(0), stream(1)])
    if begun:
        assert next(answers) == [[1], [1]]
    assert freed == []
    if how == "closed":
        answers.close()
        assert next(answers, None) is None
    elif how == "read to its end":
        assert list(answers)[-1] == [[], []]
    elif how == "failed":
        with pytest.raises(RuntimeError, match="broken"):
            list(answers)
    del answers
    assert sorted(freed) == [0, 1]
