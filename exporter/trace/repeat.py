"""Layers that repeat are traced once: like layers become one node each, then copies of the one that was traced.

Tracing takes seconds a layer, and some for each weight and each state of a cache. A language model has dozens of
layers that differ in their weights alone. Alike are layers whose modules are equal and that are called with the very
same arguments, apart from the states that go from layer to layer: the hidden state, and the layer's own keys and
values.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from resprune.names import PLANE_EMBEDS

if TYPE_CHECKING:
    from resprune.exporter.components import Component
    from resprune.exporter.trace.tracer import Weight

DOMAIN = "resprune.layer"
"""Of three nodes that live only between tracing and `expand`: Begin and End around a layer that is traced, and Copy."""

HIDDEN_STATES = "hidden_states.{}"
"""Name in the graph of what layer i − 1 hands to layer i, as transformers counts hidden states."""

LAYER_RESULT = "layer_results.{}"
"""Name of what layer i itself computes, where a plane is added to it before the next layer."""

STATE = re.compile(r"^(past_key_values|present)\.(\d+)\.")
"""Names of inputs and outputs that are one layer's own."""

HIDDEN_STATE = re.compile(re.escape(HIDDEN_STATES).replace(r"\{\}", r"(\d+)"))
PLANE = re.compile(re.escape(PLANE_EMBEDS).replace(r"\{\}", r"\d+"))

CACHES = ("past_key_values", "step")

PLAIN = (type(None), bool, int, float, str, tuple, list, dict, partial)
"""Compared by what they say; all else must be the same object."""


def stand_in(name: str, firsts: Sequence[int]) -> str:
    """Which input or output is traced in place of the one of this name."""
    return STATE.sub(lambda state: f"{state[1]}.{firsts[int(state[2])]}.", name)


