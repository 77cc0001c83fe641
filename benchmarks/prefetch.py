"""Compare SGLang's prefetch policies under load, on a server with two tensor-parallel ranks."""

import random
import statistics
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import NamedTuple

from memkv_testbed.demo.node import Node, wait_until
from memkv_testbed.tcp_proxy import TcpProxy
from sglang_cpu_platform.client import Answer, RequestFailedError

from benchmarks.base import Options
from benchmarks.report import Panel, Report
from benchmarks.serving import PAGE, Servers, Tokens, prompt, tell

POLICIES = ("timeout", "best_effort", "wait_complete")
"""The values of `--hicache-storage-prefetch-policy`."""

PREFIX = 10 * PAGE
"""Tokens of a stored prefix."""

KNOWN, QUICK_KNOWN = 18, 9
"""Number of stored prefixes. Each is requested once per round. The host pool holds only a few."""

NEW = 6
"""Requests per round whose prompts are not stored, so that ranks compute while others load."""

QUESTION = 32
"""Number of tokens after a stored prefix."""

IN_FLIGHT = 4
"""Concurrent requests."""

DEVICE_TOKENS = 16 * 1024
"""Tokens in the device pool. The host pool holds twice as many, of which half may be loads in
flight."""

HANG_SECONDS = 60.0
"""A request that takes longer counts as hung."""

ADMIN_KEY = "benchmark"

MEDIAN, TAIL = "median", "95th percentile"
HITS = "tokens from storage"
SLOW_MINIO, SLOW_SECONDS = "MinIO so slow that a load takes 4 s", 4.0

_numbers = count()


class Round(NamedTuple):
    """The requests of one round, in the order in which they are sent."""

    known: list[Tokens]
    new: list[Tokens]

    @classmethod
    def draw(cls, prefixes: list[Tokens], new: int, seed: int) -> "Round":
        """Add a question to every prefix, and some new prompts."""
        known = [[*prefix, *prompt(f"question {next(_numbers)}", QUESTION)] for prefix in prefixes]
        random.Random(seed).shuffle(known)
        return cls(known, [prompt(f"new {next(_numbers)}", PREFIX) for _ in range(new)])


class Measured(NamedTuple):
    """The result of a round."""

    first_tokens: list[float]
    """Seconds to the first token of the requests whose prefix is stored."""
    from_storage: int
    """Tokens."""
    hung: int
    """Number of requests that failed or took longer than `HANG_SECONDS`."""


def run(options: Options) -> Report:
    """Measure one server, whose policy changes between the runs. Needs about 4 GiB of memory."""
    report = Report("prefetch", "seconds to first token")
    prefixes = [
        prompt(f"prefix {number}", PREFIX)
        for number in range(QUICK_KNOWN if options.quick else KNOWN)
    ]
    with Servers(options.directory) as servers:
        proxy = servers.slow_line()
        node = _start(servers, proxy.url)
        tell(f"computing {len(prefixes)} prefixes of {PREFIX} tokens")
        for prefix in prefixes:
            node.server.client.generate(prefix, max_new_tokens=1)
        node.server.client.flush_cache()
        node.wait_for_spill(0)
        hung = dict.fromkeys(POLICIES, 0)
        for number in range(1 if options.quick else options.repetitions):
            for policy in _rotated(number):
                _choose(node, policy)
                measured = _measure(node, Round.draw(prefixes, NEW, number))
                hung[policy] += measured.hung
                _record(report, policy, measured)
        for number, prefix in enumerate(prefixes[: 1 if options.quick else 3]):
            for policy in _rotated(number):
                report.record(SLOW_MINIO, policy, _slowed(node, proxy, policy, prefix))
    _claim(report, hung, len(prefixes) * PREFIX)
    return report


def _rotated(number: int) -> tuple[str, ...]:
    """Return the policies in an order in which each comes first, second and last equally often."""
    first = number % len(POLICIES)
    return POLICIES[first:] + POLICIES[:first]


def _start(servers: Servers, endpoint: str) -> Node:
    """Start a server whose pages are only in MinIO."""
    extra = [
        *("--memkv-nvme-directory", ""),
        *("--tp-size", "2", "--admin-api-key", ADMIN_KEY),
        *("--max-total-tokens", str(DEVICE_TOKENS)),
    ]
    # On a busy machine, a tiny model may compute pages as fast as they load.
    env = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1", "MEMKV_ENGINE_SKIP_SLOW_LOADS": "false"}
    node = servers.node("tp2", endpoint=endpoint, extra=extra, env=env)
    node.server.client.admin_key = ADMIN_KEY
    node.server.client.timeout_s = HANG_SECONDS
    servers.wait()
    return node


