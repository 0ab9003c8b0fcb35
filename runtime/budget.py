"""How many tokens of an image to keep: a number, a share, or all."""

from dataclasses import dataclass

from resprune.method import share_of
from resprune.runtime.arguments import text as require_text
from resprune.runtime.errors import ResPruneError, shown


@dataclass(frozen=True)
class Budget:
    """`k` tokens, or a `share` of an image's tokens, above 0 and at most 1; with neither, all."""

    k: int | None = None
    share: float | None = None

    @staticmethod
    def parse(text: str) -> "Budget":
        """From "16", "11%" or "all"; `ResPruneError` for anything else."""
        word = require_text(text, "a budget").strip()
        try:
            if word == "all":
                return Budget()
            budget = Budget(share=float(word[:-1]) / 100) if word.endswith("%") else Budget(k=int(word))
        except ValueError:
            budget = Budget(k=0)
        if not (0 < budget.share <= 1 if budget.share is not None else (budget.k or 0) >= 1):
            raise ResPruneError(
                f"{shown(word)} is no number of tokens to keep; give a number from 1, a share like 11%, or all"
            )
        return budget

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
