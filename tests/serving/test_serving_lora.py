"""LoRA adapters are identified by content: their name and location do not matter."""

import shutil

from tests.serving.conftest import Cluster, Models
from tests.serving.node import Node, prompt, reusable

ONE = prompt("lora")


def load(node: Node, name: str, path: object) -> None:
    node.client.post("/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})


def unload(node: Node, name: str) -> None:
    node.client.post("/unload_lora_adapter", {"lora_name": name})


def test_adapters_with_different_content_share_no_pages(cluster: Cluster) -> None:
    computed = cluster.a.generate(ONE, lora_path="adapter").output_ids
    cluster.a.share()
    assert cluster.b.stored(ONE) == 0
    answer = cluster.b.generate(ONE, lora_path="adapter")
    assert answer.cached_by_source["storage"] == reusable(len(ONE))
    assert answer.output_ids == computed


def test_the_same_content_is_reused_under_another_name_and_path(
    cluster: Cluster, models: Models
) -> None:
    computed = cluster.a.generate(ONE, lora_path="adapter").output_ids
    cluster.a.share()
    copy = shutil.copytree(models.red, models.red.with_name("copy"))
    load(cluster.b, "crimson", copy)
    try:
        assert cluster.b.stored(ONE, lora_path="crimson") == reusable(len(ONE))
        assert cluster.b.generate(ONE, lora_path="crimson").output_ids == computed
        further = prompt("lora at run time")
        cluster.b.generate(further, lora_path="crimson")
        cluster.b.share()
        assert cluster.a.stored(further, lora_path="adapter") == reusable(len(further))
    finally:
        unload(cluster.b, "crimson")


def test_other_content_under_the_same_name_reuses_nothing(cluster: Cluster, models: Models) -> None:
    cluster.a.generate(ONE, lora_path="adapter")
    cluster.a.share()
    unload(cluster.b, "adapter")
    load(cluster.b, "adapter", models.blue)
    try:
        assert cluster.b.stored(ONE, lora_path="adapter") == 0
    finally:
        unload(cluster.b, "adapter")
        load(cluster.b, "adapter", models.adapter)
