"""The tier contract: what every storage tier for spilled pages must do.

All calls block, may run on any number of threads at once, and take an absolute deadline on
`time.monotonic`. When a call returns, no thread of the tier touches the pages' buffers any more,
even after an error. I/O faults are returned as results, not raised, so the caller can treat the
affected page as a miss.
"""

import enum
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple, Protocol, final

from memkv_sglang.namespace import Namespace
from memkv_sglang.page import Chain, Page, PageKey


class TierError(Exception):
    """The tier cannot answer at all, because it is unreachable, denies access or is closed."""


class LoadResult(enum.IntEnum):
    """The outcome of loading one page. The buffers are valid only if it is `LOADED`."""

    LOADED = 0
    """The page was loaded. Its namespace, hash, length and checksum all match."""
    MISSING = 1
    """The tier does not hold the page, or holds it with a different length."""
    CORRUPT = 2
    """The stored copy does not match its key or checksum. The tier has removed it."""
    FAILED = 3
    """An I/O error occurred or the deadline passed."""
    SKIPPED = 4
    """The page was not tried, because an earlier page of the prefix was not loaded."""


class Fetched(NamedTuple):
    """The outcome of fetching one page."""

    result: LoadResult
    checksum: bytes | None = None
    """The stored checksum, which the content matches; None unless `LOADED`."""


class SpillResult(enum.IntEnum):
    """The outcome of spilling one page."""

    STORED = 0
    """The page was written. It can be loaded from now on, including after a restart."""
    PRESENT = 1
    """The tier already held the page; nothing was written."""
    REFUSED = 2
    """The tier is full or read-only, or the page is too long. Nothing was stored."""
    FAILED = 3
    """An I/O error occurred or the deadline passed. Nothing was stored."""


class Lookup(NamedTuple):
    """The length of the prefix that can be loaded."""

    length: int
    """Number of pages from the start of the chain."""
    complete: bool
    """False if the deadline passed first. In that case, `length` is a lower bound."""


class TierUsage(NamedTuple):
    """What a tier holds, as far as it is known without I/O."""

    pages: int
    bytes: int
    capacity: int | None
    """Capacity in bytes; None if the tier has no limit of its own."""
    evicted: int = 0
    """Number of pages evicted since the tier was opened."""


class DiskStatus(NamedTuple):
    """State of one directory of a local tier, as far as it is known without I/O."""

    directory: str
    problem: str
    """Why the disk does not work; empty if it works."""
    usage: TierUsage


