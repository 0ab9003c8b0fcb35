"""Half precision where it pays: weights and matrix products. All else stays float32.

The traced model is a float32 model whose linear layers, convolutions and embeddings hold half weights and compute
their product in half; the residual stream, norms, softmax and rotary angles are float32. So nothing can overflow
between layers, and the weights, which are what a decode step reads, take half the bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from resprune.elements import FLOATS
from resprune.exporter.checkpoint.weightless import fake_parameter

TORCH: dict[str, torch.dtype] = {name: getattr(torch, name) for name in FLOATS}
"""The element types of the table of precisions."""


class _HalfLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        product = nn.functional.linear(x.to(self.weight.dtype), self.weight).float()
        return product if self.bias is None else product + self.bias


class _ScaledHalfLinear(nn.Linear):
    """A half product of rows scaled to a largest magnitude of 1: neither its input nor its output can overflow."""

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        product = nn.functional.linear((x / scale).to(self.weight.dtype), self.weight).float() * scale
        return product if self.bias is None else product + self.bias


class _HalfConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = self._conv_forward(x.to(self.weight.dtype), self.weight, None).float()
        return product if self.bias is None else product + self.bias[:, None, None]


class _HalfEmbedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).float()


HALVED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: _HalfLinear,
    nn.Conv2d: _HalfConv2d,
    nn.Embedding: _HalfEmbedding,
}


def lower(
    model: nn.Module, dtype: torch.dtype, mode: FakeTensorMode, further: Mapping[Any, type[nn.Module]] = {}
) -> None:
    """Give every layer of a kind in HALVED, exactly of that class, a fake weight of `dtype`; tied weights stay tied.

    `further` are kinds of this model alone, and the classes that compute them in half.
    """
    if dtype == torch.float32:
        return
    # ONNX has no convolution in bfloat16 before opset 22; the only one is of the pixels, and stays float32.
    classes: dict[Any, type[nn.Module]] = {**HALVED, **further}
    kinds = set(classes) - ({nn.Conv2d} if dtype == torch.bfloat16 else set())
    layers: list[Any] = [module for module in model.modules() if type(module) in kinds]
    originals = {
        id(layer.weight): layer.weight for layer in layers
    }  # by identity: tied weights are one tensor
    with mode:
        halved = {key: fake_parameter(weight.shape, dtype) for key, weight in originals.items()}
    for layer in layers:
        layer.weight = halved[id(layer.weight)]
        layer.__class__ = classes[type(layer)]


def scale_outliers(layers: Iterable[nn.Module]) -> None:
    """Give linear layers that `lower` has made half, and whose activations may pass half's 65504, scaled rows."""
    halved: list[Any] = [layer for layer in layers if type(layer) is _HalfLinear]
    for layer in halved:
        layer.__class__ = _ScaledHalfLinear
