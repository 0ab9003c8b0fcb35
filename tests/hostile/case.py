"""One hostile input: a command line, the files it reads, and what may come of it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

QUESTION = "what colour is the square?"
SHORT = ("--max-new-tokens", "4")


@dataclass(frozen=True)
class World:
    """What all cases share, made once: bundles and checkpoints by name, and a photo that anybody can read."""

    bundles: dict[str, Path]
    checkpoints: dict[str, Path]
    photo: Path


@dataclass
class Case:
    """`words` is the command line; files it needs were written when the case was made.

    `expected` gives the output where the input is accepted: that of a clean input which means the same. Where it is
    None, `reason` says why the output of an accepted input may be any. `around` is entered while the command runs.
    """

    kind: str
    what: str
    words: Sequence[str]
    expected: Callable[[], str] | None = None
    reason: str = ""
    refused: bool = False
    """Whether it must not be accepted."""
    around: Callable[[], AbstractContextManager[Any]] = field(default=nullcontext)

    def __post_init__(self) -> None:
        assert self.refused or (self.expected is None) == bool(self.reason), self.what


@cache
def clean_answer(bundle: Path, photo: Path, question: str = QUESTION) -> str:
    """What `resprune ask` prints for a clean input."""
    from resprune import Pipeline
    from resprune.runtime.errors import printable

    with Image.open(photo) as opened, Pipeline.load(bundle, check_hashes=False) as pipeline:
        return printable(pipeline.ask(opened.convert("RGB"), question, max_new_tokens=4).text) + "\n"
