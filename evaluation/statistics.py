"""Intervals of a share, and the comparison of two sets of answers to the same questions."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]
Z = 1.959964  # 95 %


def wilson(hits: float, trials: int) -> tuple[float, float]:
    """Wilson's 95 % score interval, (low, high) from 0 to 1, of the proportion `hits` of `trials`, at least 1."""
    share = hits / trials
    center = share + Z * Z / (2 * trials)
    spread = Z * math.sqrt(share * (1 - share) / trials + Z * Z / (4 * trials * trials))
    scale = 1 + Z * Z / trials
    low, high = (center - spread) / scale, (center + spread) / scale
    # Of all hits or of none it ends at their share, which rounding misses.
    return max(0.0, min(low, share)), min(1.0, max(high, share))


@dataclass(frozen=True)
class Paired:
    """Answers to the same questions in two ways, the second against the first.

    `agreement`: the share of answers that are the same, right or wrong; `lost` and `gained`: questions that only the
    first or only the second answers rightly; `p`: McNemar's exact test that both are as likely.
    """

    agreement: float
    lost: int
    gained: int
    p: float


def paired(same: Bools, first: Bools, second: Bools) -> Paired:
    """Compare answers: `same` [Q] whether they are equal, `first` and `second` [Q] whether each is right."""
    from scipy.stats import binomtest

    lost, gained = int((first & ~second).sum()), int((second & ~first).sum())
    p = binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    return Paired(float(same.mean()), lost, gained, float(p))
