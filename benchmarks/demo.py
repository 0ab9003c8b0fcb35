"""The demo model end to end: pruned against unpruned, and against Hugging Face in PyTorch on the same processor."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from benchmarks.measure import THREADS, Timing, run, take_turns
from resprune.runtime.bundle import Bundle, read_bundle
from resprune.runtime.families import family_of
from resprune.runtime.image import load_image
from resprune.runtime.language_model import Embedding, OrtLanguageModel
from resprune.runtime.prompt import Prompter
from resprune.runtime.session import OrtGraphs, SessionOptions
from resprune.runtime.splice import KeptTokens, Picks, splice
from resprune.runtime.vision import Looked, Vision

DEMO = Path(__file__).parent.parent / "demo"
BUDGETS = (16, 48)
STEPS = 64
RESPRUNE = [str(Path(sys.executable).with_name("resprune"))]


class Stages:
    """The runtime's own stages, apart, so that the unpruned prompt goes the same way without a selection."""

    def __init__(self, bundle: Bundle) -> None:
        options = SessionOptions(threads=THREADS)
        self.manifest = bundle.manifest
        self.prompter = Prompter(bundle)
        self.preprocessor = family_of(bundle).preprocessor(bundle)
        graphs = OrtGraphs(bundle, options)
        self.vision = Vision(bundle, self.preprocessor, graphs)
        self.embedding = Embedding(graphs)
        self.model = OrtLanguageModel(bundle, self.embedding, options)

    def first_token(self, picture: Path, question: str, tokens: int | None) -> int:
        """Picture and question to the first token; `tokens` None keeps all N without selecting."""
        prompt = self.prompter.prompt(question, 1)
        ids = np.array(prompt.ids, dtype=np.int64)
        ids[ids == self.manifest.image_token_id] = 0
        embeds = self.embedding(ids[None])[0]
        pictures = [self.preprocessor(load_image(picture))]
        if tokens is None:
            kept = _all(self.vision.look(pictures))
        else:
            (kept,) = self.vision.select(Looked(pictures, None), [embeds[prompt.text_positions]], tokens)
        spliced = splice(
            [embeds],
            [prompt.ids],
            [[kept]],
            image_token_id=self.manifest.image_token_id,
            positions=self.manifest.positions,
        )
        logits = self.model.prefill(spliced.inputs_embeds, spliced.position_ids, spliced.attention_mask)
        return int(logits[0].argmax())

    def decode(self, picture: Path, question: str, tokens: int | None) -> None:
        """STEPS tokens after the first, whatever they are."""
        token = self.first_token(picture, question, tokens)
        for _ in range(STEPS):
            token = int(self.model.step(np.array([token], dtype=np.int64))[0].argmax())


def _all(looked: Looked) -> KeptTokens:
    assert looked.image_features is not None  # the benchmark exports with --split
    rows = looked.image_features[0]
    every = np.arange(len(rows), dtype=np.int64)
    return KeptTokens(rows, Picks(every, every), every, len(rows))


class HuggingFace:
    """The same questions to transformers in PyTorch, fp32."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(THREADS)
        self.processor = AutoProcessor.from_pretrained(folder, backend="pil")
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()

    def generate(self, picture: Path, question: str, tokens: int) -> None:
        """Picture and question to `tokens` tokens."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = self.processor(images=load_image(picture), text=text, return_tensors="pt")
        with torch.inference_mode():
            self.model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)


def run_demo(work: Path) -> dict[str, Any]:
    """Export, ask in fresh processes, then time the stages in turn."""
    bundle = work / f"demo-k{max(BUDGETS)}"
    export = [*RESPRUNE, "export", "demo", str(bundle), "-k", str(max(BUDGETS)), "--split", "--force"]
    _, export_seconds, export_megabytes = run(export)
    asked = json.loads((DEMO / "pictures" / "questions.json").read_text())[0]
    picture, question = DEMO / "pictures" / asked["image"], asked["question"]
    ask = [*RESPRUNE, "ask", str(bundle), str(picture), question]
    starts = [run(ask) for _ in range(5)]

    ours, theirs = Stages(read_bundle(bundle)), HuggingFace(DEMO / "model")
    first: dict[str, Any] = {"all tokens": lambda: ours.first_token(picture, question, None)}
    decode: dict[str, Any] = {"all tokens": lambda: ours.decode(picture, question, None)}
    for k in BUDGETS:
        first[f"K {k}"] = lambda k=k: ours.first_token(picture, question, k)
        decode[f"K {k}"] = lambda k=k: ours.decode(picture, question, k)
    first["PyTorch, all tokens"] = lambda: theirs.generate(picture, question, 1)
    decode["PyTorch, all tokens"] = lambda: theirs.generate(picture, question, 1 + STEPS)
    first_token = take_turns(first, repeats=21)
    whole = take_turns(decode, repeats=9)
    rate = {name: 1e3 * STEPS / (whole[name].median - first_token[name].median) for name in whole}
    return {
        "question": question,
        "first token, milliseconds": first_token,
        "tokens per second": rate,
        "export": {"seconds": export_seconds, "peak megabytes": export_megabytes},
        "start to answer in a fresh process": {
            "seconds": float(np.median([seconds for _, seconds, _ in starts])),
            "peak megabytes": max(megabytes for _, _, megabytes in starts),
        },
    }


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    first: dict[str, Timing] = result["first token, milliseconds"]
    base = first["all tokens"].median
    rows = [
        "| | first token | against all tokens | tokens/s after it |",
        "|---|---|---|---|",
        *(
            f"| {name} | {timing} ms | {timing.median / base:.2f} | {result['tokens per second'][name]:.0f} |"
            for name, timing in first.items()
        ),
    ]
    export, start = result["export"], result["start to answer in a fresh process"]
    return "\n".join(rows) + (
        f"\n\nExport with its checks: {export['seconds']:.0f} s, {export['peak megabytes']:.0f} MB at most. "
        f"`resprune ask` in a fresh process: {start['seconds']:.2f} s from start to answer, "
        f"{start['peak megabytes']:.0f} MB at most."
    )
