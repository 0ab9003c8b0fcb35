"""What the demo model still answers with fewer visual tokens, chosen by the method and by its rivals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.measure import exported
from resprune.evaluation.answers import Answers
from resprune.evaluation.data import load_data
from resprune.evaluation.evaluate import OWN, SELECTORS, Plan, evaluate
from resprune.evaluation.model import open_bundle
from resprune.evaluation.plot import draw as plot
from resprune.evaluation.report import Score, Sheet, markdown, panel, score
from resprune.runtime.budget import Budget
from resprune.runtime.bundle.manifest import ATTENTION

HERE = Path(__file__).parent
BUDGETS = [Budget(4), Budget(8), Budget(16), Budget(32), Budget(64), Budget()]
# The demo is exported with `original` positions (benchmarks/ABLATION.md says why); the other policy for comparison, and
# every selector's picks weighed by what each stands for.
RUNS = {
    ("original", "plain"): SELECTORS,
    ("contiguous", "plain"): (OWN,),
    ("original", "proportional"): SELECTORS,
}
LIMIT = 2000
TOKENS = 144
# Of the plot in the README: the method, the rivals of the same kind, and chance.
SHOWN = (OWN, "divprune", "cdpruner", "random")
DATA = ("scenes", "crowd", "easyvqa")


def export_demo(work: Path, attention: str = "plain") -> Path:
    """The demo model's bundle whose own selection takes every K."""
    return exported("demo", work / f"demo-eval-{attention}", "-k", "144", "--attention", attention, "--split")


def run(work: Path) -> dict[str, Any]:
    """Ask LIMIT questions of each data set in every one of RUNS; an interrupted run goes on."""
    bundles = {attention: export_demo(work, attention) for attention in ATTENTION}
    data = [load_data(name) for name in DATA]
    sheets: dict[str, list[Sheet]] = {}
    for (positions, attention), selectors in RUNS.items():
        plan = Plan(data, selectors, BUDGETS, limit=LIMIT, batch=32)
        model = open_bundle(bundles[attention], positions=positions)
        answers = Answers(work / f"accuracy-{positions}-{attention}", plan.settings(model))
        evaluate(model, plan, answers)
        sheets[_title(positions, attention)] = score(plan, answers)
        answers.close()
        model.close()
    return {
        "tables": {title: markdown(of_run) for title, of_run in sheets.items()},
        "scores": {title: [asdict(sheet) for sheet in of_run] for title, of_run in sheets.items()},
    }


def draw(result: Mapping[str, Any]) -> None:
    """accuracy-all.png has every selector; accuracy.png has those that stand for one kind each, with intervals."""
    sheets = [
        Sheet(
            sheet["data"],
            sheet["types"],
            [Score(**row | {"unpruned": [], "first": []}) for row in sheet["scores"]],
        )
        for sheet in result["scores"][_title("original", "plain")]
    ]
    for name, selectors, intervals in (
        ("accuracy-all.png", SELECTORS, (OWN,)),
        ("accuracy.png", SHOWN, SHOWN),
    ):
        plan = Plan([], selectors, BUDGETS)
        panels = [panel(sheet, plan, TOKENS, intervals) for sheet in sheets]
        (HERE / name).write_bytes(plot(panels, "exact match, %"))


def _title(positions: str, attention: str) -> str:
    return f"`{positions}` positions, {attention} attention"


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    sections = [f"With {title}:\n\n{text}" for title, text in result["tables"].items()]
    return "![](accuracy-all.png)\n\n" + "\n".join(sections)
