"""The settings and constants of the method (arXiv 2603.21105), once for all rooms.

Command line, graphs and manifest read them here; only the standard library is imported. docs/method.md has the rules.
"""

import math
from dataclasses import dataclass

SCALES = ("minmax", "clamp", "shifted")
BODIES = ("loop", "unrolled")
FORMS = ("quadratic", "linear")

TIE = 1e-5
"""Scores within a factor (1 - TIE) of the largest are tied; the lowest index among them is picked. Cosines within TIE
of the largest are tied as well, and the lowest index has the token."""
EXHAUSTED = 1e-6
"""The span is exhausted once the best score is at most EXHAUSTED times the best score before any pick."""
FILL = 1e-7
"""Scores before any pick, times FILL, stand in for tokens without residual energy: below EXHAUSTED, so that a
token outside the span always comes first, and one maximum serves both rules."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What a selection is made for; a manifest has all of it but `counts`, which its `attention` says.

    Raises:
        ValueError: k below 1, a negative alpha, or an unknown scale, body or form.

    """

    k: int
    """Tokens kept of an image."""
    num_tokens: int | None = None
    """N, the tokens of an image; None where it varies."""
    alpha: float = 1.0
    """Strength of the text guidance; 0 gives a gain of 1 everywhere."""
    scale: str = "minmax"
    """How relevance becomes a gain: "minmax" over an image's tokens, "clamp" max(r, 0), "shifted" (1 + r) / 2."""
    body: str = "loop"
    """"loop" (Loops of some steps) or "unrolled" (the same k steps in a row, for runtimes that capture a graph only
    without control flow, such as CUDA graphs)."""
    max_tokens: int | None = None
    """The largest N there is, where it varies."""
    share: float | None = None
    """The part of an image's tokens that was asked for in place of K, which is what it comes to for the largest."""
    form: str = "quadratic"
    """G = V Vᵀ "quadratic", by one product before the first pick (N² numbers), or "linear", one row of it a pick."""
    counts: bool = False
    """Whether it counts the tokens that each kept one stands for, as proportional attention wants them."""

    def __post_init__(self) -> None:
        """Raise `ValueError` for a value that no selection has."""
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")
        if self.alpha < 0:
            raise ValueError(f"alpha must be at least 0, got {self.alpha}")
        for name, known in (("scale", SCALES), ("body", BODIES), ("form", FORMS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")

    def budget(self, num_tokens: int) -> int:
        """How many tokens of an image with `num_tokens` are kept: K, or fewer if a share of them is fewer."""
        return self.k if self.share is None else min(self.k, share_of(self.share, num_tokens))


def share_of(share: float, num_tokens: int) -> int:
    """A share of an image's tokens, rounded up; not by the rounding errors of a decimal fraction, though."""
    return max(1, math.ceil(round(share * num_tokens, 6)))
