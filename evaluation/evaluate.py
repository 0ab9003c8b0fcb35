"""Ask a model every question with every selection that is to be compared, each image encoded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from resprune.evaluation.answers import Answers, Run
from resprune.evaluation.data import DataSet, Question
from resprune.evaluation.model import Asked, Model
from resprune.evaluation.progress import progress
from resprune.evaluation.selectors import CONTROLS, Candidates
from resprune.evaluation.towers import EARLY, RESIZE, changes_tower
from resprune.runtime.budget import Budget
from resprune.runtime.errors import ResPruneError
from resprune.runtime.prompt.splice import Ints, whole_groups
from resprune.runtime.walk import Encoded

OWN = "resprune"
SELECTORS = (OWN, *CONTROLS)
DRAWS = 5
"""How often `random` is drawn; everything else gives the same answer each time."""


@dataclass(frozen=True)
class Plan:
    """What is to be asked: data sets, selectors by name (those of `towers.py` too), budgets.

    `limit` questions of each data set; `seed` is that of the first random draw; `batch` questions go through the
    language model together.
    """

    data: Sequence[DataSet]
    selectors: Sequence[str]
    budgets: Sequence[Budget]
    limit: int | None = None
    seed: int = 0
    batch: int = 8
    max_new_tokens: int = 16

    def __post_init__(self) -> None:
        unknown = [name for name in self.selectors if name not in SELECTORS and not changes_tower(name)]
        if unknown:
            raise ResPruneError(
                f"there is no selector {', '.join(unknown)}; choose from {', '.join((*SELECTORS, RESIZE))}"
            )

        names = [data.name for data in self.data]
        twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
        if twice:
            raise ResPruneError(f"two data sets are named {', '.join(twice)}; rename a file")

    def settings(self, model: Model) -> dict[str, Any]:
        """What answers depend on beside the question, the selector and the budget."""
        return model.settings | {
            "max_new_tokens": self.max_new_tokens,
            "data": {data.name: data.fingerprint for data in self.data},
        }

    def runs(self, data: DataSet) -> dict[Run, Budget]:
        """Every run over one data set; "all" is one run, whatever the selectors."""
        runs: dict[Run, Budget] = {}
        for budget in self.budgets:
            if budget.everything:
                runs[Run(data.name, "", "all", 0)] = budget
                continue
            for name in self.selectors:
                seeds = range(self.seed, self.seed + DRAWS) if name == "random" else range(1)
                runs |= {Run(data.name, name, str(budget), seed): budget for seed in seeds}
        return runs


def evaluate(model: Model, plan: Plan, answers: Answers) -> None:
    """Ask what has not been answered yet; `answers` has everything when this returns.

    Raises `ResPruneError` for budgets and selectors that the model cannot have, and for budgets that a report could not
    show together.
    """
    own = any(name == OWN or name.startswith(EARLY) for name in plan.selectors)
    model.check(plan.budgets, own, plan.selectors)
    kinds = {budget.share is None for budget in plan.budgets if not budget.everything}
    if model.num_tokens is None and len(kinds) > 1:
        raise ResPruneError(
            "this model's images differ in how many tokens they have, and numbers and shares of them cannot stand on "
            "one axis; give -k either numbers or shares"
        )
    for data in plan.data:
        questions, runs = data.spread(plan.limit), plan.runs(data)
        numbers = [question.number for question in questions]
        left = sum(len(answers.missing(run, numbers)) for run in runs)
        with progress(left, data.name) as update:
            for chunk in _chunks(questions, plan.batch):
                _ask(model, plan, chunk, runs, answers, update)


def _chunks(questions: Sequence[Question], least: int) -> Iterator[list[Question]]:
    """Questions of whole images, at least `least` of them but for the last chunk."""
    chunk: list[Question] = []
    for _, group in groupby(questions, key=lambda question: question.image):
        chunk += group
        if len(chunk) >= least:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _ask(
    model: Model,
    plan: Plan,
    chunk: Sequence[Question],
    runs: dict[Run, Budget],
    answers: Answers,
    update: Callable[[int], object],
) -> None:
    numbers = [question.number for question in chunk]
    todo = {run: missing for run in runs if (missing := answers.missing(run, numbers))}
    if not todo:
        return
    loads = {question.image: question.load for question in chunk}
    encoded = {image: model.look([load()])[0] for image, load in loads.items()}

    def prepare(views: Mapping[str, Encoded]) -> dict[int, tuple[Encoded, Asked]]:
        return {
            question.number: (
                views[question.image],
                model.read(question.text, [views[question.image].image.expansion]),
            )
            for question in chunk
        }

    whole = prepare(encoded)
    for run, missing in todo.items():
        prepared = whole
        if changes_tower(run.selector):
            budget = runs[run]
            prepared = prepare(
                {
                    image: model.look([load()], run.selector, budget.of(encoded[image].image.num_tokens))[0]
                    for image, load in loads.items()
                }
            )
        for start in range(0, len(missing), plan.batch):
            batch = missing[start : start + plan.batch]
            pairs = [prepared[number] for number in batch]
            kept = [
                [pick(model, run, runs[run], *pair, number)]
                for pair, number in zip(pairs, batch, strict=True)
            ]
            texts = model.answer(
                [asked for _, asked in pairs], [[image] for image, _ in pairs], kept, plan.max_new_tokens
            )
            answers.add(run, dict(zip(batch, texts, strict=True)))
            update(len(batch))


def pick(model: Model, run: Run, budget: Budget, encoded: Encoded, asked: Asked, number: int) -> Ints:
    """The tokens that a run keeps of one image for one question: indices [K] int64, in pick order.

    `number` is the question's: with the run's seed it decides what a random selector draws. Protected tokens come
    first, ascending, whatever the selector; it chooses among the others that are attached to none.
    """
    every = encoded.tokens.candidates
    if budget.everything or run.selector == RESIZE:
        return every
    k = min(budget.of(encoded.image.num_tokens), len(every))
    if run.selector == OWN or run.selector.startswith(EARLY):
        return model.select(encoded, asked, k)
    said, to = encoded.image.protected, encoded.image.attached_to
    owners = every if to is None else every[to[every] < 0]
    always = np.zeros(len(owners), dtype=bool) if said is None else said[owners]
    order, free = owners[always][:k], owners[~always]
    if left := min(k - len(order), len(free)):
        selection = model.manifest.selection
        candidates = Candidates(
            encoded.tokens.rows[free].astype(np.float64),
            asked.text.astype(np.float64),
            selection.alpha,
            selection.scale,
            (run.seed, number),
        )
        order = np.concatenate([order, free[CONTROLS[run.selector](candidates, left)]])
    if to is not None:
        order = np.concatenate([[owner, *every[to[every] == owner]] for owner in order])
    return whole_groups(order, k, to)
