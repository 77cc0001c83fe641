"""Processes that are killed without warning."""

from contextlib import ExitStack

from memkv_testbed.faults.base import Fault, leave_alone
from memkv_testbed.faults.cluster import Cluster
from memkv_testbed.processes import map_readers

_READERS = 4
"""Number of processes that read an agent's memory map."""


def _kill_agents(cluster: Cluster) -> None:
    for node in cluster.nodes:
        node.end_agent()


def _kill_watched_agents(cluster: Cluster) -> None:
    with ExitStack() as stack:
        for node in cluster.nodes:
            if (pid := node.agent_pid()) is not None:
                stack.enter_context(map_readers(pid, _READERS))
        _kill_agents(cluster)


def _kill_minio(cluster: Cluster) -> None:
    cluster.minio.kill()


def _kill_all(cluster: Cluster) -> None:
    _kill_minio(cluster)
    _kill_agents(cluster)


def _start_minio(cluster: Cluster) -> None:
    cluster.minio.start()


FAULTS = [
    Fault("agent killed", "process", _kill_agents, leave_alone),
    Fault("agent killed while watched", "process", _kill_watched_agents, leave_alone),
    Fault("MinIO killed", "process", _kill_minio, _start_minio),
    Fault("all killed", "process", _kill_all, _start_minio),
]
