"""Compare the simulator with published results.

Its parameters were frozen in the commit `FROZEN`.
"""

from typing import NamedTuple

from benchmarks.report import Panel, Report
from benchmarks.scale.cases import base, node_rate
from benchmarks.trace.requests import TRACE
from memkv_sglang.planning.replay import Tiers, replay
from memkv_sglang.planning.scenario import Scenario
from memkv_sglang.planning.storage import amplification
from memkv_sglang.planning.traces import read_trace

FROZEN = "0bf2080"
"""Commit of the calibration files, made before the first comparison."""
TOLERANCE = 0.3
GIB = 1 << 30
GBIT = 1e9 / 8
MOONCAKE_NODES = 10
"""Not published; an assumption."""
LOCAL_PAGES = 3_000_000 // 512


class Point(NamedTuple):
    """One published result and its prediction."""

    what: str
    conditions: str
    published: float
    predicted: float | None
    """None: the conditions that a prediction needs were not published."""
    remark: str = ""

    @property
    def error(self) -> float | None:
        """Relative error of the prediction."""
        return None if self.predicted is None else self.predicted / self.published - 1


def add_published(report: Report) -> None:
    """Add every point."""
    points = [*_servers(), *_networks(), *_mooncake(), *_sglang(), *_others()]
    within = predicted = 0
    for number, point in enumerate(points, 1):
        case = f"{number}. {point.what}"
        report.record(case, "published", point.published)
        if point.predicted is not None:
            report.record(case, "predicted", point.predicted)
            predicted += 1
        within += point.error is not None and abs(point.error) <= TOLERANCE
    report.facts["published"] = {
        "frozen": FROZEN,
        "points": [{**point._asdict(), "error": point.error} for point in points],
    }
    report.figures |= {
        "scale_published_points": len(points),
        "scale_published_predicted": predicted,
        "scale_published_within_30_percent": within,
    }
    cases = {f"{number}": f"{number}. {point.what}" for number, point in enumerate(points, 1)}
    report.panels.append(Panel("published results", "units of each", cases, log=True))


def _servers() -> list[Point]:
    old = base(servers=32).replace(server_nic=100 * GBIT * 0.97)
    pod = base(servers=12).replace(server_nic=400 * GBIT * 0.97)
    old_share, pod_share = amplification(old), amplification(pod)
    return [
        Point(
            "MinIO GET, GB/s per server",
            "32 i3en.24xlarge, 100 GbE, EC:4 (2021-12)",
            10.2 * GIB / 1e9,
            old.server_nic / old_share.get_out / 1e9,
            "the published rate fills 87 % of the network card, which leaves no room for reads "
            "between servers",
        ),
        Point(
            "MinIO PUT, GB/s per server",
            "as above",
            5.2 * GIB / 1e9,
            old.server_nic / old_share.put_in / 1e9,
        ),
        Point(
            "DataPod GET, GB/s per server",
            "sizing, 12 servers, 2 x 200 Gb/s",
            25 * GIB / 1e9,
            pod.server_nic / pod_share.get_out / 1e9,
        ),
        Point(
            "DataPod PUT, GB/s per server",
            "as above",
            200 / 12 * GIB / 1e9,
            pod.server_nic / pod_share.put_in / 1e9,
        ),
        Point(
            "MinIO GETs of 64 KiB, 1,000 per second",
            "16 servers, cores and network not published; a lower bound",
            400,
            None,
        ),
        Point("AIStor GET, GB/s per server", "8 servers, QLC, network not published", 33.5, None),
    ]


def _networks() -> list[Point]:
    def rate(gbit: float) -> float:
        fast = base(servers=64, layout="shards").replace(nic=gbit * GBIT * 0.97, agent_cores=1e6)
        return node_rate(fast)[0] / 1e9

    return [
        Point("Mooncake, GB/s of a node", "40 GB over 4 x 200 Gb/s", 87, rate(800)),
        Point(
            "Mooncake, GB/s of a node",
            "40 GB over 8 x 400 Gb/s",
            190,
            rate(3200),
            "the host's memory limits it, which the simulator does not model",
        ),
        Point("3FS, GB/s of a client", "400 Gb/s", 40 * GIB / 1e9, rate(400)),
        Point(
            "3FS, TB/s",
            "180 storage nodes with 2 x 200 Gb/s",
            6.6 * 1.0995,
            180 * 400 * GBIT * 0.97 / 1e12,
        ),
        Point("FX100, GB/s of a node", "100 GbE", 10.3, rate(100)),
        Point(
            "LMCache on CoreWeave, GB/s of a node",
            "8.5 to 10; network not published, 100 GbE assumed",
            9.25,
            rate(100),
            "the network is an assumption",
        ),
    ]


