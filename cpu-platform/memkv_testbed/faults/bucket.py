"""Faults of the bucket: foreign objects in it, and control requests that fail.

While these faults last, `memkv` commands list the bucket and collect it. Unless the agents have
limits, no page is old enough to be removed, so a collection that removes one has been misled.
"""

import io
import json
import random
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate

from minio import Minio
from minio.error import S3Error

from memkv_sglang.testing.pages import make_chain
from memkv_sglang.tiers.minio.names import DESCRIPTION, ObjectNames
from memkv_testbed.faults.base import Fault
from memkv_testbed.faults.cluster import NAMESPACE, Cluster
from memkv_testbed.http_proxy import NO_FAULT, HttpFault

DAY = 86400.0
NAMES = ObjectNames("")
DIGEST = NAMESPACE.digest.hex()
HASH = "ab" * 32
DEEP = b"[" * 5000 + b"]" * 5000
MILLIONS = json.dumps(
    {
        "namespaces": [f"{i:032x}" for i in range(1500)],
        "hashes": [f"{i:064x}" for i in range(1500)],
        "seconds": 1e6,
    }
).encode()
"""A pin of 156 KB that names two million pages."""


def _foreign() -> dict[str, bytes]:
    """Return objects that no collection may remove."""
    stranger = make_chain(NAMESPACE, 1, "a stranger's").keys()[0]
    names = [
        "notes/readme",
        f"{DIGEST}/notes",
        f"{DIGEST}/ab/notes",
        f"{DIGEST}/cd/{HASH}",
        f"{DIGEST}/ab/{HASH.upper()}",
        f"{DIGEST}/more/ab/{HASH}",
        f"{DIGEST.upper()}/ab/{HASH}",
        "quarantine/readme",
        f"quarantine/{DIGEST}/readme",
        "logs/readme",
        "index/readme",
        "0" * 200,
        "strange/\u202e\u00e9 +%2F&#1;<b>",
        NAMES.page(stranger),  # It has the name of a page, but not a page's metadata.
    ]
    pins = [
        b"",
        b"\xff\xfe",
        b"null",
        DEEP,
        b'{"x":' + DEEP + b',"namespaces":[],"hashes":[],"seconds":1}',
        b'{"namespaces":[],"hashes":[],"seconds":1e999}',
        json.dumps({"namespaces": [DIGEST], "hashes": ["00"], "seconds": 9}).encode(),
        b" " * ((4 << 20) + 1),
        MILLIONS,
    ]
    descriptions = [b"", b"\xff", DEEP, NAMESPACE.description, b" " * (1 << 20)]
    return (
        dict.fromkeys(names, b"foreign")
        | {f"{NAMES.pins}odd{i}.json": content for i, content in enumerate(pins)}
        | {f"{NAMES.pins}deeper/odd.json": b"{}"}
        | {f"{i:032x}/{DESCRIPTION}": content for i, content in enumerate(descriptions)}
    )


ROUNDS = [
    b'{"number":1e308}',
    b'{"number":-1,"phase":"remove"}',
    b'{"x":' + DEEP + b',"phase":"merge"}',
    b'{"number":7,"phase":"remove","remove_at":1e300}',
    b" " * (5 << 20),
]


def _storage(cluster: Cluster) -> tuple[Minio, str]:
    """Return a client with full permissions that bypasses the proxy, and the bucket's name."""
    netloc = cluster.minio.endpoint.partition("://")[2]
    return Minio(netloc, *cluster.minio.root, secure=False), "faults"


def _put_odd_objects(cluster: Cluster) -> None:
    storage, bucket = _storage(cluster)
    for name, content in _foreign().items():
        storage.put_object(bucket, name, io.BytesIO(content), len(content))
    odd = random.choice(ROUNDS)  # noqa: S311 - not a secret
    storage.put_object(bucket, NAMES.round, io.BytesIO(odd), len(odd))
    _start_commands(cluster)


def _take_odd_objects(cluster: Cluster) -> None:
    """Remove the odd objects. Each of them must still be there."""
    cluster.finish_commands()
    storage, bucket = _storage(cluster)
    for name, content in _foreign().items():
        try:
            if storage.stat_object(bucket, name).size != len(content):
                cluster.violations.append(f"overwritten: {name}")
        except S3Error:
            cluster.violations.append(f"removed: {name}")
        storage.remove_object(bucket, name)


def _start_commands(cluster: Cluster) -> None:
    for verb in ("gc", "pins", "inspect"):
        cluster.start_command(verb)


def _misled(name: str, faults: Callable[[], HttpFault]) -> Fault:
    """Return a fault of the proxy that lasts until the commands have ended."""

    def inject(cluster: Cluster) -> None:
        cluster.proxy.fault = faults()
        _start_commands(cluster)

    def heal(cluster: Cluster) -> None:
        cluster.finish_commands()
        cluster.proxy.fault = NO_FAULT

    return Fault(name, "bucket", inject, heal)


def _dates() -> Iterator[bytes]:
    for days in (400, 2, -400):
        yield formatdate(time.time() + days * DAY, usegmt=True).encode()
    yield from (b"", b"tomorrow")


def _set_date(head: bytes) -> bytes:
    """Return the head of a response with a wrong date."""
    lines = [line for line in head[:-4].split(b"\r\n") if not line.lower().startswith(b"date:")]
    date = random.choice(list(_dates()))  # noqa: S311 - not a secret
    return b"\r\n".join([*lines, b"Date: " + date]) + b"\r\n\r\n"


def _wrong_503() -> HttpFault:
    date = formatdate(time.time() + 400 * DAY, usegmt=True)
    answer = f"HTTP/1.1 503 Service Unavailable\r\nDate: {date}\r\nContent-Length: 0\r\n\r\n"
    return HttpFault(every=3, answer=answer.encode())


FAULTS = [
    Fault("odd objects", "bucket", _put_odd_objects, _take_odd_objects),
    _misled("wrong dates", lambda: HttpFault(every=3, edit_response=_set_date)),
    _misled("503 with a wrong date", _wrong_503),
    _misled(
        "control path drips",
        lambda: HttpFault(methods=("GET",), matching=rb"list-type|/pins/", drip=1.0),
    ),
]
