"""Attention as the graphs compute it, registered with transformers so that its own model code calls it.

The stock implementations trace into operators that one runtime or the other lacks, repeat each key head for its
query heads, or take the softmax in half precision. This one is two matrix products and a float32 softmax.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def register_attention(dtype: torch.dtype) -> str:
    """Register the attention whose products are of `dtype`; returns its name for `config._attn_implementation`."""
    name = f"resprune_{str(dtype).removeprefix('torch.')}"

    def attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        return grouped_attention(query, key, value, attention_mask, scaling, dtype), None

    ALL_ATTENTION_FUNCTIONS.register(name, attention)
    return name


def grouped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, dtype: torch.dtype
) -> Tensor:
    """Softmax(Q Kᵀ · scaling + mask) V, with each key head shared by consecutive query heads.

    query [B, H, S, d], key and value [B, G, T, d] with G dividing H, mask [B, 1, S, T] added in float32. Products in
    `dtype`, softmax in float32; returns [B, S, H, d] float32.
    """
    B, H, S, d = query.shape
    G, T = key.shape[1:3]
    scaled = (query * (d**-0.5 if scaling is None else scaling)).to(
        dtype
    )  # scaled first: half has little range
    if G < H:
        scaled = scaled.reshape(B, G, H // G * S, d)
    scores = torch.matmul(scaled, key.to(dtype).transpose(2, 3)).float()  # [B, G, H/G·S, T]
    if mask is not None:
        scores = scores + mask if G == H else (scores.reshape(B, H, S, T) + mask).reshape(B, G, H // G * S, T)
    weights = torch.softmax(scores, dim=-1).to(dtype)
    mixed = torch.matmul(weights, value.to(dtype)).float()  # [B, G, H/G·S, d]
    return (mixed if G == H else mixed.reshape(B, H, S, d)).transpose(1, 2)
