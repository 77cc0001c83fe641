"""Spills: to the disk, acknowledged, and from there to the shared tier behind the caller's back."""

from collections.abc import Sequence

from memkv_sglang.engine.uploads import UploadQueue
from memkv_sglang.page import Page, PageKey
from memkv_sglang.tiers.base import PendingPage, SpillResult, Tier


class Spiller:
    """Stores pages. See `spill`."""

    def __init__(
        self, local: Tier | None, shared: Tier | None, uploads: UploadQueue | None
    ) -> None:
        """Prefer `local`, whose pages `uploads` moves on to `shared`."""
        self._local = local
        self._shared = shared
        self._uploads = uploads

    def spill(
        self, pages: Sequence[Page], parent: PageKey | None, deadline: float
    ) -> list[SpillResult]:
        """Store pages of a chain, in order; `parent` is the page before the first, if there is one.

        Blocks until nobody reads the buffers any more. `STORED` and `PRESENT` pages can be loaded
        on this node from now on, also after a restart of the process. Without a local tier, or
        where it takes no more, pages go straight to the shared one.
        """
        if self._local is None:
            return self._spill_shared(pages, deadline)
        results = self._local.spill(pages, deadline)
        kept = next((i for i, r in enumerate(results) if r > SpillResult.PRESENT), len(results))
        if self._uploads is not None and kept:
            # Also what was there before: its upload may have been dropped, or its mark be lost.
            held = [PendingPage(page.key, page.length) for page in pages[:kept]]
            self._uploads.offer(held, parent)
        return results[:kept] + self._spill_shared(pages[kept:], deadline)

    def _spill_shared(self, pages: Sequence[Page], deadline: float) -> list[SpillResult]:
        if self._shared is None:
            return [SpillResult.REFUSED] * len(pages)
        return self._shared.spill(pages, deadline)
