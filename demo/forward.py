"""The forward pass that training uses: one picture, many questions, nothing computed twice.

The weights are those of the Hugging Face model and so is the result
(``tests/demo/test_forward.py``). Only the layout differs: the picture's part of the prompt runs once
and each question attends to it and to itself, at the positions it would have alone. No question
sees another's answer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlavaForConditionalGeneration


def visual_tokens(model: LlavaForConditionalGeneration, pixel_values: Tensor) -> Tensor:
    """Return the projected visual tokens [B, 144, D] of normalised pictures [B, 3, 96, 96]."""
    tower = model.model.vision_tower
    embeddings = tower.embeddings
    batch = len(pixel_values)
    side = embeddings.patch_size
    # The patch convolution as a matrix product, which is faster on a CPU.
    rows = pixel_values.unfold(2, side, side).unfold(3, side, side)  # [B, 3, 12, 12, 8, 8]
    rows = rows.permute(0, 2, 3, 1, 4, 5).reshape(batch, -1, 3 * side * side)  # [B, 144, 192]
    patches = functional.linear(rows, embeddings.patch_embedding.weight.flatten(1))
    hidden = torch.cat([embeddings.class_embedding.expand(batch, 1, -1), patches], 1)
    hidden = tower.pre_layrnorm(hidden + embeddings.position_embedding.weight)
    for layer in tower.encoder.layers:
        normed = layer.layer_norm1(hidden)
        block = layer.self_attn
        query, key, value = (
            _heads(projection(normed), block.head_dim)
            for projection in (block.q_proj, block.k_proj, block.v_proj)
        )
        scores = (query * block.scale) @ key.transpose(-1, -2)  # [B, H, 145, 145]
        mixed = scores.softmax(-1) @ value
        hidden = hidden + block.out_proj(mixed.transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
    features: Tensor = model.model.multi_modal_projector(hidden[:, 1:])
    return features


def question_states(model: LlavaForConditionalGeneration, prefix: Tensor, questions: Tensor) -> Tensor:
    """Return the language model's last hidden states [B, Q, S, D] of every question.

    ``prefix`` [B, P, D]: embeddings of the shared start of the prompt, picture included.
    ``questions`` [B, Q, S]: token ids of what follows it, padded on the right.
    """
    language = model.model.language_model
    batch, per_picture, length = questions.shape
    start = prefix.shape[1]
    asked = language.embed_tokens(questions).flatten(1, 2)  # [B, Q * S, D]
    hidden = torch.cat([prefix, asked], 1)  # [B, P + Q * S, D]
    steps = torch.arange(start + length)
    positions = torch.cat([steps[:start], steps[start:].repeat(per_picture)])
    cos, sin = (t.to(prefix.dtype) for t in language.rotary_emb(prefix, positions[None]))
    future = torch.triu(torch.full((start + length,) * 2, float("-inf")), 1)
    for layer in language.layers:
        normed = _rms_norm(layer.input_layernorm, hidden)
        mixed = _attend(layer.self_attn, normed, (cos, sin), start, (per_picture, length), future)
        hidden = hidden + mixed
        hidden = hidden + layer.mlp(_rms_norm(layer.post_attention_layernorm, hidden))
    states = _rms_norm(language.norm, hidden[:, start:])
    return states.view(batch, per_picture, length, -1)


def _attend(
    block: Any,
    hidden: Tensor,
    rotary: tuple[Tensor, Tensor],
    start: int,
    shape: tuple[int, int],
    future: Tensor,
) -> Tensor:
    batch = hidden.shape[0]
    per_picture, length = shape
    groups = block.num_key_value_groups
    query = _rotate(_heads(block.q_proj(hidden), block.head_dim), *rotary) * block.scaling
    key = _rotate(_heads(block.k_proj(hidden), block.head_dim), *rotary)
    value = _heads(block.v_proj(hidden), block.head_dim)
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))  # [B, H, L, d]
    heads = query.shape[1]
    # The picture's part: causal attention to itself.
    head_keys, head_values = key[:, :, :start], value[:, :, :start]
    scores = query[:, :, :start] @ head_keys.transpose(-1, -2) + future[:start, :start]
    mixed = scores.softmax(-1) @ head_values  # [B, H, P, d]
    # The questions: attention to the picture's part and, causal, to themselves.
    asked = query[:, :, start:]  # [B, H, Q * S, d]
    own = (batch, heads, per_picture, length, -1)
    own_keys, own_values = key[:, :, start:].reshape(own), value[:, :, start:].reshape(own)
    to_picture = asked @ head_keys.transpose(-1, -2)  # [B, H, Q * S, P]
    to_self = asked.reshape(own) @ own_keys.transpose(-1, -2) + future[:length, :length]
    weights = torch.cat([to_picture, to_self.flatten(2, 3)], -1).softmax(-1)
    seen = weights[..., :start] @ head_values
    seen = seen + (weights[..., start:].reshape(own) @ own_values).flatten(2, 3)
    joined = torch.cat([mixed, seen], 2).transpose(1, 2).flatten(2)
    output: Tensor = block.o_proj(joined)
    return output


def _heads(flat: Tensor, head_dim: int) -> Tensor:
    return flat.view(*flat.shape[:2], -1, head_dim).transpose(1, 2)  # [B, H, L, d]


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = states.chunk(2, -1)
    return states * cos[:, None] + torch.cat([-right, left], -1) * sin[:, None]


def _rms_norm(norm: Any, hidden: Tensor) -> Tensor:
    scale = torch.rsqrt(hidden.float().square().mean(-1, keepdim=True) + norm.variance_epsilon)
    scaled: Tensor = norm.weight * (hidden * scale.to(hidden.dtype))
    return scaled
