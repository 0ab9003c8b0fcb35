"""What every family's `split_model` does in the same way: config, weightless model, components.

A family's module checks what is its own, and makes the vision component.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from resprune.exporter.checkpoint.checkpoint import Checkpoint, config_faults, family_of, parse_config
from resprune.exporter.checkpoint.weightless import build
from resprune.exporter.components import Component, Components, Reference
from resprune.exporter.language import Rows, check_language, decoder_component, embed_component
from resprune.exporter.trace.attention import register_attention
from resprune.exporter.trace.precision import lower, scale_outliers

MLP_ENDS = ("mlp.down_proj", "mlp.fc2", "mlp.linear_fc2")
"""The last layer of an MLP, as the models of transformers call it."""


def read_config(checkpoint: Checkpoint, config_class: Any) -> Any:
    """The checkpoint's config; `ResPruneError` for one that `config_class` refuses or a language model not known."""
    config = parse_config(config_class, checkpoint)
    check_language(config.text_config)
    return config


def weightless_model(
    checkpoint: Checkpoint,
    model_class: Any,
    config: Any,
    dtype: torch.dtype,
    mode: FakeTensorMode,
    halved: Mapping[Any, type[torch.nn.Module]] = {},
) -> Any:
    """`model_class(config)` without weights, with attention that can be traced and products in `dtype`.

    `halved` are the model's own kinds of layers that have weights, as `lower` takes them.
    """
    config._attn_implementation = register_attention(dtype)
    with config_faults(checkpoint):
        model = build(model_class, config, mode)
    lower(model, dtype, mode, halved)
    # The product of an MLP's two halves passes 65504 in some language models (transformers #33294, #33312) and in
    # towers (TensorRT-LLM #3223, vLLM #13968). ONNX Runtime's CPU, which computes halves in float32, does not show it.
    scale_outliers(layer for name, layer in model.named_modules() if name.endswith(MLP_ENDS))
    return model


def assemble(
    checkpoint: Checkpoint,
    model: Any,
    vision: Component,
    dtype: torch.dtype,
    *,
    plane_layers: tuple[int, ...] = (),
    two_way: bool = False,
    reference: Reference | None = None,
    **facts: Any,
) -> Components:
    """The components of a model of transformers: `vision`, and the language half, which all families have alike.

    `plane_layers` and `two_way` as in `Components`, `reference` as in `decoder_component`; `facts` are its other
    fields, and take the place of what the config says.
    """
    config = model.config
    rows = Rows(plane_layers, two_way)
    axes = family_of(checkpoint).position_axes
    facts.setdefault("image_token_id", getattr(config, "image_token_id", None))
    facts.setdefault("context_length", config.text_config.max_position_embeddings)
    return Components(
        model=model,
        vision=vision,
        embed=embed_component(model.get_input_embeddings(), config.text_config),
        decoder=decoder_component(
            model.get_decoder(),
            model.lm_head,
            config.text_config,
            dtype,
            (axes,) if axes > 1 else (),
            rows,
            reference,
        ),
        plane_layers=plane_layers,
        two_way=two_way,
        **facts,
    )
