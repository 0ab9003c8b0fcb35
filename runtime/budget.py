"""How many tokens of an image to keep: a number, a share, or all."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from resprune.method import check, share_of
from resprune.runtime.arguments import text as require_text
from resprune.runtime.arguments import whole
from resprune.runtime.errors import ResPruneError, shown

Tokens = int | str | None
"""How many visual tokens of each image to keep: a number, a share such as "11%", or None for the bundle's K."""


@dataclass(frozen=True)
class Budget:
    """`k` tokens, or a `share` of an image's tokens, above 0 and at most 1; with neither, all."""

    k: int | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        """Raise `SettingError` for what no selection keeps."""
        check(k=self.k, share=self.share)

    @staticmethod
    def parse(text: str) -> "Budget":
        """From "16", "11%" or "all"; `ResPruneError` for anything else."""
        word = require_text(text, "a budget").strip()
        try:
            if word == "all":
                return Budget()
            return Budget(share=float(word[:-1]) / 100) if word.endswith("%") else Budget(k=int(word))
        except ValueError:
            raise ResPruneError(
                f"{shown(word)} is no number of tokens to keep; give a number from 1, a share like 11%, or all"
            ) from None

    @property
    def everything(self) -> bool:
        """Whether all tokens are kept."""
        return self.k is None and self.share is None

    def of(self, num_tokens: int) -> int:
        """How many of `num_tokens` are kept: at most all; a share is rounded up."""
        if self.everything:
            return num_tokens
        wanted = share_of(self.share, num_tokens) if self.share is not None else self.k or 0
        return min(wanted, num_tokens)

    def __str__(self) -> str:
        """As `parse` reads it."""
        if self.everything:
            return "all"
        return str(self.k) if self.share is None else f"{100 * self.share:g}%"


def wanted(tokens: Tokens, counts: Sequence[int]) -> list[int | None]:
    """How many tokens are kept of images that have `counts`, None for the bundle's K; a share is of each one's own."""
    if tokens is None:
        return [None] * len(counts)
    if not isinstance(tokens, str):
        return [whole(tokens, "tokens", -sys.maxsize)] * len(counts)  # the selection says which it takes
    budget = Budget.parse(tokens)
    return [budget.of(count) if budget.k is None else budget.k for count in counts]
