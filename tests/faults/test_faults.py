"""Every fault once: no wrong, lost or changed pages, no hung calls, and hits afterwards."""

import pytest
from memkv_testbed.chain_memory import ChainMemory
from memkv_testbed.faults.base import BUDGETS, Outcome
from memkv_testbed.faults.cluster import ENGINE, NAMESPACE, PAGE_BYTES
from memkv_testbed.faults.growth import Growth
from memkv_testbed.faults.registry import FAULTS
from memkv_testbed.faults.rounds import Rounds
from minio import Minio

from memkv_sglang.testing.pages import make_chain

OPENS = {
    "minio: stopped",
    "minio: refusing",
    "minio: key rotated",
    "minio: 503, Retry-After",
    "minio: 429, Retry-After",
    "minio: stalled in mid-body",
    "minio: reset in mid-body",
    "minio: truncated body",
    "minio: clock skew",
    "minio: redirect",
    "minio: garbage instead of HTTP",
}
"""Faults during which MinIO delivers no page."""

VARIANTS = {
    "minio: 429, Retry-After",
    "minio: reset in mid-body",
    "minio: truncated body",
    "minio: longer than declared",
    "minio: longer than stored",
    "minio: wrong ETag",
    "minio: wrong checksum metadata",
    "minio: redirect",
    "minio: garbage instead of HTTP",
    "bucket: odd objects",
    "bucket: wrong dates",
    "bucket: 503 with a wrong date",
    "bucket: control path drips",
    "client: forks",
    "client: sends overlapping buffers",
    "client: hangs up in mid-load",
    "nvme: ENOSPC from every call",
    "nvme: directory moved",
    "nvme: directory read-only",
    "nvme: foreign files",
    "nvme: journal flipped",
    "nvme: files grown",
    "process: agent killed while watched",
    "process: MinIO killed",
}
"""Faults that are like another one here, or that have tests of their own in `tests/cases`."""
assert set(FAULTS) >= VARIANTS

CIRCUIT_LIMIT = 2.0
"""Seconds after which the circuit must be open, however few calls have failed."""

LEAKED = 3
"""Growth between the thirds of 16 rounds; a leak of one in each round gives at least 5."""

BUSY = 1.0
"""Seconds added to every limit for busy machines; `benchmarks faults` adds none."""


def assert_harmless(outcome: Outcome) -> None:
    print(outcome._replace(lookups=()), f"lookups {outcome.lookup_p99:.3f} s (p99)")
    assert outcome.wrong_pages == 0
    assert outcome.acknowledged_pages_lost == 0
    assert outcome.hung_calls == 0
    assert outcome.changed_pages == 0
    assert outcome.violations == ()
    assert outcome.hits > 0
    assert outcome.lookups
    assert outcome.lookup_p99 <= BUDGETS * ENGINE.lookup_budget + BUSY
    assert outcome.slowest_move <= ENGINE.batch_deadline + BUSY


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, id=name, marks=[pytest.mark.slow] if name in VARIANTS else [])
        for name in FAULTS
    ],
)
def test_fault(rounds: Rounds, name: str) -> None:
    outcome = rounds.run(FAULTS[name])
    assert_harmless(outcome)
    if name in OPENS:
        assert outcome.circuit_opened is not None
        assert outcome.circuit_opened < CIRCUIT_LIMIT + BUSY


def test_the_machines_own_disk_is_never_filled(
    rounds: Rounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds.cluster, "mounted", False)
    fault, disk = FAULTS["nvme: file system full"], rounds.cluster.disk
    before = set(disk.iterdir())
    fault.inject(rounds.cluster)
    assert rounds.cluster.disk_fault.read_text() == "ENOSPC"
    assert set(disk.iterdir()) == before
    fault.heal(rounds.cluster)
    assert not rounds.cluster.disk_fault.exists()


def test_agent_killed_during_a_spill_and_during_a_load(rounds: Rounds) -> None:
    assert_harmless(rounds.kill_agent(3))


@pytest.mark.soak
def test_agent_does_not_leak_during_faults(rounds: Rounds) -> None:
    growth = Growth()
    agents = [node.agent_pid() for node in rounds.cluster.nodes]
    for _ in range(16):
        assert_harmless(rounds.run(FAULTS["minio: reset in mid-body"]))
        growth.sample(node.agent_pid() for node in rounds.cluster.nodes)
    assert [node.agent_pid() for node in rounds.cluster.nodes] == agents
    grown = growth.total()
    assert grown.threads < LEAKED
    assert grown.descriptors < LEAKED
    assert grown.memory_mb < 16


@pytest.mark.soak
def test_every_acknowledged_page_is_in_minio_at_the_end(rounds: Rounds) -> None:
    assert_harmless(rounds.run(FAULTS["minio: stopped"]))
    outcome = rounds.audit()
    assert (outcome.wrong_pages, outcome.acknowledged_pages_lost, outcome.hung_calls) == (0, 0, 0)
    assert outcome.hits > 0


def test_removed_foreign_object_is_a_violation(rounds: Rounds) -> None:
    cluster, fault = rounds.cluster, FAULTS["bucket: odd objects"]
    fault.inject(cluster)
    netloc = cluster.minio.endpoint.partition("://")[2]
    storage = Minio(netloc, *cluster.minio.root, secure=False)
    storage.remove_object("faults", "notes/readme")
    fault.heal(cluster)
    violations, cluster.violations = cluster.violations, []
    assert violations == ["removed: notes/readme"]


def test_changed_pages_are_counted(rounds: Rounds) -> None:
    memory = ChainMemory(rounds.cluster.disk_node.client, 4, PAGE_BYTES)
    memory.spill(make_chain(NAMESPACE, 4, "before"))
    before = memory.content()
    assert memory.changed_pages(before) == 0
    memory.spill(make_chain(NAMESPACE, 3, "after"))
    assert memory.changed_pages(before) == 3
