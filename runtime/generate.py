"""From logits to tokens to text: stopping, and whole characters as they become certain."""

from collections import abc
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from resprune.runtime.choose import Chooser
from resprune.runtime.sampling import Sampling

if TYPE_CHECKING:
    import tokenizers

    from resprune.runtime.backends.backend import Sequence


def generate(
    sequence: "Sequence", sampling: Sampling, eos: frozenset[int], prompts: abc.Sequence[abc.Sequence[int]]
) -> Iterator[list[int | None]]:
    """Yield one token a row until every row has ended; None for a row that ended earlier.

    `sequence` stands after its prompt; `prompts` are the ids of each row's, which some settings look at. A row ends
    with its first token in `eos`, which is yielded, or after `max_new_tokens`.
    """
    choose = Chooser(sampling, prompts, eos)
    running = [True] * len(sequence.logits)
    for count in range(1, sampling.max_new_tokens + 1):
        tokens = choose(sequence.logits)
        ids = tokens.tolist()
        yield [token if alive else None for token, alive in zip(ids, running, strict=True)]
        running = [alive and token not in eos for token, alive in zip(ids, running, strict=True)]
        if not any(running) or count == sampling.max_new_tokens:
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
