"""What weights of 8 and 4 bits lose of a trained language model, here and in OpenVINO: English without an image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

from benchmarks import environments
from benchmarks.environments import UnavailableError
from benchmarks.measure import exported
from benchmarks.measure import run as run_command
from benchmarks.precision import K, Opened, file_name, perplexity, text_ids, text_logits
from benchmarks.pretrained import write_pretrained
from benchmarks.speed import command
from resprune.runtime.bundle.files import read_bundle

OURS = {
    "resprune, fp32": ("--dtype", "fp32"),
    "resprune, int8": ("--dtype", "int8"),
    "resprune, q8": ("--dtype", "q8"),
    "resprune, --preset cpu": ("--preset", "cpu"),
}
THEIRS = {
    "OpenVINO, fp32 weights, f32": ("f32", "fp32"),
    "OpenVINO, int8 weights, bf16": ("bf16", "int8"),
    "OpenVINO, int4 weights in groups of 64, bf16": ("bf16", "int4", "--group-size", "64"),
}
"""The arithmetic, and the weights that optimum-intel writes. Its own groups of 128 do not divide a width of 576."""


def run(work: Path) -> dict[str, Any]:
    """Perplexity and agreement of each, against its own engine's fp32."""
    checkpoint = write_pretrained(work / "pretrained")
    found: dict[str, dict[str, float]] = {}
    texts, wanted, reference = None, torch.empty(0), torch.empty(0)
    for name, options in OURS.items():
        path = exported(checkpoint, work / f"losses-{file_name(options[1])}", "-k", str(K), *options)
        opened = Opened(read_bundle(path, check_hashes=False))
        texts = texts or text_ids(opened.bundle)
        read = text_logits(opened.bundle, [opened.text_alone(ids) for ids in texts], texts)
        if not found:
            wanted, reference = read["wanted"], read["logits"]
        found[name] = lost(read["logits"], reference, wanted)
    try:
        python = environments.environment("openvino", work)
        language = _language_model(checkpoint, work / "losses-language")
        for name, (arithmetic, weights, *options) in THEIRS.items():
            folder = work / f"losses-openvino-{weights}"
            model = environments.openvino_text_model(python, language, folder, weights, *options)
            out = work / "losses.npy"
            spec = {"model": str(model), "precision": arithmetic, "out": str(out)}
            spec |= {"texts": [ids.tolist() for ids in texts or []]}
            run_command(command("peer_openvino_text", spec, python=str(python)))
            found[name] = lost(torch.from_numpy(np.load(out)), reference, wanted)
    except UnavailableError as error:
        return {"positions": len(wanted), "found": found, "skipped": f"OpenVINO is not compared: {error}"}
    return {"positions": len(wanted), "found": found}


def lost(logits: Tensor, reference: Tensor, wanted: Tensor) -> dict[str, float]:
    """Perplexity of the tokens that followed, `wanted` [S], and agreement of the most likely one with `reference`."""
    agreement = float((logits.argmax(1) == reference.argmax(1)).double().mean())
    return {"perplexity": perplexity(logits, wanted), "agreement": agreement}


def _language_model(checkpoint: Path, folder: Path) -> Path:
    """The language model by itself, in float32, with the rotary settings where transformers 4 reads them."""
    whole = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    alone: Any = LlamaForCausalLM(whole.config.text_config)
    alone.model.load_state_dict(whole.model.language_model.state_dict())
    alone.tie_weights()
    alone.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    path.write_text(json.dumps(config, indent=2))
    return folder


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        f"The language model of SmolLM2-135M-Instruct, {result['positions']} positions of English without an image.\n",
        "| | perplexity | of fp32's | most likely token as fp32's |",
        "|---|---|---|---|",
    ]
    plain = next(iter(result["found"].values()))["perplexity"]
    lines += [
        f"| {name} | {row['perplexity']:.2f} | {row['perplexity'] / plain:.4f} | {100 * row['agreement']:.1f} % |"
        for name, row in result["found"].items()
    ]
    return "\n".join([*lines, *(["", result["skipped"]] if "skipped" in result else [])])
