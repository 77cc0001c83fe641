"""Estimate by simulation how much the tier helps and what hardware it needs."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import msgspec

from memkv_sglang.planning.cluster import Result, simulate
from memkv_sglang.planning.scenario import Scenario
from memkv_sglang.planning.storage import amplification

HEADROOM = 0.7
"""Maximum utilization of a resource in a plan. Above it, queues grow quickly."""
PATIENCE = 1.5
"""Bound on the 95th percentile of the time to first token, relative to the prefill time on an idle
replica."""
REQUESTS = 600
"""Number of requests in each simulation of the search for the most sessions."""
RUNS_PER_CONTEXT = 8
DAY = 86_400

Tell = Callable[[float], None]

TIERS: Mapping[str, Mapping[str, Any]] = {
    "device memory only": {"host_bytes": 0.0, "nvme_bytes": 0.0, "servers": 0},
    "and host pool": {"nvme_bytes": 0.0, "servers": 0},
    "and NVMe": {"servers": 0},
    "and MinIO": {},
}
"""For each set of tiers, the changes to a scenario that remove all other tiers."""


class Capacity(NamedTuple):
    """The most sessions that stay within the bound on the time to first token."""

    sessions: int
    first_token_p95: float
    bottleneck: str


class Plan(msgspec.Struct, frozen=True):
    """What a cluster needs for its traffic, and what it gets."""

    result: Result
    bound: float
    """Bound on the 95th percentile of the time to first token, in seconds."""
    bytes_per_token: float
    page_bytes: float
    object_bytes: float
    live_bytes: float
    """Bytes of the KV of all sessions."""
    nvme_bytes_per_node: float
    """Bytes of disk per node that hold the KV of the node's sessions."""
    bucket_bytes: float
    """Bytes of the KV of all sessions and of a day's uploads, with all copies."""
    uploaded_bytes_per_day: float
    servers: int
    """Number of storage servers with which their utilization stays below `HEADROOM`."""
    server_limit: str
    """The resource that limits a server."""
    node_gbit_s: float
    """Network throughput that a node needs for the same utilization."""
    sessions_per_gpu: dict[str, float]
    """Most sessions within the bound, by the tiers that are available."""
    bottlenecks: dict[str, str]


def run_for(context: int, new: int, page_tokens: int) -> int:
    """Return the pages per run that divide a steady context into `RUNS_PER_CONTEXT` runs."""
    return max(1, round((context - new) / page_tokens / RUNS_PER_CONTEXT))


def first_token_bound(scenario: Scenario) -> float:
    """Return the bound: `PATIENCE` times computing the context on an idle replica."""
    return PATIENCE * scenario.prefill.seconds(scenario.context, 0)


