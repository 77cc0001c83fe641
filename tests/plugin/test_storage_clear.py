"""`clear` hides pages immediately and deletes them in the background."""

import time

from memkv_testbed.minio_server import MinioServer

from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.plugin import state
from tests.plugin import host_pools
from tests.plugin.attached import after, eventually, keys, store
from tests.plugin.conftest import MakeNode


def test_old_pages_are_hidden_and_sharing_continues(make_node: MakeNode) -> None:
    near, far = make_node("a"), make_node("b")
    pool, old, new = host_pools.mha(), keys(40), keys(8, "new")
    storage, other = near.attach({"kv": pool}), far.attach({"kv": host_pools.mha()})
    store(storage, pool, old)
    near.upload()
    assert other.batch_exists(old) == 40

    begin = time.monotonic()
    storage.clear()
    storage.clear()
    assert time.monotonic() - begin < 0.1
    # Whatever the storage answers meanwhile, it never returns an old page.
    assert storage.batch_exists(old) == 0
    indices = host_pools.slots(pool, range(8))
    eventually(lambda: all(storage.batch_set_v1(new, indices, after([]))))
    assert storage.batch_exists(old) == 0
    assert storage.batch_get_v1(old[:8], indices, after([])) == [False] * 8
    near.upload()
    assert other.batch_exists(new) == 8


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
        begin = time.monotonic()
        storage.clear()
        assert time.monotonic() - begin < 0.1
        storage.close()  # a detach breaks the removal off, the next attachment goes on with it
        storage = node.attach({"kv": pool})
        assert storage.batch_exists(old) == 0
        assert storage.batch_set_v1(new, indices, after([])) == [False] * 8
        server.start()
        eventually(lambda: all(storage.batch_set_v1(new, indices, after([]))))
        assert storage.batch_exists(old) == 0
        assert not state.unfinished_clears