def _choose(node: Node, policy: str) -> None:
    """Change the policy of the running server. Its pools are empty afterwards."""
    node.server.client.flush_cache()
    node.server.client.put(
        "/hicache/storage-backend",
        {"hicache_storage_backend": "dynamic", "hicache_storage_prefetch_policy": policy},
    )


def _measure(node: Node, requests: Round) -> Measured:
    """Send every request of a round, at most `IN_FLIGHT` of them at a time."""

    def ask(tokens: Tokens) -> Answer | None:
        try:
            return node.server.client.generate(tokens, max_new_tokens=8)
        except (RequestFailedError, OSError):
            return None

    mixed = _mix(requests)
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        answers = list(pool.map(ask, mixed))
    stored = {tuple(tokens) for tokens in requests.known}
    known = [a for a, t in zip(answers, mixed, strict=True) if a is not None and tuple(t) in stored]
    return Measured(
        [answer.ttft_s for answer in known],
        sum(answer.cached_by_source.get("storage", 0) for answer in known),
        sum(answer is None or answer.total_s > HANG_SECONDS for answer in answers),
    )


def _mix(requests: Round) -> list[Tokens]:
    """Spread the new prompts evenly among the known ones."""
    mixed = list(requests.known)
    step = len(mixed) // max(1, len(requests.new))
    for number, tokens in enumerate(requests.new):
        mixed.insert(number * (step + 1), tokens)
    return mixed


def _slowed(node: Node, proxy: TcpProxy, policy: str, prefix: Tokens) -> float:
    """Return the seconds to the first token of a stored prompt while MinIO is slow."""
    _choose(node, POLICIES[0])
    wait_until(lambda: _reuses(node), HANG_SECONDS, "the tier has not recovered")
    before = node.loads("minio")
    _generate(node, prefix)
    after = node.loads("minio")
    _choose(node, policy)
    proxy.rate = (after.bytes - before.bytes) / SLOW_SECONDS
    try:
        return _generate(node, prefix).ttft_s
    finally:
        proxy.rate = None


def _generate(node: Node, prefix: Tokens) -> Answer:
    question = prompt(f"question {next(_numbers)}", QUESTION)
    return node.server.client.generate([*prefix, *question], max_new_tokens=1)


def _reuses(node: Node) -> bool:
    """Return whether pages that the server stores now can be loaded again."""
    tokens = prompt(f"probe {next(_numbers)}", 4 * PAGE)
    node.server.client.generate(tokens, max_new_tokens=1)
    node.server.client.flush_cache()
    answer = node.server.client.generate(tokens, max_new_tokens=1)
    return answer.cached_by_source.get("storage", 0) > 0


def _record(report: Report, policy: str, measured: Measured) -> None:
    times = sorted(measured.first_tokens)
    report.record(MEDIAN, policy, statistics.median(times))
    report.record(TAIL, policy, statistics.quantiles(times, n=20, method="inclusive")[-1])
    report.record(HITS, policy, measured.from_storage)
    tell(
        f"{policy}: median {report.runs[MEDIAN][policy][-1]:.2f} s, 95th percentile "
        f"{report.runs[TAIL][policy][-1]:.2f} s, {measured.from_storage} tokens from storage"
    )


def _claim(report: Report, hung: dict[str, int], stored: int) -> None:
    base = "timeout"
    for policy in POLICIES:
        report.figures |= {
            f"prefetch_{policy}_hung": hung[policy],
            f"prefetch_{policy}_hit_rate": report.median(HITS, policy) / stored,
        }
        if policy != base:
            report.figures |= {
                f"prefetch_{policy}_over_timeout_median": report.ratio(MEDIAN, policy, base),
                f"prefetch_{policy}_over_timeout_p95": report.ratio(TAIL, policy, base),
            }
    report.panels += [
        Panel("under load", report.unit, {MEDIAN: MEDIAN, TAIL: TAIL}),
        Panel("one request", report.unit, {SLOW_MINIO: SLOW_MINIO}),
        Panel("reuse", "tokens", {HITS: HITS}),
    ]
    report.notes.append(
        f"A round asks for {stored // PREFIX} stored prefixes of {PREFIX} tokens and {NEW} new "
        f"prompts, {IN_FLIGHT} at a time."
    )
