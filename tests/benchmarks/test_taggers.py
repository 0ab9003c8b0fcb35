"""The ways to find keywords: what each takes of a question."""

from benchmarks import taggers


def test_the_runtimes_nouns_and_words_that_are_no_stop_words() -> None:
    question = "What color is the traffic light, isn't it?"
    assert taggers._hanta(question) == ["color", "traffic", "light"]
    assert taggers._content(question) == ["color", "traffic", "light", "n't"]
    assert taggers._f1(taggers._hanta) > 0.98 > taggers._f1(taggers._content)


def test_a_question_without_any_has_content_words_then_all() -> None:
    def about(way: str, question: str) -> object:
        return taggers._about(way, lambda question: [], question)

    assert about(taggers.NO_TAGGER, "Is it raining?") == ["raining"]
    assert about(taggers.NO_TAGGER, "What is it?") == ["What", "is", "it"]
    assert about(taggers.NOTHING, "Is it raining?") == []
    assert about(taggers.HANTA, "Is it raining?") is None
