"""A real bucket with pages, for tests of their removal."""

import time
from collections.abc import Sequence
from typing import NamedTuple

from minio import Minio

from memkv_sglang.config.schema import CollectorConfig, MinioConfig
from memkv_sglang.page import Chain, PageKey
from memkv_sglang.testing.pages import make_chain, make_namespace, make_page
from memkv_sglang.tiers.base import SpillResult
from memkv_sglang.tiers.minio import MinioTier
from memkv_sglang.tiers.minio.names import ObjectNames
from memkv_sglang.tiers.minio.retention import Collection, Collector

LIMIT = 30.0
CLOCK_LAG = 1.5
"""A `Date` has whole seconds, and a response takes a moment."""
PAGE = 4096
NAMESPACE = make_namespace(PAGE)


class Bucketful(NamedTuple):
    """A bucket, a node's tier, and an administrator's client."""

    config: MinioConfig
    tier: MinioTier
    admin: Minio

    def spill(self, seed: str, count: int) -> Chain:
        """Store the pages of a chain one after the other."""
        chain = make_chain(NAMESPACE, count, seed)
        for key in chain.keys():
            page = make_page(key, [PAGE], filled=True)
            assert self.tier.spill([page], deadline()) == [SpillResult.STORED]
        # The engine does this after a spill.
        self.tier.record_access(chain, range(len(chain.hashes)))
        assert self.tier.flush_accesses(LIMIT)
        return chain

    def spill_in_one_period(self, seconds: float, seed: str, count: int) -> Chain:
        """Store a chain within one period; retry if the period ends meanwhile."""
        while True:
            chain = self.spill(seed, count)
            if len({self.modified(key) // seconds for key in chain.keys()}) == 1:
                return chain
            self.tier.remove(chain.keys())

    def collector(self, **settings: object) -> Collector:
        return self.tier.retention.collector(limits(**settings))

    def collect(self, **settings: object) -> Collection:
        return self.collector(**settings).collect(lambda *_: None)

    def there(self, chain: Chain) -> list[bool]:
        """Return for each page whether it is in the bucket."""
        names = ObjectNames(self.config.prefix)
        found = self.admin.list_objects(self.config.bucket, recursive=True)
        have = {item.object_name for item in found}
        return [names.page(key) in have for key in chain.keys()]

    def modified(self, key: PageKey) -> float:
        """Return when a page's object was last modified."""
        name = ObjectNames(self.config.prefix).page(key)
        item = next(iter(self.admin.list_objects(self.config.bucket, prefix=name)))
        assert item.last_modified is not None
        modified: float = item.last_modified.timestamp()
        return modified

    def wait_for_next_period(self, seconds: float) -> None:
        """Wait until what is used from now on counts as used in a later period than until now.

        A node's view of the server's time is up to `CLOCK_LAG` behind.
        """
        last = time.time() // seconds
        while (time.time() - CLOCK_LAG) // seconds <= last:
            time.sleep(0.05)


def limits(**settings: object) -> CollectorConfig:
    """Return settings with which a collection waits for other nodes for half a second."""
    settings = {"interval": 1, **settings}
    return CollectorConfig(**settings)  # type: ignore[arg-type]  # names are spelt in the tests


def deadline() -> float:
    return time.monotonic() + LIMIT


def prefix_length(there: Sequence[bool]) -> int:
    """Return the length of the present prefix; check that no page follows a gap."""
    length = there.index(False) if False in there else len(there)
    assert not any(there[length:]), "a page is there whose parent is not"
    return length
