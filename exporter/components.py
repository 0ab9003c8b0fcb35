"""What a family hands to the exporter: three traced components of one model, and the facts the manifest records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from resprune.runtime.bundle.manifest import TensorSpec
from resprune.runtime.families.preprocessor import PreparedImage

Sizes = Mapping[str, int]
Samples = Callable[[Sizes, torch.Generator], tuple[Tensor, ...]]
Reference = Callable[..., tuple[Tensor, ...]]
"""(model, inputs) → outputs; see `Component`."""


def key_bias(shared: Any, kept: Tensor, bias: Tensor) -> tuple[Any, ...]:
    """What the blocks of most towers take beside the hidden states: what is added to the scores of their keys."""
    return (bias,)


def attention_mask(kwargs: Mapping[str, Any], rows: Tensor, bias: Tensor) -> Mapping[str, Any]:
    """The keywords of most attention modules of transformers, with `bias` as their mask."""
    return {**kwargs, "attention_mask": bias}


@dataclass(frozen=True)
class Tower:
    """What a selection inside the vision tower must know of it (`early.py`); `Component.layers` are its blocks.

    A block is called with the hidden states [T, S, H], or [S, H] of one image, and with what all blocks share. From
    the first on the rows that become one visual token stand side by side in them, behind those in `leading`.
    """

    tokens: int
    """N, the visual tokens of one image or tile, without those in `leading`; the most there are where that varies."""
    hidden_size: int
    """Numbers of a hidden state's row."""
    layers: tuple[int, ...]
    """The hidden states that the projector takes, from 0 for the embeddings to the number of blocks."""
    tower: Callable[[Any], nn.Module]
    """The tower in the whole Hugging Face model."""
    projectors: Callable[[Any], Sequence[nn.Module]]
    """The modules there that make visual tokens of its rows."""
    places: Callable[[Any, tuple[Tensor, ...]], Tensor]
    """The Hugging Face model and the component's inputs → where its tower has each token's rows, behind those in
    `leading`: [N, G]."""
    leading: int = 0
    """Rows before those of the patches: 1 for a class token."""
    group: int = 1
    """G, rows that become one visual token."""
    varies: bool = False
    """Whether N is the image's own. The component is then of one image, and its number of tokens comes with it."""
    planes: tuple[int, ...] = ()
    """The hidden states that further outputs of the component are made of, as `layers` are of the first."""
    shared: Callable[[Any, Tensor, Tensor], tuple[Any, ...]] = key_bias
    """What blocks share, the tokens [T, C] that go on and what is added to the scores of their rows as keys,
    [T, 1, 1, S'] → what the later blocks share."""
    attended: Callable[[Mapping[str, Any], Tensor, Tensor], Mapping[str, Any]] = attention_mask
    """For its attention what `shared` is for blocks: its keywords, rows [T, S'] after those in `leading`, and bias."""


@dataclass(frozen=True)
class Component:
    """One graph to be: a module that takes and returns flat tensors, and how its inputs and outputs are declared.

    `module.forward(*inputs)` returns a tuple in the order of `outputs`. A string in a shape names a dynamic axis, or
    is a sum of such names. `samples(sizes, generator)` makes inputs whose dynamic axes have those sizes;
    `reference(model, inputs)` computes the same outputs with the whole Hugging Face model, by its own code.
    """

    name: str
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    samples: Samples
    reference: Reference
    layers: tuple[nn.Module, ...] = ()
    """Submodules that run one after the other, as repeat.py wants them: like ones are traced once."""
    functions: tuple[ir.Function, ...] = ()
    """Bodies of the ops of domain `resprune` that tracing the module leaves as nodes."""
    tower: Tower | None = None
    """For vision components that can select inside the tower."""
    early: bool = False
    """Whether there is such a selection: `reference(model, inputs, kept)` then takes the tokens that a graph kept,
    None to select them itself, and the outputs are those of `early.with_early`."""


@dataclass(frozen=True)
class Components:
    """A model split. `model` is the whole, weightless Hugging Face model that the components' modules share."""

    model: nn.Module
    vision: Component
    embed: Component
    decoder: Component
    image_token_id: int
    context_length: int
    num_tokens: int | None = None
    """N, the visual tokens of one image; None where it varies."""
    max_tokens: int | None = None
    """The largest N there is, where it varies."""
    images: Callable[[tuple[Tensor, ...]], list[PreparedImage]] | None = None
    """The vision graph's inputs → where the tokens of each of its images stand in a prompt; `arrays` are not looked at.
    None: side by side, one position each."""
    plane_layers: tuple[int, ...] = ()
    """The decoder layers that planes are added after, one a plane. Plane i is the vision's output `plane_features.i`
    [B, N, D], gathered by the picks; its rows are in the decoder's input `plane_embeds.i` [B, S, D]."""
    two_way: bool = False
    """Whether rows of one image see each other in both directions: the decoder then takes `image_numbers`."""
    protected: Callable[[tuple[Tensor, ...]], Tensor] | None = None
    """For families whose rows may be protected: the vision graph's inputs → which rows are, [B, N] bool."""
    attached_to: Callable[[tuple[Tensor, ...]], Tensor] | None = None
    """For families whose rows may be attached to others: the vision graph's inputs → the row that each is attached to,
    −1 for none, [B, N] int64."""
    padding: str | None = None
    """The vision graph's int64 input [batch_size, N], or [batch_size, N, T], that is below 0 where an image of the
    batch has no token."""
    proportional: bool = False
    """Whether the decoder's mask takes counts, and the selection is to give them (`language.proportional`)."""

    @property
    def features(self) -> list[str]:
        """The vision graph's outputs that are planes of the candidates, the main one first."""
        return [spec.name for spec in self.vision.outputs[: 1 + self.planes]]

    @property
    def planes(self) -> int:
        """How many planes a visual token has beside its main one."""
        return len(self.plane_layers)
