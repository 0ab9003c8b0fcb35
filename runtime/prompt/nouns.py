"""Which words of a question stand for things in the image (method: the text is the prompt's nouns).

HanTa tags the words. On the labelled questions of `tests/runtime/nouns.json` its noun F1 is 0.986. denckring-en-pos has
0.966, needs Python 3.11 and 11 MB of packages, where HanTa is one of 15 MB. All words but stop words have 0.818. The
demo model answers alike with each, and better without keywords (`python -m benchmarks taggers`, docs/method.md).
Loading HanTa costs 0.14 s and 39 MB of memory, a new question 0.2 ms; the last ones are kept, for a batch asks one
question about many images, and a camera's program the same of each frame. It knows English, is LGPL-3.0-or-later, and
is used as published.
"""

import re
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

from resprune.runtime.errors import ResPruneError

# Words as the tagger knows them: "isn't" is "is" and "n't", "man's" is "man" and "'s".
WORD = re.compile(
    r"[^\W_]+?(?=n['’]t\b)|n['’]t\b|['’](?:s|re|ve|ll|d|m)\b|[^\W_]+(?:-[^\W_]+)*", re.IGNORECASE
)
# Time and memory of the tagger grow with the square of a word's length; no noun of English is longer.
MAX_WORD = 40
# It takes a sentence as a whole and fails at about 100,000 words; a question of more than these is tagged in parts.
MAX_WORDS = 1000
# CLAWS tags by their first two letters. Auxiliaries (VB, VD, VH, VM) and question words are no content words.
NOUNS = ("NN", "NP")
CONTENT = ("VV", "AJ", "AV0", "CR", "OR", "UN", "ZZ", "IT")

Span = tuple[int, int]
_TAGGING = Lock()  # the tagger keeps what it has seen in dictionaries of its own


def question_terms(question: str, about: Sequence[str] | None = None) -> list[Span]:
    """Character spans (start, end) of the terms of `question` that the selection is guided by, in order.

    The nouns, a compound ("traffic light") as one span; where the question has none, its content words, and
    where it has none of those, all its words. `about` names the terms instead: words or phrases, found wherever
    they stand as whole words whatever their case, and none at all for no guidance.
    """
    if about is not None:
        return _merged(question, (span for word in about for span in _occurrences(question, word)))
    words = [match.span() for match in WORD.finditer(question)]
    tags = _tags([question[start:end] for start, end in words])
    for kinds in (NOUNS, CONTENT):
        terms = [span for span, tag in zip(words, tags, strict=True) if tag.startswith(kinds)]
        if terms:
            return _merged(question, terms)
    return words


def _tags(words: list[str]) -> list[str]:
    # In capitals throughout, case says nothing, and the tagger takes a capital for a name.
    if not any(word[0].islower() for word in words):
        words = [word.lower() for word in words]
    plain = tuple(word[:MAX_WORD].replace("’", "'") for word in words)
    parts = (plain[start : start + MAX_WORDS] for start in range(0, len(plain), MAX_WORDS))
    return [tag for part in parts for tag in _tags_of_part(part)]


@lru_cache(maxsize=64)  # of the longest parts 6 MB
def _tags_of_part(words: tuple[str, ...]) -> list[str]:
    with _TAGGING:
        tags: list[str] = _tagger().tag_sent(words, taglevel=0)
    return tags


@cache
def _tagger() -> Any:
    import HanTa
    from HanTa.HanoverTagger import HanoverTagger

    # By its full path: a bare name would be looked for, and unpickled, in the current directory first.
    return HanoverTagger(str(Path(HanTa.__file__).with_name("morphmodel_en.pgz")))


def split_keywords(question: str, about: Sequence[str]) -> tuple[list[str], list[str]]:
    """Keywords that stand in the question, and those that do not; `ResPruneError` for an empty one."""
    inside: list[str] = []
    outside: list[str] = []
    for word in about:
        if not word.strip():
            raise ResPruneError("a keyword of about is empty; name words such as square, or leave about out")
        (inside if _occurrences(question, word) else outside).append(word.strip())
    return inside, outside


def _occurrences(question: str, word: str) -> list[Span]:
    return [
        match.span()
        for match in re.finditer(rf"(?<!\w){re.escape(word.strip())}(?!\w)", question, re.IGNORECASE)
    ]


def _merged(question: str, spans: Iterable[Span]) -> list[Span]:
    """Spans in order, those made one that overlap or have only spaces between them."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and not question[merged[-1][1] : start].strip():
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged
