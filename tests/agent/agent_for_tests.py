"""An agent whose tier is in memory and misbehaves as the environment says.

Without an argument it runs in the foreground; with one it runs like an agent from `start_agent`.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
from prometheus_client import CollectorRegistry

from memkv_sglang.agent import main as agent_main
from memkv_sglang.agent.launched import run_launched
from memkv_sglang.agent.main import run
from memkv_sglang.config.schema import Config
from memkv_sglang.engine.engine import Engine
from memkv_sglang.metrics import Metrics
from memkv_sglang.page import Chain, Page
from memkv_sglang.tiers.base import Fetched, Lookup, SpillResult, Tier
from memkv_sglang.tiers.memory import MemoryTier
from memkv_sglang.tiers.wrappers import SlowTier, WrapperTier

BEHAVIOUR = "MEMKV_TEST_BEHAVIOUR"
"""`scribble`: loads write into the pages and never end. `raise`: loads raise. `never clear`:
clearing never ends. A number: seconds that each call waits."""

UPLOADS = "MEMKV_TEST_UPLOADS"
"""File to which a slow shared tier writes the hash of each page; empty: no shared tier."""

REBIND_LIMIT = "MEMKV_TEST_REBIND_LIMIT"
"""Seconds for which an agent tries to bind a lost socket again."""

CALLS = "MEMKV_TEST_CALLS"
"""File to which each lookup and load writes a line when it begins; empty: none."""


class AnnouncingTier(WrapperTier):
    def __init__(self, inner: Tier, path: str) -> None:
        super().__init__(inner)
        self._path = Path(path)

    def lookup(self, chain: Chain, deadline: float) -> Lookup:
        self._announce("lookup")
        return super().lookup(chain, deadline)

    def fetch(self, pages: Sequence[Page], deadline: float) -> list[Fetched]:
        self._announce("load")
        return super().fetch(pages, deadline)

    def _announce(self, verb: str) -> None:
        with self._path.open("a") as file:
            file.write(f"{verb}\n")


class RecordingTier(WrapperTier):
    def __init__(self, inner: Tier, path: str) -> None:
        super().__init__(inner)
        self._path = Path(path)

    def spill(self, pages: Sequence[Page], deadline: float) -> list[SpillResult]:
        time.sleep(0.1)
        with self._path.open("a") as file:
            file.writelines(f"{page.key.hash.hex()}\n" for page in pages)
        return super().spill(pages, deadline)


class ScribblingTier(WrapperTier):
    def fetch(self, pages: Sequence[Page], deadline: float) -> list[Fetched]:
        value = 0
        while True:
            value = value % 255 + 1
            for page in pages:
                for buffer in page.buffers:
                    buffer[:] = bytes([value]) * len(buffer)
            time.sleep(0)


class NeverClearingTier(WrapperTier):
    def clear(self, namespace: bytes) -> int:
        while True:
            time.sleep(60)


class RaisingTier(WrapperTier):
    def fetch(self, pages: Sequence[Page], deadline: float) -> list[Fetched]:
        raise RuntimeError("a defect")


def build(config: Config, registry: CollectorRegistry) -> Engine:
    memory = MemoryTier()
    behaviour = os.environ.get(BEHAVIOUR, "0")
    tier = {
        "scribble": ScribblingTier,
        "raise": RaisingTier,
        "never clear": NeverClearingTier,
    }.get(behaviour)
    wrapped: WrapperTier = tier(memory) if tier else SlowTier(memory, float(behaviour))
    if calls := os.environ.get(CALLS):
        wrapped = AnnouncingTier(wrapped, calls)
    uploads = os.environ.get(UPLOADS)
    shared = RecordingTier(MemoryTier(name="shared"), uploads) if uploads else None
    return Engine(wrapped, shared, memory, config.engine, Metrics(registry))


def main() -> int:
    if limit := os.environ.get(REBIND_LIMIT):
        agent_main.REBIND_LIMIT = float(limit)
    text = sys.stdin.buffer.read()
    if len(sys.argv) == 1:
        return run(msgspec.json.decode(text, type=Config), build=build)
    if os.fork():
        os._exit(0)
    return run_launched(text, int(sys.argv[1]), build)


if __name__ == "__main__":
    sys.exit(main())
