"""Other kinds of servers: two ranks, two pipeline stages, latent attention, 16 bits, faults."""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from memkv_sglang.config.schema import MinioConfig
from tests.serving.conftest import Cluster, Models
from tests.serving.node import Node, from_storage, prompt, reusable, start_all, whole_pages

pytestmark = pytest.mark.timeout(600)  # the first test waits for all servers to start

TOKENS = prompt("kinds", 1500)

INJECTED = {
    "SGLANG_TEST_HICACHE_BACKEND_RANDOM_DELAY": "0.1",
    "SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE": "0.3",
}
"""Delays and failures that SGLang itself injects between its threads and the storage."""


ONE_CORE_EACH = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}


class Kinds(NamedTuple):
    two_ranks: Node
    latent: Node
    latent_two_ranks: Node
    stages: Node
    """A server with two pipeline stages, each with half of the layers."""
    windows: Node
    """A server whose model has a sliding window in every other layer."""


@pytest.fixture(scope="module")
def kinds(home: Path, models: Models, shared: MinioConfig) -> Iterator[Kinds]:
    nodes = Kinds(
        Node("tp2", home, shared, models.mha, tp=2),
        Node("mla", home, shared, models.mla),
        Node("mla-tp2", home, shared, models.mla, tp=2),
        Node("pp2", home, shared, models.mha, extra=["--pp-size", "2"], env=ONE_CORE_EACH),
        Node("windows", home, shared, models.swa),
    )
    with ExitStack() as stack:
        for node in nodes:
            stack.callback(node.close)
        start_all(*nodes)
        yield nodes


class FurtherKinds(NamedTuple):
    half: Node
    """A server that computes and stores 16-bit numbers."""
    injected: Node
    replicas: Node
    """A server with two data-parallel replicas."""


@pytest.fixture(scope="module")
def further_kinds(home: Path, models: Models, shared: MinioConfig) -> Iterator[FurtherKinds]:
    nodes = FurtherKinds(
        Node("half", home, shared, models.mha, extra=["--dtype", "bfloat16"]),
        Node("injected", home, shared, models.mha, env=INJECTED),
        Node("dp2", home, shared, models.mha, extra=["--dp-size", "2"], env=ONE_CORE_EACH),
    )
    with ExitStack() as stack:
        for node in nodes:
            stack.callback(node.close)
        start_all(*nodes)
        yield nodes


def test_servers_share_pages_only_with_the_same_number_of_ranks(
    cluster: Cluster, kinds: Kinds
) -> None:
    cluster.a.generate(TOKENS)
    cluster.a.share()
    node = kinds.two_ranks
    answer = node.generate(TOKENS)
    assert answer.cached_tokens == 0
    assert answer.output_ids == cluster.recompute(TOKENS)
    assert node.stored(TOKENS) == reusable(len(TOKENS))
    assert node.generate(TOKENS).output_ids == answer.output_ids


def test_ranks_with_different_prefixes_use_the_shortest(cluster: Cluster, kinds: Kinds) -> None:
    node, tokens = kinds.two_ranks, prompt("ranks that differ", 1500)
    computed = node.generate(tokens).output_ids
    node.share()
    digests = set(re.findall(r"memkv: pool kv in namespace (\w+)", node.log()))
    assert len(digests) == 2
    with node.agent() as agent:
        assert agent.clear(bytes.fromhex(digests.pop()))
    assert node.generate(tokens[:700]).cached_tokens == 0
    node.flush()
    answer = node.generate(tokens)
    assert from_storage(answer) == whole_pages(700)
    assert answer.output_ids == computed
    assert node.stored(tokens) == reusable(len(tokens))


def test_pipeline_stages_load_their_own_pages(cluster: Cluster, kinds: Kinds) -> None:
    tokens = prompt("stages", 1500)
    computed = kinds.stages.generate(tokens)
    assert computed.output_ids == cluster.recompute(tokens)
    assert kinds.stages.stored(tokens) == reusable(len(tokens))
    assert kinds.stages.generate(tokens).output_ids == computed.output_ids


def test_a_model_with_sliding_windows_reuses_whole_sequences(kinds: Kinds) -> None:
    node, tokens = kinds.windows, prompt("windows", 1500)
    computed = node.generate(tokens)
    assert computed.cached_tokens == 0
    node.share()
    assert node.stored(tokens) == reusable(len(tokens))
    assert node.generate(tokens).output_ids == computed.output_ids
    # Only the end of a stored sequence has its window.
    assert node.stored([*tokens[:700], *prompt("elsewhere", 300)]) == 0


def test_latent_pages_are_shared_by_any_number_of_ranks(kinds: Kinds) -> None:
    computed = kinds.latent_two_ranks.generate(TOKENS)
    assert computed.cached_tokens == 0
    kinds.latent_two_ranks.share()
    answer = kinds.latent.generate(TOKENS)
    assert from_storage(answer) == reusable(len(TOKENS))
    assert answer.output_ids == computed.output_ids


@pytest.mark.slow
def test_servers_share_pages_only_with_the_same_data_type(
    cluster: Cluster, further_kinds: FurtherKinds
) -> None:
    half = further_kinds.half
    tokens = prompt("data types")
    cluster.a.generate(tokens)
    cluster.a.share()
    assert half.generate(tokens).cached_tokens == 0
    half.share()
    assert half.stored(tokens) == reusable(len(tokens))


@pytest.mark.slow
def test_texts_are_unchanged_when_storage_calls_fail_or_take_long(
    cluster: Cluster, further_kinds: FurtherKinds
) -> None:
    prompts = [prompt(f"injected {i}", 600 + 100 * i) for i in range(6)]
    computed = [cluster.recompute(each) for each in prompts]
    reused = 0
    for _ in range(3):
        for each, text in zip(prompts, computed, strict=True):
            answer = further_kinds.injected.generate(each)
            assert answer.output_ids == text
            reused += answer.cached_by_source.get("storage", 0)
            further_kinds.injected.flush()
    assert reused > 0


@pytest.mark.slow
def test_replicas_share_pages(cluster: Cluster, further_kinds: FurtherKinds) -> None:
    """Each replica reuses what the other one has computed, and so does another node."""
    node = further_kinds.replicas
    for computing in (0, 1):
        tokens = prompt(f"computed by replica {computing}", 1500)
        text = cluster.recompute(tokens)
        assert node.generate(tokens, routed_dp_rank=computing).output_ids == text
        node.share()
        answer = node.generate(tokens, routed_dp_rank=1 - computing)
        assert from_storage(answer) == reusable(len(tokens))
        assert answer.output_ids == text
        assert cluster.a.stored(tokens) == reusable(len(tokens))
