"""The first selection as Hugging Face's own modules compute it, with hooks: the reference of `exporter.early`.

The tower hands on as many rows as ever, those of dropped tokens being zeros, so that the model packs them by its own
code; what the projector makes of a zero row is set to zero. Only what is left is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from resprune.exporter.components import Component, Reference, Tower
from resprune.exporter.verify.reference import kept_counts, residual_select
from resprune.runtime.bundle.manifest import Early


def early_picks(patches: Tensor, count: int) -> Tensor:
    """The `count` tokens of [T, P, H] that go on, ascending: [T, C]."""
    gain = torch.ones(patches.shape[:2], device=patches.device)
    return residual_select(patches, gain, count).sort(dim=1).values


def early_reference(component: Component, tower: Tower, early: Early) -> Reference:
    """Inputs → the outputs of `with_early(component)`; with `kept` [T, C], of those tokens and not of its own picks."""

    def reference(
        model: Any, inputs: tuple[Tensor, ...], kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        with selected_early(tower.tower(model), tower.projector(model), tower.leading, early, kept) as picks:
            (features,) = component.reference(model, inputs)
        (indices,) = picks
        left = _left(indices, early.of)
        if len(inputs) == 1:
            mask = nn.functional.pad(left, (features.shape[1] - early.of, 0), value=True)
            return features * mask[:, :, None], mask, indices
        return (*_packed(features, left, *inputs[1:]), indices)

    return reference


@contextmanager
def selecting(
    blocks: Sequence[nn.Module], layer: int, select: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> Iterator[None]:
    """While it lasts, block `layer` is given what `select` makes of its hidden states [T, S, H].

    That is the rows that go on and a bias, which every later block is given too, beside its own hidden states.
    """
    biases: list[Tensor] = []

    def first(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, bias = select(args[0])
        biases.append(bias)
        return hidden, bias

    def later(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return args[0], biases[0]

    with ExitStack() as stack:
        for index, block in enumerate(blocks[layer:]):
            handle = block.register_forward_pre_hook(later if index else first)
            stack.callback(handle.remove)
        yield


def _left(indices: Tensor, count: int) -> Tensor:
    """Which of a tile's `count` tokens are among `indices` [T, C]: [T, count] bool."""
    dropped = torch.zeros(len(indices), count, dtype=torch.bool, device=indices.device)
    return dropped.scatter(1, indices, True)


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
    tower: Any,
    projector: nn.Module,
    leading: int,
    early: Early,
    kept: Tensor | None = None,
) -> Iterator[list[Tensor]]:
    """While it lasts, a tower of transformers selects after `early.layer` blocks: yields a list that gets the picks.

    Its attention has to add a mask to the scores, as sdpa does. `kept` [T, C] takes the place of the picks. The tower's
    outputs have all of their rows, zeros where a token was dropped, and so have the projector's.
    """
    encoder = tower.encoder
    blocks: Any = encoder.layer if hasattr(encoder, "layer") else encoder.layers
    picks: list[Tensor] = []

    def select(hidden: Tensor) -> tuple[Tensor, Tensor]:
        patches = hidden[:, leading:]
        indices = early_picks(patches, early.tokens) if kept is None else kept
        counts = kept_counts(patches, indices)
        picks.append(indices)
        bias = nn.functional.pad(counts.float().log(), (leading, 0))[:, None, None]
        rows = torch.take_along_dim(patches, indices[:, :, None], dim=1)
        return torch.cat([hidden[:, :leading], rows], dim=1), bias

    def spread(hidden: Tensor | None) -> Tensor | None:
        if hidden is None or hidden.shape[1] != leading + early.tokens:
            return hidden
        whole = hidden.new_zeros(len(hidden), leading + early.of, hidden.shape[2])
        whole[:, :leading] = hidden[:, :leading]
        return whole.scatter(
            1, (leading + picks[0])[:, :, None].expand(-1, -1, hidden.shape[2]), hidden[:, leading:]
        )

    def whole(module: object, args: object, output: Any) -> Any:
        output.last_hidden_state = spread(output.last_hidden_state)
        if output.hidden_states is not None:
            output.hidden_states = tuple(map(spread, output.hidden_states))
        return output

    def clear(module: object, args: object, output: Tensor) -> Tensor:
        left = _left(picks[0], early.of)
        left = nn.functional.pad(left, (output.shape[1] - early.of, 0), value=True)
        return output * left[:, :, None]

    with ExitStack() as stack:
        stack.enter_context(selecting(blocks, early.layer, select))
        for handle in (tower.register_forward_hook(whole), projector.register_forward_hook(clear)):
            stack.callback(handle.remove)
        yield picks
