"""Prefill/decode disaggregation (PD) over Mooncake's TCP transport, each server with the tier."""

import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from memkv_testbed.minio_server import MinioServer
from sglang_cpu_platform.client import Answer
from sglang_cpu_platform.router import Router

from memkv_sglang.config.schema import MinioConfig
from tests.serving.conftest import Models, Recompute
from tests.serving.node import (
    DEVICE_TOKENS,
    NEW_TOKENS,
    PAGE,
    Tokens,
    prompt,
    reusable,
    start_all,
    wait_until,
    whole_pages,
)
from tests.serving.pd import PdNode, ask
from tests.serving.traffic import PROMPTS, Traffic

pytest.importorskip("mooncake", reason="needs mooncake-transfer-engine-non-cuda")

pytestmark = pytest.mark.timeout(600)  # the first test waits for all servers to start

GENERATED = 3 * PAGE


class Pd(NamedTuple):
    prefill: PdNode
    caching: PdNode
    """A decode server with a radix cache."""


@pytest.fixture(scope="module")
def pd(home: Path, models: Models, shared: MinioConfig, recompute: Recompute) -> Iterator[Pd]:
    radix = ["--disaggregation-decode-enable-radix-cache"]
    nodes = Pd(
        PdNode("prefill", home, shared, models.mha, "prefill"),
        PdNode("caching", home, shared, models.mha, "decode", radix),
    )
    with ExitStack() as stack:
        for node in nodes:
            stack.callback(node.close)
        start_all(*nodes)
        yield nodes


class Fleet(NamedTuple):
    """The prefill and decode servers of this module."""

    prefill: PdNode
    other_prefill: PdNode
    """A prefill server that can become a decode server."""
    caching: PdNode
    offloading: PdNode
    """A decode server without a radix cache."""

    @property
    def prefills(self) -> list[PdNode]:
        return [self.prefill, self.other_prefill]

    @property
    def decodes(self) -> list[PdNode]:
        return [self.caching, self.offloading]


@pytest.fixture(scope="module")
def fleet(home: Path, models: Models, shared: MinioConfig, pd: Pd) -> Iterator[Fleet]:
    switch = ["--enable-pd-role-switch", "--disaggregation-decode-enable-radix-cache"]
    other_prefill = PdNode("prefill2", home, shared, models.mha, "prefill", switch)
    offloading = PdNode("offloading", home, shared, models.mha, "decode")
    with ExitStack() as stack:
        for node in (other_prefill, offloading):
            stack.callback(node.close)
        start_all(other_prefill, offloading)
        yield Fleet(pd.prefill, other_prefill, pd.caching, offloading)


@pytest.fixture(scope="module")
def router(fleet: Fleet) -> Iterator[Router]:
    with Router(
        [node.url for node in fleet.prefills],
        bootstrap_ports=[node.bootstrap_port for node in fleet.prefills],
        decode=[node.url for node in fleet.decodes],
        log=fleet.prefill.home / "router.log",
    ) as running:
        yield running


def damage(pages: Path) -> None:
    """Overwrite all pages on a disk, but not the agent's index of them."""
    for segment in pages.rglob("*.seg"):
        with segment.open("r+b") as file:
            size = segment.stat().st_size
            file.seek(4096)
            file.write(b"x" * (size - 4096))


def check_texts(prefill: PdNode, decode: PdNode, recompute: Recompute) -> None:
    for i in range(30):
        tokens = prompt(f"pd {i}", 300 + 13 * i)
        assert ask(prefill, decode, tokens).output_ids == recompute(tokens), i


def test_texts_equal_those_of_a_server_without_any_cache(pd: Pd, recompute: Recompute) -> None:
    check_texts(pd.prefill, pd.caching, recompute)


@pytest.mark.slow
def test_texts_of_a_decode_server_that_offloads(fleet: Fleet, recompute: Recompute) -> None:
    check_texts(fleet.prefill, fleet.offloading, recompute)


def test_no_request_fails_when_pages_that_a_decode_server_stored_are_gone(
    pd: Pd, storage: MinioServer, recompute: Recompute
) -> None:
    """Its storage finds them, but they are damaged on the disk, and MinIO is down."""
    tokens = prompt("gone", 1500)
    ask(pd.prefill, pd.caching, tokens)
    pd.caching.share()
    storage.kill()
    try:
        damage(pd.caching.pages)
        assert ask(pd.prefill, pd.caching, tokens).output_ids == recompute(tokens)
    finally:
        storage.start()


