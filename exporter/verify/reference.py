"""ResPrune in PyTorch: the ground truth that every graph and kernel must match, pick for pick and count for count.

Source: arXiv 2603.21105. Relevance is its Eq. 13; the selection is its greedy subspace expansion by residual
energy, written as pivoted Gram-Schmidt. The counts are for proportional attention (arXiv 2210.09461, section 3), which
is no part of it. Rules that the paper leaves open (ties, exhaustion, masks) are stated in docs/method.md, section "The
method".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from resprune.method import EXHAUSTED, TIE, Selection, check

ROUNDING = 1e-5
"""What float32 leaves in doubt of a score, as a part of the best score before any pick; and of a cosine."""

STRAYS = 8
"""How many tokens float32 may still pick by noise, before it notices that the span is exhausted."""


def text_gain(
    visual: Tensor,
    text: Tensor,
    text_mask: Tensor | None = None,
    token_mask: Tensor | None = None,
    *,
    alpha: float = Selection.alpha,
    scale: str = Selection.scale,
) -> Tensor:
    """Gain of each visual token from its relevance to the prompt's nouns (Eq. 13, scaled, to the power alpha).

    Args:
        visual: [B, N, D] visual tokens in the language model's embedding space, any float dtype.
        text: [B, M, D] embeddings of the nouns' tokens; M may be 0.
        text_mask: [B, M] bool, False where a text row is padding.
        token_mask: [B, N] bool, False where a visual row is padding.
        alpha: strength of the text guidance, at least 0; 0 gives a gain of 1 everywhere.
        scale: "minmax" of the relevance over the valid tokens, "clamp" max(r, 0), or "shifted" (1 + r) / 2.

    Returns:
        [B, N] float32 in [0, 1]; all ones for a row of the batch without text; 0 at padding.

    Raises:
        SettingError: an unknown scale or a negative alpha.

    """
    check(scale=scale, alpha=alpha)
    B, N, _ = visual.shape
    valid = _mask(token_mask, (B, N), visual)
    text_valid = _mask(text_mask, (B, text.shape[1]), visual)
    if text.shape[1] == 0:
        return valid.float()

    cosine = _unit(visual.float()) @ _unit(text.float()).transpose(1, 2)  # [B, N, M]
    relevance = cosine.masked_fill(~text_valid[:, None, :], -torch.inf).amax(dim=2)  # [B, N]
    if scale == "minmax":
        low = relevance.masked_fill(~valid, torch.inf).amin(dim=1, keepdim=True)
        high = relevance.masked_fill(~valid, -torch.inf).amax(dim=1, keepdim=True)
        span = high - low
        scaled = torch.where(span > 0, (relevance - low) / span, torch.ones_like(relevance))
    elif scale == "clamp":
        scaled = relevance.clamp(min=0)
    else:
        scaled = (1 + relevance) / 2
    gain = scaled.clamp(0, 1) ** alpha
    gain = torch.where(text_valid.any(dim=1, keepdim=True), gain, torch.ones_like(gain))
    return torch.where(valid, gain, torch.zeros_like(gain))


def residual_select(visual: Tensor, gain: Tensor, k: int, token_mask: Tensor | None = None) -> Tensor:
    """Greedy choice of k tokens by gain times residual energy (the paper's greedy subspace expansion).

    Args:
        visual: [B, N, D] visual tokens, not normalised, any float dtype.
        gain: [B, N] from `text_gain`.
        k: tokens to keep per image.
        token_mask: [B, N] bool, False where a row is padding and may never be picked.

    Returns:
        [B, k] int64 token indices in the order picked, -1 where fewer than k rows are valid. Nested: the first
        j picks are the picks for j.

    Raises:
        SettingError: k below 1.

    """
    check(k=k)
    V = visual.float()
    B, N, _ = V.shape
    available = _mask(token_mask, (B, N), V).clone()
    gain = gain.float()
    residual = V.clone()
    initial = gain * V.square().sum(dim=2)  # [B, N]: the score before any pick
    best_initial = initial.masked_fill(~available, 0).amax(dim=1, keepdim=True)
    picks = torch.full((B, k), -1, dtype=torch.int64, device=V.device)
    rows = torch.arange(B, device=V.device)

    for t in range(min(k, N)):
        score = (gain * torch.linalg.vector_norm(residual, dim=2).square()).masked_fill(~available, -1)
        exhausted = score.amax(dim=1, keepdim=True) <= EXHAUSTED * best_initial
        score = torch.where(exhausted, initial, score).masked_fill(~available, -1)
        best = score.amax(dim=1, keepdim=True)
        tied = (score >= best * (1 - TIE)) & available
        pick = tied.int().argmax(dim=1)  # the lowest index among the tied
        picks[:, t] = torch.where(available.any(dim=1), pick, -1)
        available[rows, pick] = False
        direction = residual[rows, pick]  # [B, D]
        direction = direction / direction.norm(dim=1, keepdim=True).clamp(min=torch.finfo(V.dtype).tiny)
        direction = direction.masked_fill(exhausted, 0)
        # Modified Gram-Schmidt, in place: 3,000 tokens of 4,096 dimensions are 50 MB.
        residual.baddbmm_(residual @ direction[:, :, None], direction[:, None, :], alpha=-1)
    return picks


def select(
    visual: Tensor,
    text: Tensor,
    text_mask: Tensor | None,
    selection: Selection,
    candidates: Tensor | None = None,
    protected: Tensor | None = None,
    attached_to: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gain [B, N] and pick order [B, k] of the whole selection, with protected rows first and attached ones.

    `candidates` [B, N] bool are an image's tokens, None for all; `protected` [B, N] bool those that are always kept;
    `attached_to` [B, N] int64 the row that each goes with, protected or not. The others are as in `text_gain`.
    """
    free = choice(candidates, protected, attached_to)
    gain = text_gain(visual, text, text_mask, free, alpha=selection.alpha, scale=selection.scale)
    picks = residual_select(visual, gain, selection.k, free)
    if protected is not None:
        picks = protected_first(protected if attached_to is None else protected & (attached_to < 0), picks)
    return gain, picks if attached_to is None else with_attached(attached_to, picks, candidates)


def choice(candidates: Tensor | None, protected: Tensor | None, attached_to: Tensor | None) -> Tensor | None:
    """Which of the N tokens the greedy choice is between, [B, N] bool; None: all of them. As in `select`."""
    free = candidates
    if protected is not None:
        free = ~protected if free is None else free & ~protected
    if attached_to is not None:
        free = attached_to < 0 if free is None else free & (attached_to < 0)
    return free


def protected_first(protected: Tensor, picks: Tensor) -> Tensor:
    """Rows that are always kept and counted in k, ascending, then the `picks` [B, k] as far as there is room: [B, k].

    `protected` is [B, N] bool. They are no candidates: leave them out of the `token_mask` of gain and choice.
    """
    k = picks.shape[1]
    none = picks.new_full((k,), -1)
    rows = [
        torch.cat([own.nonzero()[:, 0], order[order >= 0], none])[:k]
        for own, order in zip(protected, picks, strict=True)
    ]
    return torch.stack(rows)


def with_attached(attached_to: Tensor, picks: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """Each of `picks` [B, k] and behind it the rows attached to it, ascending, while whole groups fit: [B, k].

    `attached_to` [B, N] int64 is the row that a row is attached to, −1 for none. Attached rows are no candidates: leave
    them out of the `token_mask` of gain and choice. A pick and its rows are a group; the first that does not fit into k
    is left out, with all that come after it. Rows that `token_mask` [B, N] leaves out are nobody's.
    """
    k = picks.shape[1]
    orders = []
    for to, order, there in zip(attached_to, picks, _mask(token_mask, attached_to.shape, picks), strict=True):
        rows: list[int] = []
        for pick in order[order >= 0].tolist():
            group = [pick, *((to == pick) & there).nonzero()[:, 0].tolist()]
            if len(rows) + len(group) > k:
                break
            rows += group
        orders.append(rows + [-1] * (k - len(rows)))
    return picks.new_tensor(orders)


def whole_groups(attached_to: Tensor, order: Tensor, num_kept: Tensor) -> Tensor:
    """How many of the first `num_kept` [B] of an order [B, k] are whole groups of `with_attached`: [B]."""
    counts = []
    for to, picks, count in zip(attached_to, order, num_kept.tolist(), strict=True):
        while count < len(picks) and picks[count] >= 0 and to[picks[count]] >= 0:
            count -= 1
        counts.append(count)
    return num_kept.new_tensor(counts)


def picks_within_rounding(
    visual: Tensor, gain: Tensor, picks: Tensor, token_mask: Tensor | None = None
) -> Tensor:
    """Which picks are the best that float32 can tell, given those before them.

    Two scores closer than ROUNDING of the best score before any pick, which happens where few directions are left,
    can come in either order. Once nothing but rounding is left, tokens go by their scores before any pick, but for
    the few that float32 picks by noise. Computed in float64.

    Args:
        visual: [B, N, D] visual tokens.
        gain: [B, N] from `text_gain`.
        picks: [B, K] a pick order to judge.
        token_mask: [B, N] bool, False where a row is padding.

    Returns:
        [B, K] bool; False for a token that is padding or was picked before, or for none where there was one.

    """
    V = visual.double()
    B, N, _ = V.shape
    available = _mask(token_mask, (B, N), V).clone()
    gain = gain.double()
    residual = V.clone()
    initial = gain * V.square().sum(dim=2)  # [B, N]
    best_initial = initial.masked_fill(~available, 0).amax(dim=1)  # [B]
    slack = ROUNDING * best_initial
    strays = torch.zeros(B, dtype=torch.int64, device=V.device)
    within = torch.zeros_like(picks, dtype=torch.bool)
    rows = torch.arange(B, device=V.device)
    for t, pick in enumerate(picks.clamp(min=0).unbind(dim=1)):
        score = (gain * residual.square().sum(dim=2)).masked_fill(~available, -1)
        best = score.amax(dim=1)
        chosen = available[rows, pick] & (score[rows, pick] + slack >= best * (1 - TIE))
        fill = initial.masked_fill(~available, -1)
        stray = (best <= 0.1 * EXHAUSTED * best_initial) & (
            fill[rows, pick] + slack < fill.amax(dim=1) * (1 - TIE)
        )
        strays += stray
        chosen &= ~stray | (strays <= STRAYS)
        within[:, t] = torch.where(picks[:, t] < 0, ~available.any(dim=1), chosen)
        available[rows, pick] = False
        direction = residual[rows, pick]  # [B, D]
        direction = direction / direction.norm(dim=1, keepdim=True).clamp(min=torch.finfo(V.dtype).tiny)
        residual -= (residual @ direction[:, :, None]) * direction[:, None, :]
    return within


def keep(visual: Tensor, pick_order: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [B, K, D] of the picked tokens in ascending index, and those indices [B, K] (−1, with a zero row, last)."""
    N = visual.shape[1]
    order = torch.where(pick_order < 0, N, pick_order).sort(dim=1).values
    indices = torch.where(order == N, -1, order)
    rows = visual.gather(1, indices.clamp(min=0)[:, :, None].expand(-1, -1, visual.shape[2]))
    return rows.masked_fill((indices < 0)[:, :, None], 0), indices


def kept_counts(visual: Tensor, kept_indices: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """How many of an image's tokens each kept one stands for: itself, and every dropped token most similar to it.

    Similar is the cosine; of cosines within TIE of the largest the lowest index counts.

    Args:
        visual: [B, N, D] visual tokens, any float dtype.
        kept_indices: [B, K] int64, ascending but for −1, which is none.
        token_mask: [B, N] bool, False where a row is padding, which nobody stands for.

    Returns:
        [B, K] int64, 0 where there is no index. They add up to the image's tokens.

    """
    cosine = _cosines(visual.float(), kept_indices)
    tied = cosine >= cosine.amax(dim=2, keepdim=True) - TIE
    nearest = tied.int().argmax(dim=2)  # [B, N]: the lowest index among the tied
    counts = _counted(torch.nn.functional.one_hot(nearest, kept_indices.shape[1]), visual, token_mask)
    return counts.masked_fill(kept_indices < 0, 0)


def counts_within_rounding(
    visual: Tensor, kept_indices: Tensor, counts: Tensor, token_mask: Tensor | None = None
) -> Tensor:
    """Which of `counts` [B, K] float32 may come to, for it cannot tell cosines closer than ROUNDING: [B, K] bool.

    A count lies between the tokens that are its own beyond doubt and those that may be; the other arguments are those
    of `kept_counts`. False for all of an image whose counts do not add up to its tokens. Computed in float64.
    """
    cosine = _cosines(visual.double(), kept_indices)
    best = cosine.amax(dim=2, keepdim=True)
    certain = cosine >= best - (TIE - ROUNDING)
    maybe = cosine >= best - (TIE + ROUNDING)
    maybe &= certain.cumsum(dim=2) <= certain  # none before it is certain
    only = maybe & (maybe.sum(dim=2, keepdim=True) == 1)
    least, most = (_counted(pairs, visual, token_mask) for pairs in (only, maybe))
    tokens = _mask(token_mask, visual.shape[:2], visual).sum(dim=1, keepdim=True)
    return (least <= counts) & (counts <= most) & (counts.sum(dim=1, keepdim=True) == tokens)


def _cosines(visual: Tensor, kept_indices: Tensor) -> Tensor:
    """Cosines [B, N, K] with the kept tokens; 2 of one with itself, −2 where there is no index."""
    _, N, D = visual.shape
    rows = _unit(visual)
    kept = rows.gather(1, kept_indices.clamp(min=0)[:, :, None].expand(-1, -1, D))  # [B, K, D]
    itself = torch.arange(N, device=visual.device)[:, None] == kept_indices[:, None, :]
    cosine = (rows @ kept.transpose(1, 2)).masked_fill(itself, 2)
    return cosine.masked_fill((kept_indices < 0)[:, None, :], -2)


def _counted(pairs: Tensor, visual: Tensor, token_mask: Tensor | None) -> Tensor:
    """Of `pairs` [B, N, K] those of a token that is there, by kept token: [B, K]."""
    return (pairs * _mask(token_mask, visual.shape[:2], visual)[:, :, None]).sum(dim=1)


def _mask(mask: Tensor | None, shape: Sequence[int], like: Tensor) -> Tensor:
    return torch.ones(tuple(shape), dtype=torch.bool, device=like.device) if mask is None else mask.bool()


def _unit(rows: Tensor) -> Tensor:
    """Rows [..., D] scaled to length 1; a zero row stays zero, so its cosine with everything is 0."""
    norm = rows.norm(dim=-1, keepdim=True)
    return torch.where(norm > 0, rows / norm.clamp(min=torch.finfo(rows.dtype).tiny), torch.zeros_like(rows))
