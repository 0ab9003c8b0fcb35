"""The interfaces that every text-generation backend implements: prompts with their kept rows in, answers out.

A backend that gives logits is a `Decoder`, and answers through `LocalBackend`; one that generates by itself, such as a
server, is a `Backend` of its own. Either is shared by all threads: all state of an answer lives in its sequence.
"""

from collections import abc
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np

from resprune.names import EMBED_TOKENS
from resprune.runtime.backends.session import GraphRunner, SessionOptions
from resprune.runtime.bundle.files import Bundle
from resprune.runtime.errors import ResPruneError
from resprune.runtime.generate import generate
from resprune.runtime.prompt.prompter import Prompt
from resprune.runtime.prompt.splice import Floats, Ints, KeptTokens, Spliced
from resprune.runtime.sampling import Sampling, eos_token_ids

T = TypeVar("T")
Piece = list[int] | str | None
"""What an answer gained: token ids, [] for none; text where a server tells no ids; None: it was cut at a limit."""
EmbedTokens = Callable[[Ints], Floats]
"""`input_ids` [B, S] int64 → `inputs_embeds` [B, S, D] float32."""


class Embedding:
    """The language model's input table, as the bundle's `embed_tokens` graph: an `EmbedTokens`."""

    def __init__(self, graphs: GraphRunner) -> None:
        self.graphs = graphs
        graphs.open(EMBED_TOKENS)

    def __call__(self, input_ids: Ints) -> Floats:
        """`input_ids` [B, S] → `inputs_embeds` [B, S, D] float32."""
        embeds: Floats
        (embeds,) = self.graphs.run(EMBED_TOKENS, {"input_ids": input_ids}, ["inputs_embeds"])
        return embeds


class Sequence(Protocol):
    """A batch of prompts on its way through a language model, with all its state; one thread at a time uses it."""

    @property
    def logits(self) -> Floats:
        """[B, vocabulary] float32 of the last position."""
        ...

    def step(self, tokens: Ints) -> None:
        """Append one token a row, `tokens` [B]; `logits` are then those after it."""
        ...

    def close(self) -> None:
        """Free the KV cache; the sequence cannot be used afterwards. Losing the last reference does the same."""
        ...


class Decoder(Protocol):
    """A language model that gives logits. Any number of its sequences may be open, in any threads."""

    def start(self, spliced: Spliced) -> Sequence:
        """Prefill a batch of prompts; raises `ResPruneError` for a run that fails."""
        ...

    def close(self) -> None:
        """Free the model; no sequence of it can step afterwards."""
        ...


@dataclass
class Place:
    """Where a batch of sequences stands: the mask and positions that every decoder steps by.

    `attention_mask` [B, P + S] int64, as in `Spliced`, of all rows so far and the S that come next; `position_ids`
    [B, S] or [3, B, S] int64 of the latter, and `following` those of the token after them.
    """

    attention_mask: Ints
    position_ids: Ints
    following: Ints

    @staticmethod
    def of(spliced: Spliced) -> "Place":
        """The place at the prompt, before the prefill."""
        return Place(spliced.attention_mask, spliced.position_ids, spliced.following)

    def step(self) -> None:
        """Move on by one token a row: the mask gains a column of ones, `position_ids` become that token's."""
        more = np.ones((len(self.attention_mask), 1), np.int64)
        self.attention_mask = np.concatenate([self.attention_mask, more], axis=1)
        self.position_ids, self.following = self.following, self.following + 1


