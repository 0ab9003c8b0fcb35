"""Sampling, stopping, and text in whole characters."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resprune.runtime.errors import ResPruneError
from resprune.runtime.generate import (
    Sampling,
    TextStream,
    eos_token_ids,
    generate,
    next_token_probabilities,
    sample,
)
from tests.runtime.bundles import bundle_of_files
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
    steps = list(generate(model, Sampling(max_new_tokens=4), frozenset([9, 8])))
    assert steps == [[1, 3, 4], [2, 8, 4], [9, None, 4], [None, None, 4]]


def test_no_step_is_made_whose_logits_nobody_reads() -> None:
    model = Script([[1, 9]])
    assert list(generate(model, Sampling(), frozenset([9]))) == [[1], [9]]
    assert len(model.seen) == 1
    model = Script([[1]])
    assert list(generate(model, Sampling(max_new_tokens=2), frozenset())) == [[1], [1]]
    assert len(model.seen) == 1


def test_nucleus_is_the_fewest_tokens_that_reach_top_p() -> None:
    logits = np.log(np.array([[0.1, 0.5, 0.15, 0.25]], np.float32))
    for top_p, inside in [(0.4, [1]), (0.5, [1]), (0.6, [1, 3]), (0.8, [1, 2, 3]), (1.0, [0, 1, 2, 3])]:
        probabilities = next_token_probabilities(logits, 1.0, top_p)[0]
        assert np.flatnonzero(probabilities).tolist() == inside, top_p
        assert probabilities.sum() == pytest.approx(1)
    hot = next_token_probabilities(logits, 2.0, 1.0)[0]
    expected = np.sqrt([0.1, 0.5, 0.15, 0.25])
    assert hot == pytest.approx(expected / expected.sum())


def test_sampling_follows_the_probabilities_and_its_seed() -> None:
    logits = np.tile(np.log(np.array([0.2, 0.5, 0.3], np.float32)), (5000, 1))
    sampling = Sampling(temperature=1.0)
    drawn = sample(logits, sampling, np.random.default_rng(3))
    assert np.bincount(drawn) / len(drawn) == pytest.approx([0.2, 0.5, 0.3], abs=0.03)
    assert (drawn == sample(logits, sampling, np.random.default_rng(3))).all()
    assert (drawn != sample(logits, sampling, np.random.default_rng(4))).any()


def test_a_low_temperature_and_a_narrow_nucleus_are_greedy_and_nothing_overflows() -> None:
    logits = np.array([[1e4, -1e4, 1e4 - 1, 0]], np.float32)
    for sampling in (
        Sampling(),
        Sampling(temperature=1e-4),
        Sampling(temperature=1e-320),
        Sampling(temperature=5, top_p=1e-9),
    ):
        assert sample(logits, sampling, np.random.default_rng(0)).tolist() == [0]


def test_greedy_takes_the_lowest_of_equals() -> None:
    assert sample(np.array([[1, 3, 3]], np.float32), Sampling(), np.random.default_rng(0)).tolist() == [1]


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"seed": -1},
    ],
)
def test_wrong_settings_name_themselves(wrong: dict) -> None:
    (name,) = wrong
    with pytest.raises(ResPruneError, match=name):
        Sampling(**wrong)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config.json": '{"eos_token_id": 2}', "config.json": '{"eos_token_id": 5}'}, {2}),
        ({"generation_config.json": '{"eos_token_id": [2, 7]}'}, {2, 7}),
        ({"generation_config.json": "{}", "config.json": '{"text_config": {"eos_token_id": 0}}'}, {0}),
    ],
)
def test_end_tokens(tmp_path, files: dict[str, str], expected: set[int]) -> None:
    assert eos_token_ids(bundle_of_files(tmp_path, files)) == expected


def test_a_checkpoint_without_an_end_token_is_refused(tmp_path) -> None:
    with pytest.raises(ResPruneError, match="eos_token_id"):
        eos_token_ids(bundle_of_files(tmp_path, {"config.json": "{}"}))
