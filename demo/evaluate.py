"""Score the demo model: ``python -m demo.evaluate``.

Greedy answers of the unpruned model to every easy-VQA test question and to held-out scenes, exact
match by question type, beside the answer that is most frequent in training. Prints a table and
writes ``demo/RESULTS.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from demo.batches import IGNORED, normalise, prompt_start, targets_of, tokenise
from demo.data import PictureSet, easy_vqa, make_scenes
from demo.forward import question_states, visual_tokens
from demo.losses import prefix_embeddings
from demo.vocabulary import load_processor
from resprune.evaluation.statistics import wilson

MODEL = Path(__file__).parent / "model"
RESULTS = Path(__file__).parent / "RESULTS.json"
NAMES = ("scenes", "easy-vqa")
FIRST_SCENE = 100_000  # seeds of the evaluation; the training's own checks use seeds from 0


@dataclass(frozen=True)
class Score:
    """Exact match on one question type, with Wilson's 95 % interval and the majority baseline."""

    questions: int
    exact_match: float
    low: float
    high: float
    majority: float
    majority_answer: str


def held_out_pictures(scenes: int, questions: int, easy_pictures: int, *, first: int = 0) -> list[PictureSet]:
    """Return held-out scenes, and the first pictures of easy-VQA's test split."""
    easy = easy_vqa("test")
    rows = slice(0, easy_pictures)
    part = PictureSet(
        easy.images[rows],
        easy.owner[rows],
        easy.attributes[rows],
        easy.question_ids[rows],
        easy.table,
    )
    drawn = make_scenes(scenes, "test", questions=questions, first=first, workers=1)
    return [drawn, part]


@torch.no_grad()
def right_answers(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    pictures: PictureSet,
    pictures_at_once: int = 20,
) -> npt.NDArray[np.bool_]:
    """Say of each question [P, Q] whether the greedy answer is the right one to the token.

    An answer is right if each of its tokens, the end included, is the most likely one after those
    before it. That is greedy decoding, in one pass; :func:`greedy_agreement` checks it.
    """
    start = prompt_start(processor)
    tokens = tokenise(processor, pictures.table)
    right = np.zeros(pictures.question_ids.shape, bool)
    for first in range(0, len(pictures), pictures_at_once):
        part = slice(first, first + pictures_at_once)
        asked = pictures.question_ids[part]
        width = int(tokens.lengths[asked].max())
        ids = tokens.ids[asked]
        targets = targets_of(ids, tokens.lengths[asked], tokens.answers[asked])
        visual = visual_tokens(model, normalise(pictures.images[part], processor))
        prefix = prefix_embeddings(model, start, visual)
        states = question_states(model, prefix, torch.from_numpy(ids[..., :width]))
        wanted = torch.from_numpy(targets[..., :width])
        scored = wanted != IGNORED
        hit = torch.ones_like(scored)
        hit[scored] = model.lm_head(states[scored]).argmax(-1) == wanted[scored]
        right[part] = hit.all(-1).numpy()
    return right & (pictures.question_ids >= 0)


def types_of(pictures: PictureSet) -> npt.NDArray[np.str_]:
    """Return the type of every question [P, Q], an empty word where there is none."""
    names = np.asarray([*(row[0] for row in pictures.table), ""])
    return cast(npt.NDArray[np.str_], names[pictures.question_ids])


def exact_match(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, held_out: list[PictureSet]
) -> dict[str, float]:
    """Return exact match by question type and over all scenes' and all easy-VQA's questions."""
    scores: dict[str, float] = {}
    for name, pictures in zip(NAMES, held_out, strict=True):
        right, types = right_answers(model, processor, pictures), types_of(pictures)
        for type_ in sorted({str(t) for t in types[types != ""]}):
            scores[type_] = round(float(right[types == type_].mean()), 4)
        scores[f"{name} all"] = round(float(right[types != ""].mean()), 4)
    return scores


def answer_counts(pictures: PictureSet) -> dict[str, Counter[str]]:
    """Return, by question type, how often each answer occurs."""
    counts: dict[str, Counter[str]] = {}
    rows, times = np.unique(pictures.question_ids, return_counts=True)
    for row, count in zip(rows, times, strict=True):
        if row >= 0:
            type_, _, answer = pictures.table[row]
            counts.setdefault(type_, Counter())[answer] += int(count)
    return counts


def split_by_form(answers: Counter[str]) -> dict[str, Counter[str]]:
    """Divide a type's answers into those to yes-or-no questions and the others."""
    forms: dict[str, Counter[str]] = {"yes or no": Counter(), "what": Counter()}
    for answer, count in answers.items():
        forms["yes or no" if answer in ("yes", "no") else "what"][answer] += count
    return forms


