"""Pairs of SGLang servers with the same pools and different storage, behind SGLang's router."""

import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

from memkv_testbed.demo.node import Node
from sglang_cpu_platform.client import Answer
from sglang_cpu_platform.router import Router
from sglang_cpu_platform.server import CpuServer

from benchmarks.serving import Servers, Tokens
from benchmarks.traffic.conversations import Conversation

PAGE = 64
"""Tokens per page of all servers, as the documentation of `seaweedfs` recommends."""

DEVICE_TOKENS = 6144
"""Capacity of a device pool."""

POOLS = [
    *("--max-total-tokens", str(DEVICE_TOKENS)),
    *("--hicache-ratio", "1.25"),  # the host pool, relative to the device pool
    *("--page-size", str(PAGE)),
]

ANSWER_TOKENS = 8

TIERS = ("device", "host", "NVMe", "MinIO", "computed")


class Answered(NamedTuple):
    """A request and its answer."""

    tokens: Tokens
    answer: Answer


class System(Protocol):
    """Two servers."""

    name: str

    @property
    def servers(self) -> Sequence[CpuServer]:
        """The servers."""

    def loaded_from_minio(self) -> int | None:
        """Return the tokens that both servers have loaded from MinIO so far, if known."""


class Memkv:
    """Servers with this project's tier, each with its own disk."""

    name = "memkv"

    def __init__(self, servers: Servers) -> None:
        promote = {"MEMKV_ENGINE_PROMOTE": "second_use"}  # the default
        self._nodes: list[Node] = [
            servers.node(name, extra=POOLS, env=promote) for name in ("a", "b")
        ]
        self.servers = [node.server for node in self._nodes]

    def loaded_from_minio(self) -> int:
        """See `System`."""
        return sum(node.loads("minio").pages for node in self._nodes) * PAGE


class Peer:
    """Servers with SGLang's `seaweedfs` backend, which has one tier, or without storage."""

    def __init__(self, name: str, servers: Sequence[CpuServer]) -> None:
        self.name = name
        self.servers = servers

    def loaded_from_minio(self) -> None:
        """See `System`; unknown, but MinIO is the only storage."""


def route(servers: Servers, system: System, policy: str, extra: Sequence[str]) -> Router:
    """Start a router in front of both servers of a system."""
    name = "-".join([system.name.replace(" ", "-"), policy, *extra]).replace("--", "")
    return servers.router(system.servers, name, policy, extra)


class Stint(NamedTuple):
    """The result of replaying conversations."""

    conversations: list[list[Answered]]
    """All turns. The first ones arrive at once and are mostly computed, so they are not timed."""
    hits: Counter[str]
    """Prompt tokens of the other turns by tier."""

    def first_tokens(self) -> list[float]:
        """Return the seconds to the first token of the timed turns."""
        return [one.answer.ttft_s for turns in self.conversations for one in turns[1:]]


def replay(system: System, router: Router, conversations: Sequence[Conversation]) -> Stint:
    """Send all conversations through a router, each with at most one request in flight."""
    with ThreadPoolExecutor(len(conversations)) as pool:
        opened = list(pool.map(lambda turns: _ask(router, turns[:1]), conversations))
        before = system.loaded_from_minio()
        continued = list(pool.map(lambda turns: _ask(router, turns[1:]), conversations))
        after = system.loaded_from_minio()
    timed = [one for conversation in continued for one in conversation]
    loaded = None if before is None or after is None else after - before
    both = zip(opened, continued, strict=True)
    return Stint([[*first, *rest] for first, rest in both], _hits(timed, loaded))


def _ask(router: Router, turns: Conversation) -> list[Answered]:
    answered = []
    for turn in turns:
        time.sleep(turn.think)
        answer = router.client.generate(turn.tokens, max_new_tokens=ANSWER_TOKENS)
        answered.append(Answered(turn.tokens, answer))
    return answered


def _hits(answered: Sequence[Answered], loaded: int | None) -> Counter[str]:
    """Count tokens by tier. Of those from storage, `loaded` came from MinIO; None: all of them."""
    hits: Counter[str] = Counter()
    storage = 0
    for _, answer in answered:
        sources = answer.cached_by_source
        storage += sources.get("storage", 0)
        hits["device"] += sources.get("device", 0)
        hits["host"] += sources.get("host", 0)
        hits["computed"] += answer.prompt_tokens - answer.cached_tokens
    hits["MinIO"] = storage if loaded is None else min(storage, loaded)
    hits["NVMe"] = storage - hits["MinIO"]
    return hits
