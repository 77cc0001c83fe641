"""Decide which pages to remove: periods without a use first, and in a period leaves before roots.

Using a page uses all its ancestors, so an ancestor never has an earlier period, and its position in
the chain is smaller. The order of a page is one number: first its period, then its position,
descending. Pages of unknown position are removed first within their period.
"""

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from memkv_sglang.tiers.minio.retention.entries import UNKNOWN, Entries

GROUPS = 4096
"""Maximum number of groups in a shard's summary, which then has about 100 KB."""

LAST = (1 << 63) - 1
"""A place in the order that no page follows."""

_GROUP = np.dtype([("order", "<u8"), ("bytes", "<u8"), ("pages", "<u8")])

Orders = npt.NDArray[np.uint64]


def eviction_order(found: Entries, period: float) -> Orders:
    """Return the place of each page in the order. Pages with smaller numbers are removed first."""
    periods = (found["used"] // period).astype(np.uint64)
    return (periods << np.uint64(32)) | (np.uint64(UNKNOWN) - found["position"].astype(np.uint64))


def order_at(time: float, period: float) -> int:
    """Return the smallest place of pages last used in the period of `time`."""
    return max(int(time // period), 0) << 32


class Summary:
    """How much of a shard is at each place in the order. Does not count pinned pages."""

    def __init__(self, groups: npt.NDArray[Any]) -> None:
        """Use groups sorted by order. A group has the pages up to its order."""
        self.groups = groups

    @classmethod
    def of(cls, orders: Orders, sizes: npt.NDArray[np.uint32]) -> "Summary":
        """Summarize pages, given their places in the order and their sizes."""
        values, inverse = np.unique(orders, return_inverse=True)
        groups = np.zeros(len(values), _GROUP)
        groups["order"] = values
        groups["bytes"] = np.bincount(inverse, sizes, len(values)).astype(np.uint64)
        groups["pages"] = np.bincount(inverse, minlength=len(values))
        return cls(groups).shortened()

    @classmethod
    def sum(cls, parts: Sequence["Summary"]) -> "Summary":
        """Return the summary of all pages of several summaries."""
        groups = np.concatenate([np.empty(0, _GROUP), *(part.groups for part in parts)])
        values, inverse = np.unique(groups["order"], return_inverse=True)
        total = np.zeros(len(values), _GROUP)
        total["order"] = values
        for field in ("bytes", "pages"):
            total[field] = np.bincount(inverse, groups[field], len(values)).astype(np.uint64)
        return cls(total)

    def shortened(self) -> "Summary":
        """Return the summary with at most `GROUPS` groups, by joining neighbours."""
        count = len(self.groups)
        if count <= GROUPS:
            return self
        step = -(-count // GROUPS)
        starts = np.arange(0, count, step)
        groups = self.groups[np.append(starts[1:], count) - 1].copy()
        for field in ("bytes", "pages"):
            groups[field] = np.add.reduceat(self.groups[field], starts)
        return Summary(groups)

    def below(self, order: int) -> tuple[int, int]:
        """Return the bytes and pages of all groups below a place in the order."""
        end = int(np.searchsorted(self.groups["order"], np.uint64(order)))
        return int(self.groups["bytes"][:end].sum()), int(self.groups["pages"][:end].sum())

    def oldest(self) -> int:
        """Return the first place in the order that has pages."""
        return int(self.groups["order"][0]) if len(self.groups) else LAST

    def at(self, order: int) -> tuple[int, int]:
        """Return the bytes and pages of the group at a place in the order."""
        place = int(np.searchsorted(self.groups["order"], np.uint64(order)))
        if place == len(self.groups) or int(self.groups["order"][place]) != order:
            return 0, 0
        return int(self.groups["bytes"][place]), int(self.groups["pages"][place])

    def encode(self) -> bytes:
        """Return the summary as stored."""
        content: bytes = self.groups.tobytes()
        return content

    @classmethod
    def decode(cls, content: bytes) -> "Summary":
        """Parse a stored summary. Raises `ValueError`."""
        groups = np.frombuffer(content, _GROUP)
        if len(groups) > GROUPS or np.any(groups["order"][1:] <= groups["order"][:-1]):
            raise ValueError("not a summary")
        return cls(groups)


class Cut(msgspec.Struct, frozen=True, kw_only=True):
    """The pages that a round removes: those before `order`, and in each shard some at `order`."""

    order: int = 0
    quotas: Sequence[int] = ()
    """Bytes to remove at `order`, by shard."""

    def victims(self, shard: int, orders: Orders, sizes: npt.NDArray[np.uint32]) -> Any:
        """Return a mask of the pages of a shard to remove."""
        chosen = orders < np.uint64(self.order)
        quota = self.quotas[shard] if shard < len(self.quotas) else 0
        if quota:
            tied = np.flatnonzero(orders == np.uint64(self.order))
            before = np.cumsum(sizes[tied], dtype=np.uint64) - sizes[tied]
            chosen[tied[before < np.uint64(quota)]] = True
        return chosen


def find_cut(summaries: Sequence[Summary], excess: int, expired: int) -> Cut:
    """Return the cut that removes all pages before `expired`, and at least `excess` bytes."""
    total = Summary.sum(summaries)
    if total.below(expired)[0] >= excess:
        return Cut(order=expired)
    sums = np.cumsum(total.groups["bytes"], dtype=np.uint64)
    place = min(int(np.searchsorted(sums, np.uint64(excess))), len(sums) - 1)
    if place < 0:
        return Cut(order=expired)
    order = int(total.groups["order"][place])
    missing, quotas = excess - total.below(order)[0], []
    for summary in summaries:
        quota = min(missing, summary.at(order)[0])
        quotas.append(quota)
        missing -= quota
    return Cut(order=order, quotas=quotas)


def planned(summaries: Sequence[Summary], cut: Cut) -> tuple[int, int]:
    """Return about how many pages and bytes a cut removes."""
    pages, size = 0, 0
    for shard, summary in enumerate(summaries):
        below, at = summary.below(cut.order), summary.at(cut.order)
        quota = cut.quotas[shard] if shard < len(cut.quotas) else 0
        share = -(-at[1] * min(quota, at[0]) // at[0]) if at[0] else 0
        pages += below[1] + share
        size += below[0] + (at[0] * share // at[1] if at[1] else 0)
    return pages, size
