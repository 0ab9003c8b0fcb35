"""An answer that comes piece by piece, and what it was made from."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Lock
from time import perf_counter
from typing import Any

from resprune.runtime.backends.backend import Piece
from resprune.runtime.errors import ResPruneError
from resprune.runtime.generate import TextStream
from resprune.runtime.prompt.prompter import Prompt
from resprune.runtime.prompt.splice import Picks
from resprune.runtime.walk import step


@dataclass
class Row:
    """One answer as it grows: `token_ids` so far and `pieces` of text; `eos` and `limit` (tokens) are what ends it.

    `cut` says that a server cut it.
    """

    stream: TextStream
    eos: frozenset[int] = frozenset()
    limit: int | None = None
    token_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    cut: bool = False

    def push(self, piece: Piece) -> None:
        """Take the next tokens, whose text is decoded here, or the next text, or None: it was cut."""
        if piece is None:
            self.cut = True
        elif isinstance(piece, str):
            self._add(piece if self.pieces else piece.lstrip())
        else:
            self.token_ids += piece
            for token in piece:
                self._add(self.stream.push(token))

    def finish(self) -> None:
        """Take what text is left."""
        self._add(self.stream.finish())

    def _add(self, text: str) -> None:
        if text:
            self.pieces.append(text)


class Batch:
    """One or more answers that a backend writes together; it goes on only as far as one of them is read.

    An error that ends the batch early is kept: every answer of it raises that error from then on, so that none looks
    complete. Ctrl-C reaches only the thread that reads; later readers get a `ResPruneError`.
    """

    def __init__(
        self,
        steps: Iterator[list[Piece]],
        rows: Sequence[Row],
        timings: dict[str, float],
        require_open: Callable[[], None] = lambda: None,
    ) -> None:
        self._steps = steps
        self.rows = rows
        self.timings = timings
        self.timings["decode"] = 0.0
        self.finished = False
        self._require_open = require_open
        self._error: Exception | None = None
        self._lock = Lock()  # several threads may read one answer, or the answers of one batch

    def advance(self) -> None:
        """Take what every row gains next, if there is more; raises what ended the batch before its end."""
        with self._lock:
            if self.finished:
                return
            if self._error is not None:
                raise self._error
            start = perf_counter()
            try:
                self._require_open()
                self._take(step(self._steps))
            except Exception as error:
                self._end(error)
                raise
            except BaseException:
                self._end(ResPruneError("this answer was stopped before its end; ask again"))
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

    def close(self) -> None:
        """Abandon what has not been written yet, and free its sequence."""
        with self._lock:
            if not self.finished and self._error is None:
                self._end(ResPruneError("this answer was closed before its end; ask again"))

    def _end(self, error: Exception) -> None:
        self._error = error
        steps, self._steps = self._steps, iter(())
        if (close := getattr(steps, "close", None)) is not None:
            with suppress(Exception):
                close()


class Answer:
    """Iterate over it for the text as it comes, or ask for `text`, `token_ids` or `timings`, which finish it.

    `prompt` is what was asked, `images` which tokens of each image were kept, `prompt_tokens` how many tokens the
    language model read, the kept ones included. Losing the last reference to an answer
    that was not read to its end frees its sequence, and so does `close`.
    """

    def __init__(
        self, batch: Batch, row: Row, prompt: Prompt, images: Sequence[Picks], prompt_tokens: int
    ) -> None:
        self._batch = batch
        self._row = row
        self.prompt = prompt
        self.images = list(images)
        self.prompt_tokens = prompt_tokens

    def __iter__(self) -> Iterator[str]:
        """The text in pieces of whole characters; a second time from the start."""
        return (piece for piece in self.steps() if piece)

    def steps(self) -> Iterator[str]:
        """The text that each step of the language model adds, "" where a character is not whole yet.

        What was written before comes at once. Between two steps the reader can stop: see `close`.
        """
        given = 0
        while True:
            finished = self._batch.finished  # before the pieces, to which another thread may add the last
            pieces = self._row.pieces[given:]
            given += len(pieces)
            yield "".join(pieces)
            if finished:
                return
            self._batch.advance()

    def __str__(self) -> str:
        """`text`."""
        return self.text

    def finish(self) -> "Answer":
        """Let the language model go on to the end; returns this answer."""
        self._batch.finish()
        return self

    def close(self) -> None:
        """Abandon the answer: what is not written yet never is, and reading on raises `ResPruneError`."""
        self._batch.close()

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
    def tokens_written(self) -> int:
        """How many tokens it has so far; pieces of text from a server that tells no ids."""
        return len(self._row.token_ids) or len(self._row.pieces)

    @property
    def finish_reason(self) -> str:
        """Why the whole answer ended: `length` if it was cut at its limit, else `stop`."""
        self.finish()
        row = self._row
        cut = row.cut or (row.limit is not None and len(row.token_ids) >= row.limit)
        return "length" if cut and row.eos.isdisjoint(row.token_ids[-1:]) else "stop"

    @property
    def timings_so_far(self) -> dict[str, float]:
        """As `timings`, and it finishes nothing."""
        return dict(self._batch.timings)

    @property
    def timings(self) -> dict[str, float]:
        """Milliseconds of each stage: pixels, prompt, vision, prefill, decode. Of a batch, those of the whole batch."""
        self.finish()
        return dict(self._batch.timings)

    def describe(self) -> dict[str, Any]:
        """All of it as JSON values; what says nothing is left out.

        `text`, `finish_reason`, `token_ids` (not from a server that tells only text), `prompt_tokens`, `prompt_ids`,
        `keywords` with their `keyword_ids`, which guided the selection; `images`, each with the `kept_indices` of its
        tokens, ascending, and `pick_order`, with proportional attention also `kept_counts`; `timings` in
        milliseconds, of which `first_token_ms` is the sum of those before `decode_ms`, and `tokens_per_second` after
        the first token, if there are two.
        """
        timings = self.timings
        decode_ms = timings.pop("decode")
        spent = {f"{stage}_ms": ms for stage, ms in timings.items()}
        spent |= {"first_token_ms": sum(timings.values()), "decode_ms": decode_ms}
        said = {
            "text": self.text,
            "finish_reason": self.finish_reason,
            "token_ids": self.token_ids,
            "prompt_tokens": self.prompt_tokens,
            "prompt_ids": self.prompt.ids,
            "keywords": self.prompt.nouns,
            "keyword_ids": self.prompt.text_token_ids,
            "images": [_describe(picks) for picks in self.images],
            "timings": spent,
        }
        if self.tokens_written > 1 and decode_ms > 0:
            said["tokens_per_second"] = 1e3 * (self.tokens_written - 1) / decode_ms
        return {name: value for name, value in said.items() if value not in ([], "") or name == "text"}


def _describe(picks: Picks) -> dict[str, list[int]]:
    said = {"kept_indices": picks.kept_indices.tolist(), "pick_order": picks.pick_order.tolist()}
    counts = picks.kept_counts.tolist()
    return said if set(counts) == {1} else said | {"kept_counts": counts}
