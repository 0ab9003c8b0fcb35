import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resprune.runtime.errors import ResPruneError
from resprune.runtime.prompt import nouns
from resprune.runtime.prompt.nouns import question_terms, split_keywords

QUESTIONS = json.loads((Path(__file__).parent / "nouns.json").read_text())


def terms(question: str, about: list[str] | None = None) -> list[str]:
    return [question[start:end] for start, end in question_terms(question, about)]


def test_nouns_of_questions_about_pictures_are_found() -> None:
    found = wanted = right = 0
    for case in (case for case in QUESTIONS if case["nouns"]):
        got = [word for term in terms(case["question"]) for word in term.split()]
        found, wanted = found + len(got), wanted + len(case["nouns"])
        right += len(set(got) & set(case["nouns"]))
    assert wanted > 140
    assert 2 * right / (found + wanted) >= 0.98  # F1


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What is on the table?", ["table"]),
        ("Is the dog next to the traffic light?", ["dog", "traffic light"]),
        ("What colour is the man's shirt?", ["colour", "man", "shirt"]),
        ("What's on the man’s head?", ["man", "head"]),
        ("Is the cat, dog or bird bigger?", ["cat", "dog", "bird"]),
        ("WHAT IS THE MAN HOLDING?", ["MAN"]),
        ("Where is London Bridge?", ["London Bridge"]),
    ],
)
def test_nouns_and_compounds(question: str, expected: list[str]) -> None:
    assert terms(question) == expected


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Is it raining?", ["raining"]),  # content words: no auxiliaries, pronouns or question words
        ("Is that red?", ["red"]),
        ("Why isn't she jumping?", ["jumping"]),
        ("What is it?", ["What", "is", "it"]),  # nothing but function words: all of them
        ("这是什么？", ["这是什么"]),
        ("???", []),
        ("", []),
    ],
)
def test_a_question_without_nouns_falls_back(question: str, expected: list[str]) -> None:
    assert terms(question) == expected


@settings(max_examples=300, deadline=None)
@given(
    st.text() | st.lists(st.sampled_from([w for c in QUESTIONS for w in c["question"].split()])).map(" ".join)
)
def test_any_text_gives_ordered_spans_of_its_own_words(text: str) -> None:
    spans = question_terms(text)
    assert all(0 <= start < end <= len(text) for start, end in spans)
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(spans))
    assert all(text[start:end] == text[start:end].strip() for start, end in spans)
    assert bool(spans) == any(character.isalnum() for character in text)
    assert spans == question_terms(text)


def test_a_word_without_end_takes_no_time_without_end() -> None:
    assert question_terms("a" * 100_000) == [(0, 100_000)]


def test_about_finds_whole_words_whatever_their_case() -> None:
    question = "Is the Cat on the catwalk, or is the cat's bowl there?"
    assert question_terms(question, ["cat"]) == [(7, 10), (37, 40)]
    assert terms(question, ["bowl", " THE CAT "]) == ["the Cat", "the cat", "bowl"]
    assert terms(question, ["cat", "the cat", "on"]) == ["the Cat on", "the cat"]
    assert terms("What does 3+3 (sum) say?", ["3+3", "(sum)"]) == ["3+3 (sum)"]
    assert terms(question, []) == []


def test_keywords_are_told_apart_by_whether_the_question_has_them() -> None:
    question = "Is the cat on the catwalk?"
    inside, outside = split_keywords(question, ["cat", "dog", "walk", "c.t", " THE CAT ", "the  cat"])
    assert inside == ["cat", "THE CAT"]
    assert outside == ["dog", "walk", "c.t", "the  cat"]
    for word in ("", " "):
        with pytest.raises(ResPruneError, match="keyword of about is empty"):
            split_keywords(question, ["cat", word])


def test_the_tagger_is_loaded_when_it_is_needed_and_never_from_the_current_directory(tmp_path: Path) -> None:
    (tmp_path / "morphmodel_en.pgz").write_bytes(b"not the model")
    code = (
        "import sys; from resprune.runtime.prompt.nouns import question_terms as terms\n"
        "terms('what?', ['what']); assert 'HanTa' not in sys.modules\n"
        "assert terms('Is a cat there?') == [(5, 8)]"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ, check=True)


def test_a_question_of_any_length_is_tagged() -> None:
    question = "what is the square " * 40_000
    spans = question_terms(question)
    assert len(spans) == 40_000
    assert {question[start:end] for start, end in spans} == {"square"}


def test_a_question_that_is_asked_again_is_not_tagged_again(monkeypatch: pytest.MonkeyPatch) -> None:
    first = terms("Which vegetable is left of the kettle?")
    monkeypatch.setattr(nouns, "_tagger", lambda: pytest.fail("it is known"))
    assert terms("Which vegetable is left of the kettle?") == first == ["vegetable", "kettle"]
