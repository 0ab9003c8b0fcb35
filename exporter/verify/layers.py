"""The decoder that does not fit in memory, proven from parts: some layers against PyTorch, the others against those.

The first layer and the last of each kind are run as a decoder of their own, cut out of the written graph, beside a
Hugging Face model that has only them. Every other layer must be the same computation as one of those, on the weights
of its own number. Whether the weights themselves are the checkpoint's is for verify_weights.py.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import onnx
import onnx.utils
from torch import Tensor

from resprune.exporter.checkpoint.shards import StoredTensor
from resprune.exporter.checkpoint.weightless import blank, fill
from resprune.exporter.components import Component, Components
from resprune.exporter.language import decoder_prefix
from resprune.exporter.trace.repeat import HIDDEN_STATES, LAYER_RESULT
from resprune.runtime.errors import ResPruneError

LAYER = re.compile(r"\blayers\.(\d+)\.")
PAST = re.compile(r"\bpast_key_values\.(\d+)\.")


def chosen_layers(config: Any, plane_layers: tuple[int, ...] = ()) -> list[int]:
    """The first layer, the last of each kind that the language model has, and all up to the last plane that is added.

    So the layers that planes are added after keep their numbers among those that are chosen.
    """
    count = int(config.num_hidden_layers)
    kinds = getattr(config, "layer_types", None) or [""] * count
    first = range(max(plane_layers, default=0) + 1)
    return sorted({*first, *(len(kinds) - 1 - kinds[::-1].index(kind) for kind in set(kinds))})


def reference_of(components: Components, stored: Mapping[str, StoredTensor], chosen: list[int]) -> Any:
    """A Hugging Face model with the `chosen` layers only, in float32; its inputs are what `of_layers` leaves."""
    config: Any = copy.deepcopy(components.model.config)
    config._attn_implementation = "sdpa"
    text = config.text_config
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[layer] for layer in chosen]
    text.num_hidden_layers = len(chosen)
    model: Any = blank(type(components.model), config)
    inside = decoder_prefix(model)
    names = [
        name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if name.startswith((f"{inside}layers.", f"{inside}norm.", "lm_head."))
    ]
    numbered = {
        name: stored[LAYER.sub(lambda found: f"layers.{chosen[int(found[1])]}.", name)] for name in names
    }
    fill(model, numbered, names)
    return model


def of_layers(component: Component, chosen: list[int], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The decoder's inputs without the past of layers that were not chosen."""
    pairs = ((PAST.match(spec.name), tensor) for spec, tensor in zip(component.inputs, inputs, strict=True))
    return tuple(tensor for past, tensor in pairs if past is None or int(past[1]) in chosen)


def cut_out(graph: Path, chosen: list[int]) -> Path:
    """Write the decoder of the `chosen` layers beside `graph`, whose weights it shares; returns its path."""
    model = onnx.load(graph, load_external_data=False)
    for before, layer in pairwise(chosen):
        handed, wanted = HIDDEN_STATES.format(before + 1), HIDDEN_STATES.format(layer)
        for node in model.graph.node:
            for place, name in enumerate(node.input):
                if name == wanted:
                    node.input[place] = handed
    outputs = [model.graph.output[0].name]
    outputs += [f"present.{layer}.{part}" for layer in chosen for part in ("key", "value")]
    inputs = [value.name for value in model.graph.input]
    cut = graph.with_name(f"{graph.stem}.layers.onnx")
    onnx.save(onnx.utils.Extractor(model).extract_model(inputs, outputs), cut)
    return cut


def unlike_layers(graph: Path, chosen: list[int], count: int) -> list[int]:
    """The layers that compute something else than every chosen one does, or on the weights of another layer."""
    model = onnx.load(graph, load_external_data=False)
    makers = {name: (node, place) for node in model.graph.node for place, name in enumerate(node.output)}
    axes = {value.name: value.type.SerializeToString(deterministic=True) for value in model.graph.input}
    meanings = [_meaning(makers, axes, layer) for layer in range(count)]
    known = {meanings[layer] for layer in chosen}
    return [layer for layer in range(count) if meanings[layer] not in known]


def _meaning(
    makers: Mapping[str, tuple[onnx.NodeProto, int]], axes: Mapping[str, bytes], layer: int
) -> tuple[int, ...]:
    """What a layer hands on, as numbers that are equal for equal computations of its own states and weights.

    `axes` are the types of the graph's inputs. The shape of an input is what its type says: every layer takes the
    length of the past from one and the same of them.
    """
    entry = HIDDEN_STATES.format(layer)
    memo: dict[str, int] = {entry: hash("hidden states")}

    def own(name: str) -> str:
        name = re.sub(rf"\blayers\.{layer}\.", "layers.*.", name)
        return re.sub(rf"\bpast_key_values\.{layer}\.", "past_key_values.*.", name)

    def meaning(name: str) -> int:
        if name not in memo:
            if name in makers:
                node, place = makers[name]
                attributes = tuple(
                    sorted(attribute.SerializeToString(deterministic=True) for attribute in node.attribute)
                )
                shape_of = axes.get(node.input[0]) if node.op_type == "Shape" else None
                inputs = (hash(shape_of),) if shape_of else tuple(map(meaning, node.input))
                memo[name] = hash((node.domain, node.op_type, attributes, inputs, place))
            else:
                memo[name] = hash(own(name))
        return memo[name]

    result = LAYER_RESULT.format(layer)
    outputs = [result if result in makers else HIDDEN_STATES.format(layer + 1)]
    outputs += [f"present.{layer}.{part}" for part in ("key", "value")]
    absent = [name for name in outputs if name not in makers]
    if absent:
        raise ResPruneError(
            f"the decoder's graph has no value {absent[0]}, so it cannot be verified by layers; use --verify full"
        )
    return tuple(meaning(name) for name in outputs)
