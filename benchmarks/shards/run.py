"""Compare placements on shards, and what conversations keep when a shard fails.

Two real MinIO servers are each behind a limited link, so that links and not cores are the limit.
"""

import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from memkv_testbed.minio_server import MinioServer

from benchmarks.base import Options
from benchmarks.report import Panel, Report
from benchmarks.shards import retention
from benchmarks.shards.links import limit_links
from benchmarks.shards.placements import PLACEMENTS
from benchmarks.shards.throughput import ONE_SERVER, stored
from memkv_sglang.config.schema import KIB

MEGABITS = 200
"""Rate of each server's link, so low that a busy machine can serve both."""

PAGE = 256 * KIB
CONVERSATION = 128
"""Pages per conversation, without the shared prompt."""

COUNTS = (1, 8)
SHARDS = (2, 4, 8)
QUICK_SHARDS = (2,)


def run(options: Options) -> Report:
    """Measure throughput and retention. Raises `MissingToolError` without root, `ip` or `tc`."""
    report = Report("shards", "GB/s")
    _throughput(report, options)
    _retention(report, options)
    return report


def _throughput(report: Report, options: Options) -> None:
    addresses = limit_links(2, MEGABITS)
    repetitions = 1 if options.quick else options.repetitions
    labels = {}
    with ExitStack() as stack:
        scratch = stack.enter_context(
            tempfile.TemporaryDirectory(dir=options.directory, prefix="memkv-bench-")
        )
        servers = [
            stack.enter_context(MinioServer(Path(scratch) / address, host=address))
            for address in addresses
        ]
        with stored(servers, PAGE, COUNTS[-1], CONVERSATION) as contestants:
            for count in COUNTS:
                case = f"{count} at once"
                labels[case] = case
                runs = {name: partial(one.load, count) for name, one in contestants.items()}
                report.compete(case, runs, repetitions)
                for name in PLACEMENTS:
                    key = f"shards_{name.replace(' ', '_')}_over_one_{count}"
                    report.figures[key] = report.ratio(case, name, ONE_SERVER)
    report.panels.append(Panel(f"two servers of {MEGABITS} Mb/s each", "GB/s", labels))
    report.notes.append(
        f"each server's link is limited to {MEGABITS} Mb/s; conversations share a prompt of 16 "
        "pages, which is not loaded"
    )


def _retention(report: Report, options: Options) -> None:
    groups = 1 if options.quick else retention.GROUPS
    for replicas in (1, 2):
        for count in QUICK_SHARDS if options.quick else SHARDS:
            for placement in PLACEMENTS if replicas == 1 else ("page",):
                found = retention.measure(count, placement, replicas, groups)
                for event, share in found.items():
                    case = f"{count} shards, {replicas} replicas, {event}"
                    report.record(case, placement, share)
    labels = {case: case for case in report.runs if "shards," in case}
    report.panels.append(Panel("share of tokens kept", "", labels))
