"""The language model of a checkpoint in GGUF, without its bundle's being exported once more."""

from __future__ import annotations

from pathlib import Path

import torch

from resprune.exporter.checkpoint.checkpoint import resolve
from resprune.exporter.checkpoint.gguf_file import gguf_model
from resprune.exporter.checkpoint.weightless import fake_mode
from resprune.exporter.families import split_model
from resprune.exporter.trace.weights import find_weights


def write_gguf(model: str, bundle: Path, out: Path, precision: str) -> Path:
    """Write the language model of `model`, with the tokenizer of its bundle; returns `out`."""
    checkpoint = resolve(model, revision=None)
    components = split_model(checkpoint, torch.float32, fake_mode())
    stored = find_weights(checkpoint, components.model)
    gguf_model(components.model, stored, precision, components.planes).write(out, bundle)
    return out
