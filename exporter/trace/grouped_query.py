"""The decoder for ONNX Runtime alone: com.microsoft's GroupQueryAttention in place of portable attention.

What pays there: keys and values are appended to the cache in place where the caller binds one buffer as past and
present (the portable graph's Concat copies the cache at each step), and no key head is repeated. Inputs and outputs
are those of the portable decoder. The rotary angles are applied before the operator, by one of their own, for it knows
neither M-RoPE nor the gaps that pruning leaves; padding on the left is a bias, for the operator itself knows padding
on the right only, and so are counts.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from resprune.exporter.components import Components
from resprune.exporter.language import Rows, log_counts
from resprune.runtime.errors import ResPruneError

HEAD_MULTIPLE = 8


@dataclass
class _Layer:
    """Past keys and values [B, G, P, d] of one layer, then its present ones."""

    keys: Tensor
    values: Tensor


@dataclass
class _Step:
    """What the operator needs beside query, key and value; the past becomes the present, layer by layer."""

    layers: list[_Layer]
    last_key: Tensor
    """[B] int32: the last key that each row sees, which the operator calls seqlens_k."""
    total_length: Tensor
    """Scalar int32: P + S. The buffers may be longer."""
    lengths: Tensor
    """[B] int32: S. With it the operator takes several positions of several rows over any past."""
    bias: Tensor
    """[B, 1, S, P + S]: the lowest number at padding, else 0, or the logarithm of a count."""


class _Decoder(nn.Module):
    """As `language._Decoder`."""

    def __init__(
        self,
        language_model: Any,
        lm_head: nn.Module,
        cache_dtype: torch.dtype,
        rows: Rows,
        proportional: bool,
    ) -> None:
        super().__init__()
        self.language_model = language_model
        self.lm_head = lm_head
        self.rows = rows
        self.cache_dtype = cache_dtype
        self.proportional = proportional

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        planes, _, past = self.rows.parts(rest)
        B, S = inputs_embeds.shape[:2]
        total = attention_mask.shape[1]
        lowest = torch.finfo(self.cache_dtype).min
        weight = log_counts(attention_mask) if self.proportional else 0.0
        bias = torch.where(attention_mask.bool(), weight, lowest).to(self.cache_dtype)  # [B, P + S]
        step = _Step(
            layers=[_Layer(*pair) for pair in zip(past[::2], past[1::2], strict=True)],
            last_key=torch.full((B,), total - 1, dtype=torch.int32),
            total_length=torch.full((), total, dtype=torch.int32),
            lengths=torch.full((B,), S, dtype=torch.int32),
            bias=bias[:, None, None, :].expand(-1, -1, S, -1),
        )
        code = sys.modules[type(self.language_model).__module__]
        with (
            patch.object(code, "apply_rotary_pos_emb", _rotated),
            self.rows.added(self.language_model, planes),
        ):
            hidden = self.language_model(
                inputs_embeds=inputs_embeds,
                position_ids=position_ids,
                use_cache=False,  # the operator itself puts the new keys and values behind the past
                step=step,
            ).last_hidden_state
        present = (kept for layer in step.layers for kept in (layer.keys, layer.values))
        return (self.lm_head(hidden[:, -1:]), *present)


def optimize_decoder(components: Components, cache_dtype: torch.dtype) -> Components:
    """The same components with a decoder for ONNX Runtime, whose keys and values are of `cache_dtype`.

    `ResPruneError` for heads and masks that the operator does not take.
    """
    model: Any = components.model
    if components.two_way:
        raise ResPruneError(
            "--optimize ort takes causal masks alone, and the rows of this model's images see each other in both "
            "directions; leave it out"
        )
    width = components.decoder.outputs[1].shape[3]
    assert isinstance(width, int)
    if width % HEAD_MULTIPLE:
        raise ResPruneError(
            f"--optimize ort takes attention heads of a multiple of {HEAD_MULTIPLE} numbers, and this model's have "
            f"{width}; leave it out"
        )
    model.config.get_text_config()._attn_implementation = _register()
    rows = Rows(components.plane_layers)
    module = _Decoder(model.get_decoder(), model.lm_head, cache_dtype, rows, components.proportional)
    return replace(components, decoder=replace(components.decoder, module=module))


def _rotated(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Query [B, H, S, d] and key [B, G, S, d], each turned by the angles [B, S, d] of its position, by one operator.

    The operator looks angles up by position, in halves. Whatever the positions are, M-RoPE's too, their angles have
    been computed: here they are the table, and each row's own number is its position.
    """
    B, _, S, d = query.shape
    places = torch.arange(B * S).reshape(B, S)
    tables = [angles[..., : d // 2].reshape(B * S, d // 2) for angles in (cos, sin)]

    def turned(heads: Tensor) -> Tensor:
        rows = _rows(heads)
        rotated = torch.onnx.ops.symbolic(
            "com.microsoft::RotaryEmbedding",
            [rows, places, *tables],
            dtype=rows.dtype,
            shape=rows.shape,
            version=1,
        )
        return rotated.view(B, S, -1, d).transpose(1, 2)

    return turned(query), turned(key)


def _rows(heads: Tensor) -> Tensor:
    """Heads [B, H, S, d] side by side, as the operators take them: [B, S, H · d]."""
    return heads.transpose(1, 2).flatten(2)


def _register() -> str:
    """Register the operator as an attention of transformers; returns its name."""
    name = "resprune_grouped_query"
    ALL_ATTENTION_FUNCTIONS.register(name, _attention)
    return name


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    step: _Step,
    scaling: float,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Rotated query [B, H, S, d] and key, and value [B, G, S, d] → [B, S, H · d]; its layer of `step` moves on."""
    B, H, S, d = query.shape
    layer = step.layers[module.layer_idx]
    dtype, shape = layer.keys.dtype, layer.keys.shape
    present = (*shape[:2], shape[2] + S, d)
    attributes: dict[str, Any] = {"num_heads": H, "kv_num_heads": key.shape[1], "scale": float(scaling)}
    if sliding_window is not None:
        attributes["local_window_size"] = sliding_window
    rows = (_rows(heads).to(dtype) for heads in (query, key, value))
    unused: Sequence[None] = (None,) * 3  # cos_cache, sin_cache, position_ids
    mixed, layer.keys, layer.values = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        [
            *rows,
            layer.keys,
            layer.values,
            step.last_key,
            step.total_length,
            *unused,
            step.bias,
            *(None,) * 5,
            step.lengths,
        ],
        attributes,
        dtypes=(dtype,) * 3,
        shapes=((B, S, H * d), present, present),
        version=1,
    )
    return mixed.float(), None