def _mooncake() -> list[Point]:
    trace = read_trace(TRACE)
    alone = replay(trace, Tiers(LOCAL_PAGES, 0, 0), nodes=MOONCAKE_NODES, placement="round_robin")
    together = replay(trace, Tiers(LOCAL_PAGES * MOONCAKE_NODES, 0, 0))
    one = replay(trace, Tiers(LOCAL_PAGES, 0, 0))
    large = replay(trace, Tiers(50_000_000 // 512, 0, 0))
    scenario = base()
    even = scenario.kv_bytes_per_token / scenario.prefill.per_token / 1e9
    unsaved = (together.asked - together.total) / (alone.asked - alone.total)
    return [
        Point(
            "Mooncake, hits of a global cache / of local caches",
            f"an upper bound; 3M tokens a node; assumed: {MOONCAKE_NODES} nodes, round robin",
            2.36,
            together.total / alone.total,
            "the published value is the largest of several traces",
        ),
        Point("Mooncake, prefill saved", "an upper bound; as above", 0.48, 1 - unsaved),
        Point(
            "Mooncake, share of all hits with 3M tokens",
            "below a half",
            0.5,
            one.total / one.ideal,
        ),
        Point(
            "Mooncake, share of all hits with 50M tokens",
            "about all",
            1.0,
            large.total / large.ideal,
        ),
        Point(
            "Mooncake, GB/s to break even",
            "70B on 8 H800; H200 fp8 predicted",
            19,
            even,
            "the paper assumes peak FLOPS, which no engine reaches; the calibration uses "
            "measured times",
        ),
        Point("Mooncake, GB/s to break even", "70B on 8 A800: no calibration", 6, None),
        Point("Mooncake, Gb/s below which it hurts", "70B", 100, even * 8),
    ]


def _sglang() -> list[Point]:
    turns = 8
    hits = sum(range(turns)) / sum(range(1, turns + 1))
    left = (1 - hits) / (1 - 0.40)
    return [
        Point("HiCache with 3FS, hits", "25K tokens in 8 turns; 40 % before", 0.80, hits),
        Point(
            "HiCache with 3FS, first token saved",
            "as above; tokens to compute, without queues",
            0.56,
            1 - left,
        ),
        Point(
            "HiCache with 3FS, throughput",
            "as above",
            2.0,
            1 / left,
            "prefill only; decode does not get faster and was not published separately",
        ),
    ]


def _object_cache(tokens: int) -> Scenario:
    return base("llama-8b", context=tokens).replace(nic=100 * GBIT * 0.97)


def _others() -> list[Point]:
    short, long = _object_cache(4096), _object_cache(65_536)
    added = 4096 * short.kv_bytes_per_token / short.nic + short.lookup_seconds
    load = 65_536 * long.kv_bytes_per_token / long.nic
    cached = long.prefill.seconds(2048, 65_536 - 2048)
    return [
        Point(
            "ObjectCache, ms added at 4K tokens",
            "56 to 75; RGW over 100 Gb/s; Llama 8B assumed",
            65.5,
            1000 * added,
        ),
        Point(
            "ObjectCache, % added at 64K tokens",
            "as above; 2K tokens computed, assumed",
            5.6,
            100 * load / cached,
            "ObjectCache computes layers while later ones load; the simulator loads everything "
            "first",
        ),
        Point(
            "LMCache on CoreWeave, % of the first token saved", "22 to 32; hits not known", 27, None
        ),
        Point(
            "FX100, seconds to the first token",
            "480B, 16 at a time, MI308X: no calibration",
            11.9,
            None,
        ),
    ]
