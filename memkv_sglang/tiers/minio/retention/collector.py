"""Collects the bucket: merges logs into the index, and removes pages beyond the limits."""

import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from memkv_sglang.config.schema import CollectorConfig
from memkv_sglang.page import PageKey
from memkv_sglang.tiers.base import TierError
from memkv_sglang.tiers.minio.admin import REMOVED_AT_ONCE, Bucket
from memkv_sglang.tiers.minio.http import BackgroundCall, is_plausible
from memkv_sglang.tiers.minio.names import ObjectNames
from memkv_sglang.tiers.minio.objects import Telemetry
from memkv_sglang.tiers.minio.retention.bucket_format import (
    RENEW_AFTER,
    BucketFormat,
    renew_format,
)
from memkv_sglang.tiers.minio.retention.logs import LogName, LogStore
from memkv_sglang.tiers.minio.retention.pins import Look, PinStore
from memkv_sglang.tiers.minio.retention.records import Records
from memkv_sglang.tiers.minio.retention.renewal import Renewer
from memkv_sglang.tiers.minio.retention.rounds import Report, Round, StoredRound
from memkv_sglang.tiers.minio.retention.shards import (
    PART,
    RENEWALS,
    LeaseHeldError,
    Part,
    Shard,
    ShardState,
)

if TYPE_CHECKING:
    import numpy.typing as npt

    from memkv_sglang.tiers.minio.retention.entries import Entries
    from memkv_sglang.tiers.minio.retention.eviction import Cut, Summary

log = logging.getLogger(__name__)

LOW_WATERMARK = 0.95
"""Share of the capacity down to which a collection removes pages."""

REMOVERS = 2
"""Number of concurrent delete requests."""

FEWEST_AT_ONCE = 100
"""Least number of objects per delete request for a server that is too slow for more."""

REMOVE_SECONDS = 20.0
"""Maximum time, in seconds, from reading pins and logs to the last delete that relies on them."""

SETTLE_SECONDS = 10.0
"""Maximum time that nodes take to log their uses once pages may be removed."""

QUARANTINE_SECONDS = 7 * 86400.0
"""How long quarantined objects are kept for inspection, in seconds."""

QUARANTINE_LIMIT = 10_000
"""Maximum number of quarantined objects that a round looks at."""

CLOCK_SECONDS = 60.0
"""How long a reading of the server's time is extrapolated."""

TOO_MANY_LOGS = "too many logs to know which pages are in use; merging them before removing pages"

SHARDS_OPEN = 2.0
"""Pause, in seconds, while other nodes hold the remaining shards."""

Step = Callable[[str, int, int | None], None]
"""Called after each step with the activity, the progress and the total (None if unknown).

May raise to end the collection, or sleep to slow it down.
"""


class Collection(NamedTuple):
    """The result of a round or a dry run."""

    report: Report
    satisfied: bool
    """False if pinned pages exceed the limits."""
    memory: int
    """Most memory of entries at once, in bytes."""


class Parts(NamedTuple):
    """What a collector works with."""

    bucket: Bucket
    records: Records
    names: ObjectNames
    logs: LogStore
    pins: PinStore
    renewer: Renewer
    telemetry: Telemetry
    format: BucketFormat


def grace(config: CollectorConfig) -> float:
    """Return the seconds from the decision which pages leave to their removal.

    Longer than any node takes to notice the decision.
    """
    return config.interval / 2


def settle(config: CollectorConfig) -> float:
    """Return the seconds that nodes have to write their logs once the grace is over."""
    return min(SETTLE_SECONDS, config.interval / 4)


