"""The replay of a day in simulated time: periods pass, and every S3 request has a purpose."""

from pathlib import Path

from benchmarks.trace.day import PAGE, replay
from benchmarks.trace.requests import Workload
from memkv_sglang.config.schema import CollectorConfig

HOUR = 3600.0


def test_pages_are_stored_loaded_elsewhere_used_and_removed_by_their_age(tmp_path: Path) -> None:
    """Two conversations; one ends, the other goes on for hours on another node."""
    ended, going = list(range(20)), list(range(100, 120))
    turns = [(0.0, 0, ended), (60.0, 0, going)]
    turns += [(hour * HOUR, 1, going) for hour in (1.5, 2.5, 3.5)]
    workload = Workload("turns", [turn[2] for turn in turns], [turn[0] for turn in turns])
    limits = CollectorConfig(max_age=2 * HOUR, capacity=1000 * PAGE)
    day = replay(workload, [turn[1] for turn in turns], 100, limits, tmp_path, 4 * HOUR)
    assert (day.hits, day.stored, day.removed) == (60, 40, 20)
    assert day.used == 20 + 4 * 20
    assert day.requests["spill"] == 40
    assert 20 <= day.requests["load"] <= 40  # the third load finds the pages on the disk
    assert 4 <= day.requests["usage"] <= 8
    assert day.requests.keys() <= {"spill", "load", "lookup", "usage", "removal", "pins"}
