"""Measure the time to first token of real servers, by source of the prefix and speed of MinIO."""

from collections.abc import Callable
from functools import partial
from itertools import count

from memkv_testbed.demo.node import Node
from memkv_testbed.tcp_proxy import TcpProxy
from sglang_cpu_platform.server import CpuServer

from benchmarks.base import Options
from benchmarks.report import Measure, Panel, Report
from benchmarks.serving import PAGE, Servers, Tokens, first_token, prompt, tell, tell_medians

QUESTION = 32
"""Number of tokens after the last whole page. A partial page is always computed."""

LENGTHS = {
    name: pages * PAGE + QUESTION
    for name, pages in {"2k": 8, "8k": 31, "16k": 63, "24k": 93}.items()
}
CLAIMED = "16k"
QUICK = {CLAIMED: LENGTHS[CLAIMED]}

OTHER = prompt("other", LENGTHS["24k"])
"""A prompt that fills the top tier, so that other prompts are only in the host pool."""

LOADS = 9
"""Loads per recomputation, because a recomputation takes tens of times as long."""

SLOWED = 20
"""Factor by which MinIO is slowed down."""

TOO_SLOW, TOO_SLOW_LENGTH = 3, LENGTHS["8k"]
"""Duration of a load from the slowest MinIO, relative to recomputing the prompt; and the prompt's
length."""

SLOW = f"{CLAIMED}, MinIO slowed to 1/{SLOWED}"
CRAWLING = "8k, MinIO slower than recomputing"
FINDS_OUT = f"{CRAWLING}, first request"

FAR = "MinIO, other node"

DOCUMENTED_PAGE = 64
"""Tokens per page that SGLang's documentation recommends for `seaweedfs`."""

AS_DOCUMENTED = f"seaweedfs, {DOCUMENTED_PAGE} tokens per page"

_numbers = count()


def run(options: Options) -> Report:
    """Measure with six servers at once. Needs about 14 GiB of memory.

    `--quick` uses one length and one round, and leaves out the host pool, SGLang's `file` backend
    and the separate server that recomputes. It still takes about three minutes, mostly to start the
    servers.
    """
    report = Report("ttft", "seconds to first token")
    with Servers(options.directory) as servers:
        contest = _Contest(servers, quick=options.quick)
        servers.wait()
        contest.fill()
        for name, length in (QUICK if options.quick else LENGTHS).items():
            contestants = contest.contestants(name, length)
            recompute = {"recompute": partial(contest.recompute, length)}
            for _ in range(1 if options.quick else options.repetitions):
                report.compete(name, recompute, 1)
                report.compete(name, contestants, LOADS)
            tell_medians(report, name)
        _slow_down(report, servers, contest, 1 if options.quick else 3)
    _claim(report)
    return report


class _Contest:
    """Servers, and what each contestant does before its first token is timed."""

    def __init__(self, servers: Servers, *, quick: bool) -> None:
        self.one, self.other = servers.node("a"), servers.node("b")
        self.plain = self.one.server if quick else servers.peer("plain")
        self._seaweedfs = servers.seaweedfs()
        self._as_documented = servers.seaweedfs(DOCUMENTED_PAGE)
        self._file = None if quick else servers.file()

    def fill(self) -> None:
        """Evict other prompts from the top tier, if the contestant needs that."""
        if self._file is not None:
            first_token(self.one.server, OTHER)

    def store(self, tokens: Tokens) -> None:
        """Compute a prompt on one node and upload it to MinIO. Then empty the node's pools."""
        first_token(self.one.server, tokens)
        self.one.server.client.flush_cache()  # waits until the agent has all pages
        self.one.wait_for_spill(0)

    def contestants(self, name: str, length: int) -> dict[str, Measure]:
        """Return the contestants for prompts of this length. Each has stored them."""
        tell(f"{length} tokens: every server with storage computes and stores the prompt")
        tokens = prompt(name, length)
        self.store(tokens)
        stores = {
            "seaweedfs": self._seaweedfs,
            AS_DOCUMENTED: self._as_documented,
            "file": self._file,
        }
        peers = {each: server for each, server in stores.items() if server is not None}
        for server in peers.values():
            first_token(server, tokens)

        def anew(server: CpuServer) -> float:
            """Empty the pools of a server, then send it a prompt."""
            server.client.flush_cache()
            return first_token(server, tokens)

        def evicted() -> float:
            first_token(self.one.server, OTHER)
            return first_token(self.one.server, tokens)

        def from_minio() -> float:
            before = self.other.loaded_pages().minio
            seconds = anew(self.other.server)
            assert self.other.loaded_pages().minio - before >= (length - 1) // PAGE
            return seconds

        ours: dict[str, Callable[[], float]] = {
            FAR: from_minio,
            "NVMe": lambda: anew(self.one.server),
            "top tier": lambda: first_token(self.one.server, tokens),
        }
        if self._file is not None:
            ours["host pool"] = evicted
        theirs = {each: (lambda s=server: anew(s)) for each, server in peers.items()}
        return {**ours, **theirs}

    def recompute(self, length: int) -> float:
        """Send a prompt that is new to the server."""
        return first_token(self.plain, prompt(f"new {next(_numbers)}", length))

    def stop(self) -> None:
        """Stop the servers that are no longer needed."""
        self.other.close()
        for server in (self._seaweedfs, self._as_documented, self._file):
            if server is not None:
                server.kill()


