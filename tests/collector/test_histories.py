"""Histories of stores, uses, flushes, rounds, kills and pins by two nodes, against a model."""

import contextlib

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from memkv_sglang.config.schema import CollectorConfig
from memkv_sglang.page import Chain, PageKey
from memkv_sglang.testing.pages import make_chain, make_namespace
from memkv_sglang.tiers.minio.retention import Collector, Pin, shard_pass
from memkv_sglang.tiers.minio.retention import collector as collecting
from memkv_sglang.tiers.minio.retention.collector import grace, settle
from memkv_sglang.tiers.minio.retention.contents import namespace_entries
from memkv_sglang.tiers.minio.retention.entries import REMOVED, UNKNOWN, Entries, entries, page_keys
from memkv_sglang.tiers.minio.retention.parts import Step
from tests.collector.memory_bucket import NAMES, MemoryBucket

PAGE = 1000
NAMESPACE = make_namespace(PAGE)
CHAINS = [make_chain(NAMESPACE, 12, f"history {i}") for i in range(6)]
PERIOD, AGE = 3600.0, 24 * 3600.0
LENGTHS = st.sampled_from([2, 5, 9, 12])
CAPACITY = 24 * PAGE
CONFIG = CollectorConfig(
    capacity=CAPACITY, max_age=AGE, interval=600.0, use_period=PERIOD, lease_ttl=60.0
)


class KilledError(Exception):
    """The node died."""


