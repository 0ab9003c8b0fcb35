"""An answer that comes piece by piece, and what it was made from."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from resprune.runtime.backends.backend import Piece
from resprune.runtime.generate import TextStream
from resprune.runtime.prompt.prompter import Prompt
from resprune.runtime.prompt.splice import Picks


@dataclass
class Row:
    """One answer as it grows."""

    stream: TextStream
    token_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)

    def push(self, piece: Piece) -> None:
        """Take the next tokens, whose text is decoded here, or the next text."""
        if isinstance(piece, str):
            self._add(piece if self.pieces else piece.lstrip())
            return
        self.token_ids += piece
        for token in piece:
            self._add(self.stream.push(token))

    def finish(self) -> None:
        """Take what text is left."""
        self._add(self.stream.finish())

    def _add(self, text: str) -> None:
        if text:
            self.pieces.append(text)


class Run:
    """One run of the language model over one or more questions; it goes on only as far as it is read.

    `fault` is what ended it before its end: every answer of it raises that from then on, so none reads as a whole one.
    """

    def __init__(self, steps: Iterator[list[Piece]], rows: Sequence[Row], timings: dict[str, float]) -> None:
        self._steps = steps
        self.rows = rows
        self.timings = timings
        self.timings["decode"] = 0.0
        self.finished = False
        self.fault: BaseException | None = None

    def advance(self) -> None:
        """Take what every row gains next; raises `fault` if there is one."""
        if self.fault is not None:
            raise self.fault
        start = perf_counter()
        try:
            self._take(next(self._steps, None))
        except BaseException as error:
            self.fault = error
            raise
        self.timings["decode"] += (perf_counter() - start) * 1e3

    def _take(self, pieces: list[Piece] | None) -> None:
        if pieces is None:
            for row in self.rows:
                row.finish()
            self.finished = True
        else:
            for row, piece in zip(self.rows, pieces, strict=True):
                row.push(piece)

    def finish(self) -> None:
        """Go on to the end."""
        while not self.finished:
            self.advance()

    def settle(self) -> None:
        """Go on to the end, or to a fault, which is kept for whoever reads the answers."""
        with suppress(Exception):
            while not self.finished and self.fault is None:
                self.advance()


class Answer:
    """Iterate over it for the text as it comes, or ask for `text`, `token_ids` or `timings`, which finish it.

    `prompt` is what was asked, `images` which tokens of each picture were kept.
    """

    def __init__(self, run: Run, row: Row, prompt: Prompt, images: Sequence[Picks]) -> None:
        self._run = run
        self._row = row
        self.prompt = prompt
        self.images = list(images)

    def __iter__(self) -> Iterator[str]:
        """The text in pieces of whole characters; a second time from the start."""
        given = 0
        while True:
            while given < len(self._row.pieces):
                yield self._row.pieces[given]
                given += 1
            if self._run.finished:
                return
            self._run.advance()

    def finish(self) -> "Answer":
        """Let the language model go on to the end."""
        self._run.finish()
        return self

    @property
    def failed(self) -> bool:
        """Whether a fault ended it; one that is still being read is finished first."""
        self._run.settle()
        return self._run.fault is not None

    @property
    def text(self) -> str:
        """The whole text, without special tokens and without white space at its start."""
        self.finish()
        return "".join(self._row.pieces)

    @property
    def token_ids(self) -> list[int]:
        """Every generated id, the one that ended the answer included; none from a server that tells only text."""
        self.finish()
        return list(self._row.token_ids)

    @property
    def timings(self) -> dict[str, float]:
        """Milliseconds of each stage; for a batch, those of the whole batch."""
        self.finish()
        return dict(self._run.timings)

    def describe(self) -> dict[str, Any]:
        """All of it as JSON values: text, ids, the nouns that steered the selection, picks, timings."""
        return {
            "text": self.text,
            "token_ids": self.token_ids,
            "prompt_ids": self.prompt.ids,
            "text_token_ids": self.prompt.text_token_ids,
            "nouns": self.prompt.nouns,
            "images": [
                {
                    "kept_indices": picks.kept_indices.tolist(),
                    "pick_order": picks.pick_order.tolist(),
                    "kept_counts": picks.kept_counts.tolist(),
                }
                for picks in self.images
            ],
            "timings": self.timings,
        }
