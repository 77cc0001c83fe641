"""The reference tier: a bounded dictionary that implements the contract in the simplest way."""

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from typing_extensions import override

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
class _StoredPage:
    content: bytes
    checksum: bytes
    pending: bool = False


class MemoryTier(Tier):
    """Stores pages in this process's memory and evicts the least recently used ones.

    Also implements `PendingUploads`.
    """

    def __init__(self, capacity: int | None = None, name: str = "memory") -> None:
        """Store at most `capacity` bytes of content; None for no limit."""
        self.name = name
        self._capacity = capacity
        self._bytes = 0
        self._evicted = 0
        self._pages: OrderedDict[PageKey, _StoredPage] = OrderedDict()
        self._namespaces: dict[bytes, Namespace] = {}
        self._lock = threading.Lock()

    @override
    def lookup(self, chain: Chain, deadline: float) -> Lookup:
        return Lookup(self._use(chain), complete=True)

    @override
    def touch(self, chain: Chain) -> None:
        self._use(chain)

    @override
    def invalidate(self, keys: Sequence[PageKey]) -> None:
        pass  # Presence is not cached: every call looks in the dictionary itself.

    def _use(self, chain: Chain) -> int:
        keys = chain.keys()
        with self._lock:
            length = next((i for i, key in enumerate(keys) if key not in self._pages), len(keys))
            for key in reversed(keys[:length]):
                self._pages.move_to_end(key)
        return length

    @override
    def present(self, keys: Sequence[PageKey], deadline: float) -> list[bool]:
        with self._lock:
            return [key in self._pages for key in keys]

    @override
    def fetch(self, pages: Sequence[Page], deadline: float) -> list[Fetched]:
        """See `Tier.fetch`. Pages that are not started by the deadline fail."""
        return [
            self._fetch_one(page) if time.monotonic() < deadline else Fetched(LoadResult.FAILED)
            for page in pages
        ]

    def _fetch_one(self, page: Page) -> Fetched:
        with self._lock:
            stored = self._pages.get(page.key)
        if stored is None or len(stored.content) != page.length:
            return Fetched(LoadResult.MISSING)
        content = memoryview(stored.content)
        if page_checksum(page.key, [content]) != stored.checksum:
            self.remove([page.key])
            return Fetched(LoadResult.CORRUPT)
        scatter(content, page.buffers)
        return Fetched(LoadResult.LOADED, stored.checksum)

    @override
    def spill(self, pages: Sequence[Page], deadline: float) -> list[SpillResult]:
        """See `Tier.spill`. Stores pages in order and stops at the first failure."""
        results: list[SpillResult] = []
        for page in pages:
            is_late = time.monotonic() >= deadline
            results.append(SpillResult.FAILED if is_late else self._spill_one(page))
            if results[-1] > SpillResult.PRESENT:
                break
        return results + [SpillResult.FAILED] * (len(pages) - len(results))

    def _spill_one(self, page: Page) -> SpillResult:
        if self._capacity is not None and page.length > self._capacity:
            return SpillResult.REFUSED
        content = b"".join(page.buffers)
        try:
            stored = _StoredPage(content, spill_checksum(page, [memoryview(content)]))
        except ChangedPageError:
            return SpillResult.FAILED
        with self._lock:
            if page.key in self._pages:
                self._pages.move_to_end(page.key)
                return SpillResult.PRESENT
            if not self._free_space(page.length):
                return SpillResult.REFUSED
            self._pages[page.key] = stored
            self._bytes += page.length
        return SpillResult.STORED

    def _free_space(self, length: int) -> bool:
        """Evict pages until `length` more bytes fit; return False if only pending pages remain."""
        while self._capacity is not None and self._bytes + length > self._capacity:
            victim = next((key for key, page in self._pages.items() if not page.pending), None)
            if victim is None:
                return False
            self._remove(victim)
            self._evicted += 1
        return True

    def _remove(self, key: PageKey) -> bool:
        stored = self._pages.pop(key, None)
        self._bytes -= len(stored.content) if stored else 0
        return stored is not None

    @override
    def remove(self, keys: Sequence[PageKey]) -> int:
        with self._lock:
            return sum(self._remove(key) for key in keys)

    @override
    def clear(self, namespace: bytes) -> int:
        """Remove every page of the namespace, and its description."""
        with self._lock:
            self._namespaces.pop(namespace, None)
            return sum(self._remove(key) for key in list(self._pages) if key.namespace == namespace)

    @override
    def describe(self, namespace: Namespace) -> None:
        self._namespaces[namespace.digest] = namespace

    @override
    def namespaces(self) -> dict[bytes, Namespace]:
        return dict(self._namespaces)

    @override
    def usage(self) -> TierUsage:
        return TierUsage(len(self._pages), self._bytes, self._capacity, self._evicted)

    @override
    def check_integrity(self) -> list[str]:
        with self._lock:
            stored = sum(len(page.content) for page in self._pages.values())
        return [] if stored == self._bytes else [f"{self._bytes} bytes counted, {stored} stored"]

    def mark_pending(self, keys: Sequence[PageKey]) -> int:
        """See `PendingUploads.mark_pending`."""
        return self._mark(keys, pending=True)

    def mark_uploaded(self, keys: Sequence[PageKey]) -> None:
        """See `PendingUploads.mark_uploaded`."""
        self._mark(keys, pending=False)

    def _mark(self, keys: Sequence[PageKey], *, pending: bool) -> int:
        with self._lock:
            found = [self._pages.get(key) for key in keys]
            length = found.index(None) if None in found else len(found)
            for page in filter(None, found[:length] if pending else found):
                page.pending = pending
        return length

    def pending(self) -> Iterator[PendingPage]:
        """Yield the pending pages, least recently used first."""
        with self._lock:
            pending = [
                PendingPage(key, len(page.content))
                for key, page in self._pages.items()
                if page.pending
            ]
        return iter(pending)

    def on_return(self, resume: Callable[[Sequence[PendingPage]], None]) -> None:
        """Do nothing: memory does not fail."""

    @override
    def close(self, deadline: float = math.inf) -> None:
        """Do nothing. The pages stay, so that tests can treat a close as a restart."""
