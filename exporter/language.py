"""The language half, the same for every family: embed_tokens and the decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from resprune.exporter.components import Component, Components, Reference, Sizes
from resprune.names import DECODER, EMBED_TOKENS, IMAGE_NUMBERS, PLANE_EMBEDS
from resprune.runtime.bundle.manifest import TensorSpec, axis_size
from resprune.runtime.errors import ResPruneError
from resprune.runtime.families.language_models import LANGUAGE_MODELS

# The others rescale their angles by the length seen so far, which no static graph can do.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")

KEPT_LENGTH = "past_sequence_length + sequence_length"


class _Embed(nn.Module):
    """input_ids [B, S] int64 → inputs_embeds [B, S, D]."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table = table

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        return (self.table(input_ids),)


class _Cache(DynamicCache):
    """A cache that is handed its past, `past` in pairs, and keeps new entries in the past's dtype."""

    def __init__(self, past: Sequence[Tensor]) -> None:
        super().__init__()
        new_layer: Any = DynamicLayer
        for keys, values in zip(past[::2], past[1::2], strict=True):
            layer = new_layer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            self.layers.append(layer)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        past: Any = self.layers[layer_idx]
        key_states, value_states = key_states.to(past.keys.dtype), value_states.to(past.values.dtype)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@dataclass(frozen=True)
class Rows:
    """The decoder's inputs that say more of each row of the prompt than its embedding does.

    `plane_embeds.i` [B, S, D] float32 for each of `plane_layers`, added to what that layer hands on: 0 where there is
    text. If `two_way`, `image_numbers` [B, S] int64: 0 for text, i for the i-th image, whose rows see each other in
    both directions. All are 0 at the steps after prefill.
    """

    plane_layers: tuple[int, ...] = ()
    two_way: bool = False

    def specs(self, step: tuple[str, str], hidden_size: int) -> tuple[TensorSpec, ...]:
        """How the inputs are declared; `step` names the axes [B, S]."""
        planes = (
            TensorSpec(PLANE_EMBEDS.format(index), "float32", (*step, hidden_size))
            for index in range(len(self.plane_layers))
        )
        numbers = [TensorSpec(IMAGE_NUMBERS, "int64", step)] if self.two_way else []
        return (*planes, *numbers)

    def parts(self, rest: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor | None, tuple[Tensor, ...]]:
        """The decoder's inputs from the fourth on as planes, numbers and past."""
        count = len(self.plane_layers)
        planes, rest = rest[:count], rest[count:]
        return (planes, rest[0], rest[1:]) if self.two_way else (planes, None, rest)

    @contextmanager
    def added(self, language_model: Any, planes: Sequence[Tensor]) -> Iterator[None]:
        """While it lasts, each plane is added between its layer and the next: the layers themselves stay alike."""

        def add(plane: Tensor, layer: nn.Module, arguments: object, hidden: Tensor) -> Tensor:
            return hidden + plane

        with ExitStack() as stack:
            for layer, plane in zip(self.plane_layers, planes, strict=True):
                handle = language_model.layers[layer].register_forward_hook(partial(add, plane))
                stack.callback(handle.remove)
            yield


