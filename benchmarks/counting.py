"""Why counting suffers from pruning: what the selection keeps, what the objects' own tokens give, and proportions.

Three things are told apart. Whether the objects are among the kept tokens (`covered`). Whether an oracle that knows
where the objects are does better. And whether it is the proportions among the tokens that the language model misses:
softmax attention averages, so how many tokens look alike says how much of a thing there is. They are given back in
two ways: the kept rows stand again in all N places, each dropped token's by the most similar kept row; or K tokens
stay and are weighed by how many each stands for (`resprune export --attention proportional`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from benchmarks.accuracy import export_demo
from demo.scenes import draw_with_patches, sample_scene
from resprune.evaluation.data import Question, load_data
from resprune.evaluation.model import Asked, Model, open_bundle
from resprune.evaluation.selectors import (
    Candidates,
    Ints,
    random,
    resprune,
    stands_for,
    stride,
    without_text,
)
from resprune.evaluation.statistics import wilson
from resprune.runtime.walk import Encoded, Features

LIMIT = 600
K = 16
BATCH = 32


@dataclass(frozen=True)
class Case:
    """A question about a scene; `owner` [N] says what covers each patch, as `demo.scenes.draw_with_patches` does."""

    question: Question
    owner: npt.NDArray[np.uint8]
    encoded: Encoded
    asked: Asked

    @property
    def candidates(self) -> Candidates:
        """What a selector sees."""
        return Candidates(
            self.encoded.tokens.rows.astype(np.float64),
            self.asked.text.astype(np.float64),
            seed=(0, self.question.number),
        )

    @property
    def on_object(self) -> npt.NDArray[np.bool_]:
        """Patches [N] that an object covers by a fifth or more."""
        return (self.owner > 0) & (self.owner < 255)


def _half(case: Case) -> Ints:
    """An oracle: K/2 tokens on objects and K/2 off them, at random."""
    generator = np.random.default_rng(case.question.number)
    sides = (np.flatnonzero(case.on_object), np.flatnonzero(case.owner == 0))
    return np.concatenate([generator.permutation(side)[: K // 2] for side in sides])


WAYS: dict[str, Callable[[Case], Ints]] = {
    "all tokens": lambda case: np.arange(len(case.owner)),
    "oracle: all tokens that an object touches": lambda case: np.flatnonzero(case.owner > 0),
    f"oracle: {K // 2} on objects, {K // 2} off": _half,
    f"resprune {K}": lambda case: resprune(case.candidates, K),
    f"no text {K}": lambda case: without_text(case.candidates, K),
    f"random {K}": lambda case: random(case.candidates, K),
    f"stride {K}": lambda case: stride(case.candidates, K),
}
GIVEN_BACK = (f"resprune {K}", f"no text {K}", f"random {K}", f"stride {K}")


def run(work: Path) -> dict[str, Any]:
    """Ask LIMIT questions about scenes in every way."""
    bundle = export_demo(work, "proportional")
    model = open_bundle(bundle, positions="original", attention="plain")
    weighing = open_bundle(bundle, positions="original")
    cases = [_case(model, question) for question in tqdm(load_data("scenes").spread(LIMIT), desc="pictures")]
    rows: dict[str, Any] = {}
    for name, way in tqdm(WAYS.items(), desc="ways"):
        kept = [np.sort(way(case)) for case in cases]
        rows[name] = _score(cases, kept, _answers(model, cases, kept))
        if name in GIVEN_BACK:
            rows[f"{name}, rows in all places"] = _score(cases, kept, _answers(model, cases, kept, True))
            rows[f"{name}, weighted"] = _score(cases, kept, _answers(weighing, cases, kept))
    model.close()
    weighing.close()
    return rows


def _case(model: Model, question: Question) -> Case:
    pixels, owner = draw_with_patches(sample_scene(int(question.image), "test"))
    return Case(question, owner, model.look([pixels])[0], model.read(question.text))


def _answers(model: Model, cases: list[Case], kept: list[Ints], in_all_places: bool = False) -> list[str]:
    texts: list[str] = []
    for start in range(0, len(cases), BATCH):
        part = slice(start, start + BATCH)
        encoded = [case.encoded for case in cases[part]]
        orders = kept[part]
        if in_all_places:
            encoded = [
                Encoded(one.image, Features(one.tokens.rows[order[stands_for(one.tokens.rows, order)]]))
                for one, order in zip(encoded, orders, strict=True)
            ]
            orders = [np.arange(one.image.num_tokens) for one in encoded]
        asked = [case.asked for case in cases[part]]
        texts += model.answer(asked, [[one] for one in encoded], [[order] for order in orders], 16)
    return texts


def _score(cases: list[Case], kept: list[Ints], texts: list[str]) -> dict[str, Any]:
    right = np.array([case.question.right(text) for case, text in zip(cases, texts, strict=True)])
    types = np.array([case.question.type for case in cases])
    covered = [
        np.isin(np.arange(1, case.owner[case.on_object].max() + 1), case.owner[order]).mean()
        for case, order in zip(cases, kept, strict=True)
    ]
    shift = [
        int(text) - int(case.question.answers[0])
        for case, text in zip(cases, texts, strict=True)
        if case.question.type == "count" and text.isdigit()
    ]
    return {
        "kept": np.mean([len(order) for order in kept]),
        "on objects": np.mean(
            [case.on_object[order].mean() for case, order in zip(cases, kept, strict=True)]
        ),
        "covered": np.mean(covered),
        "exact match": right.mean(),
        "interval": wilson(right.sum(), len(right)),
        "types": {str(kind): right[types == kind].mean() for kind in np.unique(types)},
        "counted too many": np.mean(shift),
    }


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    kinds = list(next(iter(result.values()))["types"])
    header = [
        "",
        "tokens",
        "of them on objects",
        "objects covered",
        "exact match (95 %)",
        "count off by",
        *kinds,
    ]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name, row in result.items():
        low, high = row["interval"]
        cells = [
            name,
            f"{row['kept']:.0f}",
            f"{100 * row['on objects']:.0f} %",
            f"{100 * row['covered']:.1f} %",
        ]
        cells += [f"{100 * row['exact match']:.1f} ({100 * low:.1f}–{100 * high:.1f})"]
        cells += [f"{row['counted too many']:+.2f}", *(f"{100 * row['types'][kind]:.1f}" for kind in kinds)]
        lines.append(f"| {' | '.join(cells)} |")
    return f"{LIMIT} questions about held-out scenes, `original` positions.\n\n" + "\n".join(lines)
