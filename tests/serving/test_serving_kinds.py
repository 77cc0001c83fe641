"""Other shapes of server: two ranks, latent attention, and calls of the storage that fail."""

from pathlib import Path

from memkv_sglang.config.schema import MinioConfig
from tests.serving.conftest import Cluster, Models
from tests.serving.node import Node, from_storage, prompt, reusable

TOKENS = prompt("kinds", 1500)


def test_two_ranks_share_nothing_with_one_and_all_with_their_like(
    cluster: Cluster, home: Path, models: Models, shared: MinioConfig
) -> None:
    cluster.a.generate(TOKENS)
    cluster.a.share()
    with Node("tp2", home, shared, models.mha, tp=2) as node:
        answer = node.generate(TOKENS)
        assert answer.cached_tokens == 0
        assert answer.output_ids == cluster.recompute(TOKENS)
        assert node.stored(TOKENS) == reusable(len(TOKENS))
        assert node.generate(TOKENS).output_ids == answer.output_ids


def test_latent_pages_are_equal_on_all_ranks_and_shared_by_any_number_of_them(
    home: Path, models: Models, shared: MinioConfig
) -> None:
    with Node("mla-tp2", home, shared, models.mla, tp=2) as node:
        computed = node.generate(TOKENS)
        assert computed.cached_tokens == 0
        node.share()
    with Node("mla", home, shared, models.mla) as node:
        answer = node.generate(TOKENS)
    assert from_storage(answer) == reusable(len(TOKENS))
    assert answer.output_ids == computed.output_ids


def test_texts_stay_the_same_when_calls_of_the_storage_fail_or_last(
    cluster: Cluster, home: Path, models: Models, shared: MinioConfig
) -> None:
    """SGLang's own injection, between its threads and the storage."""
    injected = {
        "SGLANG_TEST_HICACHE_BACKEND_RANDOM_DELAY": "0.1",
        "SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE": "0.3",
    }
    prompts = [prompt(f"injected {i}", 600 + 100 * i) for i in range(6)]
    with Node("injected", home, shared, models.mha, env=injected) as node:
        reused = 0
        for each in [*prompts, *prompts, *prompts]:
            answer = node.generate(each)
            assert answer.output_ids == cluster.recompute(each)
            reused += answer.cached_by_source.get("storage", 0)
            node.flush()
        assert reused > 0
