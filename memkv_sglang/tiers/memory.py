"""The reference tier: a bounded dictionary, written to be read; the others must do the same."""

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from memkv_sglang.namespace import Namespace
from memkv_sglang.page import (
    Chain,
    ChangedPageError,
    Page,
    PageKey,
    page_checksum,
    scatter,
    spill_checksum,
)
from memkv_sglang.tiers.base import (
    Fetched,
    LoadResult,
    Lookup,
    PendingPage,
    SpillResult,
    Tier,
    TierUsage,
)


@dataclass(slots=True)
class _Copy:
    content: bytes
    checksum: bytes
    pending: bool = False


class MemoryTier(Tier):
    """Keeps pages in this process, least recently used first; has `PendingUploads` too."""

    def __init__(self, capacity: int | None = None, name: str = "memory") -> None:
        """Hold at most `capacity` bytes of content; without a bound if None."""
        self.name = name
        self._capacity = capacity
        self._bytes = 0
        self._copies: OrderedDict[PageKey, _Copy] = OrderedDict()
        self._namespaces: dict[bytes, Namespace] = {}
        self._lock = threading.Lock()

    def lookup(self, chain: Chain, deadline: float) -> Lookup:
        """Walk the chain to the first page that is not there."""
        return Lookup(self._use(chain), complete=True)

    def touch(self, chain: Chain) -> None:
        """Walk likewise."""
        self._use(chain)

    def invalidate(self, keys: Sequence[PageKey]) -> None:
        """There is nothing to do: nobody else has these pages in hand."""

    def _use(self, chain: Chain) -> int:
        keys = chain.keys()
        with self._lock:
            length = next((i for i, key in enumerate(keys) if key not in self._copies), len(keys))
            for key in reversed(keys[:length]):
                self._copies.move_to_end(key)
        return length

    def present(self, keys: Sequence[PageKey], deadline: float) -> list[bool]:
        """Ask the dictionary."""
        with self._lock:
            return [key in self._copies for key in keys]

    def fetch(self, pages: Sequence[Page], deadline: float) -> list[Fetched]:
        """Copy out; stop at the deadline."""
        return [
            self._fetch_one(page) if time.monotonic() < deadline else Fetched(LoadResult.FAILED)
            for page in pages
        ]

    def _fetch_one(self, page: Page) -> Fetched:
        with self._lock:
            copy = self._copies.get(page.key)
        if copy is None or len(copy.content) != page.length:
            return Fetched(LoadResult.MISSING)
        content = memoryview(copy.content)
        if page_checksum(page.key, [content]) != copy.checksum:
            self.remove([page.key])
            return Fetched(LoadResult.CORRUPT)
        scatter(content, page.buffers)
        return Fetched(LoadResult.LOADED, copy.checksum)

    def spill(self, pages: Sequence[Page], deadline: float) -> list[SpillResult]:
        """Copy in, in order, up to the first page that finds no room or no time."""
        results: list[SpillResult] = []
        for page in pages:
            late = time.monotonic() >= deadline
            results.append(SpillResult.FAILED if late else self._spill_one(page))
            if results[-1] > SpillResult.PRESENT:
                break
        return results + [SpillResult.FAILED] * (len(pages) - len(results))

    def _spill_one(self, page: Page) -> SpillResult:
        if self._capacity is not None and page.length > self._capacity:
            return SpillResult.REFUSED
        content = b"".join(page.buffers)
        try:
            copy = _Copy(content, spill_checksum(page, [memoryview(content)]))
        except ChangedPageError:
            return SpillResult.FAILED
        with self._lock:
            if page.key in self._copies:
                self._copies.move_to_end(page.key)
                return SpillResult.PRESENT
            if not self._make_room(page.length):
                return SpillResult.REFUSED
            self._copies[page.key] = copy
            self._bytes += page.length
        return SpillResult.STORED

    def _make_room(self, length: int) -> bool:
        while self._capacity is not None and self._bytes + length > self._capacity:
            coldest = next((key for key, copy in self._copies.items() if not copy.pending), None)
            if coldest is None:
                return False
            self._drop(coldest)
        return True

    def _drop(self, key: PageKey) -> bool:
        copy = self._copies.pop(key, None)
        self._bytes -= len(copy.content) if copy else 0
        return copy is not None

    def remove(self, keys: Sequence[PageKey]) -> int:
        """Drop from the dictionary."""
        with self._lock:
            return sum(self._drop(key) for key in keys)

    def clear(self, namespace: bytes) -> int:
        """Drop every page of the namespace, and its description."""
        with self._lock:
            self._namespaces.pop(namespace, None)
            return sum(self._drop(key) for key in list(self._copies) if key.namespace == namespace)

    def describe(self, namespace: Namespace) -> None:
        """Remember the description."""
        self._namespaces[namespace.digest] = namespace

    def namespaces(self) -> dict[bytes, Namespace]:
        """Return a copy of what was described."""
        return dict(self._namespaces)

    def usage(self) -> TierUsage:
        """Count what is there."""
        return TierUsage(len(self._copies), self._bytes, self._capacity)

    def check_integrity(self) -> list[str]:
        """Compare the byte count with the copies."""
        with self._lock:
            held = sum(len(copy.content) for copy in self._copies.values())
        return [] if held == self._bytes else [f"{self._bytes} bytes counted, {held} held"]

    def mark_pending(self, keys: Sequence[PageKey]) -> int:
        """Set the mark on the pages that are there."""
        return self._mark(keys, pending=True)

    def mark_uploaded(self, keys: Sequence[PageKey]) -> None:
        """Take the mark off the pages that are there."""
        self._mark(keys, pending=False)

    def _mark(self, keys: Sequence[PageKey], *, pending: bool) -> int:
        with self._lock:
            found = [self._copies.get(key) for key in keys]
            there = found.index(None) if None in found else len(found)
            for copy in filter(None, found[:there] if pending else found):
                copy.pending = pending
        return there

    def pending(self) -> Iterator[PendingPage]:
        """Yield the marked pages, least recently used first."""
        with self._lock:
            marked = [
                PendingPage(key, len(copy.content))
                for key, copy in self._copies.items()
                if copy.pending
            ]
        return iter(marked)

    def close(self, deadline: float = math.inf) -> None:
        """Keep the content: a closed memory tier stands for a restart in tests."""