class Collector:
    """One node's part in the rounds. Not thread-safe.

    Calls block, and raise `TierError` and what a step raises.
    """

    def __init__(
        self,
        parts: Parts,
        config: CollectorConfig,
        *,
        forget: Callable[[Sequence[PageKey]], None] = lambda _: None,
        flush: Callable[[], bool] = lambda: True,
        collects: bool = True,
    ) -> None:
        """`forget` is called with removed pages; `flush` writes this node's log; False if it fails.

        With `collects = False`, only `look` may be called.
        """
        self.collects = collects
        self._parts = parts
        self._config = config
        self._forget = forget
        self._flush = flush
        self._stored = StoredRound(parts.records, parts.names)
        self._shards = [
            Shard(parts.records, parts.bucket, parts.names, number, config.lease_ttl)
            for number in range(parts.format.shards)
        ]
        self._clock = _Clock(parts)
        self._planned: tuple[int, int] | None = None
        self._removed = [0, 0]
        self._replaced: list[str] = []
        """Objects of the index that no shard names any more."""
        self.removed_at_once = REMOVED_AT_ONCE
        """Number of objects per delete request."""
        self.memory = 0
        """Most memory of entries at once, in bytes, since the start."""

    @property
    def removed(self) -> tuple[int, int]:
        """Pages and bytes that this node has removed so far."""
        return self._removed[0], self._removed[1]

    def look(self) -> StoredRound:
        """Read the current round."""
        self._stored.read()
        return self._stored

    def now(self) -> float:
        """Return the server's time."""
        return self._clock.now()

    def free(self) -> None:
        """Free memory until the next round."""
        self._parts.logs.forget()

    def is_due(self) -> bool:
        """Return whether a new round should begin, given the last `look`."""
        if self._stored.current.phase != "done" or self._stored.age < self._config.interval:
            return False
        if self._stored.age >= RENEW_AFTER or self._config.max_age:
            return True
        report = self._stored.current.report
        over = report is not None and 0 < self._config.capacity < report.bytes
        return over or bool(self._parts.logs.listed())

    def begin(self) -> bool:
        """Begin a round; False if another node did so."""
        current = self._stored.current
        return self._stored.replace(
            msgspec.structs.replace(
                current,
                number=self._last_number() + 1,
                phase="merge",
                period=self._config.use_period,
            )
        )

    def _last_number(self) -> int:
        """Return the number of the last round, also if its record was lost."""
        if number := self._stored.current.number:
            return number
        for shard in self._shards:
            shard.read()
        states = [shard.state for shard in self._shards]
        return max(max(state.merged, state.removed) for state in states)

    def advance(self, step: Step, *, dry_run: bool = False) -> bool:
        """Do what can be done now for the round last read; return whether its phase is over."""
        current = self._stored.current
        if current.phase == "merge":
            pins, listed = self.read_pins(step), self._parts.logs.listed()
            if not self._each_shard(partial(self._merge, current, listed, pins, step)):
                return False
            return self._decide(step, dry_run=dry_run)
        if current.phase == "remove":
            if self._clock.now() < (current.remove_at + settle(self._config)):
                return False
            if not self._each_shard(partial(self._remove, current, step)):
                return False
            return self._end()
        return True

    def collect(self, step: Step, *, dry_run: bool = False) -> Collection:
        """Run a whole round, and before that end a round that is under way.

        Waits for other nodes, and for the time they need to log their uses.
        """
        self._log_uses()
        self.look()
        self._finish_round(step, dry_run=dry_run)
        while self._stored.current.phase == "done" and not self.begin():
            self.look()
            self._finish_round(step, dry_run=dry_run)
        self._planned = None
        self._finish_round(step, dry_run=dry_run)
        report = self._stored.current.report
        if dry_run and self._stored.current.phase == "remove":
            report = self._plan_of_removal()
        assert report is not None
        if dry_run and self._planned:
            pages, size = self._planned
            report = msgspec.structs.replace(
                report,
                pages=max(report.pages - pages, 0),
                bytes=max(report.bytes - size, 0),
                removed_pages=pages,
                removed_bytes=size,
            )
        capacity = self._config.capacity
        self._parts.logs.forget()
        return Collection(report, not capacity or report.bytes <= capacity, self.memory)

    def _finish_round(self, step: Step, *, dry_run: bool) -> None:
        """Work on the round last read until it is over; a dry run leaves removals to others."""
        number = self._stored.current.number
        while (current := self._stored.current).number == number and current.phase != "done":
            if dry_run and current.phase == "remove":
                return
            self._go_on(step, dry_run=dry_run)

    def _plan_of_removal(self) -> Report:
        """Plan what is left to remove in this round; return what the bucket holds now."""
        from memkv_sglang.tiers.minio.retention.eviction import Cut, Summary, planned

        current, summaries = self._stored.current, []
        for shard in self._shards:
            shard.read()
            is_done = shard.state.removed >= current.number
            summaries.append(Summary.sum([]) if is_done else shard.summary())
        self._planned = planned(summaries, Cut(order=current.order, quotas=current.quotas))
        return self._report(current.number)

    def _go_on(self, step: Step, *, dry_run: bool = False) -> None:
        if self.advance(step, dry_run=dry_run):
            self._stored.read()
            return
        pause = min(SHARDS_OPEN, self._config.interval / 8)
        if self._stored.current.phase == "remove":
            step("waiting for the uses of all nodes", 0, None)
        time.sleep(pause)
        self._stored.read()

    # The phases of a round

    def _each_shard(self, work: Callable[[int, Shard], bool]) -> bool:
        """Do the work on each shard, starting anywhere; return whether all shards are done."""
        count = len(self._shards)
        first = random.randrange(count)  # noqa: S311 - spreads nodes over shards
        done = True
        for i in range(count):
            number = (first + i) % count
            try:
                done = work(number, self._shards[number]) and done
            except LeaseHeldError:
                done = False
        self._remove_replaced()
        return done

    def _merge(
        self,
        current: Round,
        listed: Sequence[LogName],
        pins: Look,
        step: Step,
        number: int,
        shard: Shard,
    ) -> bool:
        """Merge the listed logs into a shard, unless that was done in this round."""
        holder = shard.read()
        self._check(shard, number)
        if shard.state.merged >= current.number:
            return True
        if holder:
            return False
        fresh = [found for found in listed if found.name not in shard.state.logs]
        now = self._clock.now()
        is_old = bool(shard.state.parts) and now - shard.state.written > RENEW_AFTER
        basis = (shard.state.pins, shard.state.period)
        if not fresh and basis == (pins.version, current.period) and not is_old:
            step("shards", number, len(self._shards))
            shard.publish(msgspec.structs.replace(shard.state, merged=current.number))
            return True
        with _held(shard):
            work = _Pass(self, shard, number, current, listed, pins, now, rewrite=is_old)
            self._finish(shard, work, step, merged=current.number)
            if is_old:
                shard.remove_orphans(now)
        return True

    def _remove(self, current: Round, step: Step, number: int, shard: Shard) -> bool:
        """Remove the pages of a shard that the round decided on and nobody used since."""
        from memkv_sglang.tiers.minio.retention.eviction import Cut

        holder = shard.read()
        if shard.state.removed >= current.number:
            return True
        if holder:
            return False
        with _held(shard):
            self._log_uses()
            cut = Cut(order=current.order, quotas=current.quotas)
            now = self._clock.now()
            listed, pins = self._parts.logs.listed(), self.read_pins(step)
            if self._parts.logs.truncated:
                raise TierError(TOO_MANY_LOGS)
            work = _Pass(self, shard, number, current, listed, pins, now, cut=cut)
            self._finish(shard, work, step, removed=current.number)
        return True

    def _finish(self, shard: Shard, work: "_Pass", step: Step, **marks: int) -> None:
        """Run a pass over a shard, and publish the result."""
        old = shard.state
        shard.publish(msgspec.structs.replace(work.run(step), **marks))
        self._replaced += shard.replaced(old)
        if len(self._replaced) >= REMOVED_AT_ONCE:
            self._remove_replaced()

    def _remove_replaced(self) -> None:
        self._parts.bucket.remove(self._replaced)
        self._replaced.clear()

    def _decide(self, step: Step, *, dry_run: bool) -> bool:
        """Decide which pages leave, given all shards as they were just merged."""
        from memkv_sglang.tiers.minio.retention.eviction import find_cut, order_at, planned

        config, now = self._config, self._clock.now()
        summaries = []
        for number, shard in enumerate(self._shards):
            step("summaries", number, len(self._shards))
            summaries.append(shard.summary())
        self._remove_merged_logs()
        self._remove_quarantined(now)
        renew_format(self._parts.records, self._parts.names, self._parts.format)
        size = sum(shard.state.bytes for shard in self._shards)
        excess = 0
        if config.capacity and size > config.capacity:
            excess = size - int(LOW_WATERMARK * config.capacity)
        expired = order_at(now - config.max_age, config.use_period) if config.max_age else 0
        cut = find_cut(summaries, excess, expired)
        self._planned = planned(summaries, cut)
        self._parts.logs.listed()
        if self._parts.logs.truncated:  # the next rounds merge the others first
            log.warning(TOO_MANY_LOGS)
            return self._end()
        if dry_run or not self._planned[0]:
            return self._end()
        return self._stored.replace(
            msgspec.structs.replace(
                self._stored.current,
                phase="remove",
                period=config.use_period,
                remove_at=now + grace(config),
                order=cut.order,
                quotas=list(cut.quotas),
            )
        )

    def _log_uses(self) -> None:
        if not self._flush():
            raise TierError("could not log which pages this node used, so none are removed")

    def _end(self) -> bool:
        """End the round, whose last phase has just read or changed every shard."""
        current = self._stored.current
        self._remove_merged_logs()
        return self._stored.replace(
            msgspec.structs.replace(current, phase="done", report=self._report(current.number))
        )

    def _report(self, number: int) -> Report:
        states = [shard.state for shard in self._shards]
        return Report(
            pages=sum(state.pages for state in states),
            bytes=sum(state.bytes for state in states),
            removed_pages=sum(s.removed_pages for s in states if s.removed == number),
            removed_bytes=sum(s.removed_bytes for s in states if s.removed == number),
            kept_pages=sum(state.kept_pages for state in states),
        )

    def _remove_merged_logs(self) -> None:
        """Remove the logs that every shard has merged."""
        merged = set(self._shards[0].state.logs)
        for shard in self._shards[1:]:
            merged &= set(shard.state.logs)
        self._parts.logs.remove(sorted(merged))

    def _remove_quarantined(self, now: float) -> None:
        names, old = self._parts.names, now - QUARANTINE_SECONDS
        found = []
        for count, item in enumerate(self._parts.bucket.objects(names.quarantined)):
            if count == QUARANTINE_LIMIT:
                break
            if (
                is_plausible(item.modified)
                and item.modified < old
                and (names.is_quarantined(item.name))
            ):
                found.append(item.name)
        self._parts.bucket.remove(found)

    def read_pins(self, step: Step) -> Look:
        """Read the pins, and remove those that have ended."""
        found = self._parts.pins.look(
            self._clock.now(), lambda count: step("pins read", count, None)
        )
        self._parts.bucket.remove(found.ended)
        return found

    def _check(self, shard: Shard, number: int) -> None:
        if shard.damaged:
            self._parts.telemetry.count("damaged_shards")
            log.warning(
                "a shard of the index is damaged and counts as empty; run `memkv bucket rebuild`",
                extra={"fields": {"shard": number}},
            )

    def note_memory(self, size: int) -> None:
        """Record how much memory entries take now."""
        self.memory = max(self.memory, size + self._parts.logs.cached_bytes)

    @property
    def parts(self) -> Parts:
        """What this collector works with."""
        return self._parts

    @property
    def lease_seconds(self) -> float:
        """Duration of a shard's lease."""
        return self._config.lease_ttl

    def remove_fewer(self) -> bool:
        """Ask for fewer objects per request, after one has failed; False if they are few."""
        if self.removed_at_once <= FEWEST_AT_ONCE:
            return False
        self.removed_at_once = max(self.removed_at_once // 3, FEWEST_AT_ONCE)
        return True

    def count_removed(self, keys: Sequence[PageKey], size: int) -> None:
        """Record that pages were removed."""
        self._removed[0] += len(keys)
        self._removed[1] += size
        self._forget(keys)


@contextmanager
def _held(shard: Shard) -> Iterator[None]:
    """Hold a shard's lease for a `with` block, which releases it if all is well."""
    shard.acquire()
    try:
        yield
    except BaseException:
        with suppress(TierError):  # otherwise it expires
            shard.release()
        raise


class _Clock:
    """The server's time, read now and then and extrapolated in between."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._read_at = float("-inf")
        self._ahead = 0.0

    def now(self) -> float:
        begin = time.monotonic()
        if begin - self._read_at > CLOCK_SECONDS:
            self._ahead = self._parts.records.clock(self._parts.names.format) - begin
            self._read_at = begin
        return begin + self._ahead


class _Pass:
    """One pass over a shard: merges logs into it and, given a cut, removes pages. Used once."""

    def __init__(
        self,
        collector: Collector,
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
        """Return the new state; the caller publishes it."""
        from memkv_sglang.tiers.minio.retention.eviction import Summary

        self._step = step
        old = self._shard.state
        fresh = [found for found in self._listed if found.name not in old.logs]
        for part, held, updates in self._ranges(old.parts, self._updates(fresh)):
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

    def _updates(self, logs: Sequence[LogName]) -> "Entries":
        """Return what the logs say about this shard, sorted by key."""
        import numpy as np

        from memkv_sglang.tiers.minio.retention.entries import by_key, empty

        found = np.concatenate([empty(), *self._parts.logs.read(logs, *self._slices)])
        return by_key(found)

    def _ranges(
        self, parts: Sequence[Part], updates: "Entries"
    ) -> "Iterator[tuple[Part | None, Entries, Entries]]":
        """Yield each part with its entries, and the updates of its range of keys."""
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
        """Remove the pages that the cut chooses; return the others."""
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
        """Remove pages unless they were pinned or used meanwhile; return a mask of the removed."""
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
        free &= np.array([key not in pins.kept for key in keys], np.bool_)
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
        known = victims[free]
        size = int(known["size"].sum(dtype="u8"))
        self._removed_pages += int((known["size"] > 0).sum())
        self._removed_bytes += size
        self._collector.count_removed(keys, size)
        return free

    def _fresh_uses(self) -> "npt.NDArray[Any]":
        """Return the sorted keys of pages in logs that were written since the pass began."""
        import numpy as np

        known = {found.name for found in self._listed}
        fresh = [found for found in self._parts.logs.listed() if found.name not in known]
        if self._parts.logs.truncated:
            raise TierError(TOO_MANY_LOGS)
        found = self._updates(fresh)
        return np.unique(found["key"])

    def _renew(self, found: "Entries") -> "Entries":
        """Renew the objects that a lifecycle rule would soon remove although they are in use."""
        return self._parts.renewer.renew(found, self._parts.format.days, self._now)
