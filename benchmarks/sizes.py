"""Measure a contestant with pages of one size.

A contestant has two sets of pages: one that it loads repeatedly, and one that it spills each time,
after it has removed the previous set.
"""

import hashlib
import time
from collections.abc import Callable, Sequence

from benchmarks.peers.base import CALL, Peer, PeerFailedError
from benchmarks.pool import HostPool, keys
from memkv_sglang.config.schema import KIB, MIB
from memkv_sglang.page import Page

SIZES = {
    "256k": 256 * KIB,
    "1m": MIB,
    "4m": 4 * MIB,
    "8m": 8 * MIB,
    "16m": 16 * MIB,
}


def label(name: str) -> str:
    """Return the name of a size: `256 KiB` for `256k`, `1 MiB` for `1m`."""
    return name.replace("k", " KiB").replace("m", " MiB")


class Throughput:
    """One contestant with the pages of one pool."""

    def __init__(self, peer: Peer, pool: HostPool) -> None:
        """Store the pages to load and check that they load byte for byte.

        The content is that of the pool. Raises `PeerFailedError`.
        """
        self._peer = peer
        self._pool = pool
        self._round = 0
        self._spilled: list[Page] = []
        self.loaded = self._pages("loaded")
        _in_calls(peer.spill, self.loaded)
        self._check()

    def load(self, seconds: float = 0.0) -> float:
        """Load all pages for at least this many seconds; return GB/s."""
        self._peer.cool()
        began, bytes_loaded = time.perf_counter(), 0
        while not bytes_loaded or time.perf_counter() - began < seconds:
            _in_calls(self._peer.load, self.loaded)
            bytes_loaded += self._pool.length
        return bytes_loaded / (time.perf_counter() - began) / 1e9

    def spill(self) -> float:
        """Spill pages that are not stored; return GB/s."""
        _in_calls(self._peer.remove, self._spilled)
        self._round += 1
        self._spilled = self._pages(f"spilled {self._round}")
        began = time.perf_counter()
        _in_calls(self._peer.spill, self._spilled)
        return self._pool.length / (time.perf_counter() - began) / 1e9

    def clear(self) -> None:
        """Remove all pages."""
        _in_calls(self._peer.remove, [*self.loaded, *self._spilled])
        self._spilled = []

    def _pages(self, seed: str) -> list[Page]:
        return self._pool.place(keys(self._pool.pages, self._pool.page_bytes, seed))

    def _check(self) -> None:
        content = hashlib.sha256(self._pool.memory).digest()
        self._pool.wipe()
        _in_calls(self._peer.load, self.loaded)
        if hashlib.sha256(self._pool.memory).digest() != content:
            raise PeerFailedError("the pages did not come back as they were")


def _in_calls(move: Callable[[Sequence[Page]], object], pages: Sequence[Page]) -> None:
    for first in range(0, len(pages), CALL):
        move(pages[first : first + CALL])
