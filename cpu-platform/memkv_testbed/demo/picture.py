"""Draw the time to first token by source of the prefix."""

from pathlib import Path
from statistics import median

LABELS = {
    "recompute": "no cache: recomputed",
    "minio": "MinIO (from another node)",
    "nvme": "NVMe (after a restart)",
    "host": "host pool",
    "top_tier": "top tier",
}
COLORS = {
    "recompute": "#9aa0a6",
    "minio": "#b5179e",
    "nvme": "#3a5bd9",
    "host": "#1b9aaa",
    "top_tier": "#2e9e5b",
}
INK = "#202124"
FAINT = "#5f6368"

TITLE = "Time to first token by source of the prefix"


def draw(samples: dict[str, list[float]], subtitle: str, path: Path) -> None:
    """Write a PNG with medians as bars and single measurements as points, on a log scale.

    `samples` has seconds by source, slowest source first. Sources without samples are left out.
    Raises `OSError`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    seen = {source: values for source, values in samples.items() if values}
    medians = [median(values) for values in seen.values()]
    figure = Figure(figsize=(10, 1.6 + 0.75 * len(seen)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = range(len(seen))
    axes.barh(places, medians, height=0.62, color=[COLORS[source] for source in seen])
    for place, values, middle in zip(places, seen.values(), medians, strict=True):
        axes.plot(values, [place] * len(values), "o", color="white", mec=INK, ms=5, mew=0.9)
        faster = medians[0] / middle
        text = _seconds(middle) + (f"   {faster:.0f}x faster" if place else "")
        axes.annotate(
            text, (max(values), place), (12, 0), textcoords="offset points",
            va="center", fontsize=12, fontweight="bold", color=INK,
        )  # fmt: skip
    axes.set_yticks(places, [LABELS[source] for source in seen], fontsize=12, color=INK)
    axes.invert_yaxis()
    axes.set_xscale("log")
    everything = [value for values in seen.values() for value in values]
    axes.set_xlim(min(everything) / 2.5, max(everything) * 3)
    axes.xaxis.set_major_formatter(lambda value, _: _seconds(value))
    axes.set_xlabel("logarithmic scale; points are single requests, bars their median", color=INK)
    axes.grid(axis="x", which="major", color="#dadce0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.suptitle(TITLE, x=0.01, ha="left", fontsize=17, fontweight="bold", color=INK)
    figure.supxlabel(subtitle, x=0.01, ha="left", fontsize=9, color=FAINT)
    figure.savefig(path)


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{value * 1000:.3g} ms"
