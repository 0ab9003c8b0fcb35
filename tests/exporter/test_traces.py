"""Exports of the tests share graphs (tests/traces.py), and none takes another's."""

from dataclasses import replace
from typing import Any

import torch

from resprune.exporter.checkpoint.checkpoint import resolve
from resprune.exporter.checkpoint.weightless import fake_mode
from resprune.exporter.components import Components
from resprune.exporter.early import with_early
from resprune.exporter.families import split_model
from resprune.exporter.language import proportional
from resprune.exporter.trace.grouped_query import optimize_decoder
from resprune.runtime.bundle.manifest import Early
from tests import tiny
from tests.traces import fingerprint


def taken_apart(root: Any, dtype: torch.dtype = torch.float32) -> Components:
    return split_model(resolve(str(root)), dtype, fake_mode())


def selecting(components: Components, tokens: int) -> Components:
    early = with_early(components.vision, Early(1, tokens, 16), fake_mode())
    return replace(components, vision=early)


def test_only_like_components_have_one_fingerprint(tiny_checkpoint, tmp_path):
    root, variant = tiny_checkpoint("clip-llama-wide"), tiny.VARIANTS["clip-llama-wide"]
    layer = tiny.write_checkpoint(tmp_path / "layer", replace(variant, feature_layer=-1))
    norm = replace(variant, language_options={"rms_norm_eps": 1e-3})
    every = [
        taken_apart(root),
        taken_apart(root),
        taken_apart(root, torch.float16),
        taken_apart(layer),
        taken_apart(tiny.write_checkpoint(tmp_path / "norm", norm)),
        selecting(taken_apart(root), 8),
        selecting(taken_apart(root), 9),
        proportional(taken_apart(root)),
        optimize_decoder(taken_apart(root), torch.float32),
        optimize_decoder(proportional(taken_apart(root)), torch.float32),
    ]

    def kinds(part: str) -> list[int]:
        prints = [fingerprint(getattr(components, part), components.model) for components in every]
        return [prints.index(one) for one in prints]

    assert kinds("embed") == [0, 0, 2, 0, 0, 0, 0, 0, 0, 0]
    assert kinds("vision") == [0, 0, 2, 3, 0, 5, 6, 0, 0, 0]
    assert kinds("decoder") == [0, 0, 2, 0, 4, 0, 0, 7, 8, 9]


def test_functions_are_told_apart_by_their_constants_and_names(tiny_checkpoint):
    components = taken_apart(tiny_checkpoint("clip-llama"))
    functions = [
        lambda x: x + 1,
        lambda x: x + 2,
        lambda x: (y + 1 for y in x),
        lambda x: (y + 2 for y in x),
        lambda x: torch.sin(x),
        lambda x: torch.cos(x),
    ]
    prints = set()
    for function in functions:
        components.embed.module.function = function
        prints.add(fingerprint(components.embed, components.model))
    assert len(prints) == len(functions)
