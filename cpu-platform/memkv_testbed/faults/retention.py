"""Check the bucket's limits under faults: which pages must have stayed, and whether limits held."""

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import msgspec
from minio import Minio
from minio.error import S3Error
from urllib3 import PoolManager
from urllib3.exceptions import HTTPError

from memkv_sglang.page import Chain
from memkv_sglang.tiers.minio.names import ObjectNames
from memkv_sglang.tiers.minio.retention.rounds import Round
from memkv_testbed.faults.cluster import BUCKET, PAGE_BYTES, Cluster

LOST_USES = 60.0
"""Maximum seconds by which pages look older after an agent was killed: the time since their spill.
"""

KEPT = 0.8
"""Share of the capacity that collections certainly keep. They remove pages down to 95 %, and do not
count pages that killed agents have not logged."""

WATCH_SECONDS = 0.5
"""Seconds between two looks at the last collection."""

NAMES = ObjectNames("")


class Used(NamedTuple):
    """A chain, and the time of its last use (`time.monotonic`)."""

    chain: Chain
    when: float


class Retention:
    """Watches the collections of a cluster."""

    def __init__(self, cluster: Cluster) -> None:
        """Watch the collections for those limits that the cluster has, until `close`."""
        self._limits = cluster.collector
        netloc = cluster.minio.endpoint.partition("://")[2]
        http = PoolManager(timeout=2.0, retries=False)
        self._storage = Minio(netloc, *cluster.minio.root, secure=False, http_client=http)
        self._last = -1
        self.rounds = 0
        """Number of collections that ended."""
        self.removed_pages = 0
        self.most_bytes = 0
        """Most bytes in the index after a collection."""
        self.most_listed_bytes = 0
        """Most bytes of pages in the bucket at any sample."""
        self.most_batches_over = 0.0
        """Most by which a collection left the bucket above its capacity, in batches.

        A batch is what the index has gained since the collection before.
        """
        self._bytes = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if self._limits.capacity:
            self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        if self._limits.capacity:
            self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(WATCH_SECONDS):
            self._sample()

    def measure(self) -> None:
        """Measure how many bytes of pages are in the bucket, if it has limits."""
        if self._limits.capacity:
            with suppress(S3Error, HTTPError):  # a fault
                self.most_listed_bytes = max(self.most_listed_bytes, self._listed_bytes())

    def _sample(self) -> None:
        """Look at the last collection. Each collection replaces the record."""
        try:
            content = self._storage.get_object(BUCKET, NAMES.round).data
            found = msgspec.json.decode(content, type=Round)
        except (S3Error, HTTPError, msgspec.MsgspecError):  # a fault may affect these requests, too
            return
        if found.phase != "done" or found.report is None or found.number == self._last:
            return
        report, self._last = found.report, found.number
        self.rounds += 1
        self.removed_pages += report.removed_pages
        self.most_bytes = max(self.most_bytes, report.bytes)
        batch = max(report.bytes + report.removed_bytes - self._bytes, PAGE_BYTES)
        over = max(report.bytes - self._limits.capacity, 0)
        self.most_batches_over = max(self.most_batches_over, over / batch)
        self._bytes = report.bytes

    def _listed_bytes(self) -> int:
        listed = self._storage.list_objects(BUCKET, recursive=True)
        return sum(item.size or 0 for item in listed if NAMES.page_key(item.object_name or ""))

    def keeps(self, size: int) -> bool:
        """Return whether the bucket's capacity allows all of the last `size` bytes to stay."""
        return not self._limits.capacity or size <= KEPT * self._limits.capacity

    def must_stay(self, used: Sequence[Used]) -> list[Chain]:
        """Return the chains that neither limit allows to be removed.

        They are those of the last fault rounds, as far as whole rounds fit into the capacity. An
        agent that was killed has not logged its latest uses, so the pages of one round may look as
        if they had been used in any order.
        """
        age, size = self._limits.max_age, 0
        since = time.monotonic() - age + LOST_USES if age else 0.0
        kept: list[Chain] = []
        for when in sorted({one.when for one in used}, reverse=True):
            chains = [one.chain for one in used if one.when == when]
            size += sum(len(chain.hashes) for chain in chains) * PAGE_BYTES
            if when < since or not self.keeps(size):
                break
            kept += chains
        return kept

    def expired_left(self, used: Sequence[Used]) -> int:
        """Return how many pages that should have expired are still in the bucket."""
        if not self._limits.max_age:
            return 0
        # The last collection may have begun just before they expired.
        before = time.monotonic() - self._limits.max_age - LOST_USES
        listed = {item.object_name for item in self._storage.list_objects(BUCKET, recursive=True)}
        return sum(
            NAMES.page(key) in listed
            for one in used
            if one.when < before
            for key in one.chain.keys()
        )
