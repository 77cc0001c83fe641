"""The in-memory index: from page keys to entries, and from entries to slots.

An entry is a small integer. Its data is in columns, so that a page takes only about 220 bytes of
memory. Reading one dictionary or column is atomic. Hold the catalog's lock if several reads must be
consistent.
"""

from array import array
from collections.abc import Iterator, Mapping

from memkv_sglang.page import PageKey

_NOTHING: Mapping[bytes, int] = {}


class Index:
    """Entries by namespace and page hash."""

    def __init__(self) -> None:
        self._by_namespace: dict[bytes, dict[bytes, int]] = {}
        self._interned: dict[bytes, bytes] = {}
        self._namespaces: list[bytes] = []
        self._hashes: list[bytes | None] = []
        self.segments = array("I")
        """Segment number by entry."""
        self.slots = array("I")
        """Slot by entry."""
        self.lengths = array("Q")
        """Bytes of content by entry."""
        self._unused: list[int] = []

    def __len__(self) -> int:
        return sum(map(len, list(self._by_namespace.values())))

    @property
    def entries(self) -> int:
        """The highest entry ever used, plus one."""
        return len(self._hashes)

    def of_namespace(self, namespace: bytes) -> Mapping[bytes, int]:
        """Return a live mapping from page hash to entry. It is empty for an unknown namespace."""
        return self._by_namespace.get(namespace, _NOTHING)

    def namespaces(self) -> list[bytes]:
        """Return the digest of every namespace that has pages."""
        return list(self._by_namespace)

    def find(self, key: PageKey) -> int | None:
        """Return the page's entry; None if the page is not linked."""
        return self.of_namespace(key.namespace).get(key.hash)

    def key(self, entry: int) -> PageKey | None:
        """Return the key of the entry's page; None if the entry is unlinked."""
        page_hash = self._hashes[entry]
        return None if page_hash is None else PageKey(self._namespaces[entry], page_hash)

    def add(self, key: PageKey, segment: int, slot: int, length: int) -> int:
        """Create an entry for a page. Lookups find it after `link`."""
        namespace, page_hash = key
        namespace = self._interned.setdefault(namespace, namespace)
        if self._unused:
            entry = self._unused.pop()
            self._namespaces[entry], self._hashes[entry] = namespace, page_hash
            self.segments[entry], self.slots[entry] = segment, slot
            self.lengths[entry] = length
        else:
            entry = len(self._hashes)
            self._namespaces.append(namespace)
            self._hashes.append(page_hash)
            self.segments.append(segment)
            self.slots.append(slot)
            self.lengths.append(length)
        return entry

    def link(self, entry: int) -> None:
        """Make the entry visible to lookups."""
        page_hash = self._hashes[entry]
        assert page_hash is not None
        self._by_namespace.setdefault(self._namespaces[entry], {})[page_hash] = entry

    def unlink(self, entry: int) -> None:
        """Hide the entry from lookups. It keeps its slot until `free`."""
        key = self.key(entry)
        assert key is not None
        pages = self._by_namespace[key.namespace]
        del pages[key.hash]
        if not pages:
            del self._by_namespace[key.namespace]
        self._hashes[entry] = None

    def retire(self, entry: int) -> None:
        """Unlink an entry whose key already maps to another entry."""
        self._hashes[entry] = None

    def free(self, entry: int) -> None:
        """Allow an unlinked entry to be used for another page."""
        self._unused.append(entry)

    def __iter__(self) -> Iterator[int]:
        """Yield the linked entries."""
        return (entry for entry, page_hash in enumerate(self._hashes) if page_hash is not None)
