"""Processes that are killed without warning, and clients that fork."""

import os
import signal
from contextlib import ExitStack

from memkv_sglang.testing.pages import make_chain
from memkv_testbed.faults.base import Fault, leave_alone
from memkv_testbed.faults.cluster import NAMESPACE, Cluster
from memkv_testbed.processes import map_readers

_READERS = 4
"""Of an agent's memory map."""

_CHILD_CALLS = 200
_CHILD_LIMIT = 30
"""Seconds after which a forked child is taken for hung, and ends."""


def _kill_agents(cluster: Cluster) -> None:
    for node in cluster.nodes:
        node.end_agent()


def _kill_watched_agents(cluster: Cluster) -> None:
    with ExitStack() as stack:
        for node in cluster.nodes:
            if (pid := node.agent_pid()) is not None:
                stack.enter_context(map_readers(pid, _READERS))
        _kill_agents(cluster)


def _fork_clients(cluster: Cluster) -> None:
    """Let a forked child call its parent's clients. Raises `RuntimeError` if that works."""
    child = os.fork()
    if child == 0:
        signal.alarm(_CHILD_LIMIT)
        chain = make_chain(NAMESPACE, 1, "nobody's")
        answered = [
            node.client.lookup(chain).complete
            for node in cluster.nodes
            for _ in range(_CHILD_CALLS)
        ]
        os._exit(any(answered))
    if os.waitpid(child, 0)[1]:
        raise RuntimeError("a forked child got an answer, or hung")


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
    Fault("client forks", "process", _fork_clients, leave_alone),
    Fault("MinIO killed", "process", _kill_minio, _start_minio),
    Fault("all killed", "process", _kill_all, _start_minio),
]
