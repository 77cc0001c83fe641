"""Count the S3 requests of a day of the agentic trace on four nodes, in simulated time."""

from benchmarks.base import Options
from benchmarks.report import Panel, Report
from benchmarks.trace.cluster import prefix_aware
from benchmarks.trace.day import DAY, PAGE, replay
from benchmarks.trace.requests import Workload
from benchmarks.uploads import AGENTIC, DISK_SHARE
from memkv_sglang.config.schema import CollectorConfig
from memkv_sglang.planning.traces import read_trace

SPACING = 360.0
"""Seconds between the starts of two sessions. The trace's 240 sessions start within a day."""
BLOCKS = 16
"""Blocks of the trace per page. A page then has 1,024 tokens."""
BUCKET_SHARE = 0.5
"""Capacity of the bucket, as a share of the different pages of the day."""
QUICK_SECONDS = 1800.0


def agentic_day(seconds: float = DAY) -> Workload:
    """Read the first `seconds` of the trace. Leaves out each prompt's last, incomplete page."""
    requests, times = [], []
    for one in read_trace(AGENTIC, spacing=SPACING).requests:
        if one.seconds < seconds and one.pages >= BLOCKS:
            requests.append(one.runs(BLOCKS)[: one.pages // BLOCKS])
            times.append(one.seconds)
    return Workload("agentic", requests, times)


def run(options: Options) -> Report:
    """Replay the day once. Once is enough, because the counts depend on no real clock."""
    seconds = QUICK_SECONDS if options.quick else DAY
    trace = agentic_day(seconds)
    report = Report("requests", "requests")
    day = replay(
        trace,
        prefix_aware(trace.requests),
        max(int(trace.pages * DISK_SHARE), 1),
        CollectorConfig(capacity=int(trace.pages * BUCKET_SHARE) * PAGE),
        options.directory,
        seconds,
    )
    for purpose, count in sorted(day.requests.items()):
        report.record("a day", purpose, count)
    report.panels.append(Panel("S3 requests", "requests", {"a day": "a day"}))
    report.figures = {
        "requests_spill_over_stored_pages": day.requests["spill"] / day.stored,
        "requests_lookup_over_calls": day.requests["lookup"] / len(trace.requests),
        "requests_load_over_loaded_pages": day.requests["load"] / day.hits,
        "requests_usage_over_used_pages": day.requests["usage"] / day.used,
        "requests_removal_over_removed_pages": day.requests["removal"] / max(day.removed, 1),
        "requests_over_stored_pages": sum(day.requests.values()) / day.stored,
        "requests_calls": len(trace.requests),
        "requests_loaded_pages": day.hits,
        "requests_used_pages": day.used,
        "requests_stored_pages": day.stored,
        "requests_removed_pages": day.removed,
    }
    return report
