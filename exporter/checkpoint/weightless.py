"""A Hugging Face model without its weights: the right classes, shapes and computed buffers, and no memory.

Parameters are fake tensors, which have shape and dtype but no data, so a model of any size can be traced. Buffers
that the model computes when it is built (rotary frequencies, position ids) are real, for no checkpoint holds them:
under transformers' own context, `torch.device("meta")`, they would be lost. accelerate's keeps them, and costs nothing:
transformers imports accelerate wherever it is installed, and a 7 B shape is built in the same 0.03 s.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers.initialization import no_init_weights

from resprune.exporter.checkpoint.shards import StoredTensor


def fake_mode() -> FakeTensorMode:
    """The mode one model's parameters and example inputs must share."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def blank(model_class: Any, config: Any) -> nn.Module:
    """`model_class(config)` with parameters on the meta device; tied ones are one tensor."""
    with no_init_weights():
        with init_empty_weights(include_buffers=False):
            model: Any = model_class(config).eval()
        # no_init_weights skips it, and accelerate makes a parameter of its own of each that is set.
        model.tie_weights()
    whole: nn.Module = model
    return whole


def build(model_class: Any, config: Any, mode: FakeTensorMode) -> nn.Module:
    """`model_class(config)` in float32 with fake parameters made under `mode`; tied ones stay one tensor."""
    model = blank(model_class, config)
    originals = list(model.parameters())  # kept alive, so that their ids stay theirs
    with mode:
        fakes = {id(parameter): fake_parameter(parameter.shape, torch.float32) for parameter in originals}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = fakes[id(parameter)]
    return model


def fill(model: nn.Module, stored: Mapping[str, StoredTensor], names: Collection[str]) -> None:
    """Give the named parameters of a blank model their weights, in float32; tied ones stay one tensor.

    All lie in one block, which goes back to the system at once when they are dropped: the allocator keeps small ones.
    """
    parameters = {
        name: tensor for name, tensor in model.named_parameters(remove_duplicate=False) if name in names
    }
    single = {id(parameter): parameter.numel() for parameter in parameters.values()}
    room = iter(torch.split(torch.empty(sum(single.values())), [*single.values()]))
    filled: dict[int, nn.Parameter] = {}
    for name, parameter in parameters.items():  # which keeps the originals alive, and so their ids theirs
        if id(parameter) not in filled:
            weight = next(room).view(parameter.shape).copy_(stored[name].read())
            filled[id(parameter)] = nn.Parameter(weight, requires_grad=False)
        owner, _, attribute = name.rpartition(".")
        model.get_submodule(owner)._parameters[attribute] = filled[id(parameter)]


def lay_over(model: nn.Module, stored: Mapping[str, StoredTensor], names: Collection[str]) -> None:
    """Give the named parameters of a blank model their weights as stored: over the mapped files, not copied."""
    for name in names:
        owner, _, attribute = name.rpartition(".")
        weight = nn.Parameter(stored[name].view(), requires_grad=False)
        model.get_submodule(owner)._parameters[attribute] = weight


def fake_parameter(shape: torch.Size, dtype: torch.dtype) -> nn.Parameter:
    """A parameter without data; call it under a fake mode."""
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


def is_fake(tensor: object) -> bool:
    """Whether a tensor has a shape and no data."""
    return isinstance(tensor, FakeTensor)
