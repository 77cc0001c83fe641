"""Collect the bucket: merge logs into the index, and remove pages beyond the limits."""

import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import NamedTuple

import msgspec

from memkv_sglang.config.schema import CollectorConfig
from memkv_sglang.page import PageKey
from memkv_sglang.tiers.base import TierError
from memkv_sglang.tiers.minio.admin import REMOVED_AT_ONCE
from memkv_sglang.tiers.minio.http import is_plausible
from memkv_sglang.tiers.minio.retention.bucket_format import RENEW_AFTER, renew_format
from memkv_sglang.tiers.minio.retention.logs import LogName
from memkv_sglang.tiers.minio.retention.parts import Parts, Step
from memkv_sglang.tiers.minio.retention.pins import Look
from memkv_sglang.tiers.minio.retention.rounds import Report, Round, StoredRound
from memkv_sglang.tiers.minio.retention.shard_pass import TOO_MANY_LOGS, ShardPass
from memkv_sglang.tiers.minio.retention.shards import LeaseHeldError, Shard

log = logging.getLogger(__name__)

LOW_WATERMARK = 0.95
"""Share of the capacity down to which a collection removes pages."""

FEWEST_AT_ONCE = 100
"""Minimum number of objects per delete request, for a server that is too slow for more."""

SETTLE_SECONDS = 10.0
"""Maximum seconds that nodes have after the `grace` to log their uses."""

QUARANTINE_SECONDS = 7 * 86400.0
"""Seconds for which quarantined objects are kept for inspection."""

QUARANTINE_LIMIT = 10_000
"""Maximum number of quarantined objects that one round looks at."""

CLOCK_SECONDS = 60.0
"""Seconds for which a reading of the server's time is extrapolated."""

LOGS_WAITING = 1000
"""Number of logs that make a round due: one listing shows as many."""

SHARDS_OPEN = 2.0
"""Seconds to wait while other nodes hold the remaining shards."""


class Collection(NamedTuple):
    """The result of a round or a dry run."""

    report: Report
    satisfied: bool
    """False if pinned pages exceed the limits."""
    memory: int
    """Peak memory of index entries, in bytes."""


def grace(config: CollectorConfig) -> float:
    """Return the seconds between choosing the pages to remove and removing them.

    No node takes longer than that to notice that pages were chosen.
    """
    return config.interval / 2


def settle(config: CollectorConfig) -> float:
    """Return the seconds that nodes have to write their logs after the `grace`."""
    return min(SETTLE_SECONDS, config.interval / 4)


