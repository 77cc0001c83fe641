"""Lookups for models that keep more than KV, through SGLang's v2 interface."""

import time
from collections.abc import Sequence
from typing import Any

from memkv_sglang.client.client import AgentClient
from memkv_sglang.engine.recompute import UNKNOWN, Recompute
from memkv_sglang.plugin.hits import (
    PoolHit,
    block_pages,
    leading_blocks,
    trailing_window,
    whole_prefix,
)
from memkv_sglang.plugin.registered import RegisteredPool

ALL_PAGES, TRAILING_PAGES, BLOCK_GROUPS = "all_pages", "trailing_pages", "block_groups"
"""The values of SGLang's `PoolHitPolicy`."""


class Search:
    """A lookup in all pools of a model, with one time limit."""

    def __init__(
        self, client: AgentClient, hashes: list[bytes], seconds: float, request: str = ""
    ) -> None:
        """Start the time limit of `seconds`. `request` is the id of the server's request."""
        self._client = client
        self._request = request
        self._hashes = hashes
        self._deadline = time.monotonic() + seconds

    def prefix(self, registered: RegisteredPool, pages: int, recompute: Recompute = UNKNOWN) -> int:
        """Return how many of the first `pages` pages, from the first on, can be loaded."""
        if registered.pool is None:
            return pages
        chain = registered.chain(self._hashes[:pages])
        left = self._left()
        return self._client.lookup(chain, left, recompute, self._request).length if left else 0

    def hit(self, registered: RegisteredPool, transfer: Any, pages: int) -> PoolHit | None:
        """Return the hit of a side pool for the first `pages` pages.

        `transfer` is SGLang's `PoolTransfer`. Returns None if the pool does not limit the hit.
        Raises `ValueError` for an unknown policy.
        """
        policy = transfer.hit_policy
        if policy == ALL_PAGES:
            return whole_prefix(self.prefix(registered, pages))
        if policy == TRAILING_PAGES:
            window = max(1, len(transfer.keys or ()))
            return trailing_window(self._present(registered, range(pages)), window)
        if policy == BLOCK_GROUPS:
            return self._blocks(registered, transfer, pages)
        raise ValueError(f"unknown hit policy {policy}")

    def _blocks(self, registered: RegisteredPool, transfer: Any, pages: int) -> PoolHit | None:
        groups = block_pages(pages, transfer.block_pages, transfer.group_pages)
        asked = [page for group in groups for page in group]
        held = dict(zip(asked, self._present(registered, asked), strict=True))
        covered = leading_blocks([[held[p] for p in g] for g in groups], transfer.block_pages)
        return PoolHit(covered, range(1, pages + 1)) if groups else None

    def use_window(self, registered: RegisteredPool, transfer: Any, pages: int) -> None:
        """Mark the last window of a prefix as used, because a check for presence does not."""
        if transfer.hit_policy == TRAILING_PAGES and registered.pool is not None and self._left():
            window = max(1, len(transfer.keys or ()))
            chain = registered.chain(self._hashes[max(0, pages - window) : pages])
            self._client.lookup(chain, self._left())

    def _present(self, registered: RegisteredPool, pages: Sequence[int]) -> list[bool]:
        if registered.pool is None:
            return [True] * len(pages)
        chain = registered.chain([self._hashes[page] for page in pages])
        left = self._left()
        if not left:
            return [False] * len(pages)
        return self._client.present(chain, left, request=self._request)

    def _left(self) -> float:
        return max(0.0, self._deadline - time.monotonic())