def most_sessions(scenario: Scenario, bound: float) -> Capacity:
    """Search for the most sessions of one node that stay within the bound.

    One node, with its share of the servers, represents all nodes.
    """
    one = scenario.replace(
        nodes=1, servers=math.ceil(scenario.servers / scenario.nodes), quantum=0.005
    )
    best = Capacity(0, math.inf, "GPU prefill")

    def keeps(sessions: int) -> bool:
        nonlocal best
        found = _try(one, sessions)
        if found.first_token_p95 > bound or found.is_behind:
            if not best.sessions:
                best = best._replace(bottleneck=found.bottleneck)
            return False
        if sessions > best.sessions:
            best = Capacity(sessions, found.first_token_p95, found.bottleneck)
        return True

    low, high = 0, max(1, int(_estimate(one)))
    while keeps(high) and high < 1 << 17:
        low, high = high, high * 2
    while high - low > max(1, low // 12):
        middle = (low + high) // 2
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return best


class _Tried(NamedTuple):
    first_token_p95: float
    bottleneck: str
    is_behind: bool
    """Whether requests arrive faster than they are answered."""


def _try(scenario: Scenario, sessions: int) -> _Tried:
    cycle = scenario.think.mean * scenario.think_scale
    seconds = max(cycle * REQUESTS / sessions, 60.0)
    result = simulate(scenario.replace(sessions=sessions, seconds=seconds, warm_up=seconds / 2))
    in_flight = scenario.replicas * scenario.device_tokens / max(scenario.context, 1)
    is_behind = result.waiting > 4 * in_flight + 0.2 * result.requests + 4
    return _Tried(result.first_token_p95, result.bottleneck, is_behind)


def _estimate(scenario: Scenario) -> float:
    """Estimate how many sessions a node can serve if every turn recomputes its context."""
    compute = scenario.prefill.seconds(scenario.context, 0)
    return scenario.replicas * scenario.think.mean * scenario.think_scale / compute


def make_plan(scenario: Scenario, *, bound: float | None = None, tell: Tell | None = None) -> Plan:
    """Simulate a steady scenario, and search for the most sessions with and without each tier."""
    limit = first_token_bound(scenario) if bound is None else bound
    tell = tell or (lambda _: None)
    result = simulate(scenario, tell=lambda share: tell(0.5 * share))
    capacities: dict[str, Capacity] = {}
    for i, (name, without) in enumerate(TIERS.items()):
        capacities[name] = most_sessions(scenario.replace(**without), limit)
        tell(0.5 + 0.125 * (i + 1))
    live = scenario.sessions * scenario.context * scenario.kv_bytes_per_token
    uploads = result.uploaded_bytes_per_s * DAY
    servers, reason = servers_needed(
        scenario, result.loaded_bytes_per_s["minio"], result.uploaded_bytes_per_s
    )
    sent = result.uploaded_bytes_per_s * amplification(scenario).puts
    most = max(result.loaded_bytes_per_s["minio"], sent)
    return Plan(
        result=result,
        bound=limit,
        bytes_per_token=scenario.kv_bytes_per_token,
        page_bytes=scenario.page_bytes,
        object_bytes=scenario.object_bytes,
        live_bytes=live,
        nvme_bytes_per_node=live / scenario.nodes / HEADROOM,
        bucket_bytes=(live + uploads) * amplification(scenario).puts,
        uploaded_bytes_per_day=uploads,
        servers=servers,
        server_limit=reason,
        node_gbit_s=most / scenario.nodes * 8 / 1e9 / HEADROOM,
        sessions_per_gpu={
            name: found.sessions / scenario.gpus for name, found in capacities.items()
        },
        bottlenecks={name: found.bottleneck for name, found in capacities.items()},
    )


def plan_document(plan: Plan) -> dict[str, Any]:
    """Return a plan as JSON values, with all inputs. Infinite sizes are null."""
    content: dict[str, Any] = msgspec.to_builtins(plan)
    content["result"] = plan.result.summary()
    scenario = content["result"]["scenario"]
    for name, value in scenario.items():
        if value == math.inf:
            scenario[name] = None
    return content


def servers_needed(scenario: Scenario, get: float, put: float) -> tuple[int, str]:
    """Return how many servers these rates need, in bytes per second, and what limits them.

    Tries one number after the other, because more servers widen the erasure sets.
    """
    servers = 1
    while True:
        uses = server_uses(scenario.replace(servers=servers), get, put)
        limit = max(uses, key=uses.__getitem__)
        if uses[limit] <= HEADROOM:
            return servers, limit
        servers = max(servers + 1, int(servers * uses[limit] / HEADROOM))


def server_uses(scenario: Scenario, get: float, put: float) -> dict[str, float]:
    """Return the utilization of each resource of the servers, for the total rates of all nodes."""
    s, share, size = scenario, amplification(scenario), scenario.object_bytes
    put_cpu = share.puts * s.server_put_cpu.per_byte_at(size)
    cpu = get * s.server_get_cpu.per_byte_at(size) + put * put_cpu
    return {
        "server network out": (get * share.get_out + put * share.put_out)
        / (s.servers * s.server_nic),
        "server network in": (get * share.get_in + put * share.put_in) / (s.servers * s.server_nic),
        "server CPU": cpu / (s.servers * s.server_cores),
        "server drives reading": get / (s.servers * s.server_drives_read),
        "server drives writing": put * share.put_drives / (s.servers * s.server_drives_write),
        "server published rate": get / (s.servers * s.server_limit),
    }
