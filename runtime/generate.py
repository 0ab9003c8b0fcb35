"""From logits to tokens to text: sampling, stopping, and whole characters as they become certain."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from resprune.runtime.arguments import number, whole
from resprune.runtime.bundle.files import Bundle
from resprune.runtime.errors import ResPruneError
from resprune.runtime.prompt.splice import Floats, Ints

if TYPE_CHECKING:
    import tokenizers

    from resprune.runtime.backends.backend import Sequence


LARGEST_ID = (1 << 31) - 1
"""Of a token: far above any vocabulary."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: `temperature` 0 is greedy; `top_p` keeps the nucleus; `seed` repeats a draw."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        whole(self.max_new_tokens, "max_new_tokens", 1)
        if number(self.temperature, "temperature") < 0:
            raise ResPruneError(f"temperature should be 0 (greedy) or more, not {self.temperature}")
        if not 0 < number(self.top_p, "top_p") <= 1:
            raise ResPruneError(f"top_p should be above 0 and at most 1, not {self.top_p}")
        if self.seed is not None:
            whole(self.seed, "seed", 0)


def eos_token_ids(bundle: Bundle) -> frozenset[int]:
    """The ids that end an answer, from `generation_config.json`, else from `config.json`."""
    for name in ("generation_config.json", "config.json"):
        config = bundle.json(name) if name in bundle.manifest.files else {}
        for table in (config, config.get("text_config") or {}):
            found = table.get("eos_token_id") if isinstance(table, dict) else None
            if found is not None and found != []:
                ids = found if isinstance(found, list) else [found]
                return frozenset(whole(token, f"eos_token_id in {name}", 0, LARGEST_ID) for token in ids)
    raise ResPruneError(
        f"neither generation_config.json nor config.json in {bundle.root} has an eos_token_id; export it again"
    )


def next_token_probabilities(logits: Floats, temperature: float, top_p: float) -> npt.NDArray[np.float64]:
    """Probabilities [B, V] of `logits` [B, V] at a temperature above 0, outside the nucleus 0.

    The nucleus is the fewest most likely tokens whose probabilities reach `top_p`; the token that crosses it
    belongs to it, and equal probabilities stand in order of id.
    """
    below = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    with np.errstate(over="ignore"):  # at a temperature of almost 0 that is minus infinity
        weights: npt.NDArray[np.float64] = np.exp(below / temperature)
    weights /= weights.sum(axis=-1, keepdims=True)  # [B, V]
    if top_p < 1:
        order = np.argsort(-weights, axis=-1, kind="stable")
        ranked = np.take_along_axis(weights, order, axis=-1)
        ranked[np.cumsum(ranked, axis=-1) - ranked >= top_p] = 0
        np.put_along_axis(weights, order, ranked, axis=-1)
        weights /= weights.sum(axis=-1, keepdims=True)
    return weights


def sample(logits: Floats, sampling: Sampling, generator: np.random.Generator) -> Ints:
    """One token id a row: `logits` [B, V] → [B]. Greedy takes the lowest id among equals."""
    greedy: Ints = np.argmax(logits, axis=-1)
    # NaN counts as the largest of numbers here, so that looking at the largest logit of each row finds any.
    if np.isnan(logits[np.arange(len(logits)), greedy]).any():
        raise ResPruneError(
            "the decoder gave NaN (not a number) as logits, so there is no answer; "
            "if the bundle is fp16, export it with --dtype bf16 or fp32"
        )
    if sampling.temperature == 0:
        return greedy
    cumulative = np.cumsum(next_token_probabilities(logits, sampling.temperature, sampling.top_p), axis=-1)
    drawn = generator.random((len(logits), 1)) * cumulative[:, -1:]
    tokens: Ints = (cumulative <= drawn).sum(axis=-1)
    return tokens


def generate(sequence: "Sequence", sampling: Sampling, eos: frozenset[int]) -> Iterator[list[int | None]]:
    """Yield one token a row until every row has ended; None for a row that ended earlier.

    `sequence` stands after its prompt. A row ends with its first token in `eos`, which is yielded, or after
    `max_new_tokens`.
    """
    generator = np.random.default_rng(sampling.seed)
    running = np.ones(len(sequence.logits), dtype=bool)
    for count in range(1, sampling.max_new_tokens + 1):
        tokens = sample(sequence.logits, sampling, generator)
        yield [int(token) if alive else None for token, alive in zip(tokens, running, strict=True)]
        running &= ~np.isin(tokens, list(eos))
        if not running.any() or count == sampling.max_new_tokens:
            return
        sequence.step(tokens)


class TextStream:
    """Text of a growing token sequence, given out in whole characters.

    The pieces joined are `decode` of all tokens without special ones, less white space at its start: a token of
    many models begins with the space before its word. A character whose bytes are spread over several tokens, or
    that a later byte token could still change, waits for them.
    """

    def __init__(self, tokenizer: "tokenizers.Tokenizer") -> None:
        self._tokenizer = tokenizer
        self._special = {
            token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special
        }
        self._ids: list[int] = []
        # Decoding a few tokens before the new ones tells whether these begin with a space.
        self._start = self._read = 0
        self._blank = True

    def push(self, token: int) -> str:
        """The characters that have become certain with `token`; often none."""
        if token in self._special:
            return ""
        self._ids.append(token)
        name = self._tokenizer.id_to_token(token) or ""
        if name.startswith("<0x"):  # SentencePiece's byte tokens: a run of them is one unit until it ends
            return ""
        return self._advance(final=False)

    def finish(self) -> str:
        """What is left at the end; bytes that never became a character come as U+FFFD."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        known = self._decode(self._start, self._read)
        text = self._decode(self._start, len(self._ids))
        if not final and text.endswith("\ufffd"):
            return ""
        if len(text) > len(known):
            self._start, self._read = self._read, len(self._ids)
        piece = text[len(known) :]
        if self._blank:
            piece = piece.lstrip()
            self._blank = not piece
        return piece

    def _decode(self, start: int, end: int) -> str:
        text: Any = self._tokenizer.decode(self._ids[start:end], skip_special_tokens=False)
        return str(text)
