"""Cache which pages the shared bucket has, and which it lacks."""

import threading
import time
from collections.abc import Iterable
from itertools import islice

from memkv_sglang.page import Chain, PageKey

TURN = 300.0
"""Seconds after which the young generation becomes the old one."""

MISSING_LIMIT = 100_000
"""Maximum number of pages cached as missing."""


class PresenceCache:
    """The pages known to be present or missing. May be stale: other nodes write too. Thread-safe.

    Present pages are cached in two generations. When the young generation is full or `turn` seconds
    old, it replaces the old one. So pages that another node removed are cached for two turns at
    most. A generation stores neither times nor order, which saves memory.
    """

    def __init__(self, limit: int, negative_ttl: float, turn: float = TURN) -> None:
        """Cache up to `limit` present pages, and missing pages for `negative_ttl` seconds."""
        self._half = limit // 2
        self._ttl = negative_ttl
        self._turn = turn
        self._turn_at = time.monotonic() + turn
        self._young: set[bytes] = set()
        self._old: set[bytes] = set()
        self._missing: dict[bytes, float] = {}
        self._lock = threading.Lock()

    def bounds(self, chain: Chain) -> tuple[int, int]:
        """Return the minimum and maximum possible length of the chain's present prefix."""
        namespace, now = chain.namespace, time.monotonic()
        with self._lock:
            self._age(now)
            young, old, low = self._young, self._old, 0
            for page_hash in chain.hashes:
                name = namespace + page_hash
                if name not in young and name not in old:
                    break
                low += 1
            unknown = chain.hashes[low:]
            # This check is fast. Usually, no page of a chain is known to be missing.
            if not self._missing.keys().isdisjoint(map(namespace.__add__, unknown)):
                for high, page_hash in enumerate(unknown, low):
                    if self._missing.get(namespace + page_hash, 0.0) > now:
                        return low, high
        return low, len(chain.hashes)

    def has(self, keys: Iterable[PageKey]) -> list[bool]:
        """Return which pages are known to be present."""
        names = [namespace + page_hash for namespace, page_hash in keys]
        with self._lock:
            self._age(time.monotonic())
            young, old = self._young, self._old
            return [name in young or name in old for name in names]

    def add(self, keys: Iterable[PageKey]) -> None:
        """Record that pages are present."""
        self._add([namespace + page_hash for namespace, page_hash in keys])

    def add_chain(self, chain: Chain) -> None:
        """Record that a chain's pages are present. Faster than `add`."""
        self._add([chain.namespace + page_hash for page_hash in chain.hashes])

    def _add(self, names: list[bytes]) -> None:
        with self._lock:
            self._age(time.monotonic())
            for name in self._missing.keys() & names:
                del self._missing[name]
            if self._half:
                self._insert(names)

    def add_missing(self, key: PageKey) -> None:
        """Record that a page is missing, unless it was stored meanwhile."""
        name, now = key.namespace + key.hash, time.monotonic()
        with self._lock:
            if self._ttl <= 0 or name in self._young or name in self._old:
                return
            self._missing.pop(name, None)  # the dictionary is in the order of expiry
            if len(self._missing) >= MISSING_LIMIT:
                del self._missing[next(iter(self._missing))]
            self._missing[name] = now + self._ttl

    def discard(self, *keys: PageKey) -> None:
        """Invalidate pages that are cached as present."""
        names = {key.namespace + key.hash for key in keys}
        with self._lock:
            self._young -= names
            self._old -= names

    def forget(self, namespace: bytes) -> None:
        """Invalidate all present pages of a namespace."""
        with self._lock:
            for generation in (self._young, self._old):
                generation -= {name for name in generation if name.startswith(namespace)}

    def check_integrity(self) -> list[str]:
        """Return violated invariants: exceeded limits, and pages both present and missing."""
        with self._lock:
            both = [name for name in self._missing if name in self._young or name in self._old]
            problems = [f"page {name.hex()} is known present and missing" for name in both]
            if len(self._young) > max(self._half, 1) or len(self._old) > max(self._half, 1):
                problems.append("more pages are known present than allowed")
            return problems

    def _age(self, now: float) -> None:
        if now < self._turn_at:
            return
        lapsed = now >= self._turn_at + self._turn  # even the young generation is too old
        self._old, self._young = set() if lapsed else self._young, set()
        self._turn_at = now + self._turn

    def _insert(self, names: list[bytes]) -> None:
        unseen = (name for name in names if name not in self._young)
        self._young.update(islice(unseen, self._half - len(self._young)))
        for name in unseen:  # the young generation is full
            self._old, self._young = self._young, {name}
            self._turn_at = time.monotonic() + self._turn
            self._young.update(islice(unseen, self._half - 1))