def firsts_alike(component: Component, inputs: Sequence[Tensor]) -> list[int]:
    """For each layer of a component the first that it is like, when the component is called with `inputs`.

    Nothing is computed in the layers themselves: each hands on the hidden state that it gets.
    """
    signatures = [_signature(layer) for layer in component.layers]
    firsts = list(range(len(component.layers)))
    kinds: dict[Hashable, int] = {}
    arguments: list[object] = []  # kept alive, so that their ids stay theirs

    def call(index: int, forward: object, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        arguments.append((args, kwargs))
        firsts[index] = kinds.setdefault((signatures[index], _shared(args, kwargs)), index)
        return hidden

    with _calling(call, component.layers), torch.no_grad():
        component.module(*inputs)
    return firsts


@contextmanager
def traced_once(layers: Sequence[nn.Module], firsts: Sequence[int]) -> Iterator[None]:
    """While it lasts, only the first of `layers` of each kind runs; the others stand for themselves as one node.

    Each layer takes a hidden state first and returns the next one. Its keys and values are those of `layers[its
    index]` of what it is given as one of CACHES, if it is; a layer that does not run leaves them as they are, and has
    no weights.
    """
    called: dict[int, Hashable] = {}
    arguments: list[object] = []  # kept alive, so that their ids stay theirs

    def call(index: int, forward: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        arguments.append((args, kwargs))
        called[index] = _shared(args, kwargs)
        first = firsts[index]
        if first != index:
            assert called[index] == called[first], f"layer {index} is not called as layer {first}"
            return _mark("Copy", index, first, hidden)
        caches = [kwargs[name] for name in CACHES if kwargs.get(name) is not None]
        cache = caches[0].layers[index] if caches else None
        hidden = _mark("Begin", index, first, hidden, cache)
        hidden = forward(hidden, *args, **kwargs)
        return _mark("End", index, first, hidden, cache)

    copies = (layer for index, layer in enumerate(layers) if firsts[index] != index)
    with _calling(call, layers), ExitStack() as stack:
        for module in (module for layer in copies for module in layer.modules()):
            stack.enter_context(patch.dict(module._parameters, clear=True))
        yield


@contextmanager
def _calling(call: Callable[..., Tensor], layers: Sequence[nn.Module]) -> Iterator[None]:
    """While it lasts, `call(index, forward, …)` is called in place of each layer's `forward(…)`."""
    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.enter_context(patch.object(layer, "forward", partial(call, index, layer.forward)))
        yield


def _shared(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable:
    """Equal for the same objects in the same places, but for the caches, of which each layer has its own part."""
    leaves, structure = tree_flatten(
        (args, {name: value for name, value in kwargs.items() if name not in CACHES})
    )
    return repr(structure), tuple(map(_plain, leaves))


def _mark(op: str, index: int, first: int, hidden: Tensor, cache: Any = None) -> Tensor:
    """One node that takes the states and gives them back."""
    states = [hidden] if cache is None else [hidden, cache.keys, cache.values]
    hidden, *kept = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{op}",
        states,
        {"index": index, "first": first},
        dtypes=[state.dtype for state in states],
        shapes=[state.shape for state in states],
        version=1,
    )
    if cache is not None:
        cache.keys, cache.values = kept
    return hidden


def _signature(layer: nn.Module) -> Hashable:
    """What decides the graph of a layer but for its inputs: all of its modules except weights and number."""
    common = {*vars(nn.Module()), "layer_idx"}
    return tuple(
        (
            name,
            type(module),
            tuple((key, _plain(value)) for key, value in vars(module).items() if key not in common),
            tuple((key, value.shape, value.dtype) for key, value in module.named_parameters(recurse=False)),
            tuple((key, str(value.tolist())) for key, value in module.named_buffers(recurse=False)),
        )
        for name, module in layer.named_modules()
    )


def _plain(value: object) -> Hashable:
    return repr(value) if isinstance(value, PLAIN) else id(value)


def expand(
    graph: ir.Graph, layers: Sequence[nn.Module], names: Mapping[int, str], weights: dict[str, Weight]
) -> None:
    """Replace the three nodes: each Copy by what stands between Begin and End, with its own layer's weights and states.

    `names` has the parameters' names by identity; `weights` the initializers, and gains those of the copies, as the
    graph gains inputs and outputs.
    """
    marks = [node for node in graph if node.domain == DOMAIN]
    begins = {_number(node, "index"): node for node in marks if node.op_type == "Begin"}
    ends = {_number(node, "index"): node for node in marks if node.op_type == "End"}
    bodies = {
        first: _body(graph, begin, ends[first], _own(graph, layers[first], names, weights))
        for first, begin in begins.items()
    }
    for copy in (node for node in marks if node.op_type == "Copy"):
        index, first = _number(copy, "index"), _number(copy, "first")
        begin, end = begins[first], ends[first]
        past = [
            ir.Value(name=_of_layer(index, value), type=value.type, shape=value.shape)
            for value in _states(begin)[1:]
        ]
        graph.inputs.extend(past)
        values = dict(zip(begin.outputs, [*_states(copy), *past], strict=True))
        parameters = zip(layers[first].parameters(), layers[index].parameters(), strict=True)
        renamed = {names[id(one)]: names[id(other)] for one, other in parameters}
        for value in _own(graph, layers[first], names, weights):
            values[value] = _like(graph, value, renamed, weights)
        nodes = [_copied(node, values, index) for node in bodies[first]]
        graph.insert_before(copy, nodes)
        hidden, *present = (values[value] for value in _states(end))
        for value, state in zip(present, end.outputs[1:], strict=True):
            value.name = _of_layer(index, state)
        graph.outputs.extend(present)
        _replace(graph, copy, [hidden], index)
    for index, begin in begins.items():
        ir.convenience.replace_all_uses_with(begin.outputs, _states(begin))
        graph.remove(begin, safe=True)
        _replace(graph, ends[index], _states(ends[index]), index)
    _name_sums(graph)
    graph.opset_imports.pop(DOMAIN, None)


def _name_sums(graph: ir.Graph) -> None:
    """Where a plane is added to a layer's result, the sum is the next hidden state, and takes its name."""
    for plane in (value for value in graph.inputs if PLANE.fullmatch(value.name or "")):
        (node,) = [use.node for use in plane.uses() if use.node.op_type != "Shape"]
        (result,) = [value for value in node.inputs if value is not plane]
        found = HIDDEN_STATE.fullmatch(result.name or "") if result is not None else None
        assert result is not None
        assert found is not None, f"{plane.name} is not added to what a layer hands on"
        node.outputs[0].name, result.name = result.name, LAYER_RESULT.format(int(found[1]) - 1)


def _of_layer(index: int, state: ir.Value) -> str:
    """The name that the same input or output has of another layer."""
    assert state.name is not None
    assert STATE.match(state.name), f"{state.name} is no layer's own"
    return STATE.sub(rf"\1.{index}.", state.name)


def _own(
    graph: ir.Graph, layer: nn.Module, names: Mapping[int, str], weights: Mapping[str, Weight]
) -> list[ir.Value]:
    """The initializers that are a layer's parameters."""
    parameters = {names[id(parameter)] for parameter in layer.parameters()}
    return [
        graph.initializers[name]
        for name, weight in weights.items()
        if parameters.issuperset(weight.parameters)
    ]


def _body(graph: ir.Graph, begin: ir.Node, end: ir.Node, own: Sequence[ir.Value]) -> list[ir.Node]:
    """The nodes between Begin and End: all that depend on a layer's states or weights, and on nothing after it.

    Whatever else they use, such as masks and rotary angles, is the same for every layer, and stays one.
    """
    inside = {*begin.outputs, *own}
    nodes = []
    for node in graph:  # in topological order
        if node is not end and inside.intersection(node.inputs):
            nodes.append(node)
            inside.update(node.outputs)
    known = {*nodes, end}
    for value in inside:
        leaks = value.is_graph_output() or any(use.node not in known for use in value.uses())
        assert not leaks, f"{value.name} is computed inside a layer and used outside of it"
    assert inside.issuperset(end.inputs), "a layer hands on what it did not compute"
    return nodes


def _like(
    graph: ir.Graph, value: ir.Value, renamed: Mapping[str, str], weights: dict[str, Weight]
) -> ir.Value:
    """The same weight of another layer, as an initializer of its own."""
    assert value.name is not None
    assert isinstance(value.const_value, ir.ExternalTensor)
    weight = weights[value.name]
    weight = replace(weight, parameters=tuple(renamed[parameter] for parameter in weight.parameters))
    tensor = value.const_value
    other = ir.Value(name=weight.name, type=value.type, shape=value.shape)
    other.const_value = ir.ExternalTensor(
        tensor.location, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=weight.name
    )
    graph.register_initializer(other)
    weights[weight.name] = weight
    return other


def _copied(node: ir.Node, values: dict[ir.Value, ir.Value], index: int) -> ir.Node:
    """A copy of a node that takes what `values` has in place of its inputs, to which its outputs are added."""
    copied = ir.Node(
        node.domain,
        node.op_type,
        [None if value is None else values.get(value, value) for value in node.inputs],
        node.attributes.values(),
        num_outputs=len(node.outputs),
        name=f"{node.name}.{index}",
    )
    for one, other in zip(node.outputs, copied.outputs, strict=True):
        other.name, other.type = f"{one.name}.{index}", one.type
        values[one] = other
    return copied


def _replace(graph: ir.Graph, mark: ir.Node, results: Sequence[ir.Value], index: int) -> None:
    """Remove a Copy or an End, in whose place `results` are used from now on."""
    names = [value.name if value.is_graph_output() else None for value in mark.outputs]
    ir.convenience.replace_all_uses_with(mark.outputs, results, replace_graph_outputs=True)
    graph.remove(mark, safe=True)
    for value, name in zip(results, names, strict=True):
        value.name = name or value.name
    results[0].name = HIDDEN_STATES.format(index + 1)


def _states(mark: ir.Node) -> list[ir.Value]:
    return [value for value in mark.inputs if value is not None]


def _number(node: ir.Node, name: str) -> int:
    return node.attributes[name].as_int()
