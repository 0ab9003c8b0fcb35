"""Tensors as ONNX Runtime takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from resprune.exporter.components import Component


def feeds(component: Component, inputs: Sequence[Tensor]) -> dict[str, NDArray[Any]]:
    """The inputs of a component's graph by name."""
    return {spec.name: array(tensor) for spec, tensor in zip(component.inputs, inputs, strict=True)}


def array(tensor: Tensor) -> NDArray[Any]:
    """One tensor; bfloat16 as float32."""
    # NumPy has no bfloat16, and the graphs are widened where they have.
    values: NDArray[Any] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return values
