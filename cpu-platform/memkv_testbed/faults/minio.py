"""Faults of MinIO and of the network to it."""

import re
import secrets
from collections.abc import Callable

from memkv_testbed.faults.base import Fault
from memkv_testbed.faults.cluster import Cluster
from memkv_testbed.http_proxy import NO_FAULT, HttpFault

MEGABYTE = 1_000_000


def _answer(status: str, *fields: str, code: str = "", body: bytes = b"") -> bytes:
    if code:
        body = f"<Error><Code>{code}</Code></Error>".encode()
    lines = [f"HTTP/1.1 {status}", *fields, f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body


def _edit(pattern: bytes, replacement: bytes) -> Callable[[bytes], bytes]:
    """Return a function that replaces a pattern in a response's head."""
    compiled = re.compile(pattern, re.IGNORECASE)
    return lambda head: compiled.sub(replacement, head)


def _shift_length(head: bytes, by: int) -> bytes:
    return re.sub(
        rb"(?i)content-length: (\d+)", lambda m: b"Content-Length: %d" % (int(m[1]) + by), head
    )


def _alter_somewhere(content: bytes) -> bytes:
    """Overwrite eight bytes at a random place. The same damage twice would be quarantined."""
    where = secrets.randbelow(max(len(content) - 8, 1))
    return content[:where] + secrets.token_bytes(8)[: len(content)] + content[where + 8 :]


def _on_the_way(name: str, fault: HttpFault, *, destroys: bool = False) -> Fault:
    """Return a fault of the proxy, which the network could cause."""

    def inject(cluster: Cluster) -> None:
        cluster.proxy.fault = fault

    def heal(cluster: Cluster) -> None:
        cluster.proxy.fault = NO_FAULT

    return Fault(name, "minio", inject, heal, destroys=destroys)


def _rotate_key(cluster: Cluster) -> None:
    cluster.admin.user_add(cluster.access_key, secrets.token_hex(16))


def _restore_key(cluster: Cluster) -> None:
    cluster.admin.user_add(cluster.access_key, cluster.secret_key)


PAGES = ("GET",)
FAULTS = [
    Fault("stopped", "minio", lambda c: c.minio.stop(), lambda c: c.minio.start()),
    Fault("refusing", "minio", lambda c: c.proxy.refuse(), lambda c: c.proxy.listen()),
    Fault("key rotated", "minio", _rotate_key, _restore_key),
    _on_the_way(
        "503, Retry-After",
        HttpFault(answer=_answer("503 Service Unavailable", "Retry-After: 1", code="SlowDownRead")),
    ),
    _on_the_way(
        "429, Retry-After",
        HttpFault(answer=_answer("429 Too Many Requests", "Retry-After: 1", code="SlowDown")),
    ),
    _on_the_way("1 MB/s", HttpFault(rate=MEGABYTE)),
    _on_the_way("stalled in mid-body", HttpFault(cut="stall")),
    _on_the_way("reset in mid-body", HttpFault(cut="reset")),
    _on_the_way("truncated body", HttpFault(cut="close")),
    _on_the_way(
        "shorter than declared",
        HttpFault(methods=PAGES, edit_response=lambda head: _shift_length(head, 100)),
        destroys=True,
    ),
    _on_the_way(
        "longer than declared",
        HttpFault(methods=PAGES, surplus=b"\xa5" * 100),
    ),
    _on_the_way(
        "longer than stored",
        HttpFault(
            methods=PAGES,
            surplus=b"\xa5" * 100,
            edit_response=lambda head: _shift_length(head, 100),
        ),
        destroys=True,
    ),
    _on_the_way(
        "wrong ETag", HttpFault(edit_response=_edit(rb'etag: "\w+"', b'ETag: "%s"' % (b"0" * 32)))
    ),
    _on_the_way(
        "wrong checksum metadata",
        HttpFault(
            methods=PAGES,
            edit_response=_edit(rb"(memkv-checksum: )\w+", rb"\g<1>" + b"0" * 32),
        ),
        destroys=True,
    ),
    _on_the_way("altered body", HttpFault(methods=PAGES, edit_content=_alter_somewhere)),
    _on_the_way(
        "clock skew", HttpFault(edit_request=_edit(rb"(x-amz-date: )\d{4}", rb"\g<1>2019"))
    ),
    _on_the_way(
        "disk full",
        HttpFault(
            methods=("PUT",),
            answer=_answer("507 Insufficient Storage", code="XMinioStorageFull"),
        ),
    ),
    _on_the_way(
        "redirect",
        HttpFault(answer=_answer("307 Temporary Redirect", "Location: http://127.0.0.1:1/")),
    ),
    _on_the_way("garbage instead of HTTP", HttpFault(answer=b"\x00\xff\r\n" * 64)),
]
