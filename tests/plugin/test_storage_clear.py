"""`clear` makes one node forget its pages; the other nodes and the bucket keep theirs."""

import time
from typing import Any

from memkv_testbed.minio_server import MinioServer

from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.plugin import state
from memkv_sglang.plugin.storage import MemKVStorage
from tests.plugin import host_pools
from tests.plugin.attached import after, eventually, keys, store
from tests.plugin.conftest import MakeNode


def test_old_pages_are_missing_here_only_and_sharing_continues(make_node: MakeNode) -> None:
    near, far = make_node("a"), make_node("b")
    pool, old, new = host_pools.mha(), keys(40), keys(8, "new")
    storage, other = near.attach({"kv": pool}), far.attach({"kv": host_pools.mha()})
    store(storage, pool, old)
    near.upload()
    assert other.batch_exists(old) == 40

    with near.stalled_agent():  # for which no call waits
        storage.clear()
        storage.clear()
        assert storage.batch_exists(old) == 0
    # Whatever the storage answers meanwhile, it never returns an old page.
    assert storage.batch_exists(old) == 0
    indices = host_pools.slots(pool, range(8))
    eventually(lambda: all(storage.batch_set_v1(new, indices, after([]))))
    assert storage.batch_exists(old) == 0
    assert storage.batch_get_v1(old[:8], indices, after([])) == [False] * 8
    near.upload()
    assert other.batch_exists(new) == 8
    assert other.batch_exists(old) == 40


def test_pages_are_found_again_once_any_node_stores_them_again(make_node: MakeNode) -> None:
    near, far = make_node("a"), make_node("b")
    pool, chain = host_pools.mha(), keys(4)
    storage = near.attach({"kv": pool})
    store(storage, pool, chain)
    near.upload()
    storage.clear()
    forgets(storage, pool)
    assert storage.batch_exists(chain) == 0
    time.sleep(2.1)  # objects in the bucket have times in whole seconds
    far_pool = host_pools.mha()
    other = far.attach({"kv": far_pool})
    other.clear()
    forgets(other, far_pool)
    time.sleep(2.1)
    contents = store(other, far_pool, chain)
    far.upload()
    eventually(lambda: storage.batch_exists(chain) == 4)
    slots = host_pools.slots(pool, range(4))
    assert storage.batch_get_v1(chain, slots, after([])) == [True] * 4
    assert [host_pools.read(pool, i) for i in range(4)] == contents


def test_pages_stay_hidden_after_the_agent_restarts(make_node: MakeNode) -> None:
    near = make_node("a")
    pool, chain = host_pools.mha(), keys(4)
    storage = near.attach({"kv": pool})
    store(storage, pool, chain)
    near.upload()
    storage.clear()
    forgets(storage, pool)
    storage.close()
    near.stop_agent()
    pool = host_pools.mha()
    storage = near.attach({"kv": pool})
    assert storage.batch_exists(chain) == 0
    slots = host_pools.slots(pool, range(4))
    assert storage.batch_get_v1(chain, slots, after([])) == [False] * 4
    store(storage, pool, keys(1, "new"))
    assert storage.batch_exists(keys(1, "new")) == 1


def forgets(storage: MemKVStorage, pool: Any) -> None:
    """Wait until a clear is done, after which the storage stores pages again."""
    slots = host_pools.slots(pool, range(1))
    eventually(lambda: all(storage.batch_set_v1(keys(1, "after"), slots, after([]))))


def test_the_storage_stays_closed_while_minio_keeps_old_pages(make_node: MakeNode) -> None:
    pool, old, new = host_pools.mha(), keys(8), keys(8, "new")
    indices = host_pools.slots(pool, range(8))
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
        store(storage, pool, old)
        node.upload()
        server.kill()
        storage.clear()
        storage.close()  # this interrupts the removal; the next attachment continues it
        storage = node.attach({"kv": pool})
        assert storage.batch_exists(old) == 0
        assert storage.batch_set_v1(new, indices, after([])) == [False] * 8
        server.start()
        eventually(lambda: all(storage.batch_set_v1(new, indices, after([]))))
        assert storage.batch_exists(old) == 0
        assert not state.unfinished_clears
