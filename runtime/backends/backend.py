"""The seam that every way of answering stands behind: prompts with their kept rows in, answers out as they come.

A backend that gives logits is a `LanguageModel` and answers through `LocalGenerator`; one that generates by itself,
such as a server, is a `Generator` of its own.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from resprune.runtime.backends.onnxruntime import Embedding, LanguageModel, OrtLanguageModel
from resprune.runtime.backends.session import SessionOptions
from resprune.runtime.bundle.files import Bundle
from resprune.runtime.errors import ResPruneError
from resprune.runtime.generate import Sampling, eos_token_ids, generate
from resprune.runtime.prompt.prompter import Prompt
from resprune.runtime.prompt.splice import KeptTokens, Spliced

Piece = list[int] | str
"""What an answer gained: token ids, [] for none; text where a server tells no ids."""


@dataclass(frozen=True)
class Request:
    """Prompts that wait for their answers, in every form that a backend may take.

    `prompts[b]` has one image token a picture, and `pictures[b]` the tokens kept of each, in that order; `spliced` is
    both together, as embeddings with their positions.
    """

    prompts: Sequence[Prompt]
    pictures: Sequence[Sequence[KeptTokens]]
    spliced: Spliced


class Generator(Protocol):
    """A language model that writes answers, wherever it runs."""

    def start(self, request: Request, sampling: Sampling) -> Iterator[list[Piece]]:
        """Take the prompts in, then yield what each answer gained, one entry a prompt, until all have ended.

        The token that ended an answer is among its ids. A new start may end what was started before. Raises
        `ResPruneError`, here or while the answers are read, for what the user can put right.
        """
        ...

    def close(self) -> None:
        """Give back what it holds; it cannot be used afterwards."""
        ...


GeneratorFactory = Callable[[Bundle, Embedding, SessionOptions], Generator]
"""What `Pipeline.load` takes: a function that opens a generator for a bundle."""


class LocalGenerator:
    """Answers from logits, which are sampled here."""

    def __init__(self, model: LanguageModel, eos: frozenset[int]) -> None:
        self.model = model
        self._eos = eos

    def start(self, request: Request, sampling: Sampling) -> Iterator[list[Piece]]:
        """Prefill; then a token a row (see `Generator`)."""
        spliced = request.spliced
        logits = self.model.prefill(spliced.inputs_embeds, spliced.position_ids, spliced.attention_mask)
        steps = generate(self.model, logits, sampling, self._eos)
        return ([[] if token is None else [token] for token in tokens] for tokens in steps)

    def close(self) -> None:
        """Give back the language model."""
        self.model.close()


def together(streams: Sequence[Iterator[Piece]]) -> Iterator[list[Piece]]:
    """What each of several answers gains next, [] for one that has ended, until all have."""
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
    counts = iter(len(picture.rows) for picture in request.pictures[row])
    ids: list[int] = []
    for token in request.prompts[row].ids:
        ids += [token] * (next(counts) if token == image_token_id else 1)
    return ids


def require_plain_attention(bundle: Bundle, title: str) -> None:
    """`ResPruneError` for a bundle whose rows count for more than themselves, which `title` cannot be told."""
    if bundle.manifest.attention != "plain":
        raise ResPruneError(
            f"{title} attends to every row alike, and this bundle was exported with --attention "
            f"{bundle.manifest.attention}; export it again with --attention plain"
        )


def onnxruntime_generator(bundle: Bundle, embedding: Embedding, options: SessionOptions) -> Generator:
    """The bundle's own decoder in ONNX Runtime: the factory that `Pipeline.load` uses unless it is given one."""
    return LocalGenerator(OrtLanguageModel(bundle, embedding, options), eos_token_ids(bundle))
