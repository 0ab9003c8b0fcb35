"""Running text for the decoder: what it sees in life. Trained weights answer normal noise with anything.

A seeded noise has none of the few huge activations that real words cause, and these are what low precision loses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from resprune.exporter.components import Component
from resprune.names import IMAGE_NUMBERS, PLANE_EMBEDS

POSITIONS = 256
KNOWN = 0.9
"""A part of the loss of a guess among all tokens alike. SmolLM2-135M has 0.33, random weights from 1 to 3.6."""
APART = 1.0
"""Standard deviations of a position's logits. The demo, which has learnt other text, has 2.9, random weights 0.3."""
ENGLISH = (
    "The harbour lay still under a thin fog, and the first boats came home before the town was awake. On the quay a "
    "woman in a blue coat counted baskets of herring, wrote the number on a slate, and wiped her hands on her apron. "
    '"Forty-two," she said to the boy beside her. "That is nine more than yesterday. Tell your father the price will '
    'fall." The boy ran up the narrow street, past the bakery, where the smell of bread filled the doorway, and past '
    "the school, whose windows were dark. Behind the church the road climbs to the lighthouse. It was built in 1874, "
    "after a winter in which three ships were lost on the reef, and its lamp can be seen from eighteen miles away. "
    "Today nobody lives there: a small computer switches the light on at dusk and off at dawn, and reports a fault by "
    "radio. Still, every Saturday the old keeper walks up the hill, cleans the glass, and sits for an hour on the "
    "bench. What does he think about? Some say that he counts the ships; others, that he only likes the wind. When "
    "visitors ask him, he points at the sea and explains how to read it: long smooth waves come from a storm that is "
    "far away, short steep ones from a wind that has just begun, and a line of foam means that the tide is turning. "
    "If you learn these three things, he says, you will never need a newspaper to know whether to stay at home."
)


def ids_of(tokenizer: Any, vocabulary: int) -> Tensor:
    """POSITIONS token ids [POSITIONS] of ENGLISH, from the start again where a tokenizer makes fewer of it."""
    ids = [
        token for token in tokenizer.encode(ENGLISH, add_special_tokens=False).ids if token < vocabulary
    ] or [0]
    return torch.tensor((ids * (1 + POSITIONS // len(ids)))[:POSITIONS])


def after_text(
    component: Component,
    sizes: Mapping[str, int],
    seed: int,
    embeds: Tensor,
    prefill: Callable[[tuple[Tensor, ...]], Mapping[str, Tensor]],
) -> tuple[Tensor, ...]:
    """The decoder's inputs of `sizes`, with rows of running text and the cache that the text before them makes.

    `embeds` [T, D] are embeddings of text, of which each row of the batch takes the next; `prefill` returns, by name,
    what a decoder presents after inputs with an empty past.
    """
    B, P, S = (sizes[name] for name in ("batch_size", "past_sequence_length", "sequence_length"))
    names = [spec.name for spec in component.inputs]
    text = embeds[: B * (P + S)].reshape(B, P + S, -1)
    before = {**sizes, "sequence_length": P, "past_sequence_length": 0}
    earlier = dict(zip(names, component.samples(before, torch.Generator().manual_seed(seed)), strict=True))
    present = prefill(tuple((earlier | {"inputs_embeds": text[:, :P]}).values()))
    inputs = dict(zip(names, component.samples(sizes, torch.Generator().manual_seed(seed)), strict=True))
    inputs["inputs_embeds"] = text[:, P:]
    for name, tensor in present.items():
        past = name.replace("present.", "past_key_values.")
        if past in inputs:
            inputs[past] = tensor.to(inputs[past].dtype)
    return tuple(inputs.values())


def whole_text(component: Component, embeds: Tensor) -> tuple[Tensor, ...]:
    """The decoder's inputs for a prefill of the text `embeds` [T, D] alone: no image, no padding, no past."""
    sizes = {"batch_size": 1, "sequence_length": len(embeds), "past_sequence_length": 0}
    inputs = component.samples(sizes, torch.Generator())
    plain = {"inputs_embeds": embeds[None], "attention_mask": torch.ones(1, len(embeds), dtype=torch.int64)}
    return tuple(
        plain.get(spec.name, torch.zeros_like(tensor) if _of_images(spec.name) else tensor)
        for spec, tensor in zip(component.inputs, inputs, strict=True)
    )


def _of_images(name: str) -> bool:
    return name.startswith(PLANE_EMBEDS.format("")) or name == IMAGE_NUMBERS


def every_logit(component: Component, model: Any, inputs: tuple[Tensor, ...]) -> Tensor:
    """Logits [S, vocabulary] of every position, by the Hugging Face model's own code."""
    hidden: list[Tensor] = []
    hook = model.get_decoder().norm.register_forward_hook(lambda *call: hidden.append(call[-1]))
    try:
        with torch.no_grad():
            component.reference(model, inputs)
            logits: Tensor = model.lm_head(hidden[-1][0])
    finally:
        hook.remove()
    return logits.float()


def every_position(graph: Path) -> Path:
    """Write the decoder with the logits of all positions beside `graph`, whose weights it shares; returns its path."""
    model = onnx.load(graph, load_external_data=False)
    makers = {name: node for node in model.graph.node for name in node.output}
    last = makers["logits"]
    while last.op_type != "Slice":  # of the hidden states, before the head
        last = makers[last.input[0]]
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name == last.output[0]:
                node.input[place] = last.input[0]
    model.graph.node.remove(last)
    (logits,) = (value for value in model.graph.output if value.name == "logits")
    logits.type.tensor_type.shape.dim[1].dim_param = "sequence_length"
    del model.graph.output[:]
    model.graph.output.append(logits)
    wide = graph.with_name(f"{graph.stem}.text.onnx")
    onnx.save(model, wide)
    return wide


def trained(logits: Tensor, ids: Tensor) -> bool:
    """Whether logits [T, vocabulary] are those of trained weights, after the token ids [T].

    They guess the next token better than chance, where random ones do worse, and the more so the more they differ; or
    the most likely token stands farther from the second than random numbers do.
    """
    guessed = torch.nn.functional.cross_entropy(logits[:-1], ids[1:])
    first, second = logits.topk(2, dim=-1).values.unbind(-1)
    apart = ((first - second) / logits.std(dim=-1)).mean()
    return float(guessed) < KNOWN * math.log(logits.shape[1]) or float(apart) > APART


def agreeing(got: Tensor, want: Tensor) -> Sequence[bool]:
    """Of each position [S, vocabulary] whether both have the same most likely token."""
    same: Sequence[bool] = (got.argmax(dim=-1) == want.argmax(dim=-1)).tolist()
    return same
