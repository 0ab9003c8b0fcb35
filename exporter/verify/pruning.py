"""The selection by itself, for models whose sample image has no more tokens than K, so that none is dropped.

An image with more would take minutes in a tower of real size; the selection needs none.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import torch

from resprune.exporter.verify.ort_worker import OrtWorker
from resprune.exporter.verify.reference import picks_within_rounding, select
from resprune.graphs import token_select_model
from resprune.method import Selection
from resprune.names import IMAGE_FEATURES, PICK_ORDER, TEXT_EMBEDS, TEXT_MASK, TOKEN_MASK

TEXT_TOKENS = 5
PICKS = 128
"""Twice a segment of the Loop: more would take minutes for the budgets of the largest images, and try nothing new."""


def pruned_picks(worker: OrtWorker, folder: Path, selection: Selection, hidden_size: int) -> tuple[int, int]:
    """How many picks among twice as many seeded tokens are PyTorch's, as far as float32 can tell, and all of them.

    There are K, or PICKS if that is fewer, in a graph like the bundle's for so many. It is written into `folder` and
    removed again.
    """
    k = min(selection.k, PICKS)
    generator = torch.Generator().manual_seed(0)
    visual = torch.randn(1, 2 * k, hidden_size, generator=generator)
    text = torch.randn(1, TEXT_TOKENS, hidden_size, generator=generator)
    every = torch.ones(1, TEXT_TOKENS, dtype=torch.bool)
    gain, picks = select(visual, text, every, replace(selection, k=k))
    path = folder / "token_select.pruning.onnx"
    onnx.save(token_select_model(replace(selection, k=k, counts=False)), path)
    try:
        got = worker.run(
            path,
            {
                IMAGE_FEATURES: visual.numpy(),
                TEXT_EMBEDS: text.numpy(),
                TEXT_MASK: every.numpy(),
                TOKEN_MASK: torch.ones(visual.shape[:2], dtype=torch.bool).numpy(),
            },
        )
    finally:
        path.unlink()
    order = torch.from_numpy(got[PICK_ORDER])
    same = order == picks
    if not same.all():
        same |= picks_within_rounding(visual, gain, order, None)
    return int(same.sum()), same.numel()