class Collector:
    """A node's part in the rounds of collection. Not thread-safe.

    Calls block. They raise `TierError`, and what a step raises.
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
        """Collect the bucket of `parts`.

        Calls `forget` with removed pages, and `flush` to write this node's log; it returns False if
        that fails. With `collects = False`, only `look` may be called.
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
        self._holder = ""
        """The node that held a shard when this one last went through the shards."""
        self._replaced: list[str] = []
        """Objects of the index that no shard names any more, and that can be removed."""
        self.removed_at_once = REMOVED_AT_ONCE
        """Number of objects per delete request."""
        self.memory = 0
        """Peak memory of entries since the start, in bytes."""

    @property
    def removed(self) -> tuple[int, int]:
        """Number of pages and bytes that this node has removed so far."""
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
        """Return whether a new round should begin, according to the last `look`.

        A round takes the same requests whether much or little has happened. Therefore logs wait for
        a period unless the bucket exceeds a limit. Sends one request once the interval is over.
        """
        config, current, report = self._config, self._stored.current, self._stored.current.report
        if current.phase != "done" or self._stored.age < config.interval:
            return False
        if report is None or self._stored.age >= RENEW_AFTER or self._has_expired():
            return True
        logs = self._parts.logs.listed()
        if 0 < config.capacity < report.bytes + sum(log.stored for log in logs):
            return True
        waited = self._stored.now - logs[0].written if logs else 0.0
        return waited >= config.use_period or len(logs) >= LOGS_WAITING

    def _has_expired(self) -> bool:
        """Return whether a page may be older than the maximum age."""
        from memkv_sglang.tiers.minio.retention.eviction import order_at

        age, current = self._config.max_age, self._stored.current
        return bool(age) and current.oldest < order_at(self._stored.now - age, current.period)

    def begin(self) -> bool:
        """Begin a round. Returns False if another node has begun one."""
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
        """Return the number of the last round, even if its record was lost."""
        if number := self._stored.current.number:
            return number
        for shard in self._shards:
            shard.read()
        states = [shard.state for shard in self._shards]
        return max(max(state.merged, state.removed) for state in states)

    def advance(self, step: Step, *, dry_run: bool = False) -> bool:
        """Do what can be done now in the round last read; return whether its phase is over."""
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
            return self._end(current.order)
        return True

    def collect(self, step: Step, *, dry_run: bool = False) -> Collection:
        """End the round that is under way, if any, then run a whole round.

        Waits for other nodes, and for the time they need to log their uses.
        """
        self._log_uses()
        self.look()
        self._finish_round(step, dry_run=dry_run)
        while self._stored.current.phase == "done" and not self.begin():
            step("waiting for the round of another node", 0, None)
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
        self._parts.logs.forget()
        # Without pins, pages beyond the capacity were stored during the collection.
        exceeds = 0 < self._config.capacity < report.bytes and report.kept_pages > 0
        return Collection(report, not exceeds, self.memory)

    def _finish_round(self, step: Step, *, dry_run: bool) -> None:
        """Work on the round last read until it is over. A dry run leaves removals to others."""
        number = self._stored.current.number
        while (current := self._stored.current).number == number and current.phase != "done":
            if dry_run and current.phase == "remove":
                return
            self._go_on(step, dry_run=dry_run)

    def _plan_of_removal(self) -> Report:
        """Plan the rest of this round's removals; return what the bucket holds now."""
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
        if self._holder:
            step(f"waiting for {self._holder}, which collects a shard", 0, None)
        elif self._stored.current.phase == "remove":
            step("waiting for all nodes to log which pages they use", 0, None)
        time.sleep(min(SHARDS_OPEN, self._config.interval / 8))
        self._stored.read()

    # The phases of a round

    def _each_shard(self, work: Callable[[int, Shard], None]) -> bool:
        """Do the work on each shard, from a random one on; return whether all shards are done."""
        count = len(self._shards)
        first = random.randrange(count)  # noqa: S311 - spreads nodes over shards
        self._holder = ""
        for i in range(count):
            number = (first + i) % count
            try:
                work(number, self._shards[number])
            except LeaseHeldError as error:
                self._holder = error.holder
        self._remove_replaced()
        return not self._holder

    def _merge(
        self,
        current: Round,
        listed: Sequence[LogName],
        pins: Look,
        step: Step,
        number: int,
        shard: Shard,
    ) -> None:
        """Merge the listed logs into a shard, unless a node has done so in this round."""
        holder = shard.read()
        self._check(shard, number)
        if shard.state.merged >= current.number:
            return
        shard.demand_free(holder)
        fresh = [found for found in listed if found.name not in shard.state.logs]
        now = self._clock.now()
        is_old = bool(shard.state.parts) and now - shard.state.written > RENEW_AFTER
        basis = (shard.state.pins, shard.state.period)
        if not fresh and basis == (pins.version, current.period) and not is_old:
            step("shards", number, len(self._shards))
            shard.publish(msgspec.structs.replace(shard.state, merged=current.number))
            return
        with _held(shard):
            work = ShardPass(self, shard, number, current, listed, pins, now, rewrite=is_old)
            self._finish(shard, work, step, merged=current.number)
            if is_old:
                shard.remove_orphans(now)

    def _remove(self, current: Round, step: Step, number: int, shard: Shard) -> None:
        """Remove those pages of a shard that the round chose and that no node has used since."""
        from memkv_sglang.tiers.minio.retention.eviction import Cut

        holder = shard.read()
        if shard.state.removed >= current.number:
            return
        shard.demand_free(holder)
        with _held(shard):
            self._log_uses()
            cut = Cut(order=current.order, quotas=current.quotas)
            now = self._clock.now()
            listed, pins = self._parts.logs.listed(), self.read_pins(step)
            if self._parts.logs.truncated:
                raise TierError(TOO_MANY_LOGS)
            work = ShardPass(self, shard, number, current, listed, pins, now, cut=cut)
            self._finish(shard, work, step, removed=current.number)

    def _finish(self, shard: Shard, work: ShardPass, step: Step, **marks: int) -> None:
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
        """Decide which pages to remove, by the state of all shards after merging."""
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
        period = self._stored.current.period  # the summaries are based on this period
        expired = order_at(now - config.max_age, period) if config.max_age else 0
        oldest = min(summary.oldest() for summary in summaries)
        cut = find_cut(summaries, excess, expired)
        self._planned = planned(summaries, cut)
        self._parts.logs.listed()
        if self._parts.logs.truncated:  # the next rounds merge the other logs first
            log.warning(TOO_MANY_LOGS)
            return self._end(oldest)
        if dry_run or not self._planned[0]:
            return self._end(oldest)
        return self._stored.replace(
            msgspec.structs.replace(
                self._stored.current,
                phase="remove",
                remove_at=now + grace(config),
                order=cut.order,
                quotas=list(cut.quotas),
            )
        )

    def _log_uses(self) -> None:
        if not self._flush():
            raise TierError("could not log which pages this node used, so none are removed")

    def _end(self, oldest: int) -> bool:
        """End the round. Its last phase has just read or changed every shard."""
        current = self._stored.current
        self._remove_merged_logs()
        return self._stored.replace(
            msgspec.structs.replace(
                current, phase="done", report=self._report(current.number), oldest=oldest
            )
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
        """Record how much memory entries take at the moment."""
        self.memory = max(self.memory, size + self._parts.logs.cached_bytes)

    @property
    def parts(self) -> Parts:
        """The parts of the bucket that this collector works with."""
        return self._parts

    @property
    def lease_seconds(self) -> float:
        """Seconds for which a shard's lease lasts."""
        return self._config.lease_ttl

    def remove_fewer(self) -> bool:
        """Delete fewer objects per request after one has failed. Returns False at the minimum."""
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
    """Hold the lease of a shard that was just read, during a `with` block.

    The block releases it if no error occurs.
    """
    shard.take()
    try:
        yield
    except BaseException:
        with suppress(TierError):  # otherwise the lease expires
            shard.release()
        raise


class _Clock:
    """The server's time, which is read now and then, and extrapolated in between."""

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
