"""Plots of what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from resprune.runtime.bench.report import STAGE_COLORS

GAIN_STYLES = (
    {"color": STAGE_COLORS["prefill"], "marker": "o"},
    {"color": "#222222", "linestyle": ":"},
    {"color": "#D55E00", "marker": "s"},
)


def stacked(
    panels: Mapping[str, Mapping[str, Mapping[str, float]]], stages: Sequence[str], path: Path, unit: str
) -> None:
    """One panel under another with one scale, in each a bar for every row, from its `stages` in that order."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = [len(bars) for bars in panels.values()]
    figure, axes = plt.subplots(
        len(panels),
        squeeze=False,
        sharex=True,
        figsize=(9, 0.9 * len(panels) + 0.27 * sum(rows)),
        height_ratios=rows,
        layout="constrained",
    )
    for axis, (title, bars) in zip(axes[:, 0], panels.items(), strict=True):
        left = [0.0] * len(bars)
        for stage in stages:
            widths = [values.get(stage, 0.0) for values in bars.values()]
            axis.barh(list(bars), widths, left=left, color=STAGE_COLORS[stage], label=stage)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        for row, total in enumerate(left):
            axis.text(total, row, f" {total:,.0f}", va="center", fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.1)
        axis.set_title(title, fontsize=9, loc="left")
        axis.tick_params(labelsize=8, labelbottom=True)
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

    size = (3.4 * len(panels), 3.4)
    figure, axes = plt.subplots(
        1, len(panels), squeeze=False, figsize=size, sharey=True, layout="constrained"
    )
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for (name, line), style in zip(lines.items(), GAIN_STYLES, strict=True):
            axis.plot(list(line), list(line.values()), label=name, markersize=5, **style)
            place = (
                {"xytext": (5, 4)}
                if style.get("marker") == "o"
                else {"xytext": (0, -6), "ha": "center", "va": "top"}
            )
            if "marker" in style:
                for k, gain in sorted(line.items())[:-1]:  # all tokens are the measure: 1
                    axis.annotate(
                        f"{gain:.1f} ×",
                        (k, gain),
                        **place,
                        textcoords="offset points",
                        fontsize=8,
                        color=style["color"],
                    )
        ticks = sorted({k for line in lines.values() for k in line})
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, list(map(str, ticks)), minor=False)
        axis.set_yscale("log", base=2)
        axis.set_yticks([1, 2, 4, 8], ["1 ×", "2 ×", "4 ×", "8 ×"], minor=False)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("K, visual tokens kept", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.12)
    axes[0, 0].set_ylabel("times as fast as with all tokens", fontsize=8)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, frameon=False, loc="outside upper center", ncols=len(labels))
    figure.savefig(path, dpi=110)
    plt.close(figure)
