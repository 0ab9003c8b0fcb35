"""Share of the visual tokens' energy outside the kept span, against K, by selector and against the SVD bound."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
from tqdm import tqdm

from benchmarks.accuracy import HERE, export_demo
from resprune.evaluation.data import load_data
from resprune.evaluation.evaluate import OWN, SELECTORS
from resprune.evaluation.model import Asked, open_bundle
from resprune.evaluation.plot import Line, Panel
from resprune.evaluation.plot import draw as plot
from resprune.evaluation.reconstruction import energy_outside, svd_bound
from resprune.evaluation.selectors import CONTROLS, Candidates, Doubles, resprune
from resprune.runtime.walk import Encoded

LARGEST = 64
SHOWN = (4, 8, 16, 32, 64)
SCENES = 60
BOUND = "best possible"
PHOTOGRAPHS = {
    "astronaut": "What color is the suit of the woman?",
    "chelsea": "What color are the eyes of the cat?",
    "coffee": "Where is the spoon?",
    "rocket": "Is there a tower beside the rocket?",
}


def run(work: Path) -> dict[str, Any]:
    """Curves of the demo model's features, mean over held-out scenes and over public-domain photographs."""
    model = open_bundle(export_demo(work))
    scenes = load_data("scenes").spread(SCENES)
    sources = {
        "scenes": [(question.load(), question.text) for question in scenes],
        "photographs": [(getattr(skimage.data, name)(), text) for name, text in PHOTOGRAPHS.items()],
    }
    curves: dict[str, dict[str, Any]] = {}
    for name, shown in sources.items():
        found = [
            _curves(model.look([picture])[0], model.read(text), number)
            for number, (picture, text) in enumerate(tqdm(shown, desc=name))
        ]
        curves[name] = {line: np.mean([one[line] for one in found], axis=0).tolist() for line in found[0]}
    model.close()
    return {"pictures": {name: len(shown) for name, shown in sources.items()}, "outside": curves}


def draw(result: Mapping[str, Any]) -> None:
    """The plot of what `run` measured, or of the same as JSON."""
    steps = list(range(1, LARGEST + 1))
    panels = [
        Panel(name, {line: Line(steps, [100 * share for share in shares[1:]]) for line, shares in of.items()})
        for name, of in result["outside"].items()
    ]
    (HERE / "reconstruction.png").write_bytes(plot(panels, "energy outside the kept span, %", dense=True))


def _curves(encoded: Encoded, asked: Asked, number: int) -> dict[str, Doubles]:
    visual = encoded.tokens.rows.astype(np.float64)
    candidates = Candidates(visual, asked.text.astype(np.float64), seed=(0, number))
    curves = {}
    for name in SELECTORS:
        if name == "stride":  # its picks for K are not the beginning of those for K + 1
            shares = [
                energy_outside(visual, CONTROLS[name](candidates, k))[-1] for k in range(1, LARGEST + 1)
            ]
            curves[name] = np.array([1.0, *shares])
        else:
            select = resprune if name == OWN else CONTROLS[name]
            curves[name] = energy_outside(visual, select(candidates, LARGEST))
    return curves | {BOUND: svd_bound(visual, LARGEST)}


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    sections = [
        "![](reconstruction.png)",
        "Share of the energy outside the kept span, in percent, mean over images.",
    ]
    for name, curves in result["outside"].items():
        lines = [f"| {name}, {result['pictures'][name]} | " + " | ".join(f"K {k}" for k in SHOWN) + " |"]
        lines.append("|---" * (len(SHOWN) + 1) + "|")
        for line, shares in curves.items():
            lines.append(f"| {line} | " + " | ".join(f"{100 * shares[k]:.2f}" for k in SHOWN) + " |")
        sections.append("\n".join(lines))
    return "\n\n".join(sections)
