"""What engines are built for; next to nothing is imported, so that help is quick."""

from __future__ import annotations

from dataclasses import dataclass

from resprune.runtime.bundle.files import Bundle
from resprune.runtime.bundle.manifest import Range
from resprune.runtime.errors import ResPruneError

MOST_CONTEXT = 4096  # unless asked for: the cache of a whole context is what fills a small GPU
QUESTION, ROOM = 32, 512
"""Tokens of a pruned prompt beside those of one image, usually, and beside those of two at most."""


@dataclass(frozen=True)
class Limits:
    """What engines are built for, each as least, usual, most; `of` fills in what is None.

    `batch`: images, and questions, at once; `nouns`: tokens of the question's nouns; `tokens`: an image's visual
    tokens before the selection, where that varies; `prompt`: tokens of a pruned prompt; `context`: most tokens of
    prompt and answer together.
    """

    batch: Range = (1, 1, 4)
    nouns: Range = (1, 4, 64)
    tokens: Range | None = None
    prompt: Range | None = None
    context: int | None = None

    def of(self, bundle: Bundle) -> tuple[Range, Range, int]:
        """`tokens`, `prompt` and `context` as they are asked for, or what fits the bundle's K and its context."""
        selection, longest = bundle.manifest.selection, bundle.manifest.context_length
        context = min(longest, max(MOST_CONTEXT, 4 * selection.k)) if self.context is None else self.context
        if not 2 <= context <= longest:
            raise ResPruneError(f"--context should be 2 to {longest}, this bundle's limit, not {context}")
        largest = selection.num_tokens or selection.max_tokens or selection.k
        tokens = self.tokens or (1, max(1, largest // 2), largest)
        if tokens[2] > largest:
            raise ResPruneError(
                f"--tokens should end at {largest}, this bundle's largest image, not {tokens[2]}"
            )
        # Pruned prompts are K and a question long; twice that serves two images or a conversation.
        room = min(context - 1, 2 * selection.k + ROOM)
        prompt = self.prompt or (1, min(room, selection.k + QUESTION), room)
        if prompt[2] >= context:
            raise ResPruneError(
                f"--prompt should stay below the {context} tokens of --context, not {prompt[2]}"
            )
        return tokens, prompt, context
