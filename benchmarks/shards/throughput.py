"""Measure loads of whole conversations from shards on real MinIO servers, by placement."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from memkv_testbed.minio_server import MinioServer

from benchmarks.pool import HostPool
from benchmarks.shards.placements import PLACEMENTS, RunPlacement, conversations
from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.page import Chain, Page
from memkv_sglang.testing.pages import make_namespace
from memkv_sglang.tiers.base import LoadResult, SpillResult, Tier
from memkv_sglang.tiers.minio import MinioTier
from memkv_sglang.tiers.shards import Shard, ShardedTier

CALL = 128
"""Pages in one of SGLang's load calls."""

PROMPT = 16
"""Pages that all conversations share. They are in the host pool, so no conversation loads them."""

LIMIT = 120.0

ONE_SERVER = "one server"


class Conversations:
    """Conversations stored on servers in one placement."""

    def __init__(self, tier: Tier, chains: Sequence[Chain], pool: HostPool) -> None:
        """Store all chains. The pool has memory for the pages of each chain."""
        self._tier = tier
        own = [chain.keys()[PROMPT:] for chain in chains]
        self._pages = [
            [Page(key, tuple(pool.views(number * len(keys) + i))) for i, key in enumerate(keys)]
            for number, keys in enumerate(own)
        ]
        for pages in self._pages:
            for first in range(0, len(pages), CALL):
                stored = tier.spill(pages[first : first + CALL], time.monotonic() + LIMIT)
                assert set(stored) == {SpillResult.STORED}

    def load(self, count: int) -> float:
        """Load the first `count` conversations at once, and return GB/s."""
        failures: list[object] = []
        chosen = self._pages[:count]

        def converse(pages: Sequence[Page]) -> None:
            for first in range(0, len(pages), CALL):
                results = self._tier.load(pages[first : first + CALL], time.monotonic() + LIMIT)
                failures.extend(one for one in results if one is not LoadResult.LOADED)

        threads = [threading.Thread(target=converse, args=(pages,)) for pages in chosen]
        begin = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - begin
        assert not failures, failures[:3]
        return sum(page.length for pages in chosen for page in pages) / seconds / 1e9


@contextmanager
def stored(
    servers: Sequence[MinioServer], page_bytes: int, count: int, pages: int
) -> Iterator[dict[str, Conversations]]:
    """Store `count` conversations of `pages` pages in every placement, and on a single server."""
    chains = conversations(
        make_namespace(page_bytes=page_bytes).digest, count, PROMPT + pages, PROMPT
    )
    names = [f"s{number}" for number in range(len(servers))]
    tiers: list[Tier] = []
    with HostPool(count * pages, page_bytes, huge=True) as pool:
        pool.fill()

        def bucket(server: MinioServer, prefix: str) -> MinioTier:
            config = MinioConfig(
                endpoint=server.endpoint,
                bucket=f"pages-{page_bytes}",
                prefix=prefix.replace(" ", "-"),
                access_key=server.access_key,
                secret_key=server.secret_key,
                stall_timeout=5.0,  # long deadlines, because eight calls share a narrow link
            )
            return MinioTier(config)

        def sharded(placement: str) -> Tier:
            shards = [
                Shard(name, bucket(server, placement))
                for name, server in zip(names, servers, strict=True)
            ]
            order = RunPlacement(names, chains, PLACEMENTS[placement])
            return ShardedTier("minio", shards, placement=order)

        try:
            tiers.append(bucket(servers[0], ONE_SERVER))
            tiers += [sharded(placement) for placement in PLACEMENTS]
            contestants = dict(zip((ONE_SERVER, *PLACEMENTS), tiers, strict=True))
            yield {name: Conversations(tier, chains, pool) for name, tier in contestants.items()}
        finally:
            for tier in tiers:
                tier.close()