class Tier(ABC):
    """Stores pages. The module docstring covers blocking, threads and deadlines."""

    name: str
    """Name of the tier in metrics, logs and responses: `nvme`, `minio`, ..."""

    @abstractmethod
    def lookup(self, chain: Chain, deadline: float) -> Lookup:
        """Return how many pages from the start of the chain can be loaded from this tier.

        Counts as an access: the pages found become the most recently used ones, with the first page
        of the chain more recent than the last, so that leaves are evicted before roots. The tier
        may assume that if it holds a page, it holds all earlier pages of the chain. If it does not,
        the length may be wrong, and `load` reports the missing page. Raises `TierError` if the tier
        cannot answer.
        """

    @abstractmethod
    def present(self, keys: Sequence[PageKey], deadline: float) -> list[bool]:
        """Return for each page whether the tier holds it. Does not count as an access.

        Raises `TierError`.
        """

    @abstractmethod
    def fetch(self, pages: Sequence[Page], deadline: float) -> list[Fetched]:
        """Load the pages into their buffers in parallel; return one outcome per page, in order.

        Once a page was not loaded, the pages after it may be `SKIPPED`. Never raises for I/O
        faults. A client may be able to write to the buffers at any time, even right after the tier
        has verified them. So compare any copy of the content with the returned checksum.
        """

    @final
    def load(self, pages: Sequence[Page], deadline: float) -> list[LoadResult]:
        """Load as `fetch` does, but return only the results."""
        return [fetched.result for fetched in self.fetch(pages, deadline)]

    @abstractmethod
    def spill(self, pages: Sequence[Page], deadline: float) -> list[SpillResult]:
        """Store the pages in parallel; return one result per page, in order.

        Pass the pages of a chain in order. After a failure, no further page of the chain is
        started, but writes in flight may still succeed and are reported as `STORED`. Never raises
        for I/O faults.

        A page that has a checksum is stored with it. If the content does not match the checksum,
        the page is not stored and its result is `FAILED`.
        """

    @abstractmethod
    def touch(self, chain: Chain) -> None:
        """Make the pages of a chain, up to the first missing one, the most recently used.

        Does not count as reuse. Call it after spilling a part of a chain, to put the pages of the
        whole chain next to each other in the eviction order. It is a no-op in a tier without an
        eviction order.
        """

    @abstractmethod
    def invalidate(self, keys: Sequence[PageKey]) -> None:
        """Discard cached presence of these pages, because another node may have removed them.

        Does not block. It is a no-op in a tier that caches no presence.
        """

    @abstractmethod
    def remove(self, keys: Sequence[PageKey]) -> int:
        """Remove the pages; return how many of them the tier held. Raises `TierError`."""

    @abstractmethod
    def describe(self, namespace: Namespace) -> None:
        """Store the namespace's description next to its pages. Idempotent. Raises `TierError`.

        When it opens, a tier may delete the description of a namespace that has no pages.
        """

    @abstractmethod
    def namespaces(self) -> dict[bytes, Namespace]:
        """Return every described namespace by digest. Raises `TierError`."""

    @abstractmethod
    def clear(self, namespace: bytes) -> int:
        """Remove every page of a namespace; return how many there were. Raises `TierError`.

        May delete the namespace's description as well.
        """

    def hide(self, namespace: bytes) -> int:
        """Treat every page of a namespace stored so far as missing, on this node only.

        Returns the number of pages removed. A local tier removes the pages; a shared tier keeps
        them for the other nodes. Pages that are stored again are found. Raises `TierError`.
        """
        return self.clear(namespace)

    @abstractmethod
    def usage(self) -> TierUsage:
        """Return what the tier holds, without I/O."""

    def problem(self) -> str | None:
        """Return why the tier does not work; empty if it works, None if that is not known yet.

        Reports the outcome of recent calls, without I/O.
        """
        return ""

    def disks(self) -> list[DiskStatus]:
        """Return the state of each local disk that the tier uses, without I/O."""
        return []

    @abstractmethod
    def check_integrity(self) -> list[str]:
        """Check the tier's internal data structures; return one line per inconsistency.

        Does not read the content of pages. Used by tests and `memkv verify`.
        """

    @abstractmethod
    def close(self, deadline: float = math.inf) -> None:
        """Release threads, descriptors and locks. Waits for calls in flight. Idempotent.

        Skips optional work that cannot finish by the deadline (`time.monotonic`).
        """


def loaded_pages(pages: Sequence[Page], outcomes: Sequence[Fetched]) -> list[Page]:
    """Return the pages that `Tier.fetch` loaded, each with its verified checksum."""
    return [
        page._replace(checksum=fetched.checksum)
        for page, fetched in zip(pages, outcomes, strict=True)
        if fetched.result is LoadResult.LOADED
    ]


class PendingPage(NamedTuple):
    """A page that waits to be uploaded to the next tier."""

    key: PageKey
    length: int


class PendingUploads(Protocol):
    """Optional ability of a local tier: remember across restarts which pages await upload.

    Pending pages are not evicted, so a tier full of them refuses spills. Calls do not raise if a
    page is missing.
    """

    def mark_pending(self, keys: Sequence[PageKey]) -> int:
        """Mark the pages as pending. The marks survive a kill of the process after the call.

        Stops at the first missing page; returns how many pages precede it, which are marked. A page
        may be evicted until it is marked.
        """

    def mark_uploaded(self, keys: Sequence[PageKey]) -> None:
        """Clear the pages' pending marks."""

    def pending(self) -> Iterator[PendingPage]:
        """Yield the pages that are pending at the time of the call, oldest mark first."""

    def on_return(self, resume: Callable[[Sequence[PendingPage]], None]) -> None:
        """Call `resume` with the pending pages of each disk that works again after a failure."""


class AccessRecorder(Protocol):
    """Optional ability of a shared tier: record when pages were used, to order its evictions.

    The tier's own lookups miss the accesses that a nearer tier serves.
    """

    def record_access(self, chain: Chain, positions: Sequence[int] | None = None) -> None:
        """Record that pages of a chain were used now. Does not block.

        `positions` are the pages' positions in the whole chain; None if unknown.
        """

    def flush_accesses(self, timeout: float) -> bool:
        """Publish the recorded accesses to other nodes; return whether that succeeded in time."""


class PinReader(Protocol):
    """Optional ability of a shared tier: know which pages are pinned and must not be evicted."""

    def read_pins(self) -> Collection[PageKey]:
        """Return the pinned pages. Blocks. Raises `TierError`."""


class EvictionExemptions(Protocol):
    """Optional ability of a tier: exempt some pages from eviction."""

    def exempt(self, keys: Collection[PageKey]) -> None:
        """Exempt exactly these pages from now on, whether or not the tier holds them.

        They are evicted nevertheless when the tier's capacity shrinks.
        """
