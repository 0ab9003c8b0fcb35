"""What a precision costs the demo model, whose images mean something: right answers, picks, greedy tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import exported
from benchmarks.precision import KINDS, PRESET, file_name
from resprune import Pipeline
from resprune.evaluation.data import Question, load_data
from resprune.evaluation.statistics import wilson

ANSWERED = ("fp32", "int8", "q8", "q4", PRESET.format("cpu"))
K = 48
QUESTIONS = {"easy-VQA": ("easyvqa", 202), "scenes": ("scenes", 400)}
BATCH = 50


def run(work: Path) -> dict[str, Any]:
    """The demo model's answers in each precision."""
    asked = {name: load_data(data).spread(limit) for name, (data, limit) in QUESTIONS.items()}
    figures: dict[str, Any] = {}
    for name in ANSWERED:
        path = work / f"demo-{file_name(name)}"
        exported("demo", path, "-k", str(K), "--positions", "original", *KINDS[name])
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
        answers = vlm.ask_batch([question.load() for question in batch], texts, tokens=K, max_new_tokens=8)
        right += sum(question.right(answer.text) for question, answer in zip(batch, answers, strict=True))
    return {"exact match": right / len(questions), "interval": wilson(right, len(questions))}


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        f"The demo model with {K} of 144 tokens, original positions.\n",
        "| precision | easy-VQA | scenes | picks as PyTorch's | greedy tokens as PyTorch's |",
        "|---|---|---|---|---|",
    ]
    for name, row in result.items():
        cells = []
        for kind in ("easy-VQA", "scenes"):
            low, high = row[kind]["interval"]
            cells.append(f"{100 * row[kind]['exact match']:.1f} % ({100 * low:.0f}–{100 * high:.0f})")
        lines.append(f"| {name} | {' | '.join(cells)} | {row['picks']} | {row['greedy tokens']} |")
    return "\n".join(lines)
