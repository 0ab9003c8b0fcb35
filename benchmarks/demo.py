"""The demo model end to end: pruned against unpruned, and against Hugging Face in PyTorch on the same processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from benchmarks.measure import RESPRUNE, THREADS, Timing, run, take_turns
from benchmarks.stages import Stages
from resprune.runtime.bundle.files import read_bundle
from resprune.runtime.families.image import load_image

DEMO = Path(__file__).parent.parent / "demo"
BUDGETS = (16, 48)
STEPS = 64


class HuggingFace:
    """The same questions to transformers in PyTorch, fp32."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(THREADS)
        self.processor = AutoProcessor.from_pretrained(folder, backend="pil")
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()

    def generate(self, picture: Path, question: str, tokens: int) -> None:
        """Image and question to `tokens` tokens."""
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
    decode: dict[str, Any] = {
        "all tokens": lambda: ours.decode(ours.first_token(picture, question, None), STEPS)
    }
    for k in BUDGETS:
        first[f"K {k}"] = lambda k=k: ours.first_token(picture, question, k)
        decode[f"K {k}"] = lambda k=k: ours.decode(ours.first_token(picture, question, k), STEPS)
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
        f"\n\nExport with its checks: {export['seconds']:.0f} s, {export['peak megabytes']:.0f} MiB at most. "
        f"`resprune ask` in a fresh process: {start['seconds']:.2f} s from start to answer, "
        f"{start['peak megabytes']:.0f} MiB at most."
    )
