"""The contract of every contestant that spills and loads pages: our tiers and the peers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

from benchmarks.pool import HostPool
from benchmarks.report import Report
from memkv_sglang.page import Chain, Page

CALL = 128
"""Pages per call. SGLang hands over as many at once (`STORAGE_BATCH_SIZE`)."""


class PeerUnavailableError(Exception):
    """The peer cannot run here. The message says why in one line."""


class PeerFailedError(Exception):
    """The peer did not move every page, so its measurement is invalid."""


class Peer(ABC):
    """Calls block until all pages are moved. They raise `PeerFailedError` if one was not.

    Pages are in the `HostPool` that the peer was created for. A call has at most `CALL` pages.
    """

    @abstractmethod
    def spill(self, pages: Sequence[Page]) -> None:
        """Store pages that are not stored yet."""

    @abstractmethod
    def load(self, pages: Sequence[Page]) -> None:
        """Fill the pages' buffers."""

    @abstractmethod
    def lookup(self, chain: Chain) -> int:
        """Return how many leading pages of the chain are stored."""

    @abstractmethod
    def remove(self, pages: Sequence[Page]) -> None:
        """Remove stored pages."""

    def cool(self) -> None:  # noqa: B027 - most peers read through no cache of this machine
        """Drop all caches and wait for background work, so that the next call is cold."""

    @abstractmethod
    def close(self) -> None:
        """Release threads, descriptors and connections."""


def demand(done: object, what: str) -> None:
    """Raise `PeerFailedError` unless `done`."""
    if not done:
        raise PeerFailedError(f"{what}: not every page was moved")


def names(pages: Sequence[Page]) -> list[str]:
    """Return the pages' hashes in hex digits, as SGLang passes them to a storage backend."""
    return [page.key.hash.hex() for page in pages]


def open_peers(
    report: Report, makers: Mapping[str, Callable[[HostPool], Peer]], pool: HostPool
) -> dict[str, Peer]:
    """Return the peers that can run here. The report says why others are left out."""
    peers = {}
    for name, make in makers.items():
        try:
            peers[name] = make(pool)
        except PeerUnavailableError as error:
            report.left_out[name] = str(error)
        except ImportError as error:
            report.left_out[name] = f"{error}; install it: pip install sglang-memkv[bench,sglang]"
    return peers
