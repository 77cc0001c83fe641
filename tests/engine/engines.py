"""Helpers for engine tests: store and load pages, and a tier that can be paused."""

import threading
import time
from collections.abc import Callable, Sequence

from memkv_sglang.engine.engine import Engine
from memkv_sglang.engine.results import PageLoad
from memkv_sglang.page import Page, PageKey
from memkv_sglang.testing.pages import holds_content, make_namespace, make_page
from memkv_sglang.tiers.base import Fetched, LoadResult, SpillResult, Tier
from memkv_sglang.tiers.wrappers import WrapperTier

LENGTHS = (4096, 4096)
NAMESPACE = make_namespace()
LOCAL, SHARED = "local", "shared"

Open = Callable[..., Engine]
"""Makes an engine over the tiers given; see the fixture `open_engine`."""


def spill(
    engine: Engine, keys: Sequence[PageKey], before: Sequence[bytes] = ()
) -> list[SpillResult]:
    return engine.spill([make_page(key, LENGTHS, filled=True) for key in keys], before)


def load(engine: Engine, keys: Sequence[PageKey]) -> list[PageLoad]:
    pages = [make_page(key, LENGTHS, filled=False) for key in keys]
    loads = engine.load(pages)
    for page, one in zip(pages, loads, strict=True):
        assert holds_content(page) == (one.result is LoadResult.LOADED)
    return loads


def load_any(engine: Engine, keys: Sequence[PageKey]) -> list[PageLoad]:
    """Load, ignoring the buffers of pages that are not loaded."""
    return engine.load([make_page(key, LENGTHS, filled=False) for key in keys])


def put(tier: Tier, keys: Sequence[PageKey]) -> None:
    tier.spill([make_page(key, LENGTHS, filled=True) for key in keys], time.monotonic() + 60)


def loaded_from(tier: str, count: int) -> list[PageLoad]:
    return [PageLoad(LoadResult.LOADED, tier)] * count


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "condition never came true"
        time.sleep(0.005)


class GatedTier(WrapperTier):
    """Blocks loads and spills until the gate opens; signals when one has arrived."""

    def __init__(self, inner: Tier) -> None:
        super().__init__(inner)
        self.gate = threading.Event()
        self.arrived = threading.Semaphore(0)

    def fetch(self, pages: Sequence[Page], deadline: float) -> list[Fetched]:
        self.arrived.release()
        self.gate.wait(60)
        # The deadline is ignored, as by a disk that is slow to answer.
        return super().fetch(pages, time.monotonic() + 60)

    def spill(self, pages: Sequence[Page], deadline: float) -> list[SpillResult]:
        self.arrived.release()
        self.gate.wait(60)
        return super().spill(pages, deadline)
