"""The settings and constants of the method (arXiv 2603.21105), once for all rooms.

Command line, graphs and manifest read them here; only the standard library is imported. docs/method.md has the rules.
"""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

SCALES = ("minmax", "clamp", "shifted")
BODIES = ("loop", "unrolled")
FORMS = ("quadratic", "linear")
MAX_ALPHA = (2 - 2**-23) * 2.0**127
"""The largest float32, which it is in a graph."""

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
        super().__init__(name, wanted, got)
        self.name, self.wanted, self.got = name, wanted, got

    def __str__(self) -> str:
        return f"{self.name} should be {self.wanted}, not {self.got!r}"


def _number(convert: Callable[[Any], Any], least: float, most: float) -> Callable[[Any], Any]:
    """What makes an int or a float from `least` to `most` of a number, NumPy's too, and raises for anything else."""

    def made(value: Any) -> Any:
        number = convert(value)
        if isinstance(value, bool | str | bytes) or not least <= number <= most:
            raise ValueError
        return number

    return made


def _one_of(known: tuple[Any, ...]) -> Callable[[Any], Any]:
    return lambda value: known[known.index(value)]


_WHOLE = ("a whole number from 1", _number(operator.index, 1, math.inf))
_RULES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    **dict.fromkeys(("k", "num_tokens", "max_tokens"), _WHOLE),
    "share": ("above 0 and at most 1", _number(float, math.ulp(0), 1)),
    "alpha": (f"a number from 0 to {MAX_ALPHA:.2e}", _number(float, 0, MAX_ALPHA)),
    **{
        name: (f"one of {', '.join(known)}", _one_of(known))
        for name, known in (("scale", SCALES), ("body", BODIES), ("form", FORMS))
    },
    "counts": ("True or False", _one_of((False, True))),
}
"""Of each setting what it should be, in words, and what makes it of a value, or raises."""


def setting(name: str, value: object) -> Any:
    """`value` as the setting has it, NumPy's numbers as Python's; raises `SettingError` for one that is none."""
    wanted, made = _RULES[name]
    try:
        return made(value)
    except Exception:  # what an object's own __index__, __float__ or __eq__ raises
        raise SettingError(name, wanted, value) from None


def check(**settings: object) -> None:
    """Raise `SettingError` for the first of the settings, by name, that is none; None has not been set."""
    for name, value in settings.items():
        if value is not None:
            setting(name, value)


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
        SettingError: a value that no selection has, None for one without a default of None, or more tokens to keep
            than there are.

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
        for one in fields(self):
            value = getattr(self, one.name)
            if value is not None or one.default is not None:
                object.__setattr__(self, one.name, setting(one.name, value))
        for name, most in (("num_tokens", self.num_tokens), ("max_tokens", self.max_tokens)):
            if most is not None and self.k > most:
                raise SettingError("k", f"at most {name} = {most}", self.k)

    def budget(self, num_tokens: int) -> int:
        """How many tokens of an image with `num_tokens` are kept: K, or fewer if a share of them is fewer."""
        return self.k if self.share is None else min(self.k, share_of(self.share, num_tokens))


def share_of(share: float, num_tokens: int) -> int:
    """A share of an image's tokens, rounded up; not by the rounding errors of a decimal fraction, though."""
    return max(1, math.ceil(round(share * num_tokens, 6)))
