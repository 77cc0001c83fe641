"""The requests of one call."""

import threading
from collections import deque
from collections.abc import Sequence
from itertools import islice
from urllib.parse import quote

from memkv_sglang.page import Page
from memkv_sglang.tiers.minio.auth.signing import Signer
from memkv_sglang.tiers.minio.http.endpoints import Endpoint
from memkv_sglang.tiers.minio.objects.bulk import Request
from memkv_sglang.tiers.minio.objects.client import NO_FIELDS

WRITTEN_AT_ONCE = 16
"""Requests that are written in a row at most."""


class Requests:
    """The requests of one call in order, written a few at a time. Thread-safe."""

    def __init__(
        self, signer: Signer, objects: Sequence[tuple[str, Page]], deadline: float
    ) -> None:
        self._signer = signer
        self._credentials = signer.credentials(deadline)
        self._objects = enumerate(objects)
        self._left = len(objects)
        self._written: dict[Endpoint, deque[Request]] = {}
        self._lock = threading.Lock()

    def take(self, endpoint: Endpoint) -> Request | None:
        """Return the next request for a server."""
        with self._lock:
            written = self._written.setdefault(endpoint, deque())
            if not written:
                written += self._write(endpoint)
            return written.popleft() if written else None

    def stop(self) -> None:
        """Have no more requests."""
        with self._lock:
            self._objects = enumerate(())
            self._written.clear()

    def _write(self, endpoint: Endpoint) -> list[Request]:
        """Write some, fewer towards the end, so that the servers have as much to do each."""
        count = min(max(self._left // 4, 1), WRITTEN_AT_ONCE)
        found = list(islice(self._objects, count))
        self._left -= len(found)
        return [
            Request(number, page, self._head(endpoint, quote(name)))
            for number, (name, page) in found
        ]

    def _head(self, endpoint: Endpoint, path: str) -> bytes:
        target = endpoint.base_path + path
        return self._signer.head(self._credentials, "GET", endpoint, target, NO_FIELDS)
