"""Measure one agent that serves as many clients as a node has GPUs.

The S3 server keeps its objects in memory, so that the client is the bottleneck. Each caller is a
process with its own host pool, like a rank of SGLang, and calls the agent through its socket. The
`floor` is a C program that only receives and hashes the same objects.
"""

import contextlib
import math
import mmap
import os
import secrets
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import fmean

from memkv_testbed.certificates import Authority
from memkv_testbed.memory_server import MemoryServer

from benchmarks.base import Options
from benchmarks.limits.wrk import wrk
from benchmarks.minio import presigned
from benchmarks.node import lock_agent
from benchmarks.node.base import Rate
from benchmarks.node.callers import Callers, rates
from benchmarks.node.floor import Floor
from benchmarks.report import Measure, Panel, Report
from benchmarks.servers import RunningAgent, agent, importable, minio
from benchmarks.sizes import label
from memkv_sglang.config.schema import KIB, MIB, MinioConfig
from memkv_sglang.page import PageKey
from memkv_sglang.testing.pages import make_namespace
from memkv_sglang.tiers.minio.names import ObjectNames

SIZES = {
    "64k": 64 * KIB,
    "256k": 256 * KIB,
    "1m": MIB,
    "4m": 4 * MIB,
    "16m": 16 * MIB,
}
QUICK_SIZES = ("256k", "1m", "4m")
CLAIMED = ("256k", "1m", "4m")
"""Page sizes for which there are targets."""

COUNTS = (1, 2, 4, 8)
QUICK_COUNTS = (1, 8)
MOST = COUNTS[-1]
"""Numbers of callers. A node has eight GPUs."""

POOL = 128 * MIB
QUICK_POOL = 32 * MIB
"""Bytes of a caller's host pool, but at least one page per connection. With pages of 1 MiB, a call
moves 128 pages, as in SGLang."""

SECONDS = 2.0
QUICK_SECONDS = 0.3
"""Seconds per run."""

FORMS = ("plain", "tls", "encrypted")
OTHER_FORMS_SIZES = ("256k", "1m", "4m")
"""Page sizes for which TLS and encryption are measured."""

OTHER_FORMS_POOL = QUICK_POOL
"""Bytes of a caller's pool with TLS or encryption. On two busy cores, eight larger calls would not
end by their deadline."""

CORES = 37
"""Cores that loads may use on a node with 112: a third of them."""


def run(options: Options) -> Report:
    """Measure loads and uploads by number of callers, then MinIO. Raises `MissingToolError`."""
    report = Report("node", "GB/s")
    repetitions = 1 if options.quick else options.repetitions
    for name in QUICK_SIZES if options.quick else SIZES:
        forms = FORMS if name in OTHER_FORMS_SIZES else FORMS[:1]
        _measure_client(report, name, forms, repetitions, quick=options.quick)
    for name in CLAIMED:
        _measure_minio(report, name, options, repetitions)
    _claim(report)
    return report


def _measure_client(
    report: Report, size: str, forms: tuple[str, ...], repetitions: int, *, quick: bool
) -> None:
    """Measure one page size with the server in memory, all forms and numbers of callers in turn."""
    least = MinioConfig().connections * SIZES[size]
    pool = max(QUICK_POOL if quick else POOL, least)
    seconds = QUICK_SECONDS if quick else SECONDS
    counts = QUICK_COUNTS if quick else COUNTS
    with ExitStack() as stack:
        stack.enter_context(importable())
        loads: dict[str, Callable[[], Rate]] = {}
        spills: dict[str, Callable[[], Rate]] = {}
        for form in forms:
            own = pool if form == "plain" else max(min(OTHER_FORMS_POOL, pool), least)
            node = stack.enter_context(_Node.open(form, size, own))
            for count in counts if form == "plain" else (MOST,):
                loads[_contestant(form, count)] = partial(node.run, "load", count, seconds)
                spills[_contestant(form, count)] = partial(node.run, "spill", count, seconds)
            if form == "plain":
                floor = stack.enter_context(contextlib.closing(node.floor()))
                for count in (1, MOST):
                    loads[f"floor, {count}"] = partial(floor.run, count, seconds)
                plain = node
        for _ in range(repetitions):
            _compete(report, f"load {size}", loads)
            report.record(f"load {size} slowest", "memkv", plain.slowest_over_mean())
        for _ in range(repetitions):
            _compete(report, f"spill {size}", spills)


