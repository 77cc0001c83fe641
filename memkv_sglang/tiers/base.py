"""The tier contract: what every place that keeps spilled pages must do.

All calls block, may come from any number of threads at once, and take an absolute deadline on
`time.monotonic`. A call is over when it returns: no thread of the tier touches a page's buffers
after that, whatever went wrong. Faults are results, not exceptions, so that each one becomes a
miss where it happens.
"""

import enum
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple, Protocol, final

from memkv_sglang.namespace import Namespace
from memkv_sglang.page import Chain, Page, PageKey


class TierError(Exception):
    """A tier cannot answer at all: unreachable, refused, out of order."""


class LoadResult(enum.IntEnum):
    """What became of one page of a load. Unless `LOADED`, its buffers hold nothing of value."""

    LOADED = 0
    """Namespace, hash, length and checksum agreed."""
    MISSING = 1
    """The tier does not hold the page, or holds it with another length."""
    CORRUPT = 2
    """The copy disagreed with its key or checksum; the tier has set it aside."""
    FAILED = 3
    """The medium failed or the deadline came first."""
    SKIPPED = 4
    """Not tried, because an earlier page of the prefix was not loaded."""


class Fetched(NamedTuple):
    """What became of one page of `Tier.fetch`."""

    result: LoadResult
    checksum: bytes | None = None
    """The stored checksum that the content was verified against; None unless `LOADED`."""


class SpillResult(enum.IntEnum):
    """What became of one page of a spill."""

    STORED = 0
    """The page can be loaded from now on, also after a restart."""
    PRESENT = 1
    """It was there already; nothing was written."""
    REFUSED = 2
    """The tier takes no more: full, read-only, or too long a page. Nothing is left behind."""
    FAILED = 3
    """The medium failed or the deadline came first. Nothing is left behind."""


class Lookup(NamedTuple):
    """How much of a chain can be loaded."""

    length: int
    """Pages from the chain's start."""
    complete: bool
    """False if time ran out first: `length` is then a lower bound."""


class TierUsage(NamedTuple):
    """What a tier holds, as far as it knows without asking anyone."""

    pages: int
    bytes: int
    capacity: int | None
    """Bytes; None where the tier has no bound of its own."""
    evicted: int = 0
    """Pages removed to make room, since the tier was opened."""


