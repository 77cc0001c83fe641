"""Count the S3 requests of this process by method, kind of object and thread."""

import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from memkv_sglang.tiers.minio.http.control import ControlHttp
from memkv_sglang.tiers.minio.objects import bulk_client, client

_PAGE = re.compile(r"/[0-9a-f]{32}/[0-9a-f]{2}/[0-9a-f]{64}$")
_FOLDERS = ("logs", "index", "shards", "collector", "pins", "quarantine")


def kind_of(path: str) -> str:
    """Return what a request is about: `page`, the name of a folder of the bucket, or `other`."""
    path, _, query = path.partition("?")
    if _PAGE.search(path):
        return "page"
    if "list-type" in query:
        return "listing"
    if "delete" in query:
        return "multi-delete"
    return next((name for name in _FOLDERS if f"/{name}/" in path), "other")


@contextmanager
def counted_requests() -> Iterator[Counter[tuple[str, str, str]]]:
    """Count requests during the `with` block. The keys are (method, kind, name of the thread)."""
    counts: Counter[tuple[str, str, str]] = Counter()
    lock = threading.Lock()

    def count(method: str, path: str) -> None:
        with lock:
            counts[method, kind_of(path), threading.current_thread().name] += 1

    request, read, write, urlopen = (
        client.ObjectClient._request,
        bulk_client.BulkClient.read,
        bulk_client.BulkClient.write,
        ControlHttp.urlopen,
    )

    def counted_request(
        self: Any, connection: Any, keys: Any, method: str, path: str, f: Any
    ) -> Any:
        count(method, path)
        return request(self, connection, keys, method, path, f)

    def counted_read(self: Any, requests: Any, *args: Any, **kwargs: Any) -> Any:
        answer = read(self, requests, *args, **kwargs)
        answered = sum(map(bool, answer.checksums)) + len(answer.unverified)
        with lock:
            counts["GET", "page", threading.current_thread().name] += answered
        return answer

    def counted_write(self: Any, *args: Any, **kwargs: Any) -> Any:
        written = write(self, *args, **kwargs)
        with lock:
            counts["PUT", "page", threading.current_thread().name] += sum(written.stored)
        return written

    def counted_urlopen(self: Any, method: str, url: str, *args: Any, **kwargs: Any) -> Any:
        parts = urlsplit(url)
        count(method, f"{parts.path}?{parts.query}")
        return urlopen(self, method, url, *args, **kwargs)

    client.ObjectClient._request = counted_request  # type: ignore[method-assign, assignment]
    bulk_client.BulkClient.read = counted_read  # type: ignore[method-assign]
    bulk_client.BulkClient.write = counted_write  # type: ignore[method-assign]
    ControlHttp.urlopen = counted_urlopen  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        client.ObjectClient._request = request  # type: ignore[method-assign]
        bulk_client.BulkClient.read = read  # type: ignore[method-assign]
        bulk_client.BulkClient.write = write  # type: ignore[method-assign]
        ControlHttp.urlopen = urlopen  # type: ignore[method-assign]