def _slow_down(report: Report, servers: Servers, contest: "_Contest", rounds: int) -> None:
    """Connect a third node to the same MinIO over a slow network."""
    loads = contest.other.loads("minio")
    contest.stop()
    tell("a node with a slow network to MinIO")
    unseen = [prompt(f"unseen {number}", TOO_SLOW_LENGTH) for number in range(rounds + 1)]
    for tokens in unseen:  # The pages that the node computes stay on its own disk.
        contest.store(tokens)
    with TcpProxy(servers.minio.host, servers.minio.port) as proxy:
        node = servers.node("c", endpoint=proxy.url)
        servers.wait()
        _let_it_learn(node)

        def anew(tokens: Tokens) -> float:
            node.server.client.flush_cache()
            return first_token(node.server, tokens)

        slow = prompt(CLAIMED, LENGTHS[CLAIMED])
        proxy.rate = loads.bytes / loads.seconds / SLOWED
        contestants = {"recompute": lambda: contest.recompute(len(slow)), FAR: lambda: anew(slow)}
        report.compete(SLOW, contestants, rounds)
        tell_medians(report, SLOW)
        # So slow that computing is faster. The first request pays for noticing that.
        size = loads.bytes / loads.pages * TOO_SLOW_LENGTH / PAGE
        proxy.rate = size / (TOO_SLOW * contest.recompute(TOO_SLOW_LENGTH))
        report.compete(FINDS_OUT, {FAR: lambda: anew(unseen.pop())}, 1)
        contestants = {
            "recompute": lambda: contest.recompute(TOO_SLOW_LENGTH),
            FAR: lambda: anew(unseen.pop()),
        }
        before = node.skipped_slow_pages()
        report.compete(CRAWLING, contestants, rounds)
        tell_medians(report, CRAWLING)
        report.figures["ttft_skipped_slow_pages"] = node.skipped_slow_pages() - before


def _let_it_learn(node: Node) -> None:
    """Let the server measure its prefill speed on prompts that are not stored."""
    for length in (LENGTHS["2k"], LENGTHS["8k"]):
        first_token(node.server, prompt(f"learn {length}", length))


def _claim(report: Report) -> None:
    base = "recompute"
    report.figures |= {
        "ttft_minio_over_recompute_16k": report.ratio(CLAIMED, FAR, base),
        "ttft_minio_over_seaweedfs_16k": report.ratio(CLAIMED, FAR, "seaweedfs"),
        "ttft_minio_over_documented_seaweedfs_16k": report.ratio(CLAIMED, FAR, AS_DOCUMENTED),
        "ttft_minio_minus_top_tier_ms_16k": 1e3
        * (report.median(CLAIMED, FAR) - report.median(CLAIMED, "top tier")),
        "ttft_nvme_over_recompute_16k": report.ratio(CLAIMED, "NVMe", base),
        "ttft_slow_minio_over_recompute_16k": report.ratio(SLOW, FAR, base),
        "ttft_too_slow_minio_over_recompute_8k": report.ratio(CRAWLING, FAR, base),
    }
    slowed = {"16k, 1/20 of the speed": SLOW, "8k, first seen": FINDS_OUT, "8k, known": CRAWLING}
    report.panels += [
        Panel(
            "prompt length in tokens",
            report.unit,
            {name: name for name in LENGTHS if name in report.runs},
            log=True,
        ),
        Panel("MinIO slowed down", report.unit, slowed),
    ]
