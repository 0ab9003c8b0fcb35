"""Ways to choose K of N visual tokens: the method, parts of it, and its rivals, all on the same features.

A selector takes `Candidates` and k ≤ N, and returns k indices [k] int64 in pick order.
NumPy in float64, for clarity; the graphs and kernels that a bundle runs are held to the same picks.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from resprune.method import EXHAUSTED, TIE, Selection

Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Candidates:
    """What a selector sees: V [N, D] and the question's text T [M, D] (M may be 0), float64.

    `alpha` and `scale` are those of the gain; `seed` is one number or a list of them, for what is random.
    """

    visual: Doubles
    text: Doubles
    alpha: float = Selection.alpha
    scale: str = Selection.scale
    seed: int | tuple[int, ...] = 0


Selector = Callable[[Candidates, int], Ints]
"""Candidates and K, at most N → the indices kept [K], in the order they were picked."""


def resprune(of: Candidates, k: int) -> Ints:
    """The method (arXiv 2603.21105): greedy by residual energy times the gain of the largest cosine."""
    return expand(of.visual, gain(of, cosines(of).max(axis=1, initial=-1)), k)


def without_text(of: Candidates, k: int) -> Ints:
    """The method at α = 0."""
    return expand(of.visual, np.ones(len(of.visual)), k)


def relevance_alone(of: Candidates, k: int) -> Ints:
    """The K tokens of the largest gain, without subspace reconstruction: the paper's ablation."""
    return _ranked(gain(of, cosines(of).max(axis=1, initial=-1)), k)


def negative(of: Candidates, k: int) -> Ints:
    """The method with low relevance preferred, which helps context according to arXiv 2606.18681.

    The gain's scale is the bundle's, but `shifted` where that is `clamp`, by which every gain could be 0.
    """
    scale = "shifted" if of.scale == "clamp" else of.scale
    return expand(of.visual, gain(replace(of, scale=scale), -cosines(of).max(axis=1, initial=-1)), k)


def mean_relevance(of: Candidates, k: int) -> Ints:
    """The method with the mean of the cosines in place of the largest."""
    return expand(of.visual, gain(of, _mean_cosine(of)), k)


def pooled_relevance(of: Candidates, k: int) -> Ints:
    """The method with the cosine of the mean text embedding."""
    pooled = of.text.mean(axis=0, keepdims=True) if len(of.text) else of.text
    return expand(of.visual, gain(of, (unit(of.visual) @ unit(pooled).T).sum(axis=1)), k)


def random(of: Candidates, k: int) -> Ints:
    """K tokens drawn without replacement."""
    return np.random.default_rng(of.seed).permutation(len(of.visual))[:k]


def stride(of: Candidates, k: int) -> Ints:
    """K tokens at even distances in raster order, the first half a distance from the start."""
    return np.floor((np.arange(k) + 0.5) * len(of.visual) / k).astype(np.int64)


def largest_norm(of: Candidates, k: int) -> Ints:
    """The K longest rows."""
    return _ranked(np.linalg.norm(of.visual, axis=1), k)


def divprune(of: Candidates, k: int) -> Ints:
    """DivPrune (arXiv 2503.02175): max-min cosine distance, first the row whose nearest neighbour is farthest."""
    distance = 1 - unit(of.visual) @ unit(of.visual).T  # [N, N]
    np.fill_diagonal(distance, np.inf)
    nearest = distance.min(axis=1)  # [N]: of any row, then of the rows kept
    picks = np.empty(k, dtype=np.int64)
    for t in range(k):
        picks[t] = nearest.argmax()
        nearest = np.minimum(np.inf if t == 0 else nearest, distance[picks[t]])
        nearest[picks[: t + 1]] = -np.inf
    return picks


def cdpruner(of: Candidates, k: int) -> Ints:
    """CDPruner (arXiv 2506.10967): greedy MAP of the DPP with kernel r_i cos(v_i, v_j) r_j.

    r is the min-max of the mean cosine with the text.
    """
    relevance = scaled(_mean_cosine(of), "minmax") if len(of.text) else np.ones(len(of.visual))
    return greedy_map(relevance[:, None] * (unit(of.visual) @ unit(of.visual).T) * relevance, k)


