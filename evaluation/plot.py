"""Curves against K on a logarithmic axis, one line a selector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The method stands out; the controls are told apart by colour and marker, so that a print in grey can be read too.
STYLES: dict[str, dict[str, Any]] = {
    "resprune": {"color": "#c0223b", "marker": "o", "linewidth": 2.8, "markersize": 7, "zorder": 5},
    "no-text": {"color": "#e8833a", "marker": "s"},
    "mean": {"color": "#b8860b", "marker": "v"},
    "pooled": {"color": "#d4a9a0", "marker": "^"},
    "negative": {"color": "#6b4c3b", "marker": "x"},
    "relevance": {"color": "#8e44ad", "marker": "D"},
    "divprune": {"color": "#1f77b4", "marker": "P"},
    "cdpruner": {"color": "#17a2a2", "marker": "X"},
    "random": {"color": "#6f7780", "marker": "."},
    "stride": {"color": "#2e8b57", "marker": "+"},
    "norm": {"color": "#9acd32", "marker": "*"},
    "best possible": {"color": "#222222", "linestyle": ":", "linewidth": 1.8},
}
PLAIN: dict[str, Any] = {"linewidth": 1.4, "markersize": 5}


@dataclass(frozen=True)
class Line:
    """One curve: x, y in percent, and optionally the band around it."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True)
class Panel:
    """One pair of axes; `level` draws a horizontal line, that of all tokens."""

    title: str
    lines: Mapping[str, Line]
    level: float | None = None
    xlabel: str = "K, visual tokens kept"


def draw(panels: Sequence[Panel], ylabel: str, *, dense: bool = False) -> bytes:
    """A PNG with the panels side by side, one y axis and one legend for all; bars where there is a single budget.

    `dense` is for many points that fall over orders of magnitude: no markers, and y is logarithmic too.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    figure = Figure(figsize=(4.6 * len(panels) + 1.9, 4.3), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    handles: dict[str, Any] = {}
    single = all(len(line.x) < 2 for panel in panels for line in panel.lines.values())
    if single:
        _bars(figure, panels, ylabel)
        return _png(figure)
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for panel, axes in zip(panels, grid, strict=True):
        for name, line in panel.lines.items():
            style = PLAIN | STYLES.get(name, {}) | ({"marker": ""} if dense else {})
            if line.low is not None and line.high is not None:
                axes.fill_between(line.x, line.low, line.high, color=style["color"], alpha=0.15, linewidth=0)
            (handles[name],) = axes.plot(line.x, line.y, **style)
        if panel.level is not None:
            handles["all tokens"] = axes.axhline(panel.level, color="#222222", linestyle="--", linewidth=1.2)
        ticks = sorted({x for line in panel.lines.values() for x in line.x})
        axes.set_xscale("log", base=2)
        if dense:
            axes.set_yscale("log")
            axes.set_ylim(0.1, 100)
            axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_major_locator(FixedLocator(ticks if len(ticks) <= 8 else [2**n for n in range(12)]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set(title=panel.title, xlabel=panel.xlabel)
        if ticks:  # none, if only all tokens were asked for
            axes.set_xlim(min(ticks) / 1.15, max(ticks) * 1.15)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel(ylabel)
    figure.legend(list(handles.values()), list(handles), loc="outside right center", frameon=False)
    return _png(figure)


def _bars(figure: Figure, panels: Sequence[Panel], ylabel: str) -> None:
    """One budget is no curve: a bar a selector, with its interval."""
    for panel, axes in zip(
        panels, figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], strict=True
    ):
        drawn = {name: line for name, line in panel.lines.items() if len(line.x)}
        for name, line in drawn.items():
            axes.bar(name, line.y[0], color=(PLAIN | STYLES.get(name, {})).get("color"))
            if line.low is not None and line.high is not None:
                spread = [[line.y[0] - line.low[0]], [line.high[0] - line.y[0]]]
                axes.errorbar([name], [line.y[0]], yerr=spread, color="#222222", capsize=4)
            axes.annotate(f" {line.y[0]:.1f}", (name, line.y[0]), ha="left", va="bottom")
        if panel.level is not None:
            axes.axhline(panel.level, color="#222222", linestyle="--", linewidth=1.2)
            axes.annotate(
                "all tokens", (0.99, panel.level), xycoords=("axes fraction", "data"), ha="right", va="bottom"
            )
        budget = next((f": {line.x[0]:g}" for line in drawn.values()), "")
        axes.set(title=panel.title, xlabel=f"{panel.xlabel}{budget}")
        axes.tick_params(axis="x", rotation=90 if len(drawn) > 4 else 0)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel(ylabel)


def _png(figure: Figure) -> bytes:
    file = BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