def _contestant(form: str, callers: int) -> str:
    return f"memkv {form}, {callers}"


def _compete(report: Report, case: str, contestants: Mapping[str, Callable[[], Rate]]) -> None:
    for name, measure in contestants.items():
        rate = measure()
        report.record(case, name, rate.gb_per_second)
        report.record(f"{case} cpu", name, rate.cpu_per_gb)
        if rate.samples:
            report.record(f"{case} lock", name, rate.lock_ms_per_gb)


class _Node:
    """One agent with its callers."""

    def __init__(self, running: RunningAgent, callers: Callers, counts: mmap.mmap) -> None:
        self._running = running
        self._callers = callers
        self._counts = counts

    @classmethod
    @contextmanager
    def open(cls, form: str, size: str, pool: int) -> Iterator["_Node"]:
        """Start server, agent and callers, and store the callers' pages."""
        with ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="memkv-bench-")))
            ca_file, key_file, certificate = "", "", None
            if form == "tls":
                authority = Authority(scratch / "certificates")
                certificate = authority.issue("server")
                ca_file = str(authority.file)
            if form == "encrypted":
                key_file = str(_make_keys(scratch / "keys"))
            limit = (MOST + 4) * pool  # the pages to load, and the pages spilled last
            server = stack.enter_context(MemoryServer(certificate, limit))
            config = MinioConfig(
                endpoint=server.endpoint,
                bucket="node",
                access_key=server.access_key,
                secret_key=server.secret_key,
                ca_file=ca_file,
                encryption_key_file=key_file,
            )
            running, counts = stack.enter_context(_counting_agent(config, scratch / "counts"))
            callers = Callers(running.config, MOST, pool // SIZES[size], SIZES[size])
            yield cls(running, stack.enter_context(callers), counts)

    def run(self, method: str, callers: int, seconds: float) -> Rate:
        """Make some callers load or spill."""
        cpu, (samples, held) = self._running.cpu_seconds(), self._samples()
        done = self._callers.run(method, callers, seconds)
        agent_cpu = self._running.cpu_seconds() - cpu
        after = self._samples()
        return Rate(
            bytes_per_second=rates(done),
            cpu=agent_cpu + sum(one.cpu for one in done),
            bytes=sum(one.bytes for one in done),
            agent_cpu=agent_cpu,
            samples=after[0] - samples,
            lock_samples=after[1] - held,
        )

    def slowest_over_mean(self) -> float:
        """Return the time of the slowest of equal concurrent calls, relative to their mean."""
        times = [one.seconds for one in self._callers.run("load", MOST)]
        return max(times) / fmean(times)

    def floor(self) -> Floor:
        """Return the `Floor` that loads the callers' objects."""
        config, pages = self._running.config.minio, self._callers.page_bytes
        names, digest = ObjectNames(config.prefix), make_namespace(page_bytes=pages).digest
        paths = [
            [f"/{config.bucket}/{names.page(PageKey(digest, one))}" for one in hashes]
            for hashes in self._callers.hashes
        ]
        return Floor(config.endpoint, paths, pages, config.connections)

    def _samples(self) -> tuple[int, int]:
        samples, held = struct.unpack_from("ll", self._counts)
        return samples, held


@contextmanager
def _counting_agent(config: MinioConfig, file: Path) -> Iterator[tuple[RunningAgent, mmap.mmap]]:
    """Run an agent that counts in a file; see `lock_agent`."""
    file.write_bytes(bytes(mmap.PAGESIZE))
    with ExitStack() as stack:
        opened = stack.enter_context(file.open("r+b"))
        counts = stack.enter_context(mmap.mmap(opened.fileno(), mmap.PAGESIZE))
        os.environ[lock_agent.COUNTS] = str(file)
        try:
            running = stack.enter_context(agent(minio=config, module=lock_agent.__name__))
        finally:
            del os.environ[lock_agent.COUNTS]
        yield running, counts


def _make_keys(file: Path) -> Path:
    file.touch(0o600)
    file.write_text(f'write = "bench"\n[keys]\nbench = "{secrets.token_hex(32)}"\n')
    return file


def _measure_minio(report: Report, size: str, options: Options, repetitions: int) -> None:
    """Compare all callers together with wrk on as many connections."""
    pool = QUICK_POOL if options.quick else POOL
    seconds = QUICK_SECONDS if options.quick else SECONDS
    with ExitStack() as stack:
        server = stack.enter_context(minio(options.directory))
        config = server.config("node")
        running = stack.enter_context(agent(minio=config))
        callers = stack.enter_context(
            Callers(running.config, MOST, pool // SIZES[size], SIZES[size])
        )
        urls = presigned(config)

        def load(count: int) -> float:
            return rates(callers.run("load", count, seconds)) / 1e9

        contestants: dict[str, Measure] = {
            _contestant("plain", count): partial(load, count) for count in (1, MOST)
        }
        for count in (1, MOST):
            connections = count * config.connections
            limit = partial(wrk, urls, connections, max(round(seconds), 1))
            contestants[f"wrk, {count}"] = limit
        report.compete(f"minio {size}", contestants, repetitions)


def _claim(report: Report) -> None:
    one, all_of_them = _contestant("plain", 1), _contestant("plain", MOST)
    figures = report.figures
    for size in CLAIMED:
        load, spill = f"load {size}", f"spill {size}"
        figures[f"node_load_8_over_1_{size}"] = report.ratio(load, all_of_them, one)
        cpu = f"{load} cpu"
        figures[f"node_load_cpu_8_over_1_{size}"] = report.ratio(cpu, all_of_them, one)
        for count in (1, MOST):
            ratio = report.ratio(cpu, _contestant("plain", count), f"floor, {count}")
            figures[f"node_load_over_floor_{count}_{size}"] = ratio
        figures[f"node_load_over_floor_{size}"] = figures[f"node_load_over_floor_{MOST}_{size}"]
        slowest = report.median(f"{load} slowest", "memkv")
        figures[f"node_load_slowest_over_mean_{size}"] = slowest
        lock = fmean(report.runs[f"{load} lock"][all_of_them])
        figures[f"node_lock_ms_per_gb_{size}"] = lock
        figures[f"node_upload_8_over_1_{size}"] = report.ratio(spill, all_of_them, one)
        upload_lock = fmean(report.runs[f"{spill} lock"][all_of_them])
        figures[f"node_upload_lock_ms_per_gb_{size}"] = upload_lock
        for form in FORMS[1:]:
            ratio = report.ratio(load, _contestant(form, MOST), all_of_them)
            figures[f"node_{form}_over_plain_{size}"] = ratio
        figures[f"node_load_over_wrk_8_{size}"] = report.ratio(
            f"minio {size}", all_of_them, f"wrk, {MOST}"
        )
        _derive_ceiling(report, size, report.median(cpu, all_of_them), lock)
    _present(report)


def _derive_ceiling(report: Report, size: str, cpu: float, lock: float) -> None:
    by_cpu, by_lock = CORES / cpu, 1e3 / lock if lock else math.inf
    floor = CORES / report.median(f"load {size} cpu", f"floor, {MOST}")
    report.figures[f"node_ceiling_gb_s_{size}"] = min(by_cpu, by_lock)
    limit = "CPU" if by_cpu < by_lock else "GIL"
    report.notes.append(
        f"ceiling, {label(size)}: min({CORES} cores / {cpu:.3f} s of CPU per GB = {by_cpu:.0f}, "
        f"1 s / {lock:.2f} ms of GIL per GB = {by_lock:.0f}) GB/s, limited by {limit}; "
        f"the C program: {CORES} / {CORES / floor:.3f} = {floor:.0f} GB/s"
    )


def _present(report: Report) -> None:
    sizes = [size for size in SIZES if f"load {size}" in report.runs]
    for verb in ("load", "spill"):
        for suffix, unit in (("", "GB/s"), (" cpu", "CPU s per GB"), (" lock", "GIL ms per GB")):
            cases = {label(size): f"{verb} {size}{suffix}" for size in sizes}
            report.panels.append(Panel(f"{verb}s, server in memory", unit, cases))
    report.panels += [
        Panel(
            "eight equal calls at once",
            "slowest / mean",
            {label(size): f"load {size} slowest" for size in sizes},
        ),
        Panel("loads, MinIO", "GB/s", {label(size): f"minio {size}" for size in CLAIMED}),
    ]
    report.notes.append("client and server share the machine's cores")
