"""Weight updates under traffic: only pages of the loaded weights are reused."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sglang_cpu_platform.client import RequestFailedError

from memkv_sglang.config.schema import MinioConfig
from tests.serving.conftest import Cluster, Models
from tests.serving.node import PAGE, Node, ServedServer, prompt, reusable
from tests.serving.traffic import PROMPTS, Traffic
from tests.serving.trainer import broadcast, send_as_tensors

OLD = prompt("of the old weights")


@pytest.fixture(scope="module")
def tuned(
    home: Path, models: Models, shared: MinioConfig, patched: dict[str, str]
) -> Iterator[Node]:
    """A node with the other weights from the start, started with a patched `sglang serve
    --enable-memkv`.
    """
    server = ServedServer
    with Node("tuned", home, shared, models.mha_tuned, env=patched, server=server) as node:
        yield node


@pytest.fixture(autouse=True)
def back_to_the_first_weights(cluster: Cluster, models: Models) -> Iterator[None]:
    yield
    update(cluster.a, models.mha)


def update(node: Node, model: Path) -> None:
    reply = node.client.post("/update_weights_from_disk", {"model_path": str(model)})
    assert reply["success"], reply


def compute(node: Node, tokens: list[int], **request: str) -> list[int]:
    answer = node.generate(tokens, **request)
    assert answer.cached_tokens == 0
    return answer.output_ids


def test_pages_of_other_weights_are_never_used(
    cluster: Cluster, tuned: Node, models: Models
) -> None:
    old_text = cluster.a.generate(OLD).output_ids
    cluster.a.share()
    # Its pages belong to the new weights and would be reused; a salt prevents that.
    new_text = compute(tuned, OLD, cache_salt="apart")
    texts = {i: [cluster.recompute(PROMPTS[i]), compute(tuned, PROMPTS[i])] for i in range(8)}
    assert all(old != new for old, new in texts.values())
    with Traffic([cluster.a], texts) as traffic:
        traffic.goes_on()
        update(cluster.a, models.mha_tuned)
        traffic.goes_on()
    assert compute(cluster.a, OLD) == new_text != old_text


def test_new_pages_are_shared_with_nodes_that_loaded_the_same_files(
    cluster: Cluster, tuned: Node, models: Models
) -> None:
    assert tuned.client.get("/server_info")["enable_memkv"] is True
    here, there = prompt("computed here"), prompt("computed there")
    update(cluster.a, models.mha_tuned)
    cluster.a.generate(here)
    cluster.a.share()
    tuned.generate(there)
    tuned.share()
    assert tuned.stored(here) == reusable(len(here))
    assert cluster.a.stored(there) == reusable(len(there))


def test_pages_are_reused_again_when_their_weights_are_back(
    cluster: Cluster, models: Models
) -> None:
    tokens = prompt("there and back")
    cluster.a.generate(tokens)
    update(cluster.a, models.mha_tuned)
    update(cluster.a, models.mha)
    answer = cluster.a.generate(tokens)
    assert answer.cached_by_source["storage"] == reusable(len(tokens))
    assert answer.output_ids == cluster.recompute(tokens)


def test_an_update_waits_for_a_backup_in_flight(
    cluster: Cluster, tuned: Node, models: Models
) -> None:
    """Otherwise SGLang would refuse to flush and serve old KV with the new weights."""
    tokens = prompt("in flight", 4 * PAGE - 1)  # too short for a lookup
    new_text = compute(tuned, tokens)
    cluster.a.flush()
    with cluster.a.stalled_agent():
        cluster.a.generate(tokens)
        update(cluster.a, models.mha_tuned)
        assert compute(cluster.a, tokens) == new_text
    cluster.a.wait_reusing()


def test_no_old_page_is_used_after_an_update_session(cluster: Cluster) -> None:
    tokens = prompt("session")
    computed = cluster.a.generate(tokens).output_ids
    cluster.a.flush()
    for verb in ("begin", "end"):
        assert cluster.a.client.post(f"/{verb}_weight_update", {"selector": "all"})["success"]
    assert compute(cluster.a, tokens) == computed
    assert cluster.a.stored(tokens) == reusable(len(tokens))


def test_a_failed_update_leaves_the_server_answering(cluster: Cluster, home: Path) -> None:
    tokens = prompt("failed update")
    computed = cluster.a.generate(tokens).output_ids
    with pytest.raises(RequestFailedError):
        cluster.a.client.post("/update_weights_from_disk", {"model_path": str(home / "none")})
    assert cluster.a.generate(tokens).output_ids == computed


@pytest.mark.parametrize("send", [send_as_tensors, broadcast])
def test_weights_without_files_are_not_shared(
    cluster: Cluster, tuned: Node, models: Models, send: Callable[[Node, Path], None]
) -> None:
    tokens = prompt(f"without files {send.__name__}")
    old_text = cluster.a.generate(tokens).output_ids
    cluster.a.share()
    new_text = compute(tuned, tokens, cache_salt="apart")
    cluster.a.client.post("/begin_weight_update", {"selector": "all"})
    send(cluster.a, models.mha_tuned)
    cluster.a.client.post("/end_weight_update", {"selector": "all"})
    assert compute(cluster.a, tokens) == new_text != old_text
    cluster.a.share()
    assert cluster.a.stored(tokens) == reusable(len(tokens))
    assert tuned.stored(tokens) == 0
    answer = cluster.b.generate(tokens)
    assert answer.cached_tokens == reusable(len(tokens))
    assert answer.output_ids == old_text


def test_released_weights_hide_and_store_no_pages_until_they_are_back(cluster: Cluster) -> None:
    """Without a memory saver, which needs a GPU, the server can still compute meanwhile."""
    known, fresh = prompt("released"), prompt("while released")
    texts = [cluster.recompute(tokens) for tokens in (known, fresh)]
    cluster.a.generate(known)
    cluster.a.share()
    cluster.a.client.post("/release_memory_occupation")
    assert [compute(cluster.a, tokens) for tokens in (known, fresh)] == texts
    cluster.a.flush()
    assert compute(cluster.a, known) == texts[0]
    cluster.a.client.post("/resume_memory_occupation")
    cluster.a.flush()
    assert compute(cluster.a, fresh) == texts[1]
    assert cluster.a.stored(known) == reusable(len(known))
    assert cluster.a.stored(fresh) == reusable(len(fresh))
