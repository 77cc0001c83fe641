"""A pass over one shard: merges logs into it, and removes the pages that a round has chosen."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from memkv_sglang.tiers.base import TierError
from memkv_sglang.tiers.minio.http import BackgroundCall
from memkv_sglang.tiers.minio.retention.logs import LogName
from memkv_sglang.tiers.minio.retention.parts import Step
from memkv_sglang.tiers.minio.retention.pins import Look
from memkv_sglang.tiers.minio.retention.rounds import Round
from memkv_sglang.tiers.minio.retention.shards import PART, RENEWALS, Part, Shard, ShardState

if TYPE_CHECKING:
    import numpy.typing as npt

    from memkv_sglang.tiers.minio.retention.collector import Collector
    from memkv_sglang.tiers.minio.retention.entries import Entries
    from memkv_sglang.tiers.minio.retention.eviction import Cut, Summary

REMOVERS = 2
"""Number of concurrent delete requests."""

REMOVE_SECONDS = 20.0
"""Maximum seconds from reading pins and logs to the last delete that relies on them."""

TOO_MANY_LOGS = "too many logs to know which pages are in use; merging them before removing pages"


class ShardPass:
    """A pass over one shard. Merges logs into it and, with a cut, removes pages. Used only once."""

    def __init__(
        self,
        collector: "Collector",
        shard: Shard,
        number: int,
        current: Round,
        listed: Sequence[LogName],
        pins: Look,
        now: float,
        *,
        cut: "Cut | None" = None,
        rewrite: bool = False,
    ) -> None:
        self._collector = collector
        self._parts = collector.parts
        self._shard = shard
        self._number = number
        self._round = current
        self._listed = listed
        self._pins = pins
        self._now = now
        self._cut = cut
        self._quota = cut.quotas[number] if cut and number < len(cut.quotas) else 0
        self._rewrite = rewrite
        width = 256 // self._parts.format.shards
        self._slices = number * width, (number + 1) * width
        self._pending: list[Entries] = []
        self._new: list[Part] = []
        self._summaries: list[Summary] = []
        self._pages = self._bytes = self._kept = 0
        self._removed_pages = self._removed_bytes = 0

    def run(self, step: Step) -> ShardState:
        """Make the pass; return the new state, which the caller publishes."""
        from memkv_sglang.tiers.minio.retention.eviction import Summary

        self._step = step
        old = self._shard.state
        fresh = [found for found in self._listed if found.name not in old.logs]

        def each(count: int) -> None:
            step("logs", count, len(fresh))
            self._shard.renew()

        for part, held, updates in self._ranges(old.parts, self._updates(fresh, each)):
            self._take(part, held, updates)
        self._write_pending(last=True)
        summary = Summary.sum(self._summaries).shortened()
        kept = {part.name for part in old.parts} & {part.name for part in self._new}
        return msgspec.structs.replace(
            old,
            parts=self._new,
            summary=self._shard.write_summary(summary) if len(summary.groups) else "",
            logs=[found.name for found in self._listed],
            period=self._round.period,
            pins=self._pins.version,
            written=old.written if kept else self._now,
            pages=self._pages,
            bytes=self._bytes,
            kept_pages=self._kept,
            removed_pages=self._removed_pages,
            removed_bytes=self._removed_bytes,
        )

    def _updates(
        self, logs: Sequence[LogName], each: Callable[[int], None] = lambda _: None
    ) -> "Entries":
        """Return what the logs say about this shard, sorted by key."""
        import numpy as np

        from memkv_sglang.tiers.minio.retention.entries import by_key, empty

        found = np.concatenate([empty(), *self._parts.logs.read(logs, *self._slices, each)])
        return by_key(found)

    def _ranges(
        self, parts: Sequence[Part], updates: "Entries"
    ) -> "Iterator[tuple[Part | None, Entries, Entries]]":
        """Yield each part with its entries, and with the updates in its range of keys."""
        import numpy as np

        from memkv_sglang.tiers.minio.retention.entries import empty

        if not parts:
            yield None, empty(), updates
            return
        firsts = np.array([bytes.fromhex(part.first) for part in parts[1:]], updates["key"].dtype)
        ends = [*np.searchsorted(updates["key"], firsts).tolist(), len(updates)]
        begin = 0
        for i, (part, end) in enumerate(zip(parts, ends, strict=True)):
            self._step("parts", i, len(parts))
            self._shard.renew()
            held = self._shard.entries(part)
            self._collector.note_memory(updates.nbytes + 2 * held.nbytes)
            yield part, held, updates[begin:end]
            begin = end

    def _take(self, part: Part | None, held: "Entries", updates: "Entries") -> None:
        from memkv_sglang.tiers.minio.retention.entries import merge, split

        for updates_part in split(updates, 4 * PART) if len(updates) > 4 * PART else [updates]:
            held = merge(held, updates_part)
        found = held
        before = found
        pinned = self._pinned(found)
        found, pinned = self._remove_victims(found, pinned)
        found = self._renew(found)
        self._note(found, pinned)
        unchanged = part is not None and not len(updates) and found is before and not self._rewrite
        if unchanged and not self._pending and part is not None:
            self._new.append(part)
        else:
            self._pending.append(found)
            self._write_pending(last=False)

    def _pinned(self, found: "Entries") -> "npt.NDArray[Any]":
        """Return a mask of the pinned pages."""
        import numpy as np

        from memkv_sglang.tiers.minio.retention.entries import page_hashes, page_keys

        mask = np.zeros(len(found), np.bool_)
        kept = self._pins.kept
        if len(kept) and len(found):
            places = np.flatnonzero(np.isin(page_hashes(found), kept.hashes()))
            for place, key in zip(places.tolist(), page_keys(found[places]), strict=True):
                mask[place] = key in kept
        return mask

    def _note(self, found: "Entries", pinned: "npt.NDArray[Any]") -> None:
        from memkv_sglang.tiers.minio.retention.eviction import Summary, eviction_order

        known = found["size"] > 0
        self._pages += int(known.sum())
        self._bytes += int(found["size"].sum(dtype="u8"))
        self._kept += int((pinned & known).sum())
        free = found[~pinned]
        if len(free):
            orders = eviction_order(free, self._round.period)
            self._summaries.append(Summary.of(orders, free["size"]))
        if len(self._summaries) > 16:
            self._summaries = [Summary.sum(self._summaries).shortened()]

    def _write_pending(self, *, last: bool) -> None:
        import numpy as np

        count = sum(map(len, self._pending))
        if not count or not (last or count >= PART):
            return
        found = np.concatenate(self._pending)
        self._pending = []
        while len(found) >= PART or (last and len(found)):
            self._new.append(self._shard.write_part(found[:PART]))
            found = found[PART:]
        if len(found):
            self._pending.append(found)

    # Removal

    def _remove_victims(
        self,
        found: "Entries",
        pinned: "npt.NDArray[Any]",
    ) -> "tuple[Entries, npt.NDArray[Any]]":
        """Remove the pages that the cut chooses; return the remaining ones."""
        import numpy as np

        from memkv_sglang.tiers.minio.retention.eviction import Cut, eviction_order

        if self._cut is None or not len(found):
            return found, pinned
        orders = eviction_order(found, self._round.period)
        sizes = np.where(pinned, 0, found["size"]).astype(np.uint32)
        cut = Cut(order=self._cut.order, quotas=[self._quota])
        chosen = cut.victims(0, orders, sizes) & ~pinned
        self._quota = max(
            self._quota - int(sizes[chosen & (orders == np.uint64(cut.order))].sum(dtype="u8")), 0
        )
        places = np.flatnonzero(chosen)
        if not len(places):
            return found, pinned
        left = np.ones(len(found), np.bool_)
        while len(places):
            some = places[: self._collector.removed_at_once * REMOVERS]
            try:
                removed = self._remove(found[some])
            except TierError:
                if not self._collector.remove_fewer():
                    raise
                continue
            left[some[removed]] = False
            places = places[len(some) :]
        return found[left], pinned[left]

    def _remove(self, victims: "Entries") -> "npt.NDArray[Any]":
        """Remove pages unless pinned or used meanwhile; return a mask of those removed."""
        import numpy as np

        from memkv_sglang.tiers.minio.retention.entries import contained, page_keys

        self._step("removed", self._removed_pages, None)
        pins, fresh = self._collector.read_pins(self._step), self._fresh_uses()
        deadline = time.monotonic() + min(
            REMOVE_SECONDS, self._collector.lease_seconds * (1 - 1 / RENEWALS)
        )
        self._shard.renew()
        keys = page_keys(victims)
        free = ~contained(victims, fresh)
        pinned = np.array([key in pins.kept for key in keys], np.bool_)
        free &= ~pinned
        keys = [key for key, is_free in zip(keys, free.tolist(), strict=True) if is_free]
        at_once = self._collector.removed_at_once
        calls = [
            BackgroundCall(
                partial(
                    self._parts.bucket.remove,
                    [self._parts.names.page(key) for key in keys[i : i + at_once]],
                    deadline - time.monotonic(),
                )
            ).begin()
            for i in range(0, len(keys), at_once)
        ]
        wait(calls)
        for call in calls:
            call.result()
        self._kept += int(pinned.sum())  # pinned since the pass began
        known = victims[free]
        size = int(known["size"].sum(dtype="u8"))
        self._removed_pages += int((known["size"] > 0).sum())
        self._removed_bytes += size
        self._collector.count_removed(keys, size)
        return free

    def _fresh_uses(self) -> "npt.NDArray[Any]":
        """Return the sorted keys of the pages in logs that were written since the pass began."""
        import numpy as np

        known = {found.name for found in self._listed}
        fresh = [found for found in self._parts.logs.listed() if found.name not in known]
        if self._parts.logs.truncated:
            raise TierError(TOO_MANY_LOGS)
        found = self._updates(fresh)
        return np.unique(found["key"])

    def _renew(self, found: "Entries") -> "Entries":
        """Renew the objects in use that a lifecycle rule would soon remove."""
        return self._parts.renewer.renew(found, self._parts.format.days, self._now)