@pytest.mark.slow
def test_no_request_fails_when_the_host_pool_of_a_decode_server_evicts(
    pd: Pd, recompute: Recompute
) -> None:
    prompts = [prompt(f"evicting {i}", DEVICE_TOKENS // 3) for i in range(10)]
    computed = [recompute(each) for each in prompts]
    for _ in range(2):
        for each, text in zip(prompts, computed, strict=True):
            assert ask(pd.prefill, pd.caching, each).output_ids == text


@pytest.mark.slow
def test_a_prefill_server_reuses_the_pages_of_another(fleet: Fleet) -> None:
    for decode in fleet.decodes:
        tokens = prompt(f"shared by {decode.home}", 1500)
        computed = ask(fleet.prefill, decode, tokens)
        assert computed.prefill.cached_tokens == 0
        fleet.prefill.share()
        answer = ask(fleet.other_prefill, decode, tokens)
        assert answer.prefill.cached_by_source["storage"] == reusable(len(tokens))
        assert answer.output_ids == computed.output_ids


@pytest.mark.slow
def test_a_prefill_server_reuses_what_a_decode_server_generated(
    fleet: Fleet, recompute: Recompute
) -> None:
    for decode in fleet.decodes:
        tokens = prompt(f"conversation with {decode.home}", 8 * PAGE)
        generated = ask(fleet.prefill, decode, tokens, GENERATED).output_ids
        fleet.prefill.share()
        decode.share()
        turn = [*tokens, *generated, *prompt("second turn", 100)]
        answer = ask(fleet.other_prefill, decode, turn)
        # The last generated token's KV was never computed.
        stored = whole_pages(len(tokens) + len(generated) - 1)
        assert answer.prefill.cached_by_source["storage"] == stored
        assert answer.output_ids == recompute(turn)


@pytest.mark.slow
def test_behind_the_router(router: Router, recompute: Recompute) -> None:
    for i in range(8):
        tokens = prompt(f"routed {i % 4}", 900)
        answer = router.client.generate(tokens, max_new_tokens=NEW_TOKENS)
        assert answer.output_ids == recompute(tokens), i


class Routed(NamedTuple):
    """A router that `Traffic` can use like a node."""

    router: Router

    def generate(self, tokens: Tokens, **request: Any) -> Answer:
        return self.router.client.generate(tokens, max_new_tokens=NEW_TOKENS, **request)


@pytest.mark.slow
def test_agents_and_minio_killed_during_traffic(
    fleet: Fleet, router: Router, storage: MinioServer, recompute: Recompute
) -> None:
    expected = {i: [recompute(tokens)] for i, tokens in enumerate(PROMPTS)}
    with Traffic([Routed(router)], expected) as traffic:
        traffic.goes_on()
        for node in fleet:
            node.kill_agent()
            traffic.goes_on()
        storage.kill()
        traffic.goes_on()
        storage.start()
        traffic.goes_on()
    attempts = itertools.count()
    wait_until(lambda: is_shared(fleet, prompt(f"shared again {next(attempts)}", 400)))


def is_shared(fleet: Fleet, tokens: Tokens) -> bool:
    """Return whether pages computed on one prefill node come from storage on the other."""
    try:
        ask(fleet.prefill, fleet.offloading, tokens)
        fleet.prefill.share()
    except (AssertionError, ConnectionError):
        return False  # the agent is not running yet, or nothing is uploaded yet
    answer = ask(fleet.other_prefill, fleet.offloading, tokens).prefill
    return answer.cached_by_source.get("storage", 0) == reusable(len(tokens))


def switch_role(node: PdNode, role: str) -> None:
    node.flush()  # a server switches only while it is idle
    reply = node.client.post(
        "/pd_role_switch", {"new_role": role, "decode_cuda_graph_memory_gb": 0}
    )
    assert reply["success"], reply


@pytest.mark.slow
def test_a_node_that_switches_its_role_clears_nothing_for_the_others(
    fleet: Fleet, recompute: Recompute
) -> None:
    """SGLang clears the storage of a server whose role changes.

    The last test: decode servers that have used this node do not reach it after it has switched
    its role twice.
    """
    node, tokens = fleet.other_prefill, prompt("before the switch", 1500)
    text = ask(node, fleet.caching, tokens).output_ids
    assert text == recompute(tokens)
    node.share()
    switch_role(node, "decode")
    answer = ask(fleet.prefill, node, tokens)
    assert answer.prefill.cached_by_source["storage"] == reusable(len(tokens))
    assert answer.output_ids == text
    switch_role(node, "prefill")
    fleet.prefill.flush()
    answer = ask(fleet.prefill, fleet.caching, tokens)
    assert answer.prefill.cached_by_source["storage"] == reusable(len(tokens))
    assert answer.output_ids == text
