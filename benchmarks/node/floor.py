"""The lower bound of the cost: a C program that only receives the same objects and hashes them."""

import ctypes
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

from xxhash import _xxhash  # type: ignore[attr-defined]  # not documented

from benchmarks.node.base import Rate
from benchmarks.node.compiled import library
from benchmarks.pool import HostPool

_FUNCTIONS = (
    "XXH3_createState",
    "XXH3_freeState",
    "XXH3_128bits_reset_withSeed",
    "XXH3_128bits_update",
)


class _Hash(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in _FUNCTIONS]


def _hash() -> _Hash:
    """Return the hash functions that the tier uses."""
    exports = ctypes.CDLL(_xxhash.__file__)

    def address(name: str) -> int | None:
        found = getattr(exports, f"{name}_dispatch", None) or getattr(exports, name)
        return ctypes.cast(found, ctypes.c_void_p).value

    return _Hash(*map(address, _FUNCTIONS))


class Floor:
    """Callers that each receive their own objects over their own connections."""

    def __init__(
        self, endpoint: str, paths: Sequence[Sequence[str]], page_bytes: int, connections: int
    ) -> None:
        """Connect one caller per sequence of object paths. Each object has `page_bytes` bytes."""
        address = urlsplit(endpoint)
        self._library = library("floor")
        self._hash = _hash()
        self._page = page_bytes
        self._requests = [
            (ctypes.c_char_p * len(own))(
                *(f"GET {path} HTTP/1.1\r\nHost: floor\r\n\r\n".encode() for path in own)
            )
            for own in paths
        ]
        self._pools = [HostPool(len(own), page_bytes, huge=True) for own in paths]
        self._sockets = [
            [socket.create_connection((address.hostname, address.port)) for _ in range(connections)]
            for _ in paths
        ]
        self._executor = ThreadPoolExecutor(len(paths))

    def run(self, callers: int, seconds: float) -> Rate:
        """Make the first callers receive all their objects, repeatedly."""
        cpu = time.process_time()
        rates = list(self._executor.map(self._repeat, range(callers), [seconds] * callers))
        cpu = time.process_time() - cpu
        return Rate(sum(size / took for size, took in rates), cpu, sum(size for size, _ in rates))

    def close(self) -> None:
        """Close the connections."""
        self._executor.shutdown()
        for sock in (sock for own in self._sockets for sock in own):
            sock.close()
        for pool in self._pools:
            pool.close()

    def _repeat(self, caller: int, seconds: float) -> tuple[int, float]:
        """Return the bytes and seconds."""
        requests, pool = self._requests[caller], self._pools[caller]
        sockets = [sock.fileno() for sock in self._sockets[caller]]
        moved, began = 0, time.monotonic()
        while not moved or time.monotonic() - began < seconds:
            failed = self._library.receive_all(
                (ctypes.c_int * len(sockets))(*sockets),
                len(sockets),
                requests,
                len(requests),
                ctypes.c_void_p(pool.address),
                ctypes.c_size_t(self._page),
                ctypes.byref(self._hash),
            )
            if failed:
                raise RuntimeError("the floor could not receive every object")
            moved += pool.length
        return moved, time.monotonic() - began
