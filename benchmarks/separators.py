"""SmolVLM's markers of tiles that keep nothing: what they cost, and what leaving them out changes."""

from __future__ import annotations

import shutil
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from benchmarks.families import SIGLIP, SMOLVLM_PROCESSOR, demo_image_token, one_layer, write
from resprune.exporter.verify.reference import residual_select, text_gain

BUDGETS = (16, 32, 64, 128, 256)
IMAGES = 6
SIZE = (1024, 768)
"""Width and height: 12 tiles and the whole view, 1,053 tokens."""
HIDDEN = 512
MARKERS = 3
"""Tokens before each tile: two marks, and at the end of a row a new line, counted as one for each."""


def write_checkpoint(folder: Path) -> None:
    """The tiles and tokens of SmolVLM2-2.2B, with a narrow tower of two layers and a language model of two."""
    narrow = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = SmolVLMConfig(
        vision_config={**SIGLIP, **narrow},
        text_config=one_layer("llama", HIDDEN) | {"num_hidden_layers": 2, "intermediate_size": 1024},
        image_token_id=demo_image_token(),
        scale_factor=3,
        tie_word_embeddings=False,
    )
    write(folder, SmolVLMForConditionalGeneration, config, SMOLVLM_PROCESSOR)


@torch.no_grad()
def run(work: Path) -> dict[str, Any]:
    """Of each image and K: tiles that keep nothing, tokens of the prompt both ways, and the divergence both ways."""
    folder = work / "separators"
    shutil.rmtree(folder, ignore_errors=True)
    write_checkpoint(folder)
    loaded: Any = SmolVLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model, processor = loaded.eval(), SmolVLMImageProcessorPil.from_pretrained(folder)
    figures: dict[str, dict[str, list[float]]] = {}
    for kind in ("busy", "half blank"):
        for number in range(IMAGES):
            inputs = processor(images=[[picture(kind, number)]], return_tensors="pt")
            pixels = inputs["pixel_values"]  # [1, tiles, 3, H, W]
            (rows,) = model.get_image_features(pixels, inputs["pixel_attention_mask"]).pooler_output
            tiles = rows.reshape(pixels.shape[1], -1, rows.shape[-1])
            for k, found in _both_ways(model, tiles, number).items():
                for what, value in found.items():
                    figures.setdefault(f"{kind}, K {k}", {}).setdefault(what, []).append(value)
    shutil.rmtree(folder)
    return {name: {what: mean(values) for what, values in found.items()} for name, found in figures.items()}


def _both_ways(model: Any, tiles: torch.Tensor, seed: int) -> dict[int, dict[str, float]]:
    """`tiles` [tiles, P, D]. The markers are drawn from the vocabulary: with random weights any tokens will do."""
    count, size, _ = tiles.shape
    generator = torch.Generator().manual_seed(seed)
    table = model.get_input_embeddings().weight
    text = table[torch.randint(len(table), (12,), generator=generator)]
    marks = table[torch.randint(len(table), (count, MARKERS), generator=generator)]
    flat = tiles.flatten(0, 1)[None]
    order = residual_select(flat, text_gain(flat, text[None, :4]), max(BUDGETS))[0]
    whole = _next(model, [part for tile in range(count) for part in (marks[tile], tiles[tile])] + [text])
    found = {}
    for k in BUDGETS:
        kept = [
            tiles[tile][order[:k][order[:k] // size == tile].sort().values % size] for tile in range(count)
        ]
        empty = sum(len(rows) == 0 for rows in kept)
        stay = [part for tile in range(count) for part in (marks[tile], kept[tile])] + [text]
        gone = [part for tile in range(count) if len(kept[tile]) for part in (marks[tile], kept[tile])] + [
            text
        ]
        found[k] = {
            "empty": float(empty),
            "tokens, markers stay": float(sum(map(len, stay))),
            "tokens, markers gone": float(sum(map(len, gone))),
            "divergence, markers stay": _divergence(whole, _next(model, stay)),
            "divergence, markers gone": _divergence(whole, _next(model, gone)),
        }
    return found


def _next(model: Any, parts: list[torch.Tensor]) -> torch.Tensor:
    """Log-probabilities of the next token after these rows."""
    logits: torch.Tensor = model(inputs_embeds=torch.cat(parts)[None]).logits[0, -1]
    return logits.log_softmax(0)


def _divergence(true: torch.Tensor, other: torch.Tensor) -> float:
    """Kullback-Leibler, in nats."""
    return float((true.exp() * (true - other)).sum())


def picture(kind: str, seed: int) -> Image.Image:
    """Blocks of colour, over the whole image or over its left half beside white."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
    if kind == "half blank":
        blocks[:, 16:] = 255
    return Image.fromarray(blocks).resize(SIZE, Image.Resampling.NEAREST)


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    rows = [
        "| image | of 13 views empty | prompt, markers stay | markers gone | divergence, stay | gone |",
        "|---|---|---|---|---|---|",
    ]
    rows += [
        f"| {name} | {found['empty']:.1f} | {found['tokens, markers stay']:.0f} | {found['tokens, markers gone']:.0f} "
        f"| {found['divergence, markers stay']:.3f} | {found['divergence, markers gone']:.3f} |"
        for name, found in result.items()
    ]
    return (
        f"SmolVLM2-2.2B's tiles (1,053 tokens), narrow random weights, means of {IMAGES} images of {SIZE[0]:,} × "
        f"{SIZE[1]}; divergence of the next token from the unpruned prompt's, in nats.\n\n" + "\n".join(rows)
    )
