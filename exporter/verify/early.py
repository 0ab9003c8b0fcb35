"""The first selection as Hugging Face's own modules compute it, with hooks: the reference of `exporter.early`.

The tower hands on as many rows as ever, those of dropped tokens being zeros, so that the model packs them by its own
code; what the projector makes of a zero row is set to zero. Only what is left is compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from resprune.exporter.components import Component, Reference, Tower
from resprune.exporter.verify.reference import kept_counts, residual_select
from resprune.runtime.bundle.manifest import Early

ATTENTION = ("self_attn", "attention", "attn")
"""What transformers calls the attention of a block."""


def early_picks(tokens: Tensor, count: int) -> Tensor:
    """The `count` tokens of [T, N, H] that go on, ascending: [T, C]."""
    gain = torch.ones(tokens.shape[:2], device=tokens.device)
    return residual_select(tokens, gain, count).sort(dim=1).values


def early_reference(component: Component, tower: Tower, early: Early) -> Reference:
    """Inputs → the outputs of `with_early(component)`; with `kept` [T, C], of those tokens and not of its own picks."""
    names = [spec.name for spec in component.inputs]

    def reference(model: Any, inputs: tuple[Tensor, ...], kept: Tensor | None = None) -> tuple[Tensor, ...]:
        own, ranks = inputs[: len(names)], inputs[len(names) :]
        places = tower.places(model, own)
        count = len(ranks[0]) if ranks else early.left(len(places))
        with selected_early(model, tower, early.layer, count, own, kept) as picks:
            features = component.reference(model, own)
        (indices,) = picks
        if "pack_indices" in names:
            return (*_packed(features[0], _left(indices, len(places), len(places)), *own[1:]), indices)
        mask = _left(indices, len(places), features[0].shape[1])
        return (*(plane * mask[:, :, None] for plane in features), mask, indices)

    return reference


def _left(indices: Tensor, count: int, length: int) -> Tensor:
    """Which of a tile's `length` rows are left, [T, length] bool: of the last `count` those in `indices` [T, C]."""
    leading = length - count
    before = torch.arange(length, device=indices.device).expand(len(indices), -1) < leading
    return before.scatter(1, leading + indices, True)


def _packed(
    features: Tensor, left: Tensor, pack_indices: Tensor, pack_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Packed rows [B, N, D], or weighted sums of rows, dropped ones being zeros → their means, and what is left."""
    # Behind the tiles' tokens are the further row and padding.
    table = torch.cat([left.flatten(), torch.tensor([True, False], device=left.device)])
    present = table[torch.where(pack_indices < 0, len(table) - 1, pack_indices)]
    if pack_weights is None:
        return features * present[:, :, None], present
    weight = (pack_weights * present).sum(dim=2)  # [B, N]
    mean = features / torch.where(weight > 0, weight, 1.0)[:, :, None]
    return mean * (weight > 0)[:, :, None], weight > 0


@contextmanager
def selected_early(
    model: Any,
    tower: Tower,
    layer: int,
    count: int,
    inputs: tuple[Tensor, ...] = (),
    kept: Tensor | None = None,
) -> Iterator[list[Tensor]]:
    """While it lasts, a model of transformers selects `count` tokens after `layer` blocks of its tower.

    Yields a list that gets the picks [T, C] of each call. `inputs` are the component's, which images of one size need
    not; `kept` [T, C] takes the place of the picks. The tower's outputs have all of their rows, zeros where a token was
    dropped, and so has what its projector makes of images or tiles of one size.
    """
    module, projectors = tower.tower(model), tower.projectors(model)
    places = tower.places(model, inputs).to(next(module.parameters()).device)
    leading, total = tower.leading, places.numel()
    picks: list[Tensor] = []
    found: list[Tensor] = []  # of the last call: rows and bias

    def select(block: object, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        states = hidden.reshape(-1, *hidden.shape[-2:])
        patches = states[:, leading:]
        means = patches[:, places].mean(dim=2)  # [T, N, H]
        indices = early_picks(means, count) if kept is None else kept
        logs = kept_counts(means, indices).float().log().repeat_interleave(tower.group, dim=1)
        rows = places[indices].flatten(1)  # [T, C · G]
        picks.append(indices)
        found[:] = rows, nn.functional.pad(logs, (leading, 0))[:, None, None]
        left = torch.take_along_dim(patches, rows[:, :, None], dim=1)
        states = torch.cat([states[:, :leading], left], dim=1)
        return states.reshape(*hidden.shape[:-2], *states.shape[1:]), *args[1:]

    def weigh(attention: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return args, dict(tower.attended(kwargs, *found))

    def spread(hidden: Tensor | None) -> Tensor | None:
        if hidden is None or not found or hidden.shape[-2] != leading + found[0].shape[1]:
            return hidden
        states = hidden.reshape(-1, *hidden.shape[-2:])
        whole = states.new_zeros(len(states), leading + total, states.shape[2])
        whole[:, :leading] = states[:, :leading]
        rows = (leading + found[0])[:, :, None].expand(-1, -1, states.shape[2])
        whole = whole.scatter(1, rows, states[:, leading:])
        return whole.reshape(*hidden.shape[:-2], *whole.shape[1:])

    def whole(tower: object, args: object, output: Any) -> Any:
        output.last_hidden_state = spread(output.last_hidden_state)
        if output.hidden_states is not None:
            output.hidden_states = tuple(map(spread, output.hidden_states))
        return output

    def projected(projector: object, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return spread(args[0]), *args[1:]

    def clear(projector: object, args: object, output: Tensor) -> Tensor:
        return output * _left(picks[-1], len(places), output.shape[1])[:, :, None]

    blocks = _blocks(module)
    with ExitStack() as stack:
        handles = [blocks[layer].register_forward_pre_hook(select), module.register_forward_hook(whole)]
        handles += [
            _attention(block).register_forward_pre_hook(weigh, with_kwargs=True) for block in blocks[layer:]
        ]
        for projector in projectors:
            handles.append(projector.register_forward_pre_hook(projected))
            if not tower.varies:
                handles.append(projector.register_forward_hook(clear))
        for handle in handles:
            stack.callback(handle.remove)
        yield picks


def _blocks(tower: Any) -> Any:
    """The blocks of a tower of transformers, which calls them by several names."""
    encoder = getattr(tower, "encoder", tower)
    return next(getattr(encoder, name) for name in ("layer", "layers", "blocks") if hasattr(encoder, name))


def _attention(block: nn.Module) -> nn.Module:
    return next(module for name, module in block.named_children() if name in ATTENTION)
