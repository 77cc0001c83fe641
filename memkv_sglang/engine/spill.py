"""Spill pages to the disk, and upload them from there in the background.

With `engine.admission = "second_use"`, pages go to the shared tier first.
"""

import time
from collections.abc import Sequence
from contextlib import suppress

from memkv_sglang.engine.uploads import UploadQueue
from memkv_sglang.page import Page, PageKey
from memkv_sglang.tiers.base import PendingPage, SpillResult, Tier, TierError


class Spiller:
    """Stores pages in the local or the shared tier. Thread-safe."""

    def __init__(
        self,
        local: Tier | None,
        shared: Tier | None,
        uploads: UploadQueue | None,
        *,
        bypass_local: bool = False,
    ) -> None:
        """Prefer `local`, from where `uploads` copies pages; prefer `shared` if `bypass_local`."""
        self._bypass_local = bypass_local
        self._local = local
        self._shared = shared
        self._uploads = uploads

    def spill(
        self, pages: Sequence[Page], parent: PageKey | None, deadline: float
    ) -> list[SpillResult]:
        """Store pages of a chain, in order. `parent` is the page before the first, if there is one.

        Blocks until no thread reads the buffers any more. `STORED` and `PRESENT` pages can be
        loaded on this node from now on, even after a restart. Pages go to the shared tier if there
        is no local tier or it is full. With `bypass_local`, they go to the shared tier first; after
        half of the time, those not stored there go to the local tier.
        """
        if self._local is None:
            return self._spill_shared(pages, deadline)
        if not self._bypass_local or self._belongs_in_local(self._local, pages, parent, deadline):
            return self._spill_local(self._local, pages, parent, deadline)
        now = time.monotonic()
        results = self._spill_shared(pages, now + (deadline - now) / 2)
        kept = _kept(results)
        if kept == len(pages):
            return results
        rest_parent = pages[kept - 1].key if kept else parent
        rest = self._spill_local(self._local, pages[kept:], rest_parent, deadline)
        return results[:kept] + rest

    def _belongs_in_local(
        self, local: Tier, pages: Sequence[Page], parent: PageKey | None, deadline: float
    ) -> bool:
        """Return whether only the local tier has the parent, or it has some of the pages."""
        if parent is not None and self._uploads is not None and self._uploads.lacks(parent):
            return True
        try:
            return any(local.present([page.key for page in pages], deadline))
        except TierError:
            return False

    def _spill_local(
        self, local: Tier, pages: Sequence[Page], parent: PageKey | None, deadline: float
    ) -> list[SpillResult]:
        if self._is_behind_hole(local, parent, deadline):
            return [SpillResult.REFUSED] * len(pages)
        results = local.spill(pages, deadline)
        if self._is_behind_hole(local, parent, deadline):  # the parent was evicted meanwhile
            stored = zip(pages, results, strict=True)
            with suppress(TierError):
                local.remove([page.key for page, r in stored if r is SpillResult.STORED])
            return [SpillResult.REFUSED] * len(pages)
        kept = _kept(results)
        if self._uploads is not None and kept:
            # Include PRESENT pages, because their upload may have been dropped or their mark lost.
            held = [PendingPage(page.key, page.length) for page in pages[:kept]]
            fresh = [pages[i].key for i in range(kept) if results[i] is SpillResult.STORED]
            kept = self._uploads.offer(held, parent, fresh)
        if kept < len(pages) and self._uploads is not None and SpillResult.REFUSED in results:
            self._uploads.release()
        return results[:kept] + self._spill_shared(pages[kept:], deadline)

    def _is_behind_hole(self, local: Tier, parent: PageKey | None, deadline: float) -> bool:
        """Return whether no tier has `parent`, so that pages after it could not be loaded.

        Returns False if there is a shared tier, which may have the page. Checking the parent is
        enough, because an evicted page has no descendants on the disk.
        """
        if parent is None or self._shared is not None:
            return False
        try:
            return not all(local.present([parent], deadline))
        except TierError:
            return False

    def _spill_shared(self, pages: Sequence[Page], deadline: float) -> list[SpillResult]:
        if self._shared is None:
            return [SpillResult.REFUSED] * len(pages)
        return self._shared.spill(pages, deadline)


def _kept(results: Sequence[SpillResult]) -> int:
    """Return how many pages are stored, up to the first that is not."""
    return next((i for i, r in enumerate(results) if r > SpillResult.PRESENT), len(results))
