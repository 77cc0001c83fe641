"""Repetitions, interleaved; medians with spread; a table and a JSON file."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import memkv_sglang

Measure = Callable[[], float]
"""Runs a contestant once and returns what it reached."""


@dataclass
class Report:
    """What one benchmark found."""

    name: str
    unit: str
    runs: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Every repetition, by case and contestant."""
    figures: dict[str, float] = field(default_factory=dict)
    """What is claimed: mostly ratios of medians within one run."""
    notes: list[str] = field(default_factory=list)
    """What a reader must know beside the numbers, a sentence each."""

    def compete(self, case: str, contestants: Mapping[str, Measure], repetitions: int) -> None:
        """Run every contestant in turn, `repetitions` times, so that noise meets all alike."""
        for _ in range(repetitions):
            for name, measure in contestants.items():
                self.record(case, name, measure())

    def record(self, case: str, contestant: str, value: float) -> None:
        """Keep one repetition that was measured elsewhere."""
        self.runs.setdefault(case, {}).setdefault(contestant, []).append(value)

    def median(self, case: str, contestant: str) -> float:
        """Return the median of a contestant's repetitions."""
        return statistics.median(self.runs[case][contestant])

    def ratio(self, case: str, contestant: str, base: str) -> float:
        """Return the median over the base's median."""
        return self.median(case, contestant) / self.median(case, base)

    def show(self) -> None:
        """Print the table and the figures."""
        table = Table(title=f"{self.name} ({self.unit})")
        for column in ("case", "contestant", "median", "lowest", "highest"):
            table.add_column(
                column, justify="left" if column in ("case", "contestant") else "right"
            )
        for case, contestants in self.runs.items():
            for name, values in contestants.items():
                numbers = (statistics.median(values), min(values), max(values))
                table.add_row(case, name, *(f"{number:.3f}" for number in numbers))
            table.add_section()
        console = Console()
        console.print(table)
        for name, value in self.figures.items():
            console.print(f"{name}: {value:.3g}")
        for note in self.notes:
            console.print(note, highlight=False)

    def write(self, file: Path) -> None:
        """Write everything, also where and when it was measured."""
        file.write_text(json.dumps(self._document(), indent=1) + "\n")

    def _document(self) -> dict[str, Any]:
        return {
            "benchmark": self.name,
            "unit": self.unit,
            "date": time.strftime("%Y-%m-%d"),
            "version": memkv_sglang.__version__,
            "machine": machine(),
            "runs": self.runs,
            "figures": self.figures,
            "notes": self.notes,
        }


def machine() -> dict[str, Any]:
    """Return what a reader must know of this machine to judge the numbers."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    memory = Path("/proc/meminfo").read_text().split(maxsplit=2)[1]
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(memory) / (1 << 20), 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
