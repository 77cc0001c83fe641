"""What a benchmark found: every repetition, how to look at it, and the figures it claims."""

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
"""Runs a contestant once and returns what it reached."""


class Panel(NamedTuple):
    """Cases that are looked at together: a part of the table, and one set of axes."""

    title: str
    unit: str
    cases: Mapping[str, str]
    """Names in `Report.runs`, by the label that a reader sees."""
    lines: bool = False
    """Whether the cases follow one another (a depth, a length), and are drawn as lines."""
    log: bool = False
    """Whether the values are far apart and need a logarithmic scale."""


@dataclass
class Report:
    """What one benchmark found."""

    name: str
    unit: str
    runs: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Every repetition, by case and contestant."""
    figures: dict[str, float] = field(default_factory=dict)
    """What is claimed: mostly ratios of medians within one run."""
    panels: list[Panel] = field(default_factory=list)
    """How to look at the runs; without any, all cases are looked at together."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Contestants that cannot run here, with the reason."""
    notes: list[str] = field(default_factory=list)
    """What a reader must know beside the numbers, a sentence each."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Whatever else belongs into the JSON file."""

    def compete(self, case: str, contestants: Mapping[str, Measure], repetitions: int) -> None:
        """Run every contestant in turn, `repetitions` times, so that noise meets all alike."""
        # As the agent does: what peers have imported is not to be visited while pages are moved.
        gc.collect()
        gc.freeze()
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

    def views(self) -> list[Panel]:
        """Return the panels, or the one that shows everything."""
        return self.panels or [Panel(self.name, self.unit, {case: case for case in self.runs})]

    def write(self, file: Path) -> None:
        """Write everything, also where and when it was measured."""
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
