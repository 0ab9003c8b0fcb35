"""What a precision, and a decoder for ONNX Runtime alone, cost and bring: size, prefill, tokens a second, accuracy."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration

from benchmarks.checkpoints import llava_config, write_checkpoint
from benchmarks.measure import THREADS, Timing, exported, take_turns
from resprune import Pipeline
from resprune.evaluation.data import Question, load_data
from resprune.evaluation.statistics import wilson
from resprune.runtime.backends.backend import Embedding
from resprune.runtime.backends.onnxruntime import OrtDecoder, OrtSequence, onnxruntime_decoder
from resprune.runtime.backends.session import OrtGraphs, SessionOptions
from resprune.runtime.bundle.files import read_bundle
from resprune.runtime.prompt.splice import Spliced

KINDS = {
    "fp32": ("--dtype", "fp32"),
    "fp32, ort": ("--dtype", "fp32", "--optimize", "ort"),
    "fp16": ("--dtype", "fp16"),
    "int8": ("--dtype", "int8"),
    "q4": ("--dtype", "q4"),
    "q4, ort": ("--dtype", "q4", "--optimize", "ort"),
}
LENGTHS = (64, 1024)
STEPS = 8
REPEATS = 7
DEMO_K = 48
DEMO_QUESTIONS = {"easy-VQA": ("easyvqa", 202), "scenes": ("scenes", 400)}
BATCH = 50
TOWER = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "projection_dim": 16,
}
LLAMA = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
}


@dataclass
class _Decoder:
    """A decoder whose cache holds a prompt of some length, to be stepped on."""

    decoder: OrtDecoder
    embeds: np.ndarray[Any, Any]
    sequence: OrtSequence | None = None

    def prefill(self) -> None:
        length = self.embeds.shape[1]
        ones = np.ones((1, length), np.int64)
        self.sequence = None  # the cache before goes before the new one is made
        self.sequence = self.decoder.start(Spliced(self.embeds, np.arange(length)[None], ones))

    def steps(self) -> None:
        assert self.sequence is not None
        for token in range(STEPS):
            self.sequence.step(np.array([token]))


def run(work: Path) -> dict[str, Any]:
    """A random Llama of some 250 M parameters in every precision, in turn; and the demo model's answers in each."""
    checkpoint = work / "llama-mid"
    if not checkpoint.exists():
        config = llava_config(TOWER, LLAMA)
        write_checkpoint(
            checkpoint, LlavaForConditionalGeneration, config, dtype=torch.float16, image_side=28
        )
    figures: dict[str, Any] = {"decoder": {}, "prefill": {}, "steps": {}, "demo": {}}
    bundles = {
        name: exported(checkpoint, work / f"llama-mid-{name.replace(', ', '-')}", "-k", "4", *options)
        for name, options in KINDS.items()
    }
    settings = SessionOptions(threads=THREADS)
    decoders: dict[str, _Decoder] = {}
    for name, path in bundles.items():
        bundle = read_bundle(path, check_hashes=False)
        graph = bundle.graph_path("decoder_model_merged")
        figures["decoder"][name] = sum(part.stat().st_size for part in graph.parent.glob(f"{graph.name}*"))
        model = onnxruntime_decoder(bundle, Embedding(OrtGraphs(bundle, settings)), settings)
        decoders[name] = _Decoder(model, np.empty(0))
    for length in LENGTHS:
        embeds = np.random.default_rng(0).standard_normal((1, length, LLAMA["hidden_size"]))
        for decoder in decoders.values():
            decoder.embeds = embeds.astype(np.float32)
        figures["prefill"][str(length)] = take_turns(
            {name: decoder.prefill for name, decoder in decoders.items()}, REPEATS
        )
        # Every cache now holds the prompt, and grows by the same steps in each turn.
        figures["steps"][str(length)] = take_turns(
            {name: decoder.steps for name, decoder in decoders.items()}, REPEATS
        )
    decoders.clear()
    gc.collect()
    figures["demo"] = _demo(work)
    return figures


def _demo(work: Path) -> dict[str, Any]:
    asked = {name: load_data(data).spread(limit) for name, (data, limit) in DEMO_QUESTIONS.items()}
    figures: dict[str, Any] = {}
    for name, options in KINDS.items():
        path = work / f"demo-{name.replace(', ', '-')}"
        exported("demo", path, "-k", str(DEMO_K), "--positions", "original", *options)
        with Pipeline.load(path) as vlm:
            figures[name] = {kind: _exact_match(vlm, questions) for kind, questions in asked.items()}
            parity = vlm.manifest.parity
        figures[name] |= {"picks": parity["picks"], "greedy tokens": parity["greedy_tokens"]}
    return figures


def _exact_match(vlm: Pipeline, questions: Sequence[Question]) -> dict[str, Any]:
    right = 0
    for start in range(0, len(questions), BATCH):
        batch = questions[start : start + BATCH]
        texts = [question.text for question in batch]
        answers = vlm.ask_batch(
            [question.load() for question in batch], texts, tokens=DEMO_K, max_new_tokens=8
        )
        right += sum(question.right(answer.text) for question, answer in zip(batch, answers, strict=True))
    return {"exact match": right / len(questions), "interval": wilson(right, len(questions))}


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        f"A random Llama of {LLAMA['num_hidden_layers']} layers of {LLAMA['hidden_size']}; tokens a second after a "
        f"prompt of {' and of '.join(map(str, LENGTHS))} tokens.\n",
        "| decoder | MB | " + " | ".join(f"prefill {n} | tokens/s at {n}" for n in LENGTHS) + " |",
        "|---" * (2 + 2 * len(LENGTHS)) + "|",
    ]
    for name, size in result["decoder"].items():
        cells = []
        for length in map(str, LENGTHS):
            steps: Timing = result["steps"][length][name]
            cells += [f"{result['prefill'][length][name]} ms", f"{1e3 * STEPS / steps.median:.1f}"]
        lines.append(f"| {name} | {size / 1e6:.0f} | {' | '.join(cells)} |")
    lines += [
        f"\nThe demo model with {DEMO_K} of 144 tokens, original positions.\n",
        "| precision | easy-VQA | scenes | picks as PyTorch's | greedy tokens as PyTorch's |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["demo"].items():
        cells = []
        for kind in ("easy-VQA", "scenes"):
            low, high = row[kind]["interval"]
            cells.append(f"{100 * row[kind]['exact match']:.1f} % ({100 * low:.0f}–{100 * high:.0f})")
        lines.append(f"| {name} | {' | '.join(cells)} | {row['picks']} | {row['greedy tokens']} |")
    return "\n".join(lines)
