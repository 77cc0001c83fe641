"""KV events of the tiers: a page is announced when it is stored, and retracted when it is gone."""

import threading
from array import array
from types import SimpleNamespace
from typing import Any

import pytest
from memkv_testbed.minio_server import MinioServer
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import hash_str_to_int64

from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.page import Chain
from memkv_sglang.plugin import events
from memkv_sglang.plugin.storage import MemKVStorage
from tests.plugin import host_pools
from tests.plugin.attached import eventually, keys, store
from tests.plugin.conftest import MakeNode
from tests.plugin.host_pools import PAGE


@pytest.fixture(autouse=True)
def _published(process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "are_published", lambda: True)
    monkeypatch.setattr(events, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(events, "SWEEP_SECONDS", 0.2)


def backup(chain: list[str], before: list[str], completed: int, **namespace: str) -> Any:
    """Return the operation that SGLang's controller holds at the end of a backup."""
    tokens = array("q", range(len(before) * PAGE, (len(before) + len(chain)) * PAGE))
    return SimpleNamespace(
        token_ids=RadixKey(tokens, **namespace),
        hash_value=chain,
        prefix_keys=before,
        completed_tokens=completed * PAGE,
    )


class Subscriber:
    def __init__(self, storage: MemKVStorage) -> None:
        self._storage = storage
        self.events: list[Any] = []

    def _take(self) -> None:
        self.events += self._storage.take_events()

    def names(self, medium: str, kind: str = "BlockStored") -> list[int]:
        self._take()
        chosen = [e for e in self.events if type(e).__name__ == kind and e.medium == medium]
        return [name for event in chosen for name in event.block_hashes]


def test_pages_are_announced_with_their_tier_once_stored(make_node: MakeNode) -> None:
    chain, pool = keys(70), host_pools.mha()
    names = [hash_str_to_int64(key) for key in chain]
    with MinioServer() as server:
        node = make_node(
            minio=MinioConfig(
                endpoint=server.endpoint,
                bucket="pages",
                access_key=server.access_key,
                secret_key=server.secret_key,
            )
        )
        storage = node.attach({"kv": pool})
        subscriber = Subscriber(storage)
        store(storage, pool, keys(1, "first"))
        node.upload()  # afterwards the bucket exists
        server.kill()
        store(storage, pool, chain)
        storage.record_backup(backup(chain[:4], [], 4), PAGE)
        storage.record_backup(backup(chain[4:], chain[:4], 60), PAGE)
        eventually(lambda: subscriber.names("DISK") == names[:64])
        assert subscriber.names("EXTERNAL") == []
        server.start()
        node.upload()
        eventually(lambda: subscriber.names("EXTERNAL") == names[:64])
        stored = [event for event in subscriber.events if event.medium == "EXTERNAL"]
        by_first = {event.block_hashes[0]: event for event in stored}
        assert by_first[names[0]].parent_block_hash is None
        assert by_first[names[4]].parent_block_hash == names[3]
        tokens = [token for event in stored for token in event.token_ids]
        assert tokens == list(range(64 * PAGE))
        assert {event.block_size for event in stored} == {PAGE}


def test_pages_of_other_namespaces_are_not_announced(make_node: MakeNode) -> None:
    chain, pool = keys(3), host_pools.mha()
    storage = make_node().attach({"kv": pool})
    subscriber = Subscriber(storage)
    store(storage, pool, chain)
    storage.record_backup(backup(chain[:1], [], 1, extra_key="adapter"), PAGE)
    storage.record_backup(backup(chain[1:2], [], 1, cache_salt="tenant"), PAGE)
    storage.record_backup(backup(chain[2:], [], 1), PAGE)
    expected = [hash_str_to_int64(chain[2])]
    eventually(lambda: subscriber.names("EXTERNAL") == expected)
    assert subscriber.names("DISK") == expected


def test_evicted_pages_are_retracted(make_node: MakeNode) -> None:
    chain, pool = keys(6), host_pools.mha()
    names = [hash_str_to_int64(key) for key in chain]
    node = make_node(minio=None)
    storage = node.attach({"kv": pool})
    subscriber = Subscriber(storage)
    store(storage, pool, chain)
    storage.record_backup(backup(chain, [], 6), PAGE)
    eventually(lambda: subscriber.names("DISK") == names)
    with node.client() as client:
        assert client.clear(storage._pools.digests()[0]) == 6
    eventually(lambda: sorted(subscriber.names("DISK", "BlockRemoved")) == sorted(names))
    assert subscriber.names("EXTERNAL") == []


def test_clearing_retracts_every_page(make_node: MakeNode) -> None:
    chain, pool = keys(6), host_pools.mha()
    names = [hash_str_to_int64(key) for key in chain]
    storage = make_node().attach({"kv": pool})
    subscriber = Subscriber(storage)
    store(storage, pool, chain)
    storage.record_backup(backup(chain, [], 6), PAGE)
    eventually(lambda: subscriber.names("EXTERNAL") == names)
    storage.clear()
    for medium in ("DISK", "EXTERNAL"):
        assert sorted(subscriber.names(medium, "BlockRemoved")) == sorted(names)


def test_without_a_publisher_nothing_is_collected(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "are_published", lambda: False)
    chain, pool = keys(2), host_pools.mha()
    storage = make_node().attach({"kv": pool})
    store(storage, pool, chain)
    storage.record_backup(backup(chain, [], 2), PAGE)
    assert storage.take_events() == []


class ClearedMeanwhile:
    """A client whose answer arrives after the pages in question were removed."""

    announcer: events.Announcer
    problem = ""

    def __init__(self) -> None:
        self.asked = threading.Event()

    def present(self, chain: Chain, budget: float, tier: str) -> list[bool]:
        self.announcer.cleared()
        self.asked.set()
        return [True] * len(chain.hashes)


def test_pages_cleared_during_a_check_are_not_announced() -> None:
    client = ClearedMeanwhile()
    announcer = events.Announcer(client, ["nvme"])  # type: ignore[arg-type]  # a race cannot be had from a real one
    client.announcer = announcer
    announcer.stored(bytes(16), events.blocks_of(backup(keys(2), [], 2), PAGE))
    assert client.asked.wait(10)
    announcer.close()
    announcer._thread.join()
    assert announcer.take() == []
