"""Pages on the node's disk and in MinIO outlive the processes."""

import shutil

import pytest
from memkv_testbed.minio_server import MinioServer

from tests.serving.conftest import Cluster, Models
from tests.serving.node import from_storage, prompt, reusable, start_all


@pytest.mark.slow
def test_a_restarted_server_loads_from_its_disk(
    cluster: Cluster, storage: MinioServer, models: Models
) -> None:
    """MinIO is down meanwhile. The adapter's content at the same path has changed in between."""
    tokens = prompt("disk")
    computed = cluster.a.generate(tokens).output_ids
    cluster.a.generate(tokens, lora_path="adapter")
    cluster.a.share()
    cluster.a.kill_server()
    shutil.copytree(models.blue, models.adapter, dirs_exist_ok=True)
    storage.kill()
    try:
        start_all(cluster.a)
        answer = cluster.a.generate(tokens)
        assert from_storage(answer) == reusable(len(tokens))
        assert answer.output_ids == computed
        assert cluster.a.stored(tokens, lora_path="adapter") == 0
    finally:
        storage.start()


def test_restarted_node_with_an_empty_disk_loads_from_minio(cluster: Cluster) -> None:
    tokens, node = prompt("restart"), cluster.b
    computed = node.generate(tokens).output_ids
    node.share()
    node.kill_server()
    node.stop_agent()
    node.forget_disk()
    start_all(node)
    answer = node.generate(tokens)
    assert from_storage(answer) == reusable(len(tokens))
    assert answer.output_ids == computed
