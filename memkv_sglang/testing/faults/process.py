"""Processes that are killed without warning."""

from memkv_sglang.testing.faults.base import Fault, leave_alone
from memkv_sglang.testing.faults.cluster import Cluster


def _kill_agents(cluster: Cluster) -> None:
    for node in cluster.nodes:
        node.end_agent()


def _kill_minio(cluster: Cluster) -> None:
    cluster.minio.kill()


def _kill_all(cluster: Cluster) -> None:
    _kill_minio(cluster)
    _kill_agents(cluster)


def _start_minio(cluster: Cluster) -> None:
    cluster.minio.start()


FAULTS = [
    Fault("agent killed", "process", _kill_agents, leave_alone),
    Fault("MinIO killed", "process", _kill_minio, _start_minio),
    Fault("all killed", "process", _kill_all, _start_minio),
]
