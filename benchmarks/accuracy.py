"""What the demo model still answers with fewer visual tokens, under both position policies."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import easy_vqa
import numpy as np
import numpy.typing as npt

from benchmarks.demo import RESPRUNE
from demo.evaluate import wilson
from demo.questions import sample_question
from demo.scenes import draw, sample_scene
from resprune.runtime import Pipeline
from resprune.runtime.image import load_image

BUDGETS = (144, 48, 16)
POLICIES = ("contiguous", "original")
FIRST_SEED = 400_000  # held-out scenes that nothing else uses
SCENES, EASY = 200, 200
BATCH = 50
Asked = tuple[npt.NDArray[np.uint8], str, str, str]


def questions() -> Iterator[Asked]:
    """(picture, question, answer, type): two questions of each held-out scene, and easy-VQA's test questions."""
    for seed in range(FIRST_SEED, FIRST_SEED + SCENES):
        scene = sample_scene(seed, "test")
        for number in range(2):
            question = sample_question(scene, np.random.default_rng([seed, number]))
            if question is not None:
                yield draw(scene), question.text, question.answer, question.type
    texts, answers, rows = easy_vqa.get_test_questions()
    paths = easy_vqa.get_test_image_paths()
    for row in range(0, len(texts), len(texts) // EASY):
        yield np.asarray(load_image(paths[rows[row]])), texts[row], answers[row], "easy-VQA"


def run(work: Path) -> dict[str, Any]:
    """Export the demo model once a policy with every token kept, and ask with fewer at run time."""
    asked = list(questions())
    types = [type_ for *_, type_ in asked]
    figures: dict[str, Any] = {"questions": {name: types.count(name) for name in dict.fromkeys(types)}}
    for policy in POLICIES:
        bundle = work / f"demo-{policy}"
        export = [*RESPRUNE, "export", "demo", str(bundle), "-k", str(max(BUDGETS)), "--force"]
        subprocess.run([*export, "--positions", policy], check=True)
        with Pipeline.load(bundle) as vlm:
            for k in BUDGETS:
                right = np.concatenate(
                    [correct(vlm, asked[start : start + BATCH], k) for start in range(0, len(asked), BATCH)]
                )
                figures[f"{policy}, K {k}"] = scores(right, types)
    return figures


def correct(vlm: Pipeline, asked: list[Asked], k: int) -> npt.NDArray[np.bool_]:
    """Whether each question is answered to the letter with `k` tokens, [questions]."""
    pictures, texts, expected, _ = zip(*asked, strict=True)
    answers = vlm.ask_batch(pictures, texts, tokens=k, max_new_tokens=8)
    return np.array([answer.text == wanted for answer, wanted in zip(answers, expected, strict=True)])


def scores(right: npt.NDArray[np.bool_], types: list[str]) -> dict[str, Any]:
    """Exact match and its interval by type of question, and of all scenes."""
    named = np.array(types)
    groups = {name: named == name for name in dict.fromkeys(types)}
    groups["scenes"] = named != "easy-VQA"
    return {
        name: {
            "exact match": float(right[group].mean()),
            "interval": wilson(int(right[group].sum()), group.sum()),
        }
        for name, group in groups.items()
    }


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    columns = ["easy-VQA", "scenes", *sorted(set(result["questions"]) - {"easy-VQA"})]
    rows = [f"| positions, K | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, scores in result.items():
        if name == "questions":
            continue
        cells = []
        for column in columns:
            low, high = scores[column]["interval"]
            interval = f" ({100 * low:.0f}–{100 * high:.0f})" if column in ("easy-VQA", "scenes") else ""
            cells.append(f"{100 * scores[column]['exact match']:.1f} %{interval}")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return f"Questions: {json.dumps(result['questions'])}. Wilson's 95 % intervals.\n\n" + "\n".join(rows)