CONTROLS: dict[str, Selector] = {
    "no-text": without_text,
    "relevance": relevance_alone,
    "negative": negative,
    "pooled": pooled_relevance,
    "mean": mean_relevance,
    "random": random,
    "stride": stride,
    "norm": largest_norm,
    "divprune": divprune,
    "cdpruner": cdpruner,
}
"""By their names on the command line; `resprune` is none of them, for there the model's own selection is measured."""


def expand(visual: Doubles, gain: Doubles, k: int) -> Ints:
    """Greedy subspace expansion: V [N, D] and gain g [N] → picks [k] int64 (docs/method.md).

    `greedy_map` of the kernel √g_i (v_i · v_j) √g_j, of whose diagonal g_i · E(v_i) is what is left after each pick.
    """
    rows = np.sqrt(gain)[:, None] * visual
    return greedy_map(rows @ rows.T, k)


def greedy_map(kernel: Doubles, k: int) -> Ints:
    """Greedy MAP inference of a determinantal point process: each pick makes the determinant grow the most.

    `kernel` [N, N] positive semidefinite → [k] picks, by an incremental Cholesky factorisation (arXiv 1709.05135).
    Ties and an exhausted kernel as in docs/method.md.
    """
    initial = kernel.diagonal().copy()
    left = initial.copy()  # the diagonal given the picks
    factor = np.zeros((len(kernel), k))
    free = np.ones(len(kernel), dtype=bool)
    picks = np.empty(k, dtype=np.int64)
    for t in range(k):
        exhausted = left[free].max() <= EXHAUSTED * initial.max()
        score = np.where(free, initial if exhausted else left, -1)
        pick = picks[t] = np.argmax(free & (score >= (1 - TIE) * score.max()))  # the lowest of the tied
        free[pick] = False
        if not exhausted:
            factor[:, t] = (kernel[:, pick] - factor[:, :t] @ factor[pick, :t]) / np.sqrt(left[pick])
            left = np.maximum(left - factor[:, t] ** 2, 0)
    return picks


def stands_for(visual: npt.NDArray[np.floating[Any]], kept: Ints) -> Ints:
    """Which kept token each of N counts with in proportional attention: its place in `kept` [K], ascending; [N] int64.

    A kept one with itself, any other with the one of the largest cosine; of those within TIE of it, the lowest.
    """
    rows = unit(visual.astype(np.float64))
    cosine = rows @ rows[kept].T  # [N, K]
    nearest: Ints = (cosine >= cosine.max(axis=1, keepdims=True) - TIE).argmax(axis=1)
    nearest[kept] = np.arange(len(kept))
    return nearest


def gain(of: Candidates, relevance: Doubles) -> Doubles:
    """Gain [N] of a relevance [N]: scaled to 0 to 1, to the power α; 1 where there is no text."""
    if not len(of.text):
        return np.ones(len(of.visual))
    return scaled(relevance, of.scale) ** of.alpha


def scaled(relevance: Doubles, scale: str) -> Doubles:
    """Relevance [N] from −1 to 1 → 0 to 1, by one of the scales of docs/method.md."""
    if scale == "clamp":
        return np.clip(relevance, 0, 1)
    if scale == "shifted":
        return np.clip((1 + relevance) / 2, 0, 1)
    low, high = relevance.min(), relevance.max()
    return (relevance - low) / (high - low) if high > low else np.ones_like(relevance)


def cosines(of: Candidates) -> Doubles:
    """Cosine of every visual token with every text token, [N, M]."""
    return unit(of.visual) @ unit(of.text).T


def unit(rows: Doubles) -> Doubles:
    """Rows scaled to length 1; a zero row stays zero."""
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norm > 0, norm, 1)


def _mean_cosine(of: Candidates) -> Doubles:
    mean: Doubles = cosines(of).sum(axis=1) / max(1, len(of.text))
    return mean


def _ranked(score: Doubles, k: int) -> Ints:
    """The K largest, the lowest index first among equals."""
    return np.argsort(-score, kind="stable")[:k]
