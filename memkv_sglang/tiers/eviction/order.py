"""The order in which pages leave: by their last use and by repeated uses, as it proves right."""

import heapq
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from memkv_sglang.page import PageKey
from memkv_sglang.tiers.eviction.ghost_list import GhostList
from memkv_sglang.tiers.eviction.reuse_policy import MOST_USES, VALUATIONS
from memkv_sglang.tiers.eviction.shadow import Shadow

NO_ENTRY = 0xFFFF_FFFF
"""In place of an entry: nothing."""

_NO_BONUSES = VALUATIONS[0].bonuses(0)
_GHOSTS = 8
"""Pages that left and are remembered, as a multiple of those that are there."""
_ONE_MORE = bytes(min(uses + 1, MOST_USES) for uses in range(MOST_USES + 1))
_CALLS_KEPT = 256
"""Calls whose uses wait to be learned from; of more than these the oldest are passed over."""
_GROWING = 32
"""Touches that are the last ones: a spill makes up to three, and some run at a time."""
_UNSETTLED = 1 << 16
"""Pages whose use may wait to be settled."""


class _Use(NamedTuple):
    """A use that was noted: pages of a chain, root first."""

    tick: int
    """Of the last page; those before it follow."""
    entries: Sequence[int]
    namespace: bytes
    hashes: Sequence[bytes] | None
    """None for what is no repeated use."""