def rows_with(pictures: PictureSet, type_: str, answers: set[str]) -> list[int]:
    """Return the rows of the table of a type that have one of the answers."""
    return [i for i, row in enumerate(pictures.table) if row[0] == type_ and row[2] in answers]


def score_set(right: npt.NDArray[np.bool_], pictures: PictureSet, training: PictureSet) -> dict[str, Score]:
    """Score every question type of a set, and all of them together.

    Relations are also scored apart by their two forms, "Is A left of B?" and "What is left of B?".
    """
    types = types_of(pictures)
    here, before = answer_counts(pictures), answer_counts(training)
    scores = {}
    totals = [0, 0, 0]
    for type_ in sorted(here):
        hits, trials = int(right[types == type_].sum()), int((types == type_).sum())
        guess = before[type_].most_common(1)[0][0]
        lucky = here[type_][guess]
        scores[type_] = Score(trials, hits / trials, *wilson(hits, trials), lucky / trials, guess)
        totals = [a + b for a, b in zip(totals, (hits, trials, lucky), strict=True)]
    if "relation" in here:
        for form, answers in split_by_form(here["relation"]).items():
            guess = split_by_form(before["relation"])[form].most_common(1)[0][0]
            place = np.isin(pictures.question_ids, rows_with(pictures, "relation", set(answers)))
            hits, trials = int(right[place].sum()), int(place.sum())
            low, high = wilson(hits, trials)
            share = answers[guess] / trials
            scores[f"relation, {form}"] = Score(trials, hits / trials, low, high, share, guess)
    hits, trials, lucky = totals
    scores["all"] = Score(trials, hits / trials, *wilson(hits, trials), lucky / trials, "per type")
    return scores


@torch.no_grad()
def greedy_agreement(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    pictures: PictureSet,
    right: npt.NDArray[np.bool_],
    count: int,
) -> float:
    """Return how often ``generate`` agrees with :func:`right_answers` on a right or wrong answer."""
    from PIL import Image

    agreed = 0
    for row in range(count):
        column = row % pictures.question_ids.shape[1]
        entry = pictures.question_ids[row, column]
        if entry < 0:
            column, entry = 0, pictures.question_ids[row, 0]
        _, text, answer = pictures.table[entry]
        content = [{"type": "image"}, {"type": "text", "text": text}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        picture = Image.fromarray(pictures.images[row])
        inputs = processor(images=picture, text=prompt, return_tensors="pt")
        made = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
        said = processor.tokenizer.decode(made, skip_special_tokens=True).strip()
        agreed += (said == answer) == bool(right[row, column])
    return agreed / count


def table(scores: dict[str, dict[str, Score]]) -> str:
    """Return the scores as a Markdown table."""
    lines = [
        "| questions | number | exact match | 95 % interval | majority answer |",
        "|---|---:|---:|---|---|",
    ]
    for name, group in scores.items():
        for type_, s in group.items():
            label = type_ if type_.startswith(name) else f"{name} {type_}"
            lines.append(
                f"| {label} | {s.questions:,} | {100 * s.exact_match:.1f} % "
                f"| {100 * s.low:.1f} to {100 * s.high:.1f} "
                f"| {100 * s.majority:.1f} % ({s.majority_answer}) |"
            )
    return "\n".join(lines)


def main() -> None:
    """Evaluate the model in ``demo/model/``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--scenes", type=int, default=400, help="held-out scenes, 12 questions each")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    began = time.monotonic()
    processor = load_processor(arguments.model)
    model = LlavaForConditionalGeneration.from_pretrained(arguments.model, dtype=torch.float32)
    model.eval()
    tests = held_out_pictures(arguments.scenes, 12, 1000, first=FIRST_SCENE)
    training = [make_scenes(1500, "train", questions=12), easy_vqa("train")]
    scores, agreement = {}, {}
    for name, pictures, before in zip(NAMES, tests, training, strict=True):
        right = right_answers(model, processor, pictures)
        scores[name] = score_set(right, pictures, before)
        agreement[name] = greedy_agreement(model, processor, pictures, right, count=48)
    print(table(scores))
    results = {
        "scores": {n: {t: asdict(s) for t, s in group.items()} for n, group in scores.items()},
        "agreement_with_generate": agreement,
    }
    arguments.results.write_text(json.dumps(results, indent=2) + "\n")
    print(f"agreement with generate: {agreement}; {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
