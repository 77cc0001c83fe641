"""Choose the reuse policy from recent uses, for all disks of a tier together."""

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from weakref import WeakKeyDictionary

from memkv_sglang.page import PageKey
from memkv_sglang.tiers.eviction.ghost_list import GhostList
from memkv_sglang.tiers.eviction.reuse_policy import REUSE_POLICIES, ReusePolicy
from memkv_sglang.tiers.eviction.shadow import Shadow

_GHOSTS_PER_PAGE = 8
"""Number of evicted pages to remember, as a multiple of the pages in the tier."""
_MAX_RETURNING = 1 << 16
"""Maximum number of announced pages that are kept for `recall`."""
_MAX_SAMPLES = 256
"""Number of chains to keep for the next `choose`. If there are more, the oldest are discarded."""


class PolicyChooser:
    """Samples uses, remembers evicted pages, and finds the best reuse policy. Thread-safe.

    Disks that hold pages of the same chains must share one chooser. With different policies they
    would evict different parts of a chain, and a page that returns may be stored on another disk.
    """

    def __init__(self, policies: tuple[ReusePolicy, ...] = REUSE_POLICIES) -> None:
        """Choose among `policies`, starting with the first."""
        self.first = policies[0]
        """The policy until `choose` is called."""
        self._ghost_list = GhostList(0)
        self._shadow = Shadow(policies)
        self._simulated_pages = 0
        self._samples: deque[tuple[bytes, Sequence[bytes]]] = deque(maxlen=_MAX_SAMPLES)
        self._pages_of: WeakKeyDictionary[object, int] = WeakKeyDictionary()
        self._returning: set[PageKey] = set()
        """Announced pages that were evicted recently, so that storing them counts as reuse."""
        self._lock = threading.Lock()

    def sample(self, namespace: bytes, hashes: Sequence[bytes]) -> None:
        """Record the use of a chain's pages, root first. Keeps only pages that are simulated."""
        with self._lock:
            if mask := self._shadow.mask & 0xFF:
                hashes = [page_hash for page_hash in hashes if not page_hash[0] & mask]
            if hashes:
                self._samples.append((namespace, hashes))

    def remember_evicted(self, pages: Iterable[tuple[PageKey, int]]) -> None:
        """Remember how often pages that are about to be evicted were reused."""
        with self._lock:
            for key, uses in pages:
                self._ghost_list.add(_fingerprint(key), uses)

    def announce(self, keys: Sequence[PageKey]) -> None:
        """Prepare `recall` for new pages of a chain, root first, that go to several disks.

        An evicted page that is stored again counts as reused, and so do the pages before it. A
        single disk would not know about these.
        """
        with self._lock:
            returning = [i for i, key in enumerate(keys) if self._was_evicted(key)]
            if len(self._returning) > _MAX_RETURNING:  # these were left over by failed spills
                self._returning.clear()
            self._returning.update(keys[: max(returning, default=-1) + 1])

    def recall(self, keys: Sequence[PageKey]) -> list[bool]:
        """Return for each new page whether it counts as reused, because it was evicted recently.

        Each page is recalled only once.
        """
        with self._lock:
            recalled = [key in self._returning or self._was_evicted(key) for key in keys]
            self._returning.difference_update(keys)
        return recalled

    def _was_evicted(self, key: PageKey) -> bool:
        return self._ghost_list.pop(_fingerprint(key)) is not None

    def choose(self, disk: object, pages: int) -> ReusePolicy:
        """Return the policy with the most hits so far. When full, `disk` holds about `pages`."""
        with self._lock:
            self._pages_of[disk] = pages
            self._resize(sum(self._pages_of.values()))
            while self._samples:
                namespace, hashes = self._samples.popleft()
                self._shadow.use(_fingerprint(PageKey(namespace, h)) for h in reversed(hashes))
            return self._shadow.choose()

    def _resize(self, pages: int) -> None:
        if abs(pages - self._simulated_pages) * 10 > self._simulated_pages:
            self._simulated_pages = pages
            self._shadow.resize(pages)
        if len(self._ghost_list) < _GHOSTS_PER_PAGE * pages // 2:
            self._ghost_list = GhostList(_GHOSTS_PER_PAGE * pages)


def _fingerprint(key: PageKey) -> int:
    """Return a 64-bit fingerprint of a page. Its lowest 16 bits are those of the page hash."""
    return int.from_bytes(key.hash[:8], "little") ^ int.from_bytes(key.namespace[:6], "big") << 16
