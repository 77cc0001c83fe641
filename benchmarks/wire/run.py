"""Measure how full loads and spills keep a line, compared with iperf3 over the same line.

Nodes and MinIO servers run on machines with networks of their own, whose lines have a limited
rate. Needs root and iperf3.
"""

import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

from memkv_testbed.machines import refusal, switched_machines
from memkv_testbed.minio_drives import TwoServers
from msgspec.structs import replace

from benchmarks.base import MissingToolError, Options, tool
from benchmarks.limits.iperf import Stream, iperf
from benchmarks.peers.base import PeerFailedError
from benchmarks.report import Measure, Panel, Report
from benchmarks.wire.balance import busy_share
from benchmarks.wire.nodes import (
    CALL_BYTES,
    Node,
    load_together,
    on_one,
    on_shards,
    shard_name,
    single_servers,
)
from memkv_sglang.config.schema import MIB, MinioConfig
from memkv_sglang.page import Chain
from memkv_sglang.testing.pages import make_namespace
from memkv_sglang.tiers.shards import Placement

SIZES = {"1m": MIB, "4m": 4 * MIB}

POOL = 256 * MIB
"""Bytes of a caller's pool. It holds two calls, which the caller repeats in turn."""

SECONDS = 4
QUICK_SECONDS = 2


class Lines(NamedTuple):
    """Rates of the machines' lines in Mb/s, and how many clients of a node call at once.

    Each client has one call in flight, which fails after 5 s even on a busy machine.
    """

    server: int
    node: int
    callers: int
    cluster_callers: int
    """Clients that load from the cluster: fewer where it delivers less than two single servers."""

    @property
    def name(self) -> str:
        """The rates in words."""
        return f"node {self.node / 1000:g} Gb/s, servers {self.server / 1000:g} Gb/s"


EQUAL = Lines(1000, 1000, callers=2, cluster_callers=2)
"""One server can fill a node's line."""

GEOMETRIES = {
    "": EQUAL,
    "_500m": Lines(500, 500, callers=1, cluster_callers=1),
    "_halves": Lines(500, 1000, callers=2, cluster_callers=1),
    "_2g": Lines(1000, 2000, callers=4, cluster_callers=2),
}
"""Keys are suffixes of figures. In the last two, two servers together fill a node's line."""

BALANCE_ROUNDS = 40
"""Runs of the model of how calls keep all shards busy."""

SHARDS, ONE_CALLER, CLUSTER, LIMIT = "shards", "shards, one caller", "cluster", "iperf3"
NODES = "both nodes"
CONNECTIONS = MinioConfig().connections


def run(options: Options) -> Report:
    """Measure loads and uploads of one node, then of two. Raises `MissingToolError`."""
    if reason := refusal():
        raise MissingToolError(f"wire: skipped, {reason}")
    tool("iperf3")
    report = Report("wire", "GB/s")
    repetitions = 1 if options.quick else options.repetitions
    seconds = QUICK_SECONDS if options.quick else SECONDS
    for size in SIZES:
        for lines in GEOMETRIES.values():
            try:
                _measure_node(report, options.directory, size, lines, repetitions, seconds)
            except PeerFailedError as error:
                report.left_out[f"{size}, {lines.name}"] = f"this machine is too slow: {error}"
                _drop_incomplete(report, size, lines)
        _measure_two_nodes(report, options.directory, size, repetitions, seconds)
    _record_balance(report, BALANCE_ROUNDS)
    _claim(report)
    return report


def _measure_node(
    report: Report, directory: Path, size: str, lines: Lines, repetitions: int, seconds: int
) -> None:
    """Compare one node's loads from two shards and from a cluster with iperf3."""
    with ExitStack() as stack:
        machines = stack.enter_context(switched_machines([lines.server, lines.server, lines.node]))
        servers, machine = machines[:2], machines[2]
        scratch = stack.enter_context(
            tempfile.TemporaryDirectory(dir=directory, prefix="memkv-bench-")
        )
        singles = stack.enter_context(single_servers(servers, Path(scratch)))
        cluster = stack.enter_context(TwoServers(servers))
        pages = POOL // SIZES[size]

        def node(config: MinioConfig, callers: int) -> Node:
            return stack.enter_context(Node.open(machine, config, callers, SIZES[size], pages))

        shards = node(on_shards(singles, "wire"), lines.callers)
        first = cluster.servers[0]
        joined = replace(on_one(first, "wire"), endpoint=cluster.endpoint)
        clustered = node(joined, lines.cluster_callers)
        _record_bound(report, size, lines, shards.callers.hashes)
        streams = [Stream(machine, server) for server in servers]

        def limit(*, upload: bool) -> float:
            return sum(iperf(streams, CONNECTIONS, seconds, upload=upload))

        loads: dict[str, Measure] = {
            LIMIT: partial(limit, upload=False),
            SHARDS: partial(shards.run, "load", lines.callers, seconds),
            ONE_CALLER: partial(shards.run, "load", 1, seconds),
            CLUSTER: partial(clustered.run, "load", lines.cluster_callers, seconds),
        }
        report.compete(_case("load", size, lines), loads, repetitions)
        if lines.server == lines.node:
            uploads: dict[str, Measure] = {
                LIMIT: partial(limit, upload=True),
                SHARDS: partial(shards.run, "spill", lines.callers, seconds),
            }
            report.compete(_case("upload", size, lines), uploads, repetitions)