class Tier(ABC):
    """A place that keeps pages. See the module's text for blocking, threads and deadlines."""

    name: str
    """Label for metrics, logs and replies: `nvme`, `minio`, ..."""

    @abstractmethod
    def lookup(self, chain: Chain, deadline: float) -> Lookup:
        """Return how many pages from the chain's start can be loaded from this tier.

        Counts as use: what is found moves to the young end of the eviction order, the chain's
        last page before its first, so that eviction takes leaves before roots. Presence is taken
        as monotone along the chain; where it is not, the answer may be too long or too short, and
        `load` finds out. Raises `TierError` if the tier cannot answer.
        """

    @abstractmethod
    def present(self, keys: Sequence[PageKey], deadline: float) -> list[bool]:
        """Tell for each page whether it is there; not a use. Raises `TierError`."""

    @abstractmethod
    def fetch(self, pages: Sequence[Page], deadline: float) -> list[Fetched]:
        """Fill the pages' buffers, in parallel; return one outcome per page, in order.

        Pages after the first that is not loaded may be `SKIPPED`. Never raises for faults of the
        medium. The buffers may be a client's memory, which can change right after it was verified:
        check any copy of the content against the checksum returned here.
        """

    @final
    def load(self, pages: Sequence[Page], deadline: float) -> list[LoadResult]:
        """Call `fetch` and return the results alone, for callers that do not pass the pages on."""
        return [fetched.result for fetched in self.fetch(pages, deadline)]

    @abstractmethod
    def spill(self, pages: Sequence[Page], deadline: float) -> list[SpillResult]:
        """Store the pages, in parallel; one result a page, in order.

        The pages of one chain are given in chain order; once a page could not be stored, no page
        behind it is begun (some that were under way may yet be stored, and say so). Never raises
        for faults of the medium.

        A page that has a checksum is stored with that one. If its content does not match, the page
        is not stored and the result is `FAILED`.
        """

    @abstractmethod
    def touch(self, chain: Chain) -> None:
        """Take pages of a chain, up to the first that is not there, as used just now.

        That is no repeated use: it tells where in the order of eviction the pages of one chain
        stand, of which `spill` sees but a part. Does nothing where a tier keeps no such order.
        """

    @abstractmethod
    def invalidate(self, keys: Sequence[PageKey]) -> None:
        """Ask anew for these pages the next time: others may have removed what was seen there.

        Does not block. Does nothing where a tier remembers no answers.
        """

    @abstractmethod
    def remove(self, keys: Sequence[PageKey]) -> int:
        """Forget the pages, return how many were there. Raises `TierError`."""

    @abstractmethod
    def describe(self, namespace: Namespace) -> None:
        """Keep the namespace's description beside its pages; idempotent. Raises `TierError`.

        As long as it has any: a tier may drop the description of a namespace without pages when
        it is opened.
        """

    @abstractmethod
    def namespaces(self) -> dict[bytes, Namespace]:
        """Return every described namespace by digest. Raises `TierError`."""

    @abstractmethod
    def clear(self, namespace: bytes) -> int:
        """Remove every page of a namespace, return how many; its description may go too."""

    @abstractmethod
    def usage(self) -> TierUsage:
        """Return what the tier holds; does not block on the medium."""

    def problem(self) -> str | None:
        """Say why the tier does not work; empty while it does, None until that is known.

        As the last calls found it; asks nobody.
        """
        return ""

    @abstractmethod
    def check_integrity(self) -> list[str]:
        """Compare the tier's own structures with each other, one line for each disagreement.

        Reads no page content. For tests and `memkv verify`.
        """

    @abstractmethod
    def close(self, deadline: float = math.inf) -> None:
        """Release threads, descriptors and locks; idempotent. Calls in flight end first.

        At the deadline (`time.monotonic`) whatever else is only useful is left undone.
        """


def loaded_pages(pages: Sequence[Page], outcomes: Sequence[Fetched]) -> list[Page]:
    """Return the pages that `Tier.fetch` loaded, with the checksums it verified."""
    return [
        page._replace(checksum=fetched.checksum)
        for page, fetched in zip(pages, outcomes, strict=True)
        if fetched.result is LoadResult.LOADED
    ]


class PendingPage(NamedTuple):
    """A page that waits for its copy to the next tier."""

    key: PageKey
    length: int


class UploadMarks(Protocol):
    """Optional ability of a tier: remember, over restarts, which pages wait for upload.

    Pages that wait are not evicted: a tier full of them refuses spills. None of the calls raises
    for pages that are gone.
    """

    def mark_pending(self, keys: Sequence[PageKey]) -> int:
        """Remember that the pages wait; survives a kill of the process once returned.

        Returns how many of them, from the first on, are there and marked: until then a page may
        leave. None behind a page that has left is marked.
        """

    def mark_uploaded(self, keys: Sequence[PageKey]) -> None:
        """Forget that they wait."""

    def pending(self) -> Iterator[PendingPage]:
        """Yield the pages that wait, oldest first, as of the call."""


class UseNotes(Protocol):
    """Optional ability of a shared tier: know when pages were used, for whoever makes room there.

    The tier's own lookups do not see the uses that a nearer tier serves.
    """

    def note_use(self, chain: Chain) -> None:
        """Take note that a chain's pages are used now, given root first; returns at once."""


class Pins(Protocol):
    """Optional ability of a shared tier: know which pages no node may remove to make room."""

    def pinned(self) -> Collection[PageKey]:
        """Read them; blocks. Raises `TierError`."""


class Keeps(Protocol):
    """Optional ability of a tier: keep some pages whatever the order of eviction."""

    def keep(self, keys: Collection[PageKey]) -> None:
        """Evict none of these from now on, and only these; they need not be there.

        They leave nevertheless where the tier itself has to shrink.
        """