class _Decoder(nn.Module):
    """One step of the language model over any past, prefill being the step with an empty one.

    inputs_embeds [B, S, D], attention_mask [B, P + S] int64 (0 at padding; if `proportional`, how many tokens each key
    counts for), position_ids [B, S] int64 or, for M-RoPE, [3, B, S], the rows (`Rows`), then each layer's past key and
    value [B, kv_heads, P, head_dim] → logits [B, 1, vocabulary] of the last position, then each layer's present.
    """

    def __init__(
        self, language_model: Any, lm_head: nn.Module, rows: Rows, proportional: bool = False
    ) -> None:
        super().__init__()
        self.language_model = language_model
        self.lm_head = lm_head
        self.rows = rows
        self.proportional = proportional

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        planes, numbers, past = self.rows.parts(rest)
        cache = _Cache(past)
        masks = additive_masks(
            self.language_model.config,
            inputs_embeds.shape[1],
            attention_mask,
            numbers,
            proportional=self.proportional,
        )
        with self.rows.added(self.language_model, planes):
            hidden = self.language_model(
                inputs_embeds=inputs_embeds,
                attention_mask=masks,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
        return (self.lm_head(hidden[:, -1:]), *present(cache))


def additive_masks(
    config: Any,
    length: int,
    attention_mask: Tensor,
    numbers: Tensor | None,
    *,
    proportional: bool,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Masks [B, 1, S, P + S] of `dtype`, in the form that the language model takes when given them ready-made.

    `length` is S, `attention_mask` [B, P + S] int64; `numbers` [B, S] int64 are `image_numbers`, None for causal masks
    alone. If `proportional`, a key's weight is the logarithm of what the mask counts it for.
    """
    device = attention_mask.device
    past_length = attention_mask.shape[1] - length
    key = torch.arange(attention_mask.shape[1], device=device)[None, :]  # [1, P + S]
    query = torch.arange(length, device=device)[:, None] + past_length  # [S, 1]
    present = attention_mask.bool()[:, None, None, :]
    seen = (key <= query)[None, None]
    if numbers is not None:
        # Keys of the past count as text: an image's rows all come in one prefill.
        past = torch.zeros_like(attention_mask)[:, :past_length]
        of_key = torch.cat([past, numbers], dim=1)[:, None, None, :]  # [B, 1, 1, P + S]
        of_query = numbers[:, None, :, None]  # [B, 1, S, 1]
        seen = seen | ((of_query > 0) & (of_query == of_key))
    seen = seen & present
    window = getattr(config, "sliding_window", None)
    # What a window cuts, it cuts of an image's rows too.
    near = seen if window is None else seen & (key > query - window)[None, None]
    weight = log_counts(attention_mask)[:, None, None, :] if proportional else 0.0
    if LANGUAGE_MODELS[config.model_type].masks_by_kind:
        return {
            "full_attention": _additive(seen, weight, dtype),
            "sliding_attention": _additive(near, weight, dtype),
        }
    return _additive(near, weight, dtype)


def present(cache: Any) -> list[Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def _additive(seen: Tensor, weight: Tensor | float, dtype: torch.dtype) -> Tensor:
    # The lowest finite number, not −∞: a padded query sees no key at all, and its softmax must not be NaN.
    return torch.where(seen, weight, torch.finfo(dtype).min).to(dtype)


def position_bias(language_model: Any, attention_mask: Tensor) -> dict[str, Tensor]:
    """Proportional attention for a Hugging Face language model, as keywords: nothing where every count is 1.

    Its own attention (sdpa) adds `position_bias` [B, 1, 1, P + S] to the scores; its others would ignore it.
    """
    if int(attention_mask.max()) <= 1:
        return {}
    assert language_model.config._attn_implementation == "sdpa"
    return {"position_bias": log_counts(attention_mask)[:, None, None, :].to(language_model.dtype)}


def log_counts(attention_mask: Tensor) -> Tensor:
    """What proportional attention adds to a key's scores: float32 of the mask's shape; 0 for a count of 1, and of 0."""
    return attention_mask.clamp(min=1).float().log()


def decoder_prefix(model: Any) -> str:
    """What the names of the language model's parameters begin with in the whole model's."""
    decoder = model.get_decoder()
    return next(f"{name}." for name, module in model.named_modules() if module is decoder)


def check_language(config: Any) -> None:
    """`ResPruneError` unless the graphs can carry this language model's config."""
    if config.model_type not in LANGUAGE_MODELS:
        raise ResPruneError(
            f"the language model is of type {config.model_type}; supported are {', '.join(LANGUAGE_MODELS)}"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    # Those of one kind of layer or, keyed by it, of each kind.
    for one in [rope, *(of_kind for of_kind in rope.values() if isinstance(of_kind, dict))]:
        kind = one.get("rope_type", "default")
        if kind not in ROPE_TYPES:
            raise ResPruneError(
                f"the language model has rotary embeddings of type {kind}; supported are {', '.join(ROPE_TYPES)}"
            )


def embed_component(table: nn.Module, config: Any) -> Component:
    """`embed_tokens`: input_ids → inputs_embeds."""
    ids = TensorSpec("input_ids", "int64", ("batch_size", "sequence_length"))
    embeds = TensorSpec("inputs_embeds", "float32", ("batch_size", "sequence_length", config.hidden_size))

    def samples(sizes: Sizes, generator: torch.Generator) -> tuple[Tensor, ...]:
        shape = tuple(axis_size(axis, sizes) for axis in ids.shape)
        return (torch.randint(config.vocab_size, shape, generator=generator),)

    def reference(model: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (model.get_input_embeddings()(inputs[0]).float(),)

    return Component(EMBED_TOKENS, _Embed(table), (ids,), (embeds,), samples, reference)


def decoder_component(
    language_model: Any,
    lm_head: nn.Module,
    config: Any,
    cache_dtype: torch.dtype,
    position_axes: tuple[int, ...] = (),
    rows: Rows = Rows(),
    reference: Reference | None = None,
) -> Component:
    """`decoder_model_merged`: one graph for prefill and every later step; keys and values in `cache_dtype`.

    `position_axes` (3,) gives M-RoPE's `position_ids` [3, B, S]. `reference` None is `decode`, which knows nothing of
    two-way masks.
    """
    assert reference is not None or not rows.two_way, "give a reference by the model's own masks"
    kv_heads = config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kept_dtype = str(cache_dtype).removeprefix("torch.")
    step = ("batch_size", "sequence_length")

    def kept(prefix: str, length: str) -> tuple[TensorSpec, ...]:
        shape = ("batch_size", kv_heads, length, head_dim)
        return tuple(
            TensorSpec(f"{prefix}.{layer}.{part}", kept_dtype, shape)
            for layer in range(config.num_hidden_layers)
            for part in ("key", "value")
        )

    inputs = (
        TensorSpec("inputs_embeds", "float32", (*step, config.hidden_size)),
        TensorSpec("attention_mask", "int64", ("batch_size", KEPT_LENGTH)),
        TensorSpec("position_ids", "int64", (*position_axes, *step)),
        *rows.specs(step, config.hidden_size),
        *kept("past_key_values", "past_sequence_length"),
    )
    # A prefill spares the vocabulary's product for all positions but the one that is read.
    logits = TensorSpec("logits", "float32", ("batch_size", 1, config.vocab_size))
    outputs = (logits, *kept("present", KEPT_LENGTH))

    def samples(sizes: Sizes, generator: torch.Generator) -> tuple[Tensor, ...]:
        shapes = [tuple(axis_size(axis, sizes) for axis in spec.shape) for spec in inputs]
        past_length = sizes["past_sequence_length"]
        positions = torch.arange(past_length, past_length + sizes["sequence_length"]).repeat(
            *shapes[2][:-1], 1
        )
        if position_axes:
            positions += 2 * torch.arange(3)[:, None, None]  # so that axes that are mixed up show
        mask = torch.ones(shapes[1], dtype=torch.int64)
        mask[0, : past_length // 2] = 0  # one row is padded on the left
        first_past = 3 + len(rows.plane_layers) + rows.two_way
        past = [torch.randn(shape, generator=generator).to(cache_dtype) for shape in shapes[first_past:]]
        embeds = torch.randn(shapes[0], generator=generator)
        planes = [torch.randn(shapes[0], generator=generator) for _ in rows.plane_layers]
        numbers = [(torch.arange(1, shapes[0][1] + 1) // 2).repeat(shapes[0][0], 1)] if rows.two_way else []
        return (embeds, mask, positions, *planes, *numbers, *past)

    module = _Decoder(language_model, lm_head, rows)
    layers = tuple(language_model.layers)
    reference = reference or partial(decode, rows=rows)
    return Component(DECODER, module, inputs, outputs, samples, reference, layers)


def proportional(components: Components) -> Components:
    """The same components, whose decoder takes counts in its mask and whose selection is to give them."""
    decoder = components.decoder
    plain: Any = decoder.module
    plain_samples = decoder.samples

    def samples(sizes: Sizes, generator: torch.Generator) -> tuple[Tensor, ...]:
        embeds, mask, *rest = plain_samples(sizes, generator)
        return (embeds, mask * torch.randint(1, 99, mask.shape, generator=generator), *rest)

    module = _Decoder(plain.language_model, plain.lm_head, plain.rows, proportional=True)
    return replace(components, decoder=replace(decoder, module=module, samples=samples), proportional=True)


def decode(
    model: Any, inputs: tuple[Tensor, ...], rows: Rows = Rows(), masks: Callable[..., Any] | None = None
) -> tuple[Tensor, ...]:
    """What the decoder graph computes, by the Hugging Face model's own masks and attention (sdpa), in float32.

    For `rows.two_way`, `masks` is the model's own way to them: `masks(inputs_embeds, attention_mask, position_ids,
    image_numbers, cache)` is what the language model takes for its mask.
    """
    inputs_embeds, attention_mask, position_ids, *rest = inputs
    planes, numbers, past = rows.parts(tuple(rest))
    cache = read_past(past)
    further = {}
    if masks is not None:
        further["attention_mask"] = masks(inputs_embeds, attention_mask, position_ids, numbers, cache)
    with rows.added(model.get_decoder(), planes):
        return called(model, inputs, cache, **further)


def read_past(past: Sequence[Tensor]) -> DynamicCache:
    """A cache in float32 of keys and values in turn, layer by layer."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(zip(past[::2], past[1::2], strict=True)):
        cache.update(keys.float(), values.float(), layer)
    return cache


def called(model: Any, inputs: tuple[Tensor, ...], cache: DynamicCache, **further: Any) -> tuple[Tensor, ...]:
    """The decoder graph's outputs by the Hugging Face model, of whose inputs the first three are taken.

    `further` is what its language model is given besides, or in place of them.
    """
    inputs_embeds, attention_mask, position_ids = inputs[:3]
    language_model = model.get_decoder()
    given = {
        "inputs_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        **position_bias(language_model, attention_mask),
        **further,
    }
    hidden = language_model(past_key_values=cache, use_cache=True, **given).last_hidden_state
    return (model.lm_head(hidden[:, -1:]), *present(cache))