def _drop_incomplete(report: Report, size: str, lines: Lines) -> None:
    for verb, contestants in (("load", 4), ("upload", 2)):
        runs = report.runs.get(_case(verb, size, lines), {})
        if len(runs) < contestants or len({len(values) for values in runs.values()}) > 1:
            report.runs.pop(_case(verb, size, lines), None)


def _measure_two_nodes(
    report: Report, directory: Path, size: str, repetitions: int, seconds: int
) -> None:
    """Let two nodes load from one server at the same time."""
    with ExitStack() as stack:
        machines = stack.enter_context(switched_machines([EQUAL.server, EQUAL.node, EQUAL.node]))
        scratch = stack.enter_context(
            tempfile.TemporaryDirectory(dir=directory, prefix="memkv-bench-")
        )
        (server,) = stack.enter_context(single_servers(machines[:1], Path(scratch)))
        pages = CALL_BYTES // SIZES[size]
        nodes = [
            stack.enter_context(
                Node.open(machine, on_one(server, f"node{number}"), 1, SIZES[size], pages)
            )
            for number, machine in enumerate(machines[1:])
        ]
        streams = [Stream(machine, machines[0]) for machine in machines[1:]]
        case = _case("two nodes", size, EQUAL)
        for _ in range(repetitions):
            limit = iperf(streams, CONNECTIONS, 2 * seconds, upload=False)
            report.record(case, LIMIT, sum(limit))
            together, shares = load_together(nodes, 2 * seconds)
            report.record(case, NODES, together)
            for number, (share, alone) in enumerate(zip(shares, limit, strict=True), 1):
                report.record(f"shares {size}", f"node {number}", share)
                report.record(f"shares {size}", f"{LIMIT} {number}", alone / sum(limit))


def _case(what: str, size: str, lines: Lines) -> str:
    return f"{what} {size}, {lines.name}"


def _record_bound(
    report: Report, size: str, lines: Lines, chains: Sequence[Sequence[bytes]]
) -> None:
    """Record how far the placement of these pages lets two equal servers fill a line."""
    placement = Placement([shard_name(0), shard_name(1)])
    namespace = make_namespace(page_bytes=SIZES[size]).digest
    keys = (key for chain in chains for key in Chain(namespace, chain).keys())
    held = Counter(map(placement.first, keys))
    bound = held.total() / len(held) / max(held.values())
    report.figures[f"line_bound_{size}_{lines.callers}_callers"] = bound


def _record_balance(report: Report, rounds: int) -> None:
    for shards in (2, 4):
        for callers in (1, 2, 4, 8):
            for alike, name in ((False, "placed by key"), (True, "placed by hash alone")):
                for seed in range(rounds):
                    share = busy_share(callers, shards, alike=alike, seed=seed)
                    case = f"balance, {shards} shards, {callers} callers"
                    report.record(case, name, share)


def _claim(report: Report) -> None:
    figures = report.figures
    for size in SIZES:
        for suffix, lines in GEOMETRIES.items():
            case = _case("load", size, lines)
            if case not in report.runs:
                continue
            for name, contestant in (
                ("", SHARDS),
                ("_one_caller", ONE_CALLER),
                ("_cluster", CLUSTER),
            ):
                ratio = report.ratio(case, contestant, LIMIT)
                figures[f"line_load{name}_{size}{suffix}"] = ratio
            case = _case("upload", size, lines)
            if case in report.runs:
                figures[f"line_upload_{size}{suffix}"] = report.ratio(case, SHARDS, LIMIT)
        case = _case("two nodes", size, EQUAL)
        figures[f"line_two_nodes_{size}"] = report.ratio(case, NODES, LIMIT)
        shares = [report.median(f"shares {size}", f"node {number}") for number in (1, 2)]
        figures[f"line_least_share_{size}"] = min(shares)
    _present(report)


def _present(report: Report) -> None:
    def cases(*starts: str) -> dict[str, str]:
        return {case: case for case in report.runs if case.startswith(starts)}

    report.panels = [
        Panel("payload over lines of limited rate", "GB/s", cases("load", "upload", "two")),
        Panel("share of a server's line", "", cases("shares")),
        Panel("share of the shards' rate that sequential calls can use (model)", "", cases("bal")),
    ]
    callers = ", ".join(f"{one.callers} ({one.name})" for one in GEOMETRIES.values())
    report.notes.append(
        f"calls of {CALL_BYTES // MIB} MiB; callers: {callers}, and one on each of two nodes; "
        f"iperf3 with {CONNECTIONS} connections per server; all machines share this machine's cores"
    )
