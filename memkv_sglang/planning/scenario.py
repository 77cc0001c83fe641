"""All inputs of a simulation."""

from collections.abc import Mapping
from typing import Any, Literal

import msgspec
from msgspec import Struct

from memkv_sglang.config.errors import ConfigError
from memkv_sglang.planning.calibration import (
    LinearCpu,
    Measured,
    Model,
    PrefillCost,
    Published,
    StepCost,
    fit_cpu,
    fit_prefill,
    fit_step,
)
from memkv_sglang.planning.workload import Think

RouterPolicy = Literal["sticky", "round_robin", "least_loaded", "cache_aware", "tier_aware"]

PAGE_BY_PAGE_NODES = 4
"""With up to this many nodes, disks evict page by page. In larger clusters, they evict runs of
pages."""
RUN_PAGES, LONG_RUN_PAGES = 32, 128
"""Pages per run with up to `RUN_NODES` nodes, and with more."""
RUN_NODES = 250
EXACT_NODES = 4
"""With up to this many nodes, flows start and end at any time. In larger clusters, they do so at
multiples of `QUANTUM`."""
QUANTUM = 0.01
"""Seconds."""


class Scenario(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A cluster, its traffic and the time to simulate, in bytes, seconds and tokens.

    Rates and sizes are per node or per server, unless the name says otherwise. A tier with 0 bytes
    or 0 servers does not exist.
    """

    model: str
    gpu: str
    nodes: int
    gpus: int
    """Per node."""
    replicas: int
    """Number of the model's replicas per node."""
    kv_bytes_per_token: float
    page_tokens: int
    objects_per_page: int
    device_tokens: float
    """Tokens of KV in a replica's device pool."""
    prefill: PrefillCost
    step: StepCost

    host_bytes: float
    nvme_bytes: float
    nvme_read: float
    nvme_write: float
    nvme_drive_bytes_per_day: float
    """Rated endurance of the node's drives, in bytes written per day."""
    host_to_device: float
    nic: float
    """Usable rate of the node's network card, each way."""
    agent_cores: float
    client_cpu: LinearCpu
    promote: Literal["never", "second_use", "always"] = "second_use"
    uploads: bool = True
    skip_slow_loads: bool = True
    balance_loads: bool = False
    """Load pages that are on disk from the bucket too, if both together are faster."""

    servers: int = 0
    shared_bytes: float = float("inf")
    """Capacity of the bucket on all servers."""
    layout: Literal["cluster", "shards"] = "cluster"
    """Whether the servers are one erasure-coded cluster, or independent with pages spread over them
    by hash."""
    copies: int = 1
    """Number of shards that store each page (`minio.replicas`)."""
    set_nodes: int = 16
    set_parity: int = 4
    server_nic: float
    server_cores: float
    server_get_cpu: LinearCpu
    server_put_cpu: LinearCpu
    server_drives_read: float
    server_drives_write: float
    server_limit: float = float("inf")
    """Upper limit of a server's rate, regardless of its hardware."""
    spine_oversubscription: float = 1.0
    """Oversubscription: the sum of the nodes' network cards, divided by the spine's capacity."""
    head_server_cpu: float
    heads_per_lookup: float
    lookup_seconds: float
    """Seconds of a lookup that asks the bucket."""

    router: RouterPolicy = "sticky"
    moves: float = 0.0
    """Share of turns that a sticky router sends to another node."""
    cache_threshold: float = 0.3
    balance_absolute: int = 64
    balance_relative: float = 1.5

    sessions: int
    """Number of sessions in the whole cluster."""
    workload: Literal["steady", "agentic"] = "steady"
    context: int = 0
    new_tokens: int = 720
    output_tokens: int = 216
    think: Think = Think(10.0, 175.0)
    think_scale: float = 1.0
    seconds: float = 600.0
    warm_up: float = 120.0
    seed: int = 1
    run_pages: int = 1
    quantum: float = 0.0

    restart_at: float = 0.0
    """Time at which all nodes restart and lose their device and host pools; 0 for never."""
    hot_prompt_at: float = 0.0
    """Time at which every node gets a request with the same prompt, which only the bucket has; 0
    for never."""
    hot_prompt_tokens: int = 0
    hot_servers: float = 0.0
    """Number of servers that these reads keep busy at once; see `storage.hot_servers`. 0 means all
    servers.
    """

    @property
    def page_bytes(self) -> float:
        """Bytes of a page on all ranks."""
        return self.page_tokens * self.kv_bytes_per_token

    @property
    def object_bytes(self) -> float:
        """Bytes of an object."""
        return self.page_bytes / self.objects_per_page

    def replace(self, **changes: Any) -> "Scenario":
        """Return a copy with these inputs changed."""
        return msgspec.structs.replace(self, **changes)


def make_scenario(
    numbers: Published,
    machine: Measured,
    *,
    model: str | Model,
    gpu: str = "h200",
    gpus: int = 8,
    nodes: int = 1,
    page_tokens: int = 64,
    changes: Mapping[str, Any] | None = None,
) -> Scenario:
    """Return a scenario with the calibration's numbers, overridden by `changes`.

    `model` is the name of a model in the calibration, or a model. Raises `ConfigError` if the model
    does not fit the GPUs, or if the calibration has no numbers for it.
    """
    kind = gpu_named(numbers, gpu)
    served = model if isinstance(model, Model) else model_named(numbers, model)
    rows = [row for row in served.prefill if row.gpu == gpu]
    if not rows:
        known = ", ".join(sorted({row.gpu for row in served.prefill}))
        raise ConfigError(f"--gpu {gpu}: no prefill times of {served.name}; there are: {known}")
    parallel = int(served.tensor_parallel.value)
    if gpus % parallel or gpus < parallel:
        raise ConfigError(
            f"--gpus {gpus}: {served.name} needs a multiple of {parallel} GPUs per node"
        )
    memory = parallel * kind.memory_bytes.value * kind.memory_fraction.value
    pool = memory - served.weight_bytes.value
    if pool <= 0:
        raise ConfigError(f"--gpu {gpu}: {served.name} does not fit {parallel} GPUs")
    node, server, calls = numbers.node, numbers.server, machine.calls
    rounds = calls.lookup_rounds.value
    run = RUN_PAGES if nodes <= RUN_NODES else LONG_RUN_PAGES
    run = 1 if nodes <= PAGE_BY_PAGE_NODES else run
    values: dict[str, Any] = {
        "model": served.name,
        "gpu": gpu,
        "nodes": nodes,
        "gpus": gpus,
        "replicas": gpus // parallel,
        "kv_bytes_per_token": served.kv_bytes_per_token.value,
        "page_tokens": page_tokens,
        "objects_per_page": int(served.ranks.value),
        "device_tokens": pool / served.kv_bytes_per_token.value,
        "prefill": fit_prefill(rows),
        "step": fit_step(served, gpu, kind),
        "host_bytes": node.host_pool_bytes.value,
        "nvme_bytes": node.nvme_bytes.value,
        "nvme_read": node.nvme_drives.value * node.drive_read_bytes_per_s.value,
        "nvme_write": node.nvme_drives.value * node.drive_write_bytes_per_s.value,
        "nvme_drive_bytes_per_day": node.nvme_bytes.value * node.drive_writes_per_day.value,
        "host_to_device": gpus * kind.host_to_device_bytes_per_s.value,
        "nic": node.nic_bytes_per_s.value * node.link_share.value,
        "agent_cores": node.agent_cores.value,
        "client_cpu": fit_cpu(machine.client_load),
        "set_nodes": int(server.set_nodes.value),
        "set_parity": int(server.set_parity.value),
        "server_nic": server.nic_bytes_per_s.value * server.link_share.value,
        "server_cores": server.cores.value,
        "server_get_cpu": fit_cpu(machine.server_get),
        "server_put_cpu": fit_cpu(machine.server_put),
        "server_drives_read": server.drives.value * server.drive_read_bytes_per_s.value,
        "server_drives_write": server.drives.value * server.drive_write_bytes_per_s.value,
        "head_server_cpu": calls.head_server_cpu_s.value,
        "heads_per_lookup": rounds * calls.heads_per_round.value * served.ranks.value,
        "lookup_seconds": calls.lookup_cold_s.value + rounds * calls.round_trip_s.value,
        "sessions": nodes,
        "run_pages": run,
        "quantum": 0.0 if nodes <= EXACT_NODES else QUANTUM,
    }
    return Scenario(**(values | dict(changes or {})))


def model_named(numbers: Published, name: str) -> Model:
    """Return a model of the calibration. Raises `ConfigError`."""
    if name not in numbers.models:
        raise ConfigError(
            f"--model {name}: unknown; give a config.json or one of {', '.join(numbers.models)}"
        )
    return numbers.models[name]


def gpu_named(numbers: Published, name: str) -> Any:
    """Return a GPU of the calibration. Raises `ConfigError`."""
    if name not in numbers.gpus:
        raise ConfigError(f"--gpu {name}: unknown; give one of {', '.join(numbers.gpus)}")
    return numbers.gpus[name]
