"""What was measured, as a table of 80 columns, as JSON values, or as a plot."""

from __future__ import annotations

import io
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resprune.runtime.bench.measure import STAGES, Case, Timing
from resprune.runtime.bundle.whole import write_whole
from resprune.runtime.errors import ResPruneError, one_line, require_packages

WIDTH, LABEL, CELL = 80, 17, 21
MOST_MS = 99_000
"""Above it a cell of the table is in seconds."""
PLOTS = (".png", ".svg", ".pdf")
# Of every plot, and of the page of `resprune serve` (serving/page/style.css): Okabe and Ito's colours, which most
# colour-blind readers can tell apart. `vision` is encoding and selecting in one graph.
STAGE_COLORS = {
    "pixels": "#999999",
    "prepare": "#009E73",
    "prompt": "#CC79A7",
    "encode": "#56B4E9",
    "vision": "#56B4E9",
    "select": "#E69F00",
    "prefill": "#0072B2",
}


@dataclass(frozen=True)
class Report:
    """The cases by ascending budget, and what they depend on.

    `threads` is 0 for as many as ONNX Runtime takes; `backend` is what answers; `load` is how long reading, checking
    and opening the bundle takes, in milliseconds.
    """

    bundle: str
    family: str
    device: str
    threads: int
    backend: str
    image: str
    load: Timing
    cases: Sequence[Case]

    @property
    def base(self) -> Case:
        """What the gains are over: the case with the most tokens."""
        return self.cases[-1]

    def table(self) -> str:
        """For a terminal of 80 columns."""
        threads = f"{self.threads} threads" if self.threads else f"{os.cpu_count()} logical cores"
        repeats = self.base.first_token.repeats
        head = {
            "bundle": f"{self.bundle}, {self.family}",
            "device": f"{self.device}, {threads}",
            "backend": self.backend,
            "image": self.image,
            "samples": f"{repeats} of each K, in turns, warm: median (quartiles)",
            "load": f"{_with_quartiles(self.load)} ms, {_times(self.load.repeats)}",
        }
        parts = [
            f"{name:<11} " + textwrap.shorten(value, WIDTH - 12, placeholder=" …")
            for name, value in head.items()
        ]
        across = (WIDTH - LABEL) // CELL
        for start in range(0, len(self.cases), across):
            parts += ["", *self._block(self.cases[start : start + across])]
        return "\n".join([*parts, "", textwrap.fill(self.verdict(), WIDTH)]) + "\n"

    def _block(self, cases: Sequence[Case]) -> list[str]:
        base = self.base
        unit, scale = ("s", 1e-3) if base.first_token.high > MOST_MS else ("ms", 1.0)
        rows = [
            ("K", [case.name for case in cases]),
            ("prompt tokens", [str(case.prompt_tokens) for case in cases]),
            *(
                (f"{name}, {unit}", [_with_quartiles(case.stages[name], scale) for case in cases])
                for name in STAGES
            ),
            (f"first token, {unit}", [_with_quartiles(case.first_token, scale) for case in cases]),
            ("tokens/s", [_with_quartiles(case.tokens_per_second) for case in cases]),
            ("peak memory, MB", [_megabytes(case.peak_bytes) for case in cases]),
            ("vision's share", [f"{100 * case.vision_share:.0f} %" for case in cases]),
        ]
        for label, gain in (
            ("prefill gain", "prefill"),
            ("  ideal", "prefill_ideal"),
            ("first token gain", "first_token"),
            ("  at most", "first_token_limit"),
        ):
            rows.append((label, [f"{case.gains(base)[gain]:.2f} x" for case in cases]))
        return [f"{label:<{LABEL}}" + "".join(f"{cell:>{CELL}}" for cell in cells) for label, cells in rows]

    def verdict(self) -> str:
        """Sentences on what more pruning can still bring."""
        least, base = self.cases[0], self.base
        gains = least.gains(base)
        return (
            f"Gains are over K {base.name}. With K {least.name} the first token comes {gains['first_token']:.2f} x as "
            f"fast. With fewer tokens it can come {gains['first_token_limit']:.2f} x as fast at most: before the "
            f"prefill pass {_short(least.before_prefill)} ms, {_short(least.stages['vision'].median)} of them in the "
            "encoder with the selection."
        )

    def values(self) -> dict[str, Any]:
        """As JSON values, by the names of `Answer.describe`; `gains` are factors over the case with the most tokens."""
        threads = {"threads": self.threads} if self.threads else {"logical_cores": os.cpu_count()}
        return {
            "bundle": self.bundle,
            "family": self.family,
            "device": self.device,
            **threads,
            "backend": self.backend,
            "image": self.image,
            "repeats": self.base.first_token.repeats,
            "load_repeats": self.load.repeats,
            "load_ms": _quartiles(self.load),
            "cases": [self._case(case) for case in self.cases],
        }

    def _case(self, case: Case) -> dict[str, Any]:
        timings = {f"{stage}_ms": _quartiles(timing) for stage, timing in case.stages.items()}
        memory = {} if case.peak_bytes is None else {"peak_memory_mb": case.peak_bytes / 1e6}
        return {
            "tokens": case.tokens,
            "num_tokens": case.num_tokens,
            "prompt_tokens": case.prompt_tokens,
            "timings": timings | {"first_token_ms": _quartiles(case.first_token)},
            "tokens_per_second": _quartiles(case.tokens_per_second),
            **memory,
            "vision_share": case.vision_share,
            "gains": case.gains(self.base),
        }


