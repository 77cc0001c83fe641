"""Run rounds: traffic, a fault in the middle of it, and a check of every acknowledged page."""

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from memkv_sglang.page import Chain
from memkv_testbed.faults.base import Fault, Outcome
from memkv_testbed.faults.cluster import PAGE_BYTES, Cluster
from memkv_testbed.faults.node import wait_until
from memkv_testbed.faults.retention import Retention, Used
from memkv_testbed.faults.tally import Tally
from memkv_testbed.faults.traffic import Caller, Traffic

CALLERS = 2
"""Number of callers per node."""

BEFORE = 0.3
"""Seconds of traffic before the fault."""

DURING = 0.8
"""Seconds of traffic during the fault. They are longer than the stall timeout."""

PATIENCE = 5.0
"""Seconds that a page may be missing after a round, because the circuit may still be open."""

RECOVERY = 30.0
"""Seconds within which both nodes must load a page again."""


AUDIT = "all rounds, at the end"
"""Stands for the fault's name in the outcome of the audit."""


class Rounds:
    """A cluster and its callers, which all rounds share."""

    def __init__(self, cluster: Cluster) -> None:
        """Connect the callers."""
        self.cluster = cluster
        self.retention = Retention(cluster)
        self._acknowledged: list[Used] = []
        """Chains that were acknowledged in all rounds, except in those that destroyed copies."""
        self.expired_pages_left = 0
        """Number of pages that should have expired before the audit, but had not."""
        names = ("disk", "plain")
        self._callers = [
            Caller(node, f"{name} {i}")
            for name, node in zip(names, cluster.nodes, strict=True)
            for i in range(CALLERS)
        ]
        self._probes = [
            Caller(node, f"{name} probe") for name, node in zip(names, cluster.nodes, strict=True)
        ]

    def run(self, fault: Fault) -> Outcome:
        """Run one round. Raises `TimeoutError` if the cluster does not recover."""
        self._begin()
        if fault.after_flush:
            opened, first_hit = self._strike_copies(fault)
        else:
            with Traffic(self._callers):
                time.sleep(BEFORE)
                fault.inject(self.cluster)
                opened = self._watch_circuit(DURING)
                fault.heal(self.cluster)
                first_hit = self._wait_for_hits()
        return self._account(fault.name, fault.destroys, opened, first_hit)

    def _strike_copies(self, fault: Fault) -> tuple[float | None, float]:
        """Inject the fault and heal it while MinIO has every page, with traffic in between."""
        with Traffic(self._callers):
            time.sleep(BEFORE)
        self.cluster.disk_node.flush()
        fault.inject(self.cluster)
        with Traffic(self._callers):
            opened = self._watch_circuit(DURING)
        self.cluster.disk_node.flush()
        fault.heal(self.cluster)
        with Traffic(self._callers):
            return opened, self._wait_for_hits()

    def kill_agent(self, times: int) -> Outcome:
        """Kill the disk node's agent several times, each time at a random moment of its work."""
        self._begin()
        first_hit = 0.0
        with Traffic(self._callers, pause=0.0):
            for _ in range(times):
                time.sleep(random.uniform(0.0, 0.4))  # noqa: S311 - not a secret
                self.cluster.disk_node.end_agent()
                first_hit = max(first_hit, self._wait_for_hits())
        return self._account("agent killed at random moments", False, None, first_hit)

    def audit(self) -> Outcome:
        """Load every acknowledged page that must still be there once more, from MinIO."""
        self.cluster.disk_node.flush()
        self.expired_pages_left = self.retention.expired_left(self._acknowledged)
        auditor = self._callers[-1]
        auditor.take()
        kept = self.retention.must_stay(self._acknowledged)
        lost = sum(_missing(auditor, chain, PATIENCE) for chain in kept)
        seen = auditor.take()
        return Outcome(
            fault=AUDIT,
            calls=seen.calls,
            hits=seen.hits,
            misses=seen.misses,
            wrong_pages=seen.wrong,
            acknowledged_pages=0,  # these were already counted in their rounds
            acknowledged_pages_lost=lost,
            destroyed_pages=0,
            hung_calls=seen.hung + len(seen.errors),
            changed_pages=seen.changed,
            violations=(),
            lookups=(),
            slowest_move=max(seen.moves, default=0.0),
            circuit_opened=None,
            first_hit=0.0,
        )

    def _begin(self) -> None:
        """Forget earlier rounds, and spill one chain per caller."""
        for caller in (*self._callers, *self._probes):
            caller.acknowledged.clear()
            wait_until(caller.spill, "a spill")
            caller.take()

    def _watch_circuit(self, seconds: float) -> float | None:
        """Load pages from MinIO until its circuit opens; return the seconds, or None if it did not.

        Takes longer than `seconds` if nothing is loaded but the circuit is still closed.
        """
        probe, opened = self._probes[-1], None
        hits = probe.tally.hits
        with _loading(probe):
            began = time.monotonic()
            while (elapsed := time.monotonic() - began) < seconds or (
                opened is None and probe.tally.hits == hits and elapsed < PATIENCE
            ):
                if opened is None and self.cluster.plain_node.breaker() == "open":
                    opened = time.monotonic() - began
                time.sleep(0.01)
        return opened

    def _wait_for_hits(self) -> float:
        """Return the seconds until both nodes have loaded a page."""
        return max(
            wait_until(lambda: _hit(probe), "a hit after the fault", RECOVERY)  # noqa: B023
            for probe in self._probes
        )

    def _account(
        self, name: str, destroys: bool, opened: float | None, first_hit: float
    ) -> Outcome:
        seen = self._take()
        violations, self.cluster.violations = tuple(self.cluster.violations), []
        stored = [(caller, chain) for caller in self._callers for chain in caller.acknowledged]
        stored += [(self._callers[0], chain) for chain in self.cluster.acknowledged]
        self.cluster.acknowledged = []
        acknowledged = sum(len(chain.hashes) for _, chain in stored)
        for caller, chain in stored:
            # A lookup counts as a use of the page in MinIO. A load from the disk alone does not.
            caller.lookup(chain)
        if not destroys:
            now = time.monotonic()
            self._acknowledged += [Used(chain, now) for _, chain in stored]
        self.retention.measure()
        patience = 0.0 if destroys else PATIENCE
        lost = sum(_missing(caller, chain, patience) for caller, chain in stored)
        if not self.retention.keeps(acknowledged * PAGE_BYTES):
            lost = 0  # a long round: collections had to remove some of its pages
        audit = self._take()
        return Outcome(
            fault=name,
            calls=seen.calls,
            hits=seen.hits + audit.hits,
            misses=seen.misses,
            wrong_pages=seen.wrong + audit.wrong,
            acknowledged_pages=acknowledged,
            acknowledged_pages_lost=0 if destroys else lost,
            destroyed_pages=lost if destroys else 0,
            hung_calls=seen.hung + audit.hung + len(seen.errors) + len(audit.errors),
            changed_pages=seen.changed + audit.changed,
            violations=violations,
            lookups=seen.lookups,
            slowest_move=max(seen.moves, default=0.0),
            circuit_opened=opened,
            first_hit=first_hit,
        )

    def _take(self) -> Tally:
        total, self.cluster.seen = self.cluster.seen, Tally()
        for caller in (*self._callers, *self._probes):
            total += caller.take()
        return total

    def close(self) -> None:
        """Disconnect all callers."""
        self.retention.close()
        for caller in (*self._callers, *self._probes):
            caller.close()


@contextmanager
def _loading(probe: Caller) -> Iterator[None]:
    """Load the caller's first chain repeatedly, in a thread, while the block runs."""
    stopped = threading.Event()

    def load() -> None:
        while not stopped.wait(0.01):
            probe.load(probe.acknowledged[0])

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def _hit(probe: Caller) -> bool:
    """Load a page from before the fault or, if the fault destroyed it, one that is stored now."""
    if probe.load(probe.acknowledged[0]):
        return True
    probe.spill()
    return bool(probe.load(probe.acknowledged[-1]))


def _missing(caller: Caller, chain: Chain, patience: float) -> int:
    """Return how many of the chain's pages are still missing after `patience` seconds."""
    with suppress(TimeoutError):
        wait_until(lambda: caller.load(chain) == len(chain.hashes), "every page", patience)
        return 0
    return len(chain.hashes) - caller.load(chain)
