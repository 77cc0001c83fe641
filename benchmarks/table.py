"""Print a report as tables."""

import statistics

from rich.console import Console
from rich.table import Table

from benchmarks.report import Report


def show(report: Report) -> None:
    """Print one table per panel, the figures, and which contestants were left out and why."""
    console = Console()
    for panel in report.views():
        table = Table(title=f"{report.name}: {panel.title} ({panel.unit})", title_justify="left")
        for column in ("case", "contestant"):
            table.add_column(column)
        for column in ("median", "lowest", "highest"):
            table.add_column(column, justify="right")
        for label, case in panel.cases.items():
            for name, values in report.runs[case].items():
                numbers = (statistics.median(values), min(values), max(values))
                table.add_row(label, name, *(f"{number:.3g}" for number in numbers))
                label = ""
            table.add_section()
        console.print(table)
    for name, value in report.figures.items():
        console.print(f"{name}: {value:.4g}")
    for name, reason in report.left_out.items():
        console.print(f"omitted: {name}: {reason}", style="yellow")
    for note in report.notes:
        console.print(f"note: {note}", style="dim")
