"""The result of a benchmark: every repetition, the figures, and how to present them."""

import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.machine import machine, versions

Measure = Callable[[], float]
"""Runs a contestant once and returns the measurement."""


class Panel(NamedTuple):
    """Cases that are shown together, in one table and on one pair of axes."""

    title: str
    unit: str
    cases: Mapping[str, str]
    """Keys of `Report.runs`, by the label to show for them."""
    lines: bool = False
    """Whether the cases are a sequence, such as lengths, and are drawn as lines."""
    log: bool = False
    """Whether the axis is logarithmic."""


@dataclass
class Report:
    """The result of one benchmark."""

    name: str
    unit: str
    runs: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Every repetition, by case and contestant."""
    figures: dict[str, float] = field(default_factory=dict)
    """Figures, mostly ratios of medians within one run."""
    panels: list[Panel] = field(default_factory=list)
    """How to present the runs. If empty, all cases are shown together."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Contestants that cannot run on this machine, with the reason."""
    notes: list[str] = field(default_factory=list)
    """Notes for the reader, one sentence each."""
    facts: dict[str, Any] = field(default_factory=dict)
    """More data for the JSON file."""

    def compete(self, case: str, contestants: Mapping[str, Measure], repetitions: int) -> None:
        """Run all contestants in turn, `repetitions` times, so that noise affects them equally."""
        # Like the agent, exclude imported modules from garbage collection while pages are moved.
        gc.collect()
        gc.freeze()
        for _ in range(repetitions):
            for name, measure in contestants.items():
                self.record(case, name, measure())

    def record(self, case: str, contestant: str, value: float) -> None:
        """Add a repetition that the caller has measured."""
        self.runs.setdefault(case, {}).setdefault(contestant, []).append(value)

    def median(self, case: str, contestant: str) -> float:
        """Return the median of a contestant's repetitions."""
        return statistics.median(self.runs[case][contestant])

    def ratio(self, case: str, contestant: str, base: str) -> float:
        """Return a contestant's median relative to that of `base`."""
        return self.median(case, contestant) / self.median(case, base)

    def views(self) -> list[Panel]:
        """Return the panels. By default, there is one with all cases."""
        return self.panels or [Panel(self.name, self.unit, {case: case for case in self.runs})]

    def write(self, file: Path) -> None:
        """Write everything to a JSON file, with the machine and the date."""
        file.write_text(json.dumps(self._document(), indent=1) + "\n")

    def _document(self) -> dict[str, Any]:
        return {
            "benchmark": self.name,
            "unit": self.unit,
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine(),
            "versions": versions(),
            "figures": self.figures,
            "left_out": self.left_out,
            "notes": self.notes,
            "panels": [panel._asdict() for panel in self.panels],
            "runs": self.runs,
            **self.facts,
        }
