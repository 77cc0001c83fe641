"""Whatever fails below the server, every request is answered with the same text."""

import pytest
from memkv_testbed.minio_server import MinioServer

from tests.serving.conftest import Cluster
from tests.serving.node import (
    THRESHOLD,
    from_storage,
    prompt,
    reusable,
    start_all,
    wait_until,
)
from tests.serving.traffic import PROMPTS, Expected, Traffic


@pytest.fixture(scope="module")
def expected(cluster: Cluster) -> Expected:
    return {i: [cluster.recompute(tokens)] for i, tokens in enumerate(PROMPTS)}


def hits_come_back(cluster: Cluster, name: str) -> None:
    """Wait until pages computed on one node come from storage on the other."""
    attempts = iter(range(100))

    def is_shared() -> bool:
        tokens = prompt(f"{name} {next(attempts)}", 400)
        try:
            cluster.a.generate(tokens)
            cluster.a.share()
        except (AssertionError, ConnectionError):
            return False  # the agent is not running yet, or nothing is uploaded yet
        return cluster.b.stored(tokens) == reusable(len(tokens))

    wait_until(is_shared)


def test_agents_killed_during_traffic(cluster: Cluster, expected: Expected) -> None:
    with Traffic([cluster.a, cluster.b], expected) as traffic:
        traffic.goes_on()
        cluster.a.kill_agent()
        cluster.b.kill_agent()
        traffic.goes_on()
    hits_come_back(cluster, "killed")


def test_minio_stopped_during_traffic(
    cluster: Cluster, storage: MinioServer, expected: Expected
) -> None:
    with Traffic([cluster.a, cluster.b], expected) as traffic:
        traffic.goes_on()
        storage.kill()
        traffic.goes_on()
        storage.start()
        traffic.goes_on()
    hits_come_back(cluster, "stopped")


def test_server_agent_and_minio_killed_at_once(
    cluster: Cluster, storage: MinioServer, expected: Expected
) -> None:
    """The other node keeps answering; pages that only the killed node's disk held come back and are
    shared.

    MinIO is killed first, so that no upload ends before the rest is killed.
    """
    tokens = prompt("before the kill")
    with Traffic([cluster.b], expected) as traffic:
        traffic.goes_on()
        storage.kill()
        computed = cluster.a.generate(tokens).output_ids
        cluster.a.flush()  # after this, all spills have been acknowledged
        cluster.a.kill_server()
        cluster.a.kill_agent()
        traffic.goes_on()
        storage.start()
        start_all(cluster.a)
        traffic.goes_on()
    assert computed == cluster.recompute(tokens)
    answer = cluster.a.generate(tokens)
    assert from_storage(answer) == reusable(len(tokens))
    assert answer.output_ids == computed
    cluster.a.share()
    wait_until(lambda: cluster.b.stored(tokens) == reusable(len(tokens)))
    hits_come_back(cluster, "killed at once")


def test_a_stalled_agent_stops_neither_requests_nor_a_flush(cluster: Cluster) -> None:
    """The agent stays suspended until it is killed."""
    known, fresh = prompt("stalled"), prompt("meanwhile")
    computed = cluster.recompute(known)
    cluster.a.generate(known)
    cluster.a.share()
    cluster.b.flush()
    with cluster.b.stalled_agent():
        assert cluster.b.generate(known).output_ids == computed
        assert cluster.b.generate(fresh).output_ids == cluster.recompute(fresh)
        cluster.b.flush()
        assert cluster.b.client.is_healthy()
        assert cluster.b.generate(known).output_ids == computed
    hits_come_back(cluster, "stalled")


def test_an_agent_that_hangs_in_a_spill(cluster: Cluster) -> None:
    """The spill in flight ends with the agent's process; then the server starts another agent."""
    # Too short for a lookup, so the spill is the first call that hangs.
    tokens = prompt("stalls", THRESHOLD - 1)
    computed = cluster.recompute(tokens)
    cluster.b.flush()
    before = cluster.b.agent_pid()
    with cluster.b.stalled_agent():
        assert cluster.b.generate(tokens).output_ids == computed
        cluster.b.flush()
        assert cluster.b.generate(tokens).output_ids == computed
    hits_come_back(cluster, "stored")
    assert cluster.b.agent_pid() != before
