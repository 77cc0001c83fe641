"""The table of requests, for terminals with at least 80 columns."""

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from memkv_testbed.demo.record import Request, Row, rows

SOURCE_COLORS = {"device": "green", "host": "cyan", "nvme": "blue", "minio": "magenta"}
SOURCE_NAMES = {"device": "top\ntier", "host": "host", "nvme": "NVMe", "minio": "MinIO"}
COMPUTED_COLOR = "bright_black"

BAR_CELLS = 24
WIDE = 112
"""Minimum columns of a terminal in which the bars fit."""


def make_table(requests: Sequence[Request], width: int) -> Table:
    """Return the table: one row per step, with the median time of its repetitions."""
    table = Table(
        title="Prompt tokens by source, and seconds to first token",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 0, 0, 1) if width >= WIDE else 0,
    )
    table.add_column("request", no_wrap=True)
    table.add_column("on", no_wrap=True)
    table.add_column("prompt", justify="right")
    for source, name in SOURCE_NAMES.items():
        table.add_column(name, justify="right", style=SOURCE_COLORS[source])
    if width >= WIDE:
        table.add_column("reused, computed", width=BAR_CELLS)
    for name in ("first\ntoken", "no\ncache", "gain"):
        table.add_column(name, justify="right")
    table.add_column("same\ntext", justify="right")
    for row in rows(requests):
        table.add_row(*_cells(row, width))
    return table


def _cells(row: Row, width: int) -> list[str | Text]:
    request = row.first
    repeated = f" x{row.times}" if row.times > 1 else ""
    bars = [_bar(request)] if width >= WIDE else []
    return [
        request.step + repeated,
        request.node + ("*" if request.via == "router" else ""),
        f"{len(request.prompt):,}",
        *(f"{tokens:,}" if tokens else "·" for tokens in row.reused),
        *bars,
        f"{row.ttft_s:.2f}",
        *_comparison(row),
    ]


def _comparison(row: Row) -> list[str | Text]:
    if row.recompute_s is None:
        return ["…", "…", "…"]
    ratio = row.recompute_s / row.ttft_s
    return [
        f"{row.recompute_s:.2f}",
        Text(f"{ratio:.0f}x", style="bold") if ratio >= 1.5 else "1x",
        Text("✓", "green") if row.identical else Text("✗", "bold red"),
    ]


def _bar(request: Request) -> Text:
    """Return a bar that shows the prompt's sources in the colors of the columns."""
    bar, used, tokens = Text(), 0, 0
    for source, part in request.reused._asdict().items():
        tokens += part
        cells = round(BAR_CELLS * tokens / len(request.prompt)) - used
        bar.append("█" * cells, SOURCE_COLORS[source])
        used += cells
    return bar.append("░" * (BAR_CELLS - used), COMPUTED_COLOR)
