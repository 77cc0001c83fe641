"""Draw pictures of plans."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from memkv_sglang.planning.replay import Hits
from memkv_sglang.planning.sizing import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#1a73e8", "#12a4af", "#188038", "#e37400", "#a8a8a8")
INK = "#202124"


def _figure(width: float, columns: int) -> "tuple[Figure, list[Axes]]":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(1, columns, i + 1) for i in range(columns)]
    for each in axes:
        for side in ("top", "right"):
            each.spines[side].set_visible(False)
        each.grid(axis="y", color="#dadce0", linewidth=0.8)
        each.set_axisbelow(True)
    return figure, axes


def draw_plan(plan: Plan, file: Path) -> None:
    """Draw the hits, sessions per GPU and used resources of a plan. Raises `OSError`."""
    figure, (hits, sessions, uses) = _figure(13, 3)
    result, scenario = plan.result, plan.result.scenario
    _bars(hits, {name: 100 * share for name, share in result.hits.items()}, "pages from", "%")
    _bars(sessions, plan.sessions_per_gpu, "sessions per GPU within the bound", "sessions")
    busiest = sorted(result.use.items(), key=lambda item: -item[1])[:5]
    _bars(uses, {name: 100 * share for name, share in busiest}, "busiest resources", "% used")
    figure.suptitle(
        f"{scenario.model}, {scenario.nodes} x {scenario.gpus} {scenario.gpu}, "
        f"{scenario.sessions} sessions of {scenario.context} tokens",
        color=INK,
    )
    figure.savefig(file, dpi=130)


def draw_curve(curve: Mapping[float, Hits], file: Path) -> None:
    """Draw a trace's hits by size of the disk. Raises `OSError`."""
    figure, (axes,) = _figure(7, 1)
    sizes = [size / 1e12 for size in curve]
    asked = [max(hits.asked, 1) for hits in curve.values()]
    lower: list[float] = [0.0] * len(sizes)
    for name, color in (("host", COLORS[0]), ("nvme", COLORS[2]), ("minio", COLORS[3])):
        values = [
            100 * getattr(hits, name) / total
            for hits, total in zip(curve.values(), asked, strict=True)
        ]
        upper = [a + b for a, b in zip(lower, values, strict=True)]
        axes.fill_between(sizes, lower, upper, color=color, alpha=0.75, lw=0, label=name)
        lower = upper
    ideal = [100 * hits.ideal / total for hits, total in zip(curve.values(), asked, strict=True)]
    axes.plot(sizes, ideal, "--", color=INK, lw=1, label="nothing evicted")
    _label(axes, "hits by NVMe per node", "% of the pages asked for")
    axes.set_xlabel("TB of NVMe per node")
    axes.set_ylim(0, 100)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(file, dpi=130)


def _bars(axes: "Axes", values: Mapping[str, float], title: str, unit: str) -> None:
    places = range(len(values))
    axes.bar(places, list(values.values()), color=COLORS[: len(values)], width=0.7)
    for place, value in zip(places, values.values(), strict=True):
        axes.annotate(
            f"{value:.3g}", (place, value), ha="center", va="bottom", fontsize=8.5, color=INK
        )
    axes.set_xticks(list(places), list(values), rotation=25, ha="right", fontsize=8.5)
    _label(axes, title, unit)


def _label(axes: "Axes", title: str, unit: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_ylabel(unit, color=INK)
