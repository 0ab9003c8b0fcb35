"""Stopping, and text in whole characters."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resprune.runtime.generate import TextStream, generate
from resprune.runtime.sampling import Sampling
from tests.runtime.tokenizers_made import KINDS

TEXTS = [
    "the red square",
    "日本語 is 🎉🙂👩‍👩‍👧",
    "the\n  red café naïve",
    "  What is\tthe table?  ",
    "é",
    "",
]


def stream(kind: str, ids: list[int]) -> tuple[list[str], str]:
    tokenizer = KINDS[kind]()
    text = TextStream(tokenizer)
    pieces = [text.push(token) for token in ids] + [text.finish()]
    return pieces, tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_join_to_the_text(kind: str, text: str) -> None:
    pieces, whole = stream(kind, KINDS[kind]().encode(text).ids)
    assert "".join(pieces) == whole.lstrip()
    assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(KINDS)), st.data())
def test_any_tokens_at_all_join_to_what_the_tokenizer_decodes(kind: str, data: st.DataObject) -> None:
    size = KINDS[kind]().get_vocab_size()
    ids = data.draw(st.lists(st.integers(0, size - 1), max_size=20))
    pieces, whole = stream(kind, ids)
    assert "".join(pieces) == whole.lstrip()


@pytest.mark.parametrize("kind", KINDS)
def test_words_come_one_by_one(kind: str) -> None:
    pieces, _ = stream(kind, KINDS[kind]().encode("the red square").ids)
    assert pieces == ["the", " red", " square", ""]


def test_a_character_waits_for_its_last_byte() -> None:
    tokenizer = KINDS["byte_level"]()
    ids = tokenizer.encode("🎉x").ids
    assert len(ids) == 5
    text = TextStream(tokenizer)
    assert [text.push(token) for token in ids] == ["", "", "", "🎉", "x"]


def test_what_is_cut_in_the_middle_of_a_character_says_so() -> None:
    tokenizer = KINDS["byte_level"]()
    text = TextStream(tokenizer)
    assert text.push(tokenizer.encode("🎉").ids[0]) == ""
    assert text.finish() == "\ufffd"


class Script:
    """A sequence that wants to say certain tokens."""

    def __init__(self, wanted: list[list[int]], vocabulary: int = 10) -> None:
        self.wanted = wanted
        self.vocabulary = vocabulary
        self.seen: list[list[int]] = []

    @property
    def logits(self) -> np.ndarray:
        column = [row[min(len(self.seen), len(row) - 1)] for row in self.wanted]
        return np.eye(self.vocabulary, dtype=np.float32)[column]

    def step(self, tokens: np.ndarray) -> None:
        self.seen.append(tokens.tolist())

    def close(self) -> None:
        pass


def test_each_row_ends_by_itself_and_the_end_token_is_given() -> None:
    model = Script([[1, 2, 9], [3, 8], [4, 4, 4, 4]])
    steps = list(generate(model, Sampling(max_new_tokens=4), frozenset([9, 8]), [[0]] * 3))
    assert steps == [[1, 3, 4], [2, 8, 4], [9, None, 4], [None, None, 4]]


def test_no_step_is_made_whose_logits_nobody_reads() -> None:
    model = Script([[1, 9]])
    assert list(generate(model, Sampling(), frozenset([9]), [[0]])) == [[1], [9]]
    assert len(model.seen) == 1
    model = Script([[1]])
    assert list(generate(model, Sampling(max_new_tokens=2), frozenset(), [[0]])) == [[1], [1]]
    assert len(model.seen) == 1
