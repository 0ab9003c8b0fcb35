"""From answers to scores: exact match with its interval, by type of question, and against the unpruned answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from resprune.evaluation.answers import Answers, Run
from resprune.evaluation.data import Question
from resprune.evaluation.evaluate import Plan
from resprune.evaluation.model import Model
from resprune.evaluation.plot import Line, Panel, draw
from resprune.evaluation.statistics import Paired, paired, wilson
from resprune.runtime.budget import Budget
from resprune.runtime.bundle.whole import write_whole
from resprune.runtime.errors import ResPruneError


@dataclass(frozen=True)
class Score:
    """One selector at one budget on one data set.

    Shares go from 0 to 1. `exact_match` is the mean over `draws`, the shares of the single draws, and `low` to `high`
    Wilson's 95 % interval of it for this many questions; `types` has the share for each type of question. `unpruned`
    compares each draw with all tokens (empty if those were not asked); `first` with the selector that was named first.
    """

    selector: str
    k: str
    questions: int
    exact_match: float
    low: float
    high: float
    types: dict[str, float]
    draws: list[float]
    unpruned: list[Paired] = field(default_factory=list)
    first: list[Paired] = field(default_factory=list)


@dataclass(frozen=True)
class Sheet:
    """The scores on one data set, and how many questions it has of each type."""

    data: str
    types: dict[str, int]
    scores: list[Score]

    def score(self, selector: str, budget: Budget) -> Score:
        """The score of a selector at a budget; `StopIteration` if it was not asked."""
        return next(row for row in self.scores if (row.selector, row.k) == (selector, str(budget)))


def score(plan: Plan, answers: Answers) -> list[Sheet]:
    """Score every data set of a plan whose questions have all been asked."""
    return [_sheet(plan, answers, data.name, data.spread(plan.limit), plan.runs(data)) for data in plan.data]


def _sheet(
    plan: Plan, answers: Answers, name: str, questions: Sequence[Question], runs: dict[Run, Budget]
) -> Sheet:
    numbers = [question.number for question in questions]
    types = np.array([question.type for question in questions])
    texts = {run: np.array(answers.of(run, numbers)) for run in runs}
    right = {
        run: np.array([q.right(text) for q, text in zip(questions, said, strict=True)])
        for run, said in texts.items()
    }
    unpruned = next((run for run in runs if run.k == "all"), None)

    def compare(first: Run | None, drawn: list[Run]) -> list[Paired]:
        if first is None or first in drawn:
            return []
        return [paired(texts[first] == texts[run], right[first], right[run]) for run in drawn]

    scores = []
    for (selector, k), group in groupby(runs, key=lambda run: (run.selector, run.k)):
        drawn = list(group)
        share = np.mean([right[run] for run in drawn], axis=0)  # [Q]
        low, high = wilson(float(share.sum()), len(numbers))
        first = Run(name, plan.selectors[0], k, plan.seed if plan.selectors[0] == "random" else 0)
        scores.append(
            Score(
                selector=selector,
                k=k,
                questions=len(numbers),
                exact_match=float(share.mean()),
                low=low,
                high=high,
                types={kind: float(share[types == kind].mean()) for kind in _kinds(types)},
                draws=[float(right[run].mean()) for run in drawn],
                unpruned=compare(unpruned, drawn),
                first=compare(first if first in runs else None, drawn),
            )
        )
    return Sheet(name, {kind: int((types == kind).sum()) for kind in _kinds(types)}, scores)


def _kinds(types: npt.NDArray[np.str_]) -> list[str]:
    return [str(kind) for kind in np.unique(types) if kind]


def to_json(sheets: Sequence[Sheet], settings: dict[str, Any]) -> str:
    """Everything, as the text of `report.json`."""
    return json.dumps({"settings": settings, "data": [asdict(sheet) for sheet in sheets]}, indent=1) + "\n"


def markdown(sheets: Sequence[Sheet]) -> str:
    """One table a data set."""
    return "\n\n".join(f"**{sheet.data}**, {_counted(sheet)}\n\n{_table(sheet)}" for sheet in sheets) + "\n"


def _counted(sheet: Sheet) -> str:
    by_type = ", ".join(f"{kind} {count:,}" for kind, count in sheet.types.items())
    return f"{sheet.scores[0].questions:,} questions" + (f" ({by_type})" if by_type else "")


def _table(sheet: Sheet) -> str:
    kinds = list(sheet.types)
    columns = ["K", "selector", "exact match (95 %)", "as unpruned", "lost, gained (p)", *kinds]
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in sheet.scores:
        spread = f", {_percent(min(row.draws))} to {_percent(max(row.draws))}" if len(row.draws) > 1 else ""
        interval = f"{_percent(row.exact_match)} ({_percent(row.low)}–{_percent(row.high)}{spread})"
        cells = [row.k, row.selector or "all tokens", interval, *_against(row.unpruned)]
        cells += [_percent(row.types[kind]) for kind in kinds]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _against(draws: list[Paired]) -> tuple[str, str]:
    """Agreement, and McNemar's counts; of several draws their means, without a p."""
    if not draws:
        return "", ""
    lost, gained = (np.mean([getattr(draw, name) for draw in draws]) for name in ("lost", "gained"))
    p = f" ({draws[0].p:.2g})" if len(draws) == 1 else ""
    return _percent(float(np.mean([draw.agreement for draw in draws]))), f"{lost:.0f}, {gained:.0f}{p}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def write(directory: Path, sheets: Sequence[Sheet], plan: Plan, model: Model) -> None:
    """`report.json`, `REPORT.md` and `accuracy.png`; `ResPruneError` where they cannot be written."""
    settings = plan.settings(model) | {
        "name": model.manifest.model,
        "selection": asdict(model.manifest.selection),
        "limit": plan.limit,
        "seed": plan.seed,
        **asdict(model.engine),
    }
    manifest = model.manifest
    title = f"{manifest.model}: exact match against K, {manifest.positions} positions, {manifest.attention} attention"
    try:
        write_whole(directory / "report.json", to_json(sheets, settings).encode())
        text = f"# {title}\n\n![](accuracy.png)\n\n{markdown(sheets)}"
        write_whole(directory / "REPORT.md", text.encode())
        panels = [panel(sheet, plan, model.num_tokens) for sheet in sheets]
        write_whole(directory / "accuracy.png", draw(panels, "exact match, %"))
    except OSError as error:
        raise ResPruneError(f"{error.filename or directory} cannot be written: {error.strerror}") from None


def panel(sheet: Sheet, plan: Plan, num_tokens: int | None, intervals: Sequence[str] | None = None) -> Panel:
    """A data set's curves; a band is the interval of `intervals` (None: of the selector named first).

    A share of the tokens stands where it does for an image of N tokens. Where N varies all budgets are shares
    (`evaluate` refuses a mix) or all are numbers.
    """
    percent = num_tokens is None and any(budget.share is not None for budget in plan.budgets)
    places = {
        str(budget): float(budget.of(num_tokens) if num_tokens else budget.k or 100 * (budget.share or 1))
        for budget in plan.budgets
    }
    lines = {}
    for name in plan.selectors:
        rows = sorted((row for row in sheet.scores if row.selector == name), key=lambda row: places[row.k])
        banded = name in (plan.selectors[:1] if intervals is None else intervals)
        lines[name] = Line(
            [places[row.k] for row in rows],
            [100 * row.exact_match for row in rows],
            [100 * row.low for row in rows] if banded else None,
            [100 * row.high for row in rows] if banded else None,
        )
    everything = [row.exact_match for row in sheet.scores if row.k == "all"]
    level = 100 * everything[0] if everything else None
    return Panel(sheet.data, lines, level, "% of the tokens" if percent else Panel.xlabel)
