"""What the selection costs as the tokens grow in number, in both forms, and where one overtakes the other."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.measure import Timing, take_turns
from benchmarks.measure import run as run_command
from benchmarks.selection import cpu_session
from resprune.graphs import choose_form, token_select_model
from resprune.method import FORMS, Selection, share_of

TOKENS = (576, 1296, 2880, 4096)
HIDDEN = (2048, 4096)
SHARES = (1 / 16, 0.11, 0.22, 1 / 3)
SHOWN = 0.11


def run(work: Path) -> dict[str, Any]:
    """Time both forms in turn at every number of tokens, hidden size and share; memory in child processes."""
    shapes = {}
    for D in HIDDEN:
        for N in TOKENS:
            feeds = _feeds(N, D)
            calls: dict[str, Any] = {}
            for k in budgets(N):
                for form in FORMS:
                    session = _session(k, form)
                    calls[f"{form} K {k}"] = lambda session=session, feeds=feeds: session.run(None, feeds)
            timings = take_turns(calls, repeats=7)
            shown = share_of(SHOWN, N)
            memory = {}
            for form in FORMS:
                command = [sys.executable, "-m", "benchmarks.growth", form, str(N), str(D), str(shown)]
                memory[form] = json.loads(run_command(command)[0])
            shapes[f"N {N}, D {D}"] = {
                "N": N,
                "D": D,
                "milliseconds": timings,
                "megabytes of a run": memory,
                "chosen": choose_form(shown, N, D),
                "crossover": crossover(N, timings),
            }
    return {"shapes": shapes}


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    rows = [
        "| D | N | K | quadratic | linear | chosen | linear is faster up to | memory, quadratic | linear |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for figures in result["shapes"].values():
        N, D, memory = figures["N"], figures["D"], figures["megabytes of a run"]
        k = share_of(SHOWN, N)
        timings: dict[str, Timing] = figures["milliseconds"]
        rows.append(
            f"| {D} | {N} | {k} | {timings[f'quadratic K {k}']} ms | {timings[f'linear K {k}']} ms "
            f"| {figures['chosen']} | {up_to(N, figures['crossover'])} "
            f"| {memory['quadratic']:,.0f} MB | {memory['linear']:,.0f} MB |"
        )
    return (
        "K is 11 % of N, fp32, one image. Linear is faster up to the K at which a straight line through the forms' "
        f"difference at {len(SHARES)} shares, {min(SHARES):.0%} to {max(SHARES):.0%}, is zero; memory is the peak of a "
        "first run above the opened session.\n\n" + "\n".join(rows)
    )


def up_to(N: int, share: float) -> str:
    """The crossover as the table has it; past what was measured it is no figure."""
    if share > max(SHARES):
        return "every K that was tried"
    return f"K = {share * N:.0f}, {share:.1%}" if share > min(SHARES) else "no K that was tried"


def budgets(N: int) -> list[int]:
    return [share_of(share, N) for share in SHARES]


def crossover(N: int, timings: dict[str, Timing]) -> float:
    """The share k / N where a straight line through linear minus quadratic is zero.

    Straight because the forms differ by K products of V [N, D] with a row against one of V with V.
    """
    gaps = [timings[f"linear K {k}"].median - timings[f"quadratic K {k}"].median for k in budgets(N)]
    slope, start = np.polyfit(budgets(N), gaps, 1)
    return float(-start / slope / N)


def _session(k: int, form: str) -> Any:
    return cpu_session(token_select_model(Selection(k=k, form=form)).SerializeToString())


def _feeds(N: int, D: int) -> dict[str, npt.NDArray[Any]]:
    rng = np.random.default_rng(0)
    return {
        "image_features": rng.standard_normal((1, N, D), dtype=np.float32),
        "text_embeds": rng.standard_normal((1, 4, D), dtype=np.float32),
        "text_mask": np.ones((1, 4), dtype=bool),
        "token_mask": np.ones((1, N), dtype=bool),
    }


def _measure(form: str, N: int, D: int, k: int) -> None:
    """Print by how many megabytes the first run raises the peak."""
    session, feeds = _session(k, form), _feeds(N, D)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    session.run(None, feeds)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e6)


if __name__ == "__main__":
    _measure(sys.argv[1], *map(int, sys.argv[2:5]))
