"""The NVMe tier over several directories. New pages go to the disks in turn."""

import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial, reduce
from itertools import compress, zip_longest
from operator import or_

from typing_extensions import override

from memkv_sglang.config.errors import BrokenDiskError
from memkv_sglang.config.schema import NvmeConfig
from memkv_sglang.namespace import Namespace
from memkv_sglang.page import Chain, Page, PageKey
from memkv_sglang.tiers.base import (
    DiskStatus,
    Fetched,
    LoadResult,
    Lookup,
    PendingPage,
    SpillResult,
    Tier,
    TierError,
    TierUsage,
)
from memkv_sglang.tiers.disks.disk import Disk
from memkv_sglang.tiers.disks.placement import OpenDisk, Placement, Share, shares
from memkv_sglang.tiers.eviction import PolicyChooser
from memkv_sglang.tiers.nvme import NvmeTier
from memkv_sglang.tiers.nvme.calls import CallsInFlight
from memkv_sglang.tiers.parallel import run_in_parallel

CALLS = 32
"""Number of calls that can use all disks in parallel. Further calls wait for a thread."""


class StripedTier(Tier):
    """Stores pages in several directories, one per disk, as one tier.

    New pages go to the disks in turn, so the pages of a call are spread evenly. A page is found on
    any disk. Also implements `PendingUploads` and `EvictionExemptions`.

    While a disk is broken, its pages count as missing, and new pages go to the other disks. It is
    retried in the background. When it returns, its copies of pages stored elsewhere in the meantime
    are removed.
    """

    name = NvmeTier.name

    def __init__(self, config: NvmeConfig) -> None:
        """Open every directory of `config`. Retry those of broken disks. Raises `ConfigError`."""
        chooser = PolicyChooser()
        self._resume: Callable[[Sequence[PendingPage]], None] = self._cancel
        self._exempt: Collection[PageKey] = ()
        self._described: dict[bytes, Namespace] = {}
        """Descriptions to store on broken disks when they work again."""
        self._placement = Placement(chooser)
        self._calls = CallsInFlight()
        self._disks = [
            Disk(one, chooser, self._prepare, self._return_pages)
            for one in config.for_each_directory()
        ]
        self._threads = ThreadPoolExecutor(
            CALLS * len(self._disks), thread_name_prefix="memkv-disk"
        )
        try:
            for disk in self._disks:
                try:
                    disk.open()
                except BrokenDiskError as error:
                    disk.retry(str(error))
        except BaseException:
            self.close(time.monotonic())
            raise

    def _prepare(self, tier: NvmeTier) -> None:
        """Make a newly opened directory consistent with the other disks."""
        tier.exempt(self._exempt)
        with suppress(TierError):  # Without the descriptions, only listings are incomplete.
            for namespace in [*self._described.values(), *self.namespaces().values()]:
                tier.describe(namespace)
        with suppress(TierError):  # A page on two disks does no harm except for the space.
            for other in self._open():
                _remove_copies(tier, other.tier)

    def _return_pages(self, tier: NvmeTier) -> None:
        pages = list(tier.pending())
        if pages:
            self._resume(pages)

    def _cancel(self, pages: Sequence[PendingPage]) -> None:
        self.mark_uploaded([page.key for page in pages])

    def _open(self) -> list[OpenDisk]:
        return [OpenDisk(disk, tier) for disk in self._disks if (tier := disk.tier) is not None]

    # Finding pages

    def _walk(self, chain: Chain) -> tuple[int, list[tuple[NvmeTier, Chain]]]:
        """Return the length of the stored prefix, and the part of it on each disk."""
        hashes = chain.hashes
        disks = self._open()
        # One byte per page, 1 if the disk has it. This is the fastest way without a Python loop
        # over all pages.
        held = [bytes(map(on.tier.hashes(chain.namespace).__contains__, hashes)) for on in disks]
        on_any = reduce(or_, (int.from_bytes(flags, "big") for flags in held), 0)
        missing = on_any.to_bytes(len(hashes), "big").find(0)
        length = len(hashes) if missing < 0 else missing
        parts = [
            (on.tier, Chain(chain.namespace, part))
            for on, flags in zip(disks, held, strict=True)
            if (part := list(compress(hashes[:length], flags)))
        ]
        return length, parts

    def _holders(self, keys: Sequence[PageKey]) -> list[OpenDisk | None]:
        """Return for each page a disk that has it."""
        holders: list[OpenDisk | None] = [None] * len(keys)
        for on in self._open():
            for i, is_present in enumerate(on.tier.present(keys, math.inf)):
                if is_present and holders[i] is None:
                    holders[i] = on
        return holders

    @override
    def lookup(self, chain: Chain, deadline: float) -> Lookup:
        """See `Tier.lookup`. Exact; does not block."""
        length, parts = self._walk(chain)
        for tier, part in parts:
            tier.lookup(part, deadline)
        return Lookup(length, complete=True)

    @override
    def present(self, keys: Sequence[PageKey], deadline: float) -> list[bool]:
        """See `Tier.present`. Does not block."""
        return [holder is not None for holder in self._holders(keys)]

    @override
    def touch(self, chain: Chain) -> None:
        """See `Tier.touch`. Does not block."""
        for tier, part in self._walk(chain)[1]:
            tier.touch(part)

    # Moving pages

    @override
    def fetch(self, pages: Sequence[Page], deadline: float) -> list[Fetched]:
        """See `Tier.fetch`. Reads from all disks in parallel; skips no page."""
        with self._calls.enter() as entered:
            if not entered:
                return [Fetched(LoadResult.FAILED)] * len(pages)
            return self._fetch(pages, deadline)

    def _fetch(self, pages: Sequence[Page], deadline: float) -> list[Fetched]:
        outcomes = [Fetched(LoadResult.MISSING)] * len(pages)

        def fetch(share: Share) -> None:
            wanted = [pages[i] for i in share.members]
            fetched = share.on.tier.fetch(wanted, deadline)
            if time.monotonic() < deadline:
                share.on.disk.record([page.key for page in wanted], fetched, share.on.tier)
            for i, outcome in zip(share.members, fetched, strict=True):
                outcomes[i] = outcome

        self._run(fetch, shares(self._holders([page.key for page in pages])))
        return outcomes

    @override
    def spill(self, pages: Sequence[Page], deadline: float) -> list[SpillResult]:
        """See `Tier.spill`. Writes to all disks in parallel.

        Pages that a disk does not take go to the others.
        """
        with self._calls.enter() as entered:
            if not entered:
                return [SpillResult.FAILED] * len(pages)
            return self._spill(pages, deadline)

    def _spill(self, pages: Sequence[Page], deadline: float) -> list[SpillResult]:
        results = [SpillResult.REFUSED] * len(pages)
        refusing: list[Disk] = []
        left = list(range(len(pages)))

        def spill(share: Share) -> None:
            members = [left[i] for i in share.members]
            spilled = share.on.tier.spill([pages[i] for i in members], deadline)
            for i, result in zip(members, spilled, strict=True):
                results[i] = result
            if max(spilled) > SpillResult.PRESENT:
                refusing.append(share.on.disk)

        while left:
            keys = [pages[i].key for i in left]
            takers = [
                on for on in self._open() if on.disk not in refusing and on.tier.accepts_pages
            ]
            with self._placement.place(keys, takers, partial(self._holders, keys)) as places:
                for member, on in zip(left, places, strict=True):
                    if on is not None and on.disk in refusing:  # the disk already has the page
                        results[member] = SpillResult.PRESENT
                tried = shares([None if on and on.disk in refusing else on for on in places])
                self._run(spill, tried)
            left = [i for i in left if results[i] > SpillResult.PRESENT]
            if not tried or time.monotonic() >= deadline:
                break
        return results

    def _run(self, call: Callable[[Share], None], parts: Sequence[Share]) -> None:
        """Make the call for each share in parallel."""
        run_in_parallel([(self._threads, partial(call, part)) for part in parts])

    # Other calls

    @override
    def invalidate(self, keys: Sequence[PageKey]) -> None:
        """Do nothing: no other node changes these disks."""

    @override
    def remove(self, keys: Sequence[PageKey]) -> int:
        return sum(on.tier.remove(keys) for on in self._open())

    @override
    def clear(self, namespace: bytes) -> int:
        """See `Tier.clear`. The directory of a broken disk is cleared when the disk works again."""
        removed, failure = 0, None
        for disk in self._disks:
            try:
                removed += disk.clear(namespace)
            except TierError as error:
                failure = error
        if failure is not None:
            raise failure
        return removed

    @override
    def describe(self, namespace: Namespace) -> None:
        """Store the description on every disk, or on a broken disk when it works again."""
        disks = self._open()
        if len(disks) < len(self._disks):
            self._described[namespace.digest] = namespace
        failures = []
        for on in disks:
            try:
                on.tier.describe(namespace)
            except TierError as error:
                failures.append(error)
        if len(failures) == len(disks):
            raise failures[0] if failures else TierError("no disk works")

    @override
    def namespaces(self) -> dict[bytes, Namespace]:
        """Read every description from every disk."""
        described: dict[bytes, Namespace] = {}
        for on in self._open():
            described |= on.tier.namespaces()
        return described

    @override
    def usage(self) -> TierUsage:
        """Return the usage of all disks. The capacity is that of the working disks."""
        statuses = self.disks()
        working = [on.tier.usage() for on in self._open()]
        return TierUsage(
            sum(usage.pages for usage in working),
            sum(usage.bytes for usage in working),
            sum(usage.capacity or 0 for usage in working),
            sum(status.usage.evicted for status in statuses),
        )

    @override
    def disks(self) -> list[DiskStatus]:
        return [disk.status() for disk in self._disks]

    @override
    def problem(self) -> str:
        """Return why a disk does not work, or empty if all disks work."""
        failing = [status.problem for status in self.disks() if status.problem]
        if not failing or len(self._disks) == 1:
            return "".join(failing)
        return f"{len(failing)} of {len(self._disks)} disks: {failing[0]}"

    @override
    def check_integrity(self) -> list[str]:
        return [
            f"{on.disk.directory}: {line}"
            for on in self._open()
            for line in on.tier.check_integrity()
        ]

    @override
    def close(self, deadline: float = math.inf) -> None:
        """See `Tier.close`. Closes all disks in parallel."""
        if self._calls.close():
            list(self._threads.map(lambda disk: disk.close(deadline), self._disks))
            self._threads.shutdown()

    def exempt(self, keys: Collection[PageKey]) -> None:
        """See `EvictionExemptions.exempt`."""
        self._exempt = keys
        for on in self._open():
            on.tier.exempt(keys)

    # Pending uploads

    def mark_pending(self, keys: Sequence[PageKey]) -> int:
        """See `PendingUploads.mark_pending`."""
        holders = self._holders(keys)
        length = holders.index(None) if None in holders else len(holders)
        for on, members in shares(holders[:length]):
            marked = on.tier.mark_pending([keys[i] for i in members])
            # If a page was evicted meanwhile, later pages on other disks may stay marked. Those can
            # be evicted only after a restart has uploaded them.
            length = min([length, *members[marked : marked + 1]])
        return length

    def mark_uploaded(self, keys: Sequence[PageKey]) -> None:
        """See `PendingUploads.mark_uploaded`."""
        for on, members in shares(self._holders(keys)):
            on.tier.mark_uploaded([keys[i] for i in members])

    def pending(self) -> Iterator[PendingPage]:
        """See `PendingUploads.pending`. Takes pages from the disks in turn, as `spill` does."""
        turns = zip_longest(*(on.tier.pending() for on in self._open()))
        return (page for turn in turns for page in turn if page is not None)

    def on_return(self, resume: Callable[[Sequence[PendingPage]], None]) -> None:
        """See `PendingUploads.on_return`. Until it is called, such pages are marked as uploaded."""
        self._resume = resume


def _remove_copies(tier: NvmeTier, other: NvmeTier) -> None:
    """Remove from `tier` the pages that `other` has too, and move their pending marks there."""
    copies = {
        PageKey(namespace, page_hash)
        for namespace in tier.with_pages()
        for page_hash in tier.hashes(namespace) & other.hashes(namespace)
    }
    if copies:
        other.mark_pending([page.key for page in tier.pending() if page.key in copies])
        tier.remove(list(copies))
