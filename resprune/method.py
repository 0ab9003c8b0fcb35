"""The settings and constants of the method (arXiv 2603.21105), once for all rooms.

Command line, graphs and manifest read them here; only the standard library is imported. docs/method.md has the rules.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

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


class SettingError(ValueError):
    """A value that no selection has: the `name` of the setting, what it should be in words, and what it is."""

    def __init__(self, name: str, wanted: str, got: object) -> None:
        super().__init__(f"{name} should be {wanted}, not {got!r}")
        self.name, self.wanted, self.got = name, wanted, got


def _counts(value: object) -> bool:
    return isinstance(value, int) and value >= 1


_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("k", "num_tokens", "max_tokens"), ("a whole number from 1", _counts)),
    "share": ("above 0 and at most 1", lambda share: isinstance(share, int | float) and 0 < share <= 1),
    "alpha": ("a number from 0", lambda alpha: isinstance(alpha, int | float) and 0 <= alpha < math.inf),
    **{
        name: (f"one of {', '.join(known)}", known.__contains__)
        for name, known in (("scale", SCALES), ("body", BODIES), ("form", FORMS))
    },
}


def check(**settings: object) -> None:
    """Raise `SettingError` for the first of the settings, by name, that is none; None has not been set."""
    for name, value in settings.items():
        if name in _RULES and value is not None:
            wanted, holds = _RULES[name]
            if not holds(value):
                raise SettingError(name, wanted, value)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What may be asked of a selection; for what is None the model family or the number of tokens has the default."""

    k: int | None = None
    """Tokens to keep of an image."""
    share: float | None = None
    """The part of an image's tokens that was asked for in place of K, which is what it comes to for the largest."""
    alpha: float | None = None
    """Strength of the text guidance; 0 gives a gain of 1 everywhere."""
    scale: str = "minmax"
    """How relevance becomes a gain: "minmax" over an image's tokens, "clamp" max(r, 0), "shifted" (1 + r) / 2."""
    body: str = "loop"
    """"loop" (Loops of some steps) or "unrolled" (the same k steps in a row, for runtimes that capture a graph only
    without control flow, such as CUDA graphs)."""
    form: str | None = None
    """G = V Vᵀ "quadratic", by one product before the first pick (N² numbers), or "linear", one row of it a pick."""

    def settle(self, **defaults: Any) -> "Selection":
        """The selection that was asked for, with `defaults` for what was not; raises `SettingError`."""
        asked = {one.name: getattr(self, one.name) for one in fields(Settings)}
        return Selection(**defaults | {name: value for name, value in asked.items() if value is not None})


@dataclass(frozen=True, kw_only=True)
class Selection(Settings):
    """What a selection is made for; a manifest has all of it but `counts`, which its `attention` says.

    Raises:
        SettingError: a value that no selection has, or more tokens to keep than there are.

    """

    k: int = field()  # which has no default, unlike that of `Settings`
    alpha: float = 1.0
    form: str = "quadratic"
    num_tokens: int | None = None
    """N, the tokens of an image; None where it varies."""
    max_tokens: int | None = None
    """The largest N there is, where it varies."""
    counts: bool = False
    """Whether it counts the tokens that each kept one stands for, as proportional attention wants them."""

    def __post_init__(self) -> None:
        """Raise `SettingError`."""
        check(**vars(self))
        for name, most in (("num_tokens", self.num_tokens), ("max_tokens", self.max_tokens)):
            if most is not None and self.k > most:
                raise SettingError("k", f"at most {name} = {most}", self.k)

    def budget(self, num_tokens: int) -> int:
        """How many tokens of an image with `num_tokens` are kept: K, or fewer if a share of them is fewer."""
        return self.k if self.share is None else min(self.k, share_of(self.share, num_tokens))


def share_of(share: float, num_tokens: int) -> int:
    """A share of an image's tokens, rounded up; not by the rounding errors of a decimal fraction, though."""
    return max(1, math.ceil(round(share * num_tokens, 6)))
