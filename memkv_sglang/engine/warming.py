"""Copy pages from the shared tier to this node's disk before they are used."""

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
"""Maximum bytes of a batch. A single page may be larger."""

BATCH_SECONDS = 5.0
"""Seconds to load a batch, and again to store it."""


class Warmer:
    """Copies pages from `shared` to `local`. Thread-safe."""

    def __init__(self, local: Tier | None, shared: Tier | None, gate: NamespaceGate) -> None:
        """Copy between these tiers. If one of them is missing, `warm` raises."""
        self._gate = gate
        self._local = local
        self._shared = shared
        self._lengths: dict[bytes, int] = {}

    def warm(self, keys: Sequence[PageKey]) -> Warming:
        """Copy pages of one namespace, in the chain's order, to the local tier.

        Stops at the first page that the shared tier cannot load, because later pages are useless
        without it. Raises `TierError` if a tier fails or is not configured, or if the namespace is
        being cleared or has no description, which contains the page length.
        """
        if self._local is None or self._shared is None:
            raise TierError(
                "warming needs a disk and a bucket; set nvme.directory and minio.endpoint"
            )
        if not keys:
            return Warming()
        length = self._page_length(self._local, self._shared, keys[0].namespace)
        batch_pages = max(MEMORY // length, 1)
        total = Warming()
        with Staging(min(batch_pages, len(keys)) * length) as staging:
            for first in range(0, len(keys), batch_pages):
                batch = keys[first : first + batch_pages]
                with self._gate.enter(keys[0].namespace) as is_open:
                    if not is_open:
                        raise TierError("the namespace is being cleared; retry later")
                    done = self._warm_batch(self._local, self._shared, batch, length, staging)
                total = Warming(*(a + b for a, b in zip(total, done, strict=True)))
                if done.present + done.copied < len(batch):
                    break
        return total

    def _warm_batch(
        self, local: Tier, shared: Tier, keys: Sequence[PageKey], length: int, staging: Staging
    ) -> Warming:
        in_local = local.present(keys, time.monotonic() + BATCH_SECONDS)
        lacking = [key for key, is_local in zip(keys, in_local, strict=True) if not is_local]
        pages = staging.pages([PendingPage(key, length) for key in lacking])
        outcomes = shared.fetch(pages, time.monotonic() + BATCH_SECONDS)
        missed = (i for i, one in enumerate(outcomes) if one.result is not LoadResult.LOADED)
        end = next(missed, len(pages))
        loaded = loaded_pages(pages[:end], outcomes[:end])
        stored = local.spill(loaded, time.monotonic() + BATCH_SECONDS)
        kept = sum(result <= SpillResult.PRESENT for result in stored)
        return Warming(sum(in_local), kept, len(pages) - end, end - kept)

    def _page_length(self, local: Tier, shared: Tier, namespace: bytes) -> int:
        """Return the page length in the shared tier's description, and copy the description."""
        if namespace not in self._lengths:
            description = shared.namespaces().get(namespace)
            if description is None:
                raise TierError(f"{shared.name} has no description of namespace {namespace.hex()}")
            local.describe(description)  # no server on this node may have done so yet
            self._lengths[namespace] = description.page_bytes
        return self._lengths[namespace]
