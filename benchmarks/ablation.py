"""The method's open choices on the demo model: scale, α, positions, the text, and whether V is normalised."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.accuracy import export_demo
from resprune.evaluation.answers import Answers, Run
from resprune.evaluation.data import DataSet, Question, load_data
from resprune.evaluation.evaluate import Plan
from resprune.evaluation.model import Asked, Model, open_bundle
from resprune.evaluation.selectors import Candidates, Ints, resprune, unit
from resprune.evaluation.statistics import paired, wilson
from resprune.method import SCALES, Selection
from resprune.runtime.bundle.manifest import POSITIONS
from resprune.runtime.walk import Encoded

PUBLISHED = Path(__file__).parent / "ABLATION.md"
MARK = "<!-- What follows is written by `python -m benchmarks ablation`. -->"
BUDGETS = (36, 16, 8)  # N / 4, N / 9, N / 18
ALPHAS = (0.0, 0.5, 1.0, 2.0, 4.0)
LIMITS = {"scenes": 200, "crowd": 200, "easyvqa": 200}
BATCH = 32


@dataclass(frozen=True)
class Variant:
    """One setting of the method; without guidance (α 0) text and scale play no part."""

    alpha: float = Selection.alpha
    scale: str = Selection.scale
    text: str = "nouns"
    visual: str = "raw"

    def __str__(self) -> str:
        """As a row of the table begins."""
        guidance = f"{self.text} | {self.scale} | {self.alpha:g}" if self.alpha else "– | – | 0"
        return f"{self.visual} | {guidance}"

    def picks(self, encoded: Encoded, nouns: Asked, words: Asked) -> Ints:
        """The picks for the largest budget; those for a smaller one are their beginning."""
        visual = encoded.tokens.rows.astype(np.float64)
        text = (nouns if self.text == "nouns" else words).text.astype(np.float64)
        rows = unit(visual) if self.visual == "normalised" else visual
        return resprune(Candidates(rows, text, self.alpha, self.scale), max(BUDGETS))


DEFAULT = Variant()
UNGUIDED = replace(DEFAULT, alpha=0.0)
UNGUIDED_TITLE = "against no guidance"
NOUNS_TITLE = "against nouns"


def variants() -> Iterator[Variant]:
    """Every combination that differs from the others."""
    for visual in ("raw", "normalised"):
        yield Variant(0.0, visual=visual)
        for text, scale, alpha in itertools.product(("nouns", "all words"), SCALES, ALPHAS[1:]):
            yield Variant(alpha, scale, text, visual)


def run(work: Path) -> dict[str, Any]:
    """Ask every variant at every budget under both policies, and publish the table; an interrupted run goes on."""
    bundle = export_demo(work)
    data = {name: load_data(name) for name in LIMITS}
    rows: dict[str, Any] = {}
    for positions in POSITIONS:
        model = open_bundle(bundle, positions=positions)
        plan = Plan(list(data.values()), (), (), batch=BATCH)
        answers = Answers(work / f"ablation-{positions}", plan.settings(model))
        for name, of in data.items():
            _ask(model, of, of.spread(LIMITS[name]), answers)
        rows[positions] = _rows(data, answers)
        answers.close()
        model.close()
    result = {"questions": LIMITS, "rows": rows}
    if PUBLISHED.exists():
        prose = PUBLISHED.read_text().partition(MARK)[0]
        PUBLISHED.write_text(f"{prose}{MARK}\n\n{table(result)}\n")
    return result


def _ask(model: Model, data: DataSet, questions: Sequence[Question], answers: Answers) -> None:
    whole = Run(data.name, "", "all", 0)
    tried = list(variants())
    runs = {(variant, k): Run(data.name, str(variant), str(k), 0) for variant in tried for k in BUDGETS}
    for start in tqdm(range(0, len(questions), BATCH), desc=f"{data.name}, {model.manifest.positions}"):
        batch = questions[start : start + BATCH]
        numbers = [question.number for question in batch]
        if not any(answers.missing(of, numbers) for of in (whole, *runs.values())):
            continue
        looked = {question.image: model.look([question.load()])[0] for question in batch}
        pictures = [looked[question.image] for question in batch]
        asked = [model.read(question.text) for question in batch]
        words = [model.read(question.text, about=[question.text]) for question in batch]
        kept = {whole: [np.arange(one.image.num_tokens) for one in pictures]}
        for variant in tried:
            orders = [variant.picks(*candidates) for candidates in zip(pictures, asked, words, strict=True)]
            kept |= {runs[variant, k]: [order[:k] for order in orders] for k in BUDGETS}
        for of, orders in kept.items():
            texts = model.answer(asked, [[one] for one in pictures], [[order] for order in orders], 16)
            answers.add(of, dict(zip(numbers, texts, strict=True)))


def _rows(data: dict[str, DataSet], answers: Answers) -> list[dict[str, Any]]:
    """For each variant and budget the share of right answers and its interval, and what it is compared with."""
    rows: list[dict[str, Any]] = []
    for variant, k in [(None, "all"), *((v, str(k)) for v in variants() for k in BUDGETS)]:
        row: dict[str, Any] = {"variant": str(variant) if variant else "all tokens", "k": k}
        for name, of in data.items():
            texts, right = _right(of, answers, str(variant) if variant else "", k)
            row[name] = {"exact match": right.mean(), "interval": wilson(right.sum(), len(right))}
            types = np.array([question.type for question in of.spread(LIMITS[name])])
            row[name]["types"] = {kind: right[types == kind].mean() for kind in np.unique(types)}
            for title, other in _rivals(variant):
                before, was_right = _right(of, answers, str(other), k)
                found = paired(texts == before, was_right, right)
                row[name][title] = {"lost": found.lost, "gained": found.gained, "p": found.p}
        rows.append(row)
    return rows


def _rivals(variant: Variant | None) -> Iterator[tuple[str, Variant]]:
    """What a variant is compared with: no guidance, and all words with the nouns."""
    if variant is not None and variant != UNGUIDED:
        yield UNGUIDED_TITLE, UNGUIDED
    if variant is not None and variant.text == "all words":
        yield NOUNS_TITLE, replace(variant, text="nouns")


def _right(of: DataSet, answers: Answers, variant: str, k: str) -> tuple[Any, Any]:
    questions = of.spread(LIMITS[of.name])
    texts = answers.of(Run(of.name, variant, k, 0), [question.number for question in questions])
    right = [question.right(text) for question, text in zip(questions, texts, strict=True)]
    return np.array(texts), np.array(right)


def table(result: dict[str, Any]) -> str:
    """One table a policy: exact match in percent at each budget, and what guidance changed on the scenes."""
    counts = ", ".join(f"{count} of {name}" for name, count in result["questions"].items())
    sections = [
        f"Exact match in percent, questions: {counts}. In brackets: questions lost and gained against raw V, α 0."
    ]
    for positions, rows in result["rows"].items():
        whole, rest = rows[0], rows[1:]
        header = ["V", "text", "scale", "α"]
        header += [f"{name}, K {k}" for name in result["questions"] for k in BUDGETS]
        lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        by_variant: dict[str, dict[str, Any]] = {}
        for row in rest:
            by_variant.setdefault(row["variant"], {})[row["k"]] = row
        for variant, at in by_variant.items():
            cells = [_cell(at[str(k)], name) for name in result["questions"] for k in BUDGETS]
            text = f"| {variant} | {' | '.join(cells)} |"
            lines.append(text)
        shares = ", ".join(f"{name} {100 * whole[name]['exact match']:.1f}" for name in result["questions"])
        sections.append(f"**`{positions}` positions**; all tokens: {shares}.\n\n" + "\n".join(lines))
        sections += [
            f"Beyond chance (p < 0.05), {title}: {_beyond(rest, title)}."
            for title in (UNGUIDED_TITLE, NOUNS_TITLE)
        ]
    return "\n\n".join(sections)


def _cell(row: dict[str, Any], name: str) -> str:
    share = f"{100 * row[name]['exact match']:.1f}"
    found = row[name].get(UNGUIDED_TITLE)
    changed = found and (found["lost"] or found["gained"])
    return f"{share} (−{found['lost']} +{found['gained']})" if changed else share


def _beyond(rows: Sequence[dict[str, Any]], title: str) -> str:
    """How many guided variants gained and lost beyond chance in the comparison `title`, by data set."""
    said = []
    for name in LIMITS:
        found = [
            row[name][title] for row in rows if title in row[name] and not row["variant"].endswith("| 0")
        ]
        beyond = [one["gained"] > one["lost"] for one in found if one["p"] < 0.05]
        said.append(f"{name} {sum(beyond)} gained and {len(beyond) - sum(beyond)} lost of {len(found)}")
    return "; ".join(said)
