"""What the demo model still answers with fewer visual tokens, chosen by the method and by its rivals."""

from __future__ import annotations

import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.demo import RESPRUNE
from resprune.evaluation.answers import Answers
from resprune.evaluation.budget import Budget
from resprune.evaluation.data import load_data
from resprune.evaluation.evaluate import OWN, SELECTORS, Plan, evaluate
from resprune.evaluation.model import open_bundle
from resprune.evaluation.plot import draw
from resprune.evaluation.report import Sheet, markdown, panel, score

HERE = Path(__file__).parent
BUDGETS = [Budget(4), Budget(8), Budget(16), Budget(32), Budget(64), Budget()]
# The demo is exported with `original` positions (benchmarks/ABLATION.md says why); the other policy for comparison.
SELECTED = {"original": SELECTORS, "contiguous": (OWN,)}
LIMIT = 2000
DATA = ("scenes", "crowd", "easyvqa")


def export_demo(work: Path) -> Path:
    """The demo model's bundle whose own selection takes every K."""
    bundle = work / "demo-eval"
    subprocess.run([*RESPRUNE, "export", "demo", str(bundle), "-k", "144", "--split", "--force"], check=True)
    return bundle


def run(work: Path) -> dict[str, Any]:
    """Ask LIMIT questions of each data set under both position policies; an interrupted run goes on."""
    bundle = export_demo(work)
    data = [load_data(name) for name in DATA]
    sheets: dict[str, list[Sheet]] = {}
    for positions, selectors in SELECTED.items():
        plan = Plan(data, selectors, BUDGETS, limit=LIMIT, batch=32)
        model = open_bundle(bundle, positions=positions)
        answers = Answers(work / f"accuracy-{positions}", plan.settings(model))
        evaluate(model, plan, answers)
        sheets[positions] = score(plan, answers)
        answers.close()
        model.close()
        if positions == "original":
            panels = [panel(sheet, plan, model.num_tokens) for sheet in sheets[positions]]
            draw(HERE / "accuracy.png", panels, "exact match, %")
    return {
        "tables": {positions: markdown(of_policy) for positions, of_policy in sheets.items()},
        "scores": {
            positions: [asdict(sheet) for sheet in of_policy] for positions, of_policy in sheets.items()
        },
    }


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    sections = [f"Under `{positions}` positions:\n\n{text}" for positions, text in result["tables"].items()]
    return "![](accuracy.png)\n\n" + "\n".join(sections)
