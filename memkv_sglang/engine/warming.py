"""Pages of the shared tier brought to this node's disk ahead of their use."""

import time
from collections.abc import Sequence

from memkv_sglang.engine.gate import NamespaceGate
from memkv_sglang.engine.results import Warming
from memkv_sglang.engine.staging import Staging
from memkv_sglang.page import PageKey
from memkv_sglang.tiers.base import (
    LoadResult,
    PendingPage,
    SpillResult,
    Tier,
    TierError,
    loaded_pages,
)

MEMORY = 32 << 20
"""Bytes of pages in hand at a time, but one page at least."""

BATCH_SECONDS = 5.0
"""Longest time for those to be loaded, and again for them to be stored."""


class Warmer:
    """Copies pages from `shared` to `local`. Thread-safe."""

    def __init__(self, local: Tier | None, shared: Tier | None, gate: NamespaceGate) -> None:
        """Without one of the tiers, nothing can be warmed."""
        self._gate = gate
        self._local = local
        self._shared = shared
        self._lengths: dict[bytes, int] = {}

    def warm(self, keys: Sequence[PageKey]) -> Warming:
        """Have pages of one namespace, in the chain's order, on the disk; blocks.

        The first page that the shared tier does not give ends it: those behind it would serve
        nobody. Raises `TierError` if a tier cannot answer or there is only one, or if the
        namespace is not described, so that its pages' length is not known, or is being cleared.
        """
        if self._local is None or self._shared is None:
            raise TierError("this node has not both nvme.directory and minio.endpoint")
        if not keys:
            return Warming()
        length = self._page_length(self._local, self._shared, keys[0].namespace)
        step = max(MEMORY // length, 1)
        total = Warming()
        with Staging(min(step, len(keys)) * length) as staging:
            for first in range(0, len(keys), step):
                batch = keys[first : first + step]
                with self._gate.enter(keys[0].namespace) as is_open:
                    if not is_open:
                        raise TierError("the namespace is being cleared; warm it afterwards")
                    done = self._warm_some(self._local, self._shared, batch, length, staging)
                total = Warming(*(a + b for a, b in zip(total, done, strict=True)))
                if done.present + done.copied < len(batch):
                    break
        return total

    def _warm_some(
        self, local: Tier, shared: Tier, keys: Sequence[PageKey], length: int, staging: Staging
    ) -> Warming:
        here = local.present(keys, time.monotonic() + BATCH_SECONDS)
        lacking = [key for key, there in zip(keys, here, strict=True) if not there]
        pages = staging.pages([PendingPage(key, length) for key in lacking])
        outcomes = shared.fetch(pages, time.monotonic() + BATCH_SECONDS)
        missed = (i for i, one in enumerate(outcomes) if one.result is not LoadResult.LOADED)
        end = next(missed, len(pages))
        loaded = loaded_pages(pages[:end], outcomes[:end])
        stored = local.spill(loaded, time.monotonic() + BATCH_SECONDS)
        kept = sum(result <= SpillResult.PRESENT for result in stored)
        return Warming(sum(here), kept, len(pages) - end, end - kept)

    def _page_length(self, local: Tier, shared: Tier, namespace: bytes) -> int:
        """Return what the shared tier's description says, once the local tier has that, too."""
        if namespace not in self._lengths:
            description = shared.namespaces().get(namespace)
            if description is None:
                raise TierError(f"no description of namespace {namespace.hex()} in {shared.name}")
            local.describe(description)  # perhaps no server here has
            self._lengths[namespace] = description.page_bytes
        return self._lengths[namespace]