class Histories(RuleBasedStateMachine):
    """Two nodes and their bucket. The model knows every page's last use and who logged it."""

    def __init__(self) -> None:
        super().__init__()
        self.bucket = MemoryBucket()
        self.nodes = [self._collector() for _ in range(2)]
        self.unlogged: list[list[tuple[bytes, int, int, int, int]]] = [[], []]
        self.used: dict[PageKey, float] = {}
        self.pinned: set[PageKey] = set()
        self.whole = True
        """Whether every chain was stored and used from its first page on."""

    def _collector(self) -> Collector:
        return Collector(self.bucket.parts(4), CONFIG)

    def present(self) -> set[PageKey]:
        keys = map(NAMES.page_key, self.bucket.stored)
        return {key for key in keys if key is not None}

    def record(self, node: int, chain: Chain, *, store: bool) -> None:
        now = int(self.bucket.now)
        for place, key in enumerate(chain.keys()):
            name, is_there = NAMES.page(key), NAMES.page(key) in self.bucket.stored
            if store and not is_there:
                self.bucket.put(name, bytes(PAGE))
            elif not is_there:
                return
            size, written = (PAGE, now) if store and not is_there else (0, 0)
            self.unlogged[node].append((key.namespace + key.hash, size, now, written, place))
            self.used[key] = self.bucket.now

    def flush(self, node: int) -> None:
        if self.unlogged[node]:
            parts = self.bucket.parts(4)
            parts.logs.write(entries(self.unlogged[node]), self.bucket.now)
            self.unlogged[node].clear()

    @rule(node=st.integers(0, 1), number=st.integers(0, 5), length=LENGTHS)
    def spill(self, node: int, number: int, length: int) -> None:
        chain = CHAINS[number]
        self.record(node, Chain(chain.namespace, chain.hashes[:length]), store=True)

    @initialize(
        turns=st.lists(
            st.tuples(st.integers(0, 1), st.integers(0, 5), LENGTHS, st.sampled_from([0.0, 1.5])),
            min_size=4,
            max_size=9,
        )
    )
    def begin(self, turns: list[tuple[int, int, int, float]]) -> None:
        """Store the first chains, with some time between them."""
        for node, number, length, hours in turns:
            self.spill(node, number, length)
            self.wait(hours)

    @rule(node=st.integers(0, 1), number=st.integers(0, 5), length=LENGTHS)
    def use(self, node: int, number: int, length: int) -> None:
        chain = CHAINS[number]
        self.record(node, Chain(chain.namespace, chain.hashes[:length]), store=False)

    @rule(hours=st.sampled_from([0.5, 1.0, 5.0, 20.0]))
    def wait(self, hours: float) -> None:
        for node in range(2):  # each node writes its log at least once per interval
            self.flush(node)
        self.bucket.now += hours * 3600

    @rule(number=st.integers(0, 5), length=st.integers(1, 4))
    def pin(self, number: int, length: int) -> None:
        chain = CHAINS[number]
        self.bucket.parts(4).pins.add(
            Pin(
                namespaces=[chain.namespace.hex()],
                hashes=[page.hex() for page in chain.hashes[:length]],
                seconds=1e9,
            )
        )
        self.pinned |= set(chain.keys()[:length])

    @rule(node=st.integers(0, 1), number=st.integers(0, 5))
    def spill_and_collect(self, node: int, number: int) -> None:
        """Store a chain, then collect: most rounds remove pages because the bucket is full."""
        self.spill(node, number, 12)
        self.collect(node, number, None)

    @rule(
        node=st.integers(0, 1),
        late=st.integers(0, 5),
        kill_after=st.none() | st.integers(1, 30),
    )
    def collect(self, node: int, late: int, kill_after: int | None) -> None:
        """Run a round that may be killed; meanwhile the other node may use a chain."""
        steps = 0

        def step(_what: str, _done: int, _total: int | None) -> None:
            nonlocal steps
            steps += 1
            if steps == kill_after:
                raise KilledError

        for one in range(2):  # a node writes its log within an interval
            self.flush(one)
        before = self.present()
        try:
            self._round(self.nodes[node], late, step)
        except KilledError:
            self.nodes[node] = self._collector()
            self.bucket.now += CONFIG.lease_ttl + 1
            self._round(self.nodes[1 - node], late, lambda *_: None)
        if len(self.present() - self.pinned) * PAGE > CAPACITY:
            # Pages that were used late stay, so another round must remove other pages instead.
            self.bucket.now += CONFIG.interval
            self._round(self.nodes[1 - node], None, lambda *_: None)
        self._judge(before, before - self.present())

    def _round(self, collector: Collector, late: int | None, step: Step) -> None:
        if collector.look().current.phase == "done":
            self._judge_delay(collector)
            collector.begin()
        for _ in range(50):
            current = collector.look().current
            if current.phase == "done":
                return
            if current.phase == "remove" and self.bucket.now < current.remove_at:
                if late is not None:
                    self.record(1, CHAINS[late], store=False)
                self.bucket.now = current.remove_at
                for node in range(2):  # every node writes its log before pages may be removed
                    self.flush(node)
                self.bucket.now += settle(CONFIG)
            collector.advance(step)
        raise AssertionError("the round does not end")

    def _judge_delay(self, collector: Collector) -> None:
        """A round is put off only while no limit is exceeded."""
        if collector.look().age < CONFIG.interval or collector.is_due():
            return
        left = self.present()
        assert len(left) * PAGE <= CAPACITY
        assert all(self.bucket.now - self.used[key] < AGE + PERIOD for key in left - self.pinned)

    def _judge(self, before: set[PageKey], gone: set[PageKey]) -> None:
        now = self.bucket.now
        assert not gone & self.pinned
        young = [key for key in gone if now - self.used[key] < AGE - PERIOD]
        if len(before) * PAGE <= CAPACITY:
            assert not young, "used within the age limit, and there was space"
        if young:  # pages below the age limit leave only to free space
            left = [key for key in self.present() - self.pinned if self.used.get(key)]
            period = max(self.used[key] // PERIOD for key in young)
            assert all(self.used[key] // PERIOD >= period for key in left)
        kept = self.present()
        assert len(kept - self.pinned) * PAGE <= CAPACITY
        expired = [k for k in kept - self.pinned if now - self.used[k] > AGE + 2 * PERIOD]
        assert not expired
        for chain in CHAINS:  # a chain must lose its last pages first
            here = [key in kept for key in chain.keys()]
            length = here.index(False) if False in here else len(here)
            assert set(chain.keys()[length:]) & kept <= self.pinned

    @rule()
    def clear(self) -> None:
        """Remove a namespace's pages and log their removal, like the tier's `clear`."""
        for node in range(2):
            self.flush(node)
        self.bucket.now += 1
        removed = []
        for found in namespace_entries(self.bucket.parts(4), NAMESPACE.digest):
            removed += page_keys(found)
        self.bucket.remove(NAMES.page(key) for key in removed)
        now = int(self.bucket.now)
        rows = [(key.namespace + key.hash, REMOVED, now, 0, UNKNOWN) for key in removed]
        if rows:
            self.bucket.parts(4).logs.write(entries(rows), now)
        assert not self.present()
        self.bucket.now += 1

    @invariant()
    def pages_are_known(self) -> None:
        """Every page in the bucket is in the index, a log, or a log that is not written yet."""
        known = {key for found in self._known() for key in page_keys(found)}
        waiting = {PageKey(row[0][:16], row[0][16:]) for rows in self.unlogged for row in rows}
        assert self.present() <= known | waiting

    @invariant()
    def only_small_folders_are_listed(self) -> None:
        assert self.bucket.listed <= {"logs/", "pins/", "quarantine/"} | {
            f"index/{number:02x}-" for number in range(4)
        }

    def _known(self) -> list[Entries]:
        return list(namespace_entries(self.bucket.parts(4), NAMESPACE.digest))


Histories.TestCase.settings = settings(max_examples=50, stateful_step_count=12, deadline=None)


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_pass, "PART", 8)
    monkeypatch.setattr(collecting, "CLOCK_SECONDS", -1.0)  # this test lets time jump


class TestHistories(Histories.TestCase):  # type: ignore[misc,valid-type]
    """Runs the histories."""


def test_the_grace_is_longer_than_a_node_takes_to_notice() -> None:
    for interval in (1.0, 60.0, 600.0, 86400.0):
        config = CollectorConfig(interval=interval)
        assert grace(config) >= 2 * interval / 4
        with contextlib.suppress(ZeroDivisionError):
            assert settle(config) <= interval / 4
