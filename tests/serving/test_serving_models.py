"""Kinds of model, KV and adapter, each on two nodes and next to a server without any cache.

Texts stay the same, pages come from the node's disk after a restart and from the other node
through MinIO, and a changed token ends the reuse at its page.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from memkv_testbed.minio_server import MinioServer
from sglang_cpu_platform.client import Answer
from sglang_cpu_platform.server import CpuServer
from sglang_cpu_platform.tiny_model import WINDOW

from memkv_sglang.config.schema import MinioConfig
from tests.serving.conftest import Models, lora_arguments
from tests.serving.node import (
    DEVICE_TOKENS,
    NEW_TOKENS,
    PAGE,
    Node,
    Tokens,
    from_storage,
    libraries,
    prompt,
    reusable,
    start_all,
    whole_pages,
)

pytestmark = [
    pytest.mark.slow,  # three servers for each kind
    pytest.mark.timeout(900),  # the first test of a kind waits for its servers
]

LENGTH = 1500


class Kind(NamedTuple):
    model: str
    """Name of a field of `Models`."""
    extra: Sequence[str] = ()
    tp: int = 1
    exact: bool = True
    """Whether a prefix can end at any page, or only where a stored sequence ends."""
    adapter: str = ""
    """Name of the field of `Models` with the adapter that every request uses."""

    @property
    def request(self) -> dict[str, Any]:
        """More fields of every request."""
        return {"lora_path": "adapter"} if self.adapter else {}


KINDS = {
    "swa": Kind("swa", exact=False),
    "fp8_e4m3": Kind("mha", ["--kv-cache-dtype", "fp8_e4m3"]),
    "fp8_e5m2": Kind("mha", ["--kv-cache-dtype", "fp8_e5m2"]),
    "bf16": Kind("mha", ["--kv-cache-dtype", "bf16"]),
    "mla_tp2": Kind("mla", tp=2),
    "lora": Kind("mha", adapter="red"),
}


class Pair(NamedTuple):
    kind: Kind
    a: Node
    b: Node
    plain: CpuServer

    def generate(self, node: Node, tokens: Tokens) -> Answer:
        return node.generate(tokens, **self.kind.request)

    def stored(self, node: Node, tokens: Tokens) -> int:
        return node.stored(tokens, **self.kind.request)

    def recompute(self, tokens: Tokens) -> list[int]:
        answer = self.plain.client.generate(tokens, max_new_tokens=NEW_TOKENS, **self.kind.request)
        return answer.output_ids


@pytest.fixture(scope="module", params=KINDS)
def pair(
    request: pytest.FixtureRequest, home: Path, models: Models, shared: MinioConfig
) -> Iterator[Pair]:
    kind = KINDS[request.param]
    model, extra = getattr(models, kind.model), list(kind.extra)
    if kind.adapter:
        extra += lora_arguments(getattr(models, kind.adapter))
    plain = CpuServer(
        model,
        log=home / f"plain-{request.param}.log",
        tp=kind.tp,
        max_total_tokens=DEVICE_TOKENS,
        extra=["--disable-radix-cache", *extra],
        env=libraries(home),
        forks=Node.forks,
    )
    a, b = (
        Node(f"{request.param}-{name}", home, shared, model, tp=kind.tp, extra=extra)
        for name in "ab"
    )
    with ExitStack() as stack:
        stack.callback(plain.kill)
        for node in (a, b):
            stack.callback(node.close)
        start_all(plain, a, b)
        yield Pair(kind, a, b, plain)


def test_texts_stay_the_same_and_pages_come_from_the_other_node(pair: Pair) -> None:
    prompts = [prompt(f"models {i}", 300 + 40 * i) for i in range(30)]
    computed = [pair.recompute(tokens) for tokens in prompts]
    assert [pair.generate(pair.a, tokens).output_ids for tokens in prompts] == computed
    pair.a.share()
    answers = [pair.generate(pair.b, tokens) for tokens in prompts]
    assert [answer.output_ids for answer in answers] == computed
    assert [from_storage(answer) for answer in answers] == [reusable(len(p)) for p in prompts]


def test_a_changed_token_ends_the_reuse_at_its_page(pair: Pair) -> None:
    base = prompt("changed", LENGTH)
    pair.generate(pair.a, base)
    pair.a.share()
    # The window of a prefix ends before, in, at and after the page of the changed token.
    last = LENGTH // PAGE * PAGE
    points = [1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 700, last - 1, last, last + 1]
    for point in points:
        tokens = [*base[:point], (base[point] + 1) % 250 + 5, *prompt(point, 300)]
        pair.b.flush()
        answer = pair.generate(pair.b, tokens)
        reached = whole_pages(point) if pair.kind.exact or point >= last else 0
        assert from_storage(answer) == reached, point
        assert answer.output_ids == pair.recompute(tokens), point
        pair.b.share()


def test_the_next_turn_of_a_conversation_reuses_the_whole_turn_before(pair: Pair) -> None:
    """The prefix ends within a page, and its window reaches into what was generated."""
    talk, stored = prompt("turns", 500), 0
    for turn in range(4):
        node = (pair.a, pair.b)[turn % 2]
        answer = pair.generate(node, talk)
        assert from_storage(answer) == whole_pages(stored), turn
        assert answer.output_ids == pair.recompute(talk), turn
        node.share()
        stored = len(talk) + len(answer.output_ids) - 1
        talk = [*talk, *answer.output_ids, *prompt(f"turn {turn}", 200)]


def test_a_restarted_server_loads_from_its_disk(pair: Pair, storage: MinioServer) -> None:
    prompts = [prompt(f"restarted {i}", 400 + 150 * i) for i in range(4)]
    computed = [pair.generate(pair.a, tokens).output_ids for tokens in prompts]
    pair.a.share()
    pair.a.kill_server()
    storage.kill()
    try:
        start_all(pair.a)
        for tokens, text in zip(prompts, computed, strict=True):
            answer = pair.generate(pair.a, tokens)
            assert from_storage(answer) == reusable(len(tokens))
            assert answer.output_ids == text == pair.recompute(tokens)
    finally:
        storage.start()


def test_a_pool_that_has_lost_its_pages_makes_a_miss(pair: Pair) -> None:
    """A prompt misses if one of its pools has lost its pages. Once recomputed, it hits again."""
    pools = dict(re.findall(r"memkv: pool (\w+) in namespace (\w+)", pair.a.log()))
    assert "swa" in pools or pair.kind.model != "swa"
    for pool, digest in pools.items():
        tokens = prompt(f"lost {pool}", 700)
        text = pair.generate(pair.a, tokens).output_ids
        pair.a.share()
        with pair.a.agent() as agent:
            assert agent.clear(bytes.fromhex(digest))
        pair.a.flush()
        answer = pair.generate(pair.a, tokens)
        assert answer.cached_tokens == 0, pool
        assert answer.output_ids == text
        pair.a.share()
        assert pair.stored(pair.a, tokens) == reusable(len(tokens)), pool
