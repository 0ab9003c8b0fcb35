"""How much of the visual tokens' energy the kept ones do not span, and the least that any K directions leave."""

import numpy as np

from resprune.evaluation.selectors import Doubles, Ints

DEPENDENT = 1e-12
"""A row with less than this part of the whole energy outside the span adds no direction."""


def energy_outside(visual: Doubles, picks: Ints) -> Doubles:
    """Share of the energy of V [N, D] outside the span of the first t picks, for t = 0 … K: [K + 1]."""
    residual = visual.copy()
    total = float((visual**2).sum())
    shares = [1.0]
    for pick in picks:
        row = residual[pick]
        energy = float(row @ row)
        if energy > DEPENDENT * total:
            residual = residual - np.outer(residual @ row, row) / energy
        shares.append(float((residual**2).sum()) / total)
    return np.array(shares)


def svd_bound(visual: Doubles, k: int) -> Doubles:
    """The smallest share that any t directions leave outside, for t = 0 … k (Eckart and Young): [k + 1]."""
    energy = np.linalg.svd(visual, compute_uv=False) ** 2
    shares: Doubles = 1 - np.concatenate([[0.0], np.cumsum(energy)]) / energy.sum()
    held = np.zeros(max(0, k + 1 - len(shares)))  # more directions than there are leave nothing
    bound: Doubles = np.maximum(np.concatenate([shares, held])[: k + 1], 0)
    return bound
