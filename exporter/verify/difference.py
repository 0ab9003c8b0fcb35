"""How far a graph may be from PyTorch, and the table of what is further."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from resprune.runtime.bundle.precisions import Precision

Counted = tuple[int, int]
"""How many are equal, and how many there are."""
TEXT = "text positions"
"""What is counted of running text: positions with PyTorch's most likely token."""


class ParityError(Exception):
    """A graph differs from PyTorch by more than it may; the text is a table of outputs. The CLI exits with 1."""


@dataclass(frozen=True)
class Difference:
    """How far one output of one graph is from PyTorch's: the largest difference, and the noise as a whole."""

    graph: str
    output: str
    max_diff: float
    scale: float
    atol: float
    snr: float = math.inf
    """Signal-to-noise ratio in dB."""
    least_snr: float = 0.0

    @property
    def within(self) -> bool:
        """Whether it may be; a NaN may not."""
        return self.max_diff <= self.allowed and self.snr >= self.least_snr

    @property
    def allowed(self) -> float:
        """The bound of `max_diff`; infinite where the noise alone is judged."""
        return self.atol * max(1.0, self.scale)

    @property
    def shares(self) -> tuple[float, float]:
        """How much of what they may be the largest difference and the noise are: 1 is all of it."""
        return self.max_diff / self.allowed, 10 ** ((self.least_snr - self.snr) / 20)

    @property
    def words(self) -> str:
        """Both figures, and the bound of the one that is nearer to its own."""
        largest, noise = self.shares
        atol, least = f" (atol {self.allowed:.0e})", ""
        if noise > largest:
            atol, least = "", f" (at least {self.least_snr:.0f})"
        text = f"max diff {self.max_diff:.1e}{atol}"
        return text if math.isinf(self.snr) else f"{text}, SNR {self.snr:.0f} dB{least}"


def difference(graph: str, output: str, got: NDArray[Any], want: Tensor, row: Precision) -> Difference:
    """The difference of one output, judged by the precision of its graph."""
    if got.shape != tuple(want.shape):
        return Difference(graph, output, math.nan, 0.0, row.atol, math.nan, row.snr)
    gap = torch.from_numpy(got.astype("float32")) - want
    signal, noise = float(want.double().square().sum()), float(gap.double().square().sum())
    snr = math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal else -math.inf
    # What is nothing but rounding has no signal of its own: an atol of nothing is then all there is to judge by.
    if float(gap.abs().max()) <= 1e-5:
        snr = math.inf
    return Difference(graph, output, float(gap.abs().max()), float(want.abs().max()), row.atol, snr, row.snr)


def text_difference(graph: str, got: NDArray[Any], want: Tensor, row: Precision) -> Difference:
    """The difference of logits at all positions of running text."""
    return difference(graph, "logits of text", got, want, replace(row, atol=row.text_atol))


def nearest(differences: Iterable[Difference]) -> Difference:
    """The one that is nearest to what it may be, or past it."""
    return max(differences, key=lambda row: (not row.within, max(row.shares)))


def require(
    differences: Iterable[Difference],
    counts: Mapping[str, Counted],
    *,
    exact: Collection[str],
    least: Mapping[str, float] | None = None,
) -> None:
    """`ParityError` with a table if a difference is too large or a count too small.

    Of those in `exact` all must be equal, of those in `least` that share.
    """
    rows = list(differences)
    shares = dict.fromkeys(exact, 1.0) | dict(least or {})
    missed = [what for what, (equal, total) in counts.items() if equal < shares.get(what, 0.0) * total]
    if missed or not all(row.within for row in rows):
        table = [f"  {'graph':24} {'output':24} {'max diff':>10} {'allowed':>10} {'SNR':>8} {'at least':>8}"]
        for row in rows:
            allowed = "-" if math.isinf(row.allowed) else f"{row.allowed:.1e}"
            mark = "" if row.within else "  <-"
            table.append(
                f"  {row.graph:24} {row.output:24} {row.max_diff:10.1e} {allowed:>10} "
                f"{row.snr:5.0f} dB {row.least_snr:5.0f} dB{mark}"
            )
        for what, (equal, total) in counts.items():
            mark = "  <-" if what in missed else ""
            table.append(f"  {what:49} {equal} of {total} equal{mark}")
        raise ParityError("the graphs differ from PyTorch, so no bundle was written\n" + "\n".join(table))


def equal_tokens(got: Sequence[int], wanted: Sequence[int]) -> Counted:
    """How many places of two answers, which are of one length, have the same token."""
    return sum(map(operator.eq, got, wanted)), len(wanted)


def verdict(got: Sequence[int], wanted: Sequence[int]) -> str:
    """What two answers have in common, in words: few places are equal after a word more or less."""
    equal, total = equal_tokens(got, wanted)
    if equal == total:
        return "word for word"
    if 2 * equal >= total:
        return "mostly the same words"
    alike = next(place for place, pair in enumerate(zip(got, wanted, strict=True)) if pair[0] != pair[1])
    return f"the first {alike} alike, then other words" if alike else "another answer"
