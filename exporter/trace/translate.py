"""From a traced program to an ONNX graph, without tracing it a second time.

torch.onnx traces a program once more to decompose the operators that its translator does not know, which takes as long
as the first trace. Of what Hugging Face's towers and decoders are made of, these are a handful, and each is another
name of one that it knows: they are renamed here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.onnx import OnnxExporterError, ONNXProgram

aten = torch.ops.aten
DEFAULTS = (None, [1, 1], "valid")
"""Bias, stride and padding of a convolution."""


def translate(program: ExportedProgram, **options: Any) -> ONNXProgram:
    """`torch.onnx.export` with `options`; with a second trace where an operator is left that needs one."""
    if any(_mutates(node) for node in program.graph.nodes):
        return _export(program, **options)
    for node in list(program.graph.nodes):
        if (rename := RENAMED.get(node.target)) is not None:
            rename(node)
    vars(program)["run_decompositions"] = lambda table: program
    try:
        return _export(program, **options)
    except OnnxExporterError:  # an operator that is known only when it is decomposed
        pass
    finally:
        del vars(program)["run_decompositions"]
    return _export(program, **options)


def _export(program: ExportedProgram, **options: Any) -> ONNXProgram:
    exported = torch.onnx.export(program, **options, dynamo=True, optimize=False, verbose=False)
    assert exported is not None
    return exported


def _mutates(node: fx.Node) -> bool:
    """Whether it changes a value in place.

    A second trace alone writes that without; and a cast to the same type, left out here, may be the copy that changes.
    """
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _erase(node: fx.Node) -> None:
    node.graph.erase_node(node)


def _cast(node: fx.Node, value: fx.Node, dtype: torch.dtype) -> None:
    if value.meta["val"].dtype == dtype:
        node.replace_all_uses_with(value)
        _erase(node)
    else:
        node.target, node.args, node.kwargs = aten._to_copy.default, (value,), {"dtype": dtype}


def _to_dtype(node: fx.Node) -> None:
    value, dtype, *_ = node.args
    _cast(node, value, dtype)  # type: ignore[arg-type]


def _to_device(node: fx.Node) -> None:
    value, _, dtype, *_ = node.args
    _cast(node, value, dtype)  # type: ignore[arg-type]


def _without_padding(node: fx.Node) -> None:
    arguments: list[Any] = [*node.args, *DEFAULTS[len(node.args) - 2 :]]
    pixels, weight, bias, stride, padding, *others = arguments
    if padding == "valid":
        node.target, node.args = aten.conv2d.default, (pixels, weight, bias, stride, [0, 0], *others)


def _bitwise(target: Any) -> Callable[[fx.Node], None]:
    def rename(node: fx.Node) -> None:
        node.target = target

    return rename


RENAMED: dict[Any, Callable[[fx.Node], None]] = {
    aten._assert_tensor_metadata.default: _erase,
    aten.to.dtype: _to_dtype,
    aten.to.device: _to_device,
    aten.__and__.Tensor: _bitwise(aten.bitwise_and.Tensor),
    aten.__or__.Tensor: _bitwise(aten.bitwise_or.Tensor),
    aten.conv2d.padding: _without_padding,
}
"""Operators that the translator knows by another name, and what makes that of them."""
