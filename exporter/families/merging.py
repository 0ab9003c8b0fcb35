"""Towers whose patches become tokens a square at a time: their rows stand in merge order from end to end.

Attention does not mind the order, once the patches have their positions. What makes a token then finds its rows side
by side, whichever of the tokens are left (`exporter/early.py`).
"""

from __future__ import annotations

import math

from torch import Tensor


def merge_order(rows: Tensor, side: int) -> Tensor:
    """Rows [T, P, C] of a square of patches, token by token and in each row by row; a token is `side` × `side`."""
    tokens = math.isqrt(rows.shape[1]) // side
    squares = rows.reshape(rows.shape[0], tokens, side, tokens, side, rows.shape[2])
    return squares.transpose(2, 3).flatten(1, 4)


def of_tokens(rows: Tensor, side: int) -> Tensor:
    """Rows [T, P, C] in merge order → [T, N, side², C]."""
    return rows.reshape(rows.shape[0], -1, side**2, rows.shape[2])