class Reading(Generic[T]):
    """An iterator that frees what it reads from by `free`, once: at its end, when it fails, is closed, or is lost.

    A generator that was not begun does nothing of the kind, whatever its `finally` says.
    """

    def __init__(self, items: Iterator[T], free: Callable[[], object]) -> None:
        self._items = items
        self._free: Callable[[], object] | None = free

    def __iter__(self) -> "Reading[T]":
        return self

    def __next__(self) -> T:
        try:
            return next(self._items)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Abandon what has not been read."""
        free, self._free = self._free, None
        if free is not None:
            self._items = iter(())
            free()

    __del__ = close


@dataclass(frozen=True)
class Request:
    """Prompts that wait for their answers, in every form that a backend may take.

    `prompts[b]` has one image token a span of its images, and `images[b]` the tokens kept of each image, in that
    order; `spliced` is both together, as embeddings with their positions.
    """

    prompts: abc.Sequence[Prompt]
    images: abc.Sequence[abc.Sequence[KeptTokens]]
    spliced: Spliced


class Backend(Protocol):
    """A language model that writes answers, wherever it runs. Any number of requests may be open, in any threads."""

    def start(self, request: Request, sampling: Sampling) -> Iterator[list[Piece]]:
        """Take the prompts in, then yield what each answer gained, one entry a prompt, until all have ended.

        The token that ended an answer is among its ids. Dropping the iterator abandons the answers, even before the
        first is read: see `Reading`. Raises `ResPruneError`, here or while the answers are read, for what the user can
        put right.
        """
        ...

    def close(self) -> None:
        """Free what it holds; it cannot be used afterwards."""
        ...


BackendFactory = Callable[[Bundle, Embedding, SessionOptions], Backend]
"""What `Pipeline.load(generator=…)` takes: a function that opens a backend for a bundle."""


class LocalBackend:
    """A backend that samples from the logits of a local decoder."""

    def __init__(self, decoder: Decoder, eos: frozenset[int], image_token_id: int) -> None:
        self.decoder = decoder
        self._eos = eos
        self._image_token_id = image_token_id

    def start(self, request: Request, sampling: Sampling) -> Iterator[list[Piece]]:
        """Prefill; then a token a row (see `Backend`)."""
        prompts = [expanded_ids(request, row, self._image_token_id) for row in range(len(request.prompts))]
        return answers(self.decoder.start(request.spliced), sampling, self._eos, prompts)

    def close(self) -> None:
        """Free the language model."""
        self.decoder.close()


def answers(
    sequence: Sequence, sampling: Sampling, eos: frozenset[int], prompts: abc.Sequence[abc.Sequence[int]]
) -> Iterator[list[Piece]]:
    """What a local sequence writes after its prompts (see `generate`); it is closed at the end, or when dropped."""
    steps = generate(sequence, sampling, eos, prompts)
    return Reading(map(_pieces, steps), sequence.close)


def _pieces(tokens: abc.Sequence[int | None]) -> list[Piece]:
    return [[] if token is None else [token] for token in tokens]


def local_backend(bundle: Bundle, decoder: Decoder) -> LocalBackend:
    """A backend around a decoder of a bundle's language model."""
    return LocalBackend(decoder, eos_token_ids(bundle), bundle.manifest.image_token_id)


def together(streams: Iterable[Reading[Piece]]) -> Iterator[list[Piece]]:
    """What each of several answers gains next, [] for one that has ended, until all have.

    `streams` may begin the answers one by one: if one cannot begin, those before it are closed.
    """
    with ExitStack() as all_of_them:
        begun = [all_of_them.enter_context(closing(stream)) for stream in streams]
        return Reading(_in_turns(begun), all_of_them.pop_all().close)


def _in_turns(streams: abc.Sequence[Iterator[Piece]]) -> Iterator[list[Piece]]:
    running = dict(enumerate(streams))
    while running:
        pieces: list[Piece] = [[] for _ in streams]
        for row, stream in list(running.items()):
            try:
                pieces[row] = next(stream)
            except StopIteration:
                del running[row]
        yield pieces


def expanded_ids(request: Request, row: int, image_token_id: int) -> list[int]:
    """The ids of one prompt with an image token for each row that is kept."""
    counts = iter([count for image in request.images[row] for count in image.spans])
    ids: list[int] = []
    for token in request.prompts[row].ids:
        ids += [token] * (next(counts) if token == image_token_id else 1)
    return ids


def closed_early() -> ResPruneError:
    """The error of an answer that is read on after its pipeline was closed."""
    return ResPruneError(
        "the pipeline was closed before this answer was read to its end; read it before that"
    )


def require_images(request: Request, title: str) -> None:
    """`ResPruneError` if a prompt has no image. `title` names the backend, which takes prompts with images only."""
    if not all(request.images):
        raise ResPruneError(f"{title} answers only about images here; give one")


def require_plain_attention(bundle: Bundle, title: str) -> None:
    """`ResPruneError` for a bundle with proportional attention. `title` names the backend, which ignores counts."""
    if bundle.manifest.selection.counts:
        raise ResPruneError(
            f"{title} attends to every row alike, and this bundle was exported with --attention "
            f"{bundle.manifest.attention}; export it again with --attention plain"
        )
