"""Two nodes share prefixes exactly to the page, and no text changes."""

import json
import random
from pathlib import Path

from sglang_cpu_platform.client import Client, RequestFailedError
from sglang_cpu_platform.process import group_members
from sglang_cpu_platform.router import Router

from memkv_sglang.config.schema import MinioConfig
from tests.serving.conftest import Cluster
from tests.serving.node import PAGE, THRESHOLD, from_storage, prompt, reusable, whole_pages

LENGTH = 1500


def test_reuse_is_the_longest_common_prefix_rounded_down_to_the_page(cluster: Cluster) -> None:
    base = prompt("base", LENGTH)
    cluster.a.generate(base)
    cluster.a.share()
    choose = random.Random(20)
    points = [1, THRESHOLD - 1, THRESHOLD, LENGTH - 1, PAGE * 20, PAGE * 20 - 1, PAGE * 20 + 1]
    points += [choose.randrange(LENGTH) for _ in range(12 - len(points))]
    for point in points:
        diverging = [*base[:point], (base[point] + 1) % 250 + 5, *prompt(point, 400)]
        assert cluster.b.stored(diverging) == whole_pages(point), point


def test_the_last_prompt_token_is_computed(cluster: Cluster) -> None:
    base = prompt("last", 8 * PAGE + 1)
    cluster.a.generate(base)
    cluster.a.share()
    assert cluster.b.stored(base) == 8 * PAGE
    assert cluster.b.stored(base[:-1]) == 7 * PAGE


def test_texts_equal_those_of_a_server_without_any_cache(cluster: Cluster) -> None:
    prompts = [prompt(f"text {i}", 300 + 13 * i) for i in range(16)]
    computed = [cluster.recompute(each) for each in prompts]
    assert [cluster.a.generate(each).output_ids for each in prompts] == computed
    cluster.a.share()
    answers = [cluster.b.generate(each) for each in prompts]
    assert [answer.output_ids for answer in answers] == computed
    assert [from_storage(answer) for answer in answers] == [reusable(len(p)) for p in prompts]


def test_another_salt_reuses_nothing_and_the_same_salt_all(cluster: Cluster) -> None:
    base = prompt("salt")
    cluster.a.generate(base, cache_salt="one tenant")
    cluster.a.share()
    assert cluster.b.stored(base) == 0
    assert cluster.b.stored(base, cache_salt="another tenant") == 0
    assert cluster.b.stored(base, extra_key="one tenant") == 0
    assert cluster.b.stored(base, cache_salt="one tenant") == reusable(len(base))


def test_lookups_of_another_tenants_pages_take_the_usual_time(cluster: Cluster) -> None:
    """A lookup of it costs the agent as much as a lookup of a text that is not stored."""
    base = prompt("timed")
    cluster.a.generate(base, cache_salt="one tenant")
    cluster.a.share()
    costs = []
    for asked in (base, prompt("never asked")):
        cluster.b.share()
        before = cluster.b.lookup_counts()
        assert cluster.b.generate(asked, cache_salt="another tenant").cached_tokens == 0
        spent = cluster.b.lookup_counts() - before
        # Per call: SGLang may repeat a lookup while it waits, and uploads look up the computed
        # pages.
        costs.append({key: n / spent["lookup", key[1], "calls"] for key, n in spent.items()})
    assert costs[0] == costs[1]
    assert {result for _, _, result in costs[0]} == {"calls", "missing"}
    assert {operation for operation, _, _ in costs[0]} == {"lookup"}


def test_a_conversation_continues_behind_the_router(cluster: Cluster) -> None:
    """Every turn goes to the other node, like round robin; only the last turns are computed."""
    talk, stored = prompt("talk", 1200), 0
    with Router([cluster.a.url, cluster.b.url], log=cluster.a.home / "router.log") as router:
        for turn in range(4):
            answer = router.client.generate(talk, max_new_tokens=8)
            assert answer.output_ids == cluster.recompute(talk)
            assert answer.cached_tokens == whole_pages(stored), turn
            cluster.a.share()
            cluster.b.share()
            stored = len(talk) + len(answer.output_ids) - 1
            talk = talk + answer.output_ids + prompt(f"turn {turn}", 300)


def test_a_patched_server_names_the_backend_itself(cluster: Cluster) -> None:
    info = cluster.b.client.get("/server_info")
    assert info["hicache_storage_backend"] == "memkv"


SERVER_PATHS = (
    *("/server_info", "/get_server_info", "/get_model_info", "/health", "/metrics"),
    *("/hicache/storage-backend", "/get_hicache_l3_cache_layout"),
)
AGENT_PATHS = ("/healthz", "/readyz", "/metrics")
"""Paths that everyone who can reach the agent's port may read."""


def _answer(client: Client, path: str) -> str:
    try:
        return json.dumps(client.get(path))
    except RequestFailedError as error:  # the message contains the server's answer
        return str(error)


def test_no_secret_is_exposed(cluster: Cluster, shared: MinioConfig) -> None:
    for node in (cluster.a, cluster.b):
        agent = Client(f"http://127.0.0.1:{node.agent_port()}")
        told = [_answer(node.client, path) for path in SERVER_PATHS]
        told += [_answer(agent, path) for path in AGENT_PATHS]
        text = node.log() + "".join(told)
        text += "".join(path.read_text() for path in node.home.rglob("*.log"))
        for pid in [*group_members(node.server_pid), node.agent_pid()]:
            text += Path(f"/proc/{pid}/cmdline").read_text()
        assert shared.bucket in text
        assert "memkv_call_duration_seconds" in text
        assert shared.access_key not in text
        assert shared.secret_key not in text
