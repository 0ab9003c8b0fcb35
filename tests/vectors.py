"""The selection cases in tests/vectors: float32 inputs and the picks of an independent float64 implementation.

cases.json lists each case's k, alpha and scale; <name>.npz holds `visual` [N, D], `text` [M, D], `text_mask` [M],
`token_mask` [N], and what must come out: `gain` [N] (to 1e-5) and `pick_order` [K] (exactly).
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from resprune.method import Selection

FOLDER = Path(__file__).parent / "vectors"


@dataclass(frozen=True)
class Case:
    name: str
    k: int
    alpha: float
    scale: str
    arrays: dict[str, np.ndarray]

    @property
    def selection(self):
        return Selection(k=self.k, alpha=self.alpha, scale=self.scale)

    def inputs(self, dtype=np.float32):
        """(visual, text, text_mask, token_mask), each with a batch axis of one."""
        a = self.arrays
        return (
            a["visual"].astype(dtype)[None],
            a["text"].astype(dtype)[None],
            a["text_mask"].astype(bool)[None],
            a["token_mask"].astype(bool)[None],
        )


CASES = [
    Case(row["name"], row["k"], row["alpha"], row["scale"], dict(np.load(FOLDER / f"{row['name']}.npz")))
    for row in json.loads((FOLDER / "cases.json").read_text())
]
