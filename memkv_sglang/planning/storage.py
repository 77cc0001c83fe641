"""The links of a cluster: nodes, spine and storage servers."""

import math
import random
import statistics
from collections import Counter
from typing import NamedTuple

from memkv_sglang.planning.fabric import Fabric
from memkv_sglang.planning.scenario import Scenario

_PLACEMENTS = 40
"""Random placements of a call's pages to average over."""


class Amplification(NamedTuple):
    """How many bytes the servers move for each byte that a client sends or receives."""

    get_out: float
    get_in: float
    put_out: float
    put_in: float
    put_drives: float
    puts: int
    """PUTs of each page by its client."""


def amplification(scenario: Scenario) -> Amplification:
    """Return the amplification of erasure coding.

    In a cluster, the server that gets a request holds one share of the object and reads the others
    from its peers, over the same network cards. With n servers per erasure set, these are (n - 1) /
    n more bytes each way. PUTs send data and parity to the peers. Shards have no peers; a client
    sends a page to each shard that stores it.
    """
    data = 16 - scenario.set_parity
    overhead = 16 / data
    peers = min(scenario.set_nodes, scenario.servers)
    is_cluster = scenario.layout == "cluster"
    internode = (peers - 1) / peers if is_cluster and peers else 0.0
    puts = 1 if is_cluster else min(scenario.copies, max(scenario.servers, 1))
    return Amplification(
        get_out=1 + internode,
        get_in=internode,
        put_out=internode * overhead,
        put_in=puts + internode * overhead,
        put_drives=overhead * puts,
        puts=puts,
    )


def hot_servers(scenario: Scenario, *, connections: int = 8, call_pages: int = 128) -> float:
    """Return how many servers all nodes keep busy that read the same pages in the same order.

    A call of one rank loads `call_pages` pages, `connections` at a time. In a cluster, each object
    keeps its erasure set busy. Shards serve a call all at once, each over its own connections, and
    the call ends when the shard with the most pages has sent them.
    """
    s = scenario
    if s.layout == "cluster":
        sets = max(1.0, s.servers / s.set_nodes)
        in_flight = connections * s.objects_per_page
        return float(s.servers * (1 - (1 - 1 / sets) ** in_flight))
    objects = call_pages * s.objects_per_page
    rng = random.Random(s.seed)
    most = [
        max(Counter(rng.choices(range(s.servers), k=objects)).values()) for _ in range(_PLACEMENTS)
    ]
    return min(float(s.servers), objects / statistics.fmean(most))


class Routes(NamedTuple):
    """The routes that the bytes of one node take."""

    host: int
    """Host pool to device."""
    read: int
    """Disk to host pool (and device)."""
    write: int
    """Host pool to disk."""
    get: int
    """Bucket to host pool."""
    put: int
    """Disk to bucket."""
    hot: int
    """Bucket to host pool, if all nodes want the same objects."""


def build_links(fabric: Fabric, scenario: Scenario) -> list[Routes]:
    """Add the links and return each node's routes.

    There is one link of each kind for all servers together, because pages are spread over them by
    hash, so their load is equal.
    """
    s = scenario
    share = amplification(s)
    size = s.object_bytes
    is_limit = s.spine_oversubscription > 1
    spine = s.nodes * s.nic / s.spine_oversubscription if is_limit else math.inf
    down, up = fabric.add_link("spine down", spine), fabric.add_link("spine up", spine)
    server_out = fabric.add_link("server network out", max(s.servers, 1) * s.server_nic)
    server_in = fabric.add_link("server network in", max(s.servers, 1) * s.server_nic)
    server_cpu = fabric.add_link("server CPU", max(s.servers, 1) * s.server_cores)
    drives_read = fabric.add_link("server drives reading", max(s.servers, 1) * s.server_drives_read)
    drives_write = fabric.add_link(
        "server drives writing", max(s.servers, 1) * s.server_drives_write
    )
    software = fabric.add_link("server published rate", max(s.servers, 1) * s.server_limit)
    busy = s.hot_servers or max(s.servers, 1)
    hot = fabric.add_link("servers of hot objects", busy * s.server_nic / share.get_out)
    routes = []
    for node in range(s.nodes):
        into = fabric.add_link(f"node {node} network in", s.nic)
        out = fabric.add_link(f"node {node} network out", s.nic)
        cpu = fabric.add_link(f"node {node} agent CPU", s.agent_cores)
        reading = fabric.add_link(f"node {node} NVMe reading", max(s.nvme_read, 1.0))
        writing = fabric.add_link(f"node {node} NVMe writing", max(s.nvme_write, 1.0))
        device = fabric.add_link(f"node {node} host to device", s.host_to_device)
        client = s.client_cpu.per_byte_at(size)
        get = {
            into: 1.0,
            cpu: client,
            device: 1.0,
            down: 1.0,
            server_out: share.get_out,
            server_in: share.get_in,
            server_cpu: s.server_get_cpu.per_byte_at(size),
            drives_read: 1.0,
            software: 1.0,
        }
        put = {
            out: share.puts,
            cpu: client * share.puts,
            reading: 1.0 if s.nvme_bytes else 0.0,
            up: share.puts,
            server_in: share.put_in,
            server_out: share.put_out,
            server_cpu: s.server_put_cpu.per_byte_at(size) * share.puts,
            drives_write: share.put_drives,
        }
        routes.append(
            Routes(
                host=fabric.add_route({device: 1.0}),
                read=fabric.add_route({reading: 1.0, device: 1.0}),
                write=fabric.add_route({writing: 1.0}),
                get=fabric.add_route(get),
                put=fabric.add_route(put),
                hot=fabric.add_route({**get, hot: 1.0}),
            )
        )
    return routes