class EvictionOrder:
    """When each entry was used last, in ticks of a counter, and how often it was used again.

    An entry is a small integer that stands for a page. Within one use of a chain the leaf gets the
    oldest tick, so that leaves leave before roots, see `valuation`. `take`, `touch`, `use` and
    `settle` may be called by any thread; who changes what is there calls `set`, `enter`
    and `leave` one at a time, who makes room the others.

    Uses are noted at first, as lookups wait for that, and settled before anything depends on them.
    """

    def __init__(self) -> None:
        self._ticks = array("Q")
        self._uses = bytearray()
        """Repeated uses, by entry."""
        self._bonuses = VALUATIONS[0].bonuses(0)
        self._ghosts = GhostList(0)
        self._shadow = Shadow()
        self._learned_for = 0
        self._heard: deque[tuple[bytes, Sequence[bytes]]] = deque(maxlen=_CALLS_KEPT)
        self._noted: deque[_Use] = deque()
        self._touches: deque[int] = deque(maxlen=_GROWING)
        """First ticks of the last touches."""
        self._unsettled = 0
        self._settling = threading.Lock()
        self._next = 1
        self._lock = threading.Lock()

    @property
    def valuation(self) -> str:
        """Name of the valuation that is followed."""
        return self._shadow.best.valuation.name

    def take(self, count: int) -> int:
        """Return the first of `count` ticks that are later than all before."""
        with self._lock:
            first = self._next
            self._next += count
        return first

    def advance_past(self, tick: int) -> None:
        """Make all ticks to come later than this one."""
        with self._lock:
            self._next = max(self._next, tick + 1)

    def touch(self, entries: Sequence[int]) -> None:
        """Move pages of a chain to the young end, which is no repeated use; given root first.

        They may have come to be there in parts: none ranks below its next from then on.
        """
        first = self._note(entries, b"", None)
        if first:
            self._touches.append(first)

    def is_growing(self, entry: int) -> bool:
        """Tell whether the page is of a chain that is being spilled, or was just now.

        What is spilled next comes behind it, so it must not leave for that, however little it is
        worth. Along a chain this holds up to some page and for none behind that.
        """
        if not self._touches:
            return False
        first = max(
            self._touches[0], self._next - self._learned_for // 2
        )  # not all, in a small tier
        return self._ticks[entry] >= first

    def use(self, namespace: bytes, hashes: Sequence[bytes], entries: Sequence[int]) -> None:
        """Note that pages of a chain are used again; `entries` are those of the first `hashes`."""
        self._note(entries, namespace, hashes[: len(entries)])

    def _note(
        self, entries: Sequence[int], namespace: bytes, hashes: Sequence[bytes] | None
    ) -> int:
        """Return the first tick of the use; 0 if nothing was used."""
        if not entries:
            return 0
        with self._lock:
            first = self._next
            self._noted.append(_Use(self._next, entries, namespace, hashes))
            self._next += len(entries)
            self._unsettled += len(entries)
        if self._unsettled > _UNSETTLED:
            self.settle()
        return first

    @property
    def is_behind(self) -> bool:
        """Whether it is time to call `settle`, lest a use has to."""
        return self._unsettled > _UNSETTLED // 2

    def settle(self) -> None:
        """Work in the uses that were noted; when it is called makes no difference to the order."""
        with self._settling:
            while self._noted:
                # Others see that something is noted, and wait for the lock, until it is settled.
                self._settle(self._noted[0])
                with self._lock:
                    self._unsettled -= len(self._noted.popleft().entries)

    def _settle(self, use: _Use) -> None:
        ticks, uses, tick, entries = self._ticks, self._uses, use.tick, use.entries
        for entry in reversed(entries):
            ticks[entry] = tick
            tick += 1
        if use.hashes is None:
            most = 0
            for entry in reversed(entries):
                most = uses[entry] = max(uses[entry], most)
        else:
            for entry in entries:
                uses[entry] = _ONE_MORE[uses[entry]]
            self._hear(use.namespace, use.hashes)

    def newest(self) -> int:
        """Return the latest tick of any entry, 0 if there is none."""
        self.settle()
        return max(self._ticks, default=0)

    def tick(self, entry: int) -> int:
        """Return the tick of the last use."""
        if self._noted:
            self.settle()
        return self._ticks[entry]

    # Coming and going

    def set(self, entry: int, tick: int) -> None:
        """Say when the page of an entry, which may be a new one, was used; it counts as new."""
        if self._noted:
            self.settle()
        if entry == len(self._ticks):
            self._uses.append(0)
            self._ticks.append(tick)
        else:
            self._uses[entry] = 0
            self._ticks[entry] = tick

    def succeed(self, entry: int, successor: int) -> None:
        """Count an entry's uses for another, which stands for the same page from now on."""
        self._uses[successor] = self._uses[entry]

    def enter(self, pages: Sequence[tuple[PageKey, int]]) -> None:
        """Note that pages of a chain came to be there, root first; call after `set`.

        Those that were there not long ago are used again by that.
        """
        self.settle()
        with self._settling:
            most = 0
            for key, entry in reversed(pages):
                ghost = self._ghosts.take(_fingerprint(key))
                if ghost is not None:
                    most = 1  # one repeated use, no more than those before it are sure to have
                self._uses[entry] = most  # not less than those behind it, which need it
        if pages:
            self._hear(pages[0][0].namespace, [key.hash for key, _ in pages])

    def leave(self, pages: Iterable[tuple[PageKey, int]]) -> None:
        """Remember pages that are about to leave to make room."""
        self.settle()
        for key, entry in pages:
            self._ghosts.add(_fingerprint(key), self._uses[entry])

    # Learning

    def adapt(self, pages: int) -> None:
        """Learn from the uses since the last call; the tier is full with about `pages` pages."""
        self.settle()
        is_new_size = abs(pages - self._learned_for) * 10 > self._learned_for
        if is_new_size:
            self._learned_for = pages
            self._shadow.resize(pages)
        if len(self._ghosts) < _GHOSTS * pages // 2:
            self._ghosts = GhostList(_GHOSTS * pages)
        before = self._shadow.best
        while self._heard:
            namespace, hashes = self._heard.popleft()
            self._shadow.use(_fingerprint(PageKey(namespace, h)) for h in reversed(hashes))
        valuation = self._shadow.choose()
        if is_new_size or self._shadow.best is not before:
            self._bonuses = valuation.bonuses(pages)

    def _hear(self, namespace: bytes, hashes: Sequence[bytes]) -> None:
        """Keep a use for `adapt`, as far as the sample goes."""
        if mask := self._shadow.mask & 0xFF:
            hashes = [page_hash for page_hash in hashes if not page_hash[0] & mask]
        if hashes:
            self._heard.append((namespace, hashes))

    # Who leaves

    def rank(self, entry: int) -> int:
        """Return the entry's place in the order: the lowest leaves first."""
        if self._noted:
            self.settle()
        return self._ticks[entry] + self._bonuses[self._uses[entry]]

    def coldest(
        self,
        chunks: Iterable[Sequence[int]],
        may_leave: Callable[[int], bool],
        count: int,
        *,
        by_age: bool = False,
    ) -> list[tuple[int, int]]:
        """Return rank and id of the `count` entries that leave first of those that may, in order.

        `by_age`: whatever repeated uses are worth. Lets other threads run between the chunks, so
        these should be short.
        """
        self.settle()
        ticks, uses = self._ticks, self._uses
        bonuses = _NO_BONUSES if by_age else self._bonuses
        coldest: list[tuple[int, int]] = []
        bound = 1 << 64
        for chunk in chunks:
            coldest += [
                (rank, entry)
                for entry in chunk
                if entry != NO_ENTRY
                and (rank := ticks[entry] + bonuses[uses[entry]]) < bound
                and may_leave(entry)
            ]
            if len(coldest) >= 2 * count:
                coldest = heapq.nsmallest(count, coldest)
                bound = coldest[-1][0]
            time.sleep(0)
        return sorted(coldest)[:count]


def _fingerprint(key: PageKey) -> int:
    """Return 64 bits that tell a page from others, the lowest 16 those of its hash, a SHA-256."""
    return int.from_bytes(key.hash[:8], "little") ^ int.from_bytes(key.namespace[:6], "big") << 16
