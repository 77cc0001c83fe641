"""Load from both tiers at once while the local one is the bottleneck."""

from collections.abc import Callable, Sequence

from memkv_sglang.engine.speed import TierSpeed
from memkv_sglang.page import Page, PageKey

STEPS = 8
"""Number of equal parts of the local tier's pages; a split moves some of these parts."""

GAIN = 0.75
"""Split only if that takes at most this share of the time, since estimates have errors."""


class LoadBalancer:
    """Chooses the pages to load from the shared tier although the local one holds them."""

    def __init__(
        self, local: TierSpeed, shared: TierSpeed, lacks: Callable[[PageKey], bool]
    ) -> None:
        """Use the measured speeds of both tiers.

        `lacks` returns whether a page is known to be missing from the shared tier.
        """
        self._local = local
        self._shared = shared
        self._lacks = lacks

    def choose(self, pages: Sequence[Page], near: Sequence[int], far: Sequence[int]) -> list[int]:
        """Return the members of `near` to load from the shared tier.

        Args:
            pages: of a load call.
            near: indices of the pages that the local tier holds.
            far: indices of the pages that only the shared tier may hold.

        Chooses the last pages, so that a failure cuts off as little of the prefix as possible.

        """
        if not near:
            return []
        size = pages[near[0]].length
        alone = self._seconds(len(near), len(far), size)
        if not self._shared.seconds(1, size) or not alone:
            return []  # a speed is unknown
        counts = [len(near) * step // STEPS for step in range(1, STEPS + 1)]
        best = min(
            counts, key=lambda count: self._seconds(len(near) - count, len(far) + count, size)
        )
        if self._seconds(len(near) - best, len(far) + best, size) > GAIN * alone:
            return []
        return [i for i in near[len(near) - best :] if not self._lacks(pages[i].key)]

    def _seconds(self, near: int, far: int, size: int) -> float:
        return max(
            self._local.seconds(1, near * size) if near else 0.0,
            self._shared.seconds(1, far * size) if far else 0.0,
        )
