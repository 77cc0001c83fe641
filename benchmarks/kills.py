"""Kill agents during loads. Count late writes, and measure how long clients wait."""

import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path

from memkv_testbed.kills import MIB, PAGES, Kill, Kills
from memkv_testbed.slow_disk import SlowDisk
from rich.progress import track

from benchmarks.base import Options
from benchmarks.report import Report

KILLS = 500
QUICK_KILLS = 10
READERS = 4
BUSY = 30 * MIB
"""Disk throughput in bytes per second during every second kill. Requests then take half a second.
"""


def run(options: Options) -> Report:
    """Kill `--rounds` agents, every second one while the disk is slow."""
    kills = options.rounds or (QUICK_KILLS if options.quick else KILLS)
    report = Report("kills", "ms from the kill to the end of the call")
    outcomes: list[Kill] = []
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.directory)))
        disks: list[SlowDisk | None] = [None]
        try:
            disks.append(stack.enter_context(SlowDisk(home)))
        except OSError as error:
            report.left_out["slow disk"] = f"no control group for disks: {error}"
        work = Kills(home, readers=READERS)
        for number in track(range(kills), "kills"):
            disk = disks[number % len(disks)]
            outcome = work.kill(disk, BUSY)
            outcomes.append(outcome)
            contestant = "slow disk" if disk else "normal disk"
            report.record("agent killed during a load", contestant, outcome.seconds * 1e3)
    waits = [outcome.seconds * 1e3 for outcome in outcomes]
    report.figures = {
        "kills": len(outcomes),
        "kills_in_mid_load": sum(outcome.loaded == 0 for outcome in outcomes),
        "readers": READERS,
        "pages_watched": PAGES * len(outcomes),
        "pages_changed": sum(outcome.changed for outcome in outcomes),
        "calls_with_withheld_pages": sum(outcome.withheld for outcome in outcomes),
        "median_wait_ms": round(statistics.median(waits), 1),
        "longest_wait_ms": round(max(waits), 1),
    }
    return report
