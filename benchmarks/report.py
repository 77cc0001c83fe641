"""The result of a benchmark: every repetition, how to present it, and the figures."""

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
    """Cases shown together: one table and one set of axes."""

    title: str
    unit: str
    cases: Mapping[str, str]
    """Keys of `Report.runs` by the label to show."""
    lines: bool = False
    """Whether the cases are a sequence (depths, lengths) and are drawn as lines."""
    log: bool = False
    """Whether the scale is logarithmic."""


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
    """How to present the runs; empty to show all cases together."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Contestants that cannot run on this machine, with the reason."""
    notes: list[str] = field(default_factory=list)
    """Notes for the reader, one sentence each."""
    facts: dict[str, Any] = field(default_factory=dict)
    """More content for the JSON file."""

    def compete(self, case: str, contestants: Mapping[str, Measure], repetitions: int) -> None:
        """Run all contestants in turn, `repetitions` times, so that noise affects all equally."""
        # Like the agent, keep the garbage collector away from imported modules while pages are
        # moved.
        gc.collect()
        gc.freeze()
        for _ in range(repetitions):
            for name, measure in contestants.items():
                self.record(case, name, measure())

    def record(self, case: str, contestant: str, value: float) -> None:
        """Add one repetition that the caller measured."""
        self.runs.setdefault(case, {}).setdefault(contestant, []).append(value)

    def median(self, case: str, contestant: str) -> float:
        """Return the median of a contestant's repetitions."""
        return statistics.median(self.runs[case][contestant])

    def ratio(self, case: str, contestant: str, base: str) -> float:
        """Return the ratio of a contestant's median to the base's."""
        return self.median(case, contestant) / self.median(case, base)

    def views(self) -> list[Panel]:
        """Return the panels, by default one with all cases."""
        return self.panels or [Panel(self.name, self.unit, {case: case for case in self.runs})]

    def write(self, file: Path) -> None:
        """Write everything to JSON, including machine and date."""
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
