"""Draw a report. Medians are bars or lines, and each repetition is a point."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.machine import machine
from benchmarks.report import Panel, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS = "memkv"
"""Prefix of the names of this project's contestants, which have colors of one family."""

OUR_COLORS = ("#3a5bd9", "#8fa4ef", "#1b2f80")
LIMIT_COLORS = dict.fromkeys(("fio", "wrk", "alone", "bound", "all in the top tier"), "#5f6368")
PEER_COLORS = ("#b5179e", "#e07a1f", "#1b9aaa", "#2e9e5b", "#c9a227", "#7a5195", "#9aa0a6")
INK = "#202124"
FAINT = "#5f6368"

COLUMNS = 2
"""Number of panels side by side."""

LABEL_ROOM = 60
"""Maximum characters per line of text below a panel."""


def draw(report: Report, file: Path) -> None:
    """Write a PNG and an SVG next to the JSON file `file`. Raises `OSError`."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = report.views()
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    size = (7.2 * columns if columns > 1 else 9, 4.2 * rows + 0.9)
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    colors = _colors(report)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, panel in zip(grid, panels, strict=False):
        (_lines if panel.lines else _bars)(axes, report, panel, colors)
        _finish(axes, panel)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    figure.suptitle(f"sglang-memkv: {report.name}", x=0.01, ha="left", fontsize=15, color=INK)
    figure.supxlabel(_subtitle(), x=0.01, ha="left", fontsize=8.5, color=FAINT)
    with mpl.rc_context({"svg.hashsalt": report.name, "svg.fonttype": "none"}):
        figure.savefig(file.with_suffix(".png"))
        figure.savefig(file.with_suffix(".svg"), metadata={"Date": None})


def _colors(report: Report) -> dict[str, str]:
    """Return one color per contestant, the same in every panel."""
    names = dict.fromkeys(name for case in report.runs.values() for name in case)
    ours = iter(OUR_COLORS * len(names))
    peers = iter(PEER_COLORS * len(names))
    return {
        name: next(ours) if name.startswith(OURS) else LIMIT_COLORS.get(name) or next(peers)
        for name in names
    }


def _bars(axes: Axes, report: Report, panel: Panel, colors: dict[str, str]) -> None:
    """Draw a group of bars per case. Each repetition is a point on its bar."""
    names = _names(report, panel)
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        for group, case in enumerate(panel.cases.values()):
            values = report.runs[case].get(name)
            if not values:
                continue
            at = group + (place - (len(names) - 1) / 2) * width
            axes.bar(at, statistics.median(values), width * 0.92, color=colors[name])
            axes.plot([at] * len(values), values, "o", color="white", mec=INK, ms=3, mew=0.6)
        axes.bar(0, 0, color=colors[name], label=name)
    axes.set_xticks(range(len(panel.cases)), list(panel.cases))
    if sum(max(map(len, label.splitlines()), default=0) for label in panel.cases) > LABEL_ROOM:
        for text in axes.get_xticklabels():
            text.set(rotation=25, ha="right")


def _lines(axes: Axes, report: Report, panel: Panel, colors: dict[str, str]) -> None:
    """Draw a line per contestant through its medians, with a band from minimum to maximum."""
    for name in _names(report, panel):
        found = [
            (place, report.runs[case][name])
            for place, case in enumerate(panel.cases.values())
            if name in report.runs[case]
        ]
        places = [place for place, _ in found]
        medians = [statistics.median(values) for _, values in found]
        axes.plot(places, medians, "o-", color=colors[name], label=name, ms=4, lw=1.8)
        lowest, highest = [min(v) for _, v in found], [max(v) for _, v in found]
        axes.fill_between(places, lowest, highest, color=colors[name], alpha=0.15, lw=0)
    axes.set_xticks(range(len(panel.cases)), list(panel.cases))


def _names(report: Report, panel: Panel) -> list[str]:
    return list(dict.fromkeys(name for case in panel.cases.values() for name in report.runs[case]))


def _finish(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import LogFormatter

    axes.set_title(panel.title, loc="left", fontsize=11.5, fontweight="bold", color=INK)
    axes.set_ylabel(panel.unit, color=INK)
    if panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(LogFormatter())
    else:
        axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#dadce0", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(fontsize=8.5, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def _subtitle() -> str:
    here: dict[str, Any] = machine()
    return (
        f"{time.strftime('%Y-%m-%d')}, {here['cores']} cores of {here['cpu']}, "
        f"{here['memory_gib']} GiB, Linux {here['kernel']}; points are repetitions, bars and lines "
        "their medians, bands lowest to highest"
    )