def check_plot(path: Path) -> None:
    """`ResPruneError` unless a plot can be drawn there; asked before the measurement, which takes its time."""
    require_packages("--out", ["matplotlib"], 'install with: pip install "resprune[eval]"')
    if path.suffix.lower() not in PLOTS:
        raise ResPruneError(f"a plot is {', '.join(PLOTS)}, and {one_line(path)} ends as none of them")
    if not path.parent.is_dir() or path.is_dir():
        raise ResPruneError(f"--out cannot write {one_line(path)}; give it a file in a directory that exists")


def plot(report: Report, path: Path) -> None:
    """Draw each budget's stages up to the first token as a bar; the whole file or, with a `ResPruneError`, none."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = [f"K {case.name}" for case in report.cases]
    figure, axis = plt.subplots(figsize=(8, 1.6 + 0.4 * len(names)), layout="constrained")
    left = [0.0] * len(names)
    for stage in STAGES:
        widths = [case.stages[stage].median for case in report.cases]
        axis.barh(names, widths, left=left, color=STAGE_COLORS[stage], label=stage)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for row, (case, total) in enumerate(zip(report.cases, left, strict=True)):
        axis.text(total, row, f" {case.first_token.median:.4g} ms", va="center", fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set_xlabel("milliseconds to the first token, medians")
    axis.set_title(f"{report.bundle}, {report.family}", fontsize=9, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=8, frameon=False, loc="outside upper center", ncols=len(STAGES))
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:].lower(), dpi=110)
    plt.close(figure)
    try:
        write_whole(path, content.getvalue())
    except OSError as error:
        raise ResPruneError(f"--out cannot write {path} ({one_line(error)}); give another path") from None


def _with_quartiles(timing: Timing, scale: float = 1.0) -> str:
    median, low, high = (_short(scale * value) for value in (timing.median, timing.low, timing.high))
    return f"{median} ({low}–{high})"


def _quartiles(timing: Timing) -> dict[str, float]:
    return {"median": timing.median, "first_quartile": timing.low, "third_quartile": timing.high}


def _megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:.0f}"


def _short(value: float) -> str:
    """Three digits or more, in few characters."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _times(repeats: int) -> str:
    return "once" if repeats == 1 else f"{repeats} times"
