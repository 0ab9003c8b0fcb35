"""Plots of what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

# Okabe and Ito's colours, which most colour-blind readers can tell apart.
COLOURS = ("#999999", "#0072B2", "#56B4E9", "#D55E00", "#009E73", "#CC79A7")
GAIN_COLOURS = ("#D55E00", "#222222", "#0072B2")
GAIN_STYLES = ("o-", ":", "s-")


def stacked(
    panels: Mapping[str, Mapping[str, Mapping[str, float]]], stages: Sequence[str], path: Path, unit: str
) -> None:
    """One panel under another, in each a bar for every row, from its `stages` in that order."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = [len(bars) for bars in panels.values()]
    figure, axes = plt.subplots(
        len(panels),
        squeeze=False,
        figsize=(9, 0.9 * len(panels) + 0.27 * sum(rows)),
        height_ratios=rows,
        layout="constrained",
    )
    for axis, (title, bars) in zip(axes[:, 0], panels.items(), strict=True):
        left = [0.0] * len(bars)
        for stage, colour in zip(stages, COLOURS, strict=False):
            widths = [values.get(stage, 0.0) for values in bars.values()]
            axis.barh(list(bars), widths, left=left, color=colour, label=stage)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        for row, total in enumerate(left):
            axis.text(total, row, f" {total:,.0f}", va="center", fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.1)
        axis.set_title(title, fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, frameon=False, loc="outside upper center", ncols=len(labels))
    axes[-1, 0].set_xlabel(unit, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def gains(panels: Mapping[str, Mapping[str, Mapping[int, float]]], path: Path) -> None:
    """Panels side by side, in each a line of how many times as fast, by tokens kept; a dotted one is not measured."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(panels), squeeze=False, figsize=(3.4 * len(panels), 3.3), sharey=True)
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for (name, line), colour, style in zip(lines.items(), GAIN_COLOURS, GAIN_STYLES, strict=True):
            axis.plot(list(line), list(line.values()), style, color=colour, label=name, markersize=5)
        ticks = sorted({k for line in lines.values() for k in line})
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, list(map(str, ticks)), minor=False)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("K, visual tokens kept", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("times as fast as with all tokens", fontsize=8)
    axes[0, -1].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
