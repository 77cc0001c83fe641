"""An S3 server in memory whose clock is the simulated one. Counts requests by purpose."""

import bisect
import hashlib
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from email.utils import formatdate
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

LISTED = 1000
"""Maximum objects per response to a listing, as on S3."""

_PAGE = re.compile(r"/[0-9a-f]{64}$")


class _Stored(NamedTuple):
    content: bytes
    modified: float
    etag: str
    fields: Mapping[str, str]
    """Metadata."""


class SimulatedS3:
    """A server with one bucket. A context manager. Does not check signatures."""

    def __init__(self) -> None:
        """Listen on a free loopback port."""
        self.counts: Counter[str] = Counter()
        """Number of requests by purpose."""
        self.stored = self.removed = 0
        """Number of pages stored and removed."""
        self._purpose = "start"
        self._objects: dict[str, _Stored] = {}
        self._names: list[str] | None = None
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    @contextmanager
    def purpose(self, name: str) -> Iterator[None]:
        """Count a `with` block's requests for this purpose; those that write logs as `usage`."""
        before, self._purpose = self._purpose, name
        try:
            yield
        finally:
            self._purpose = before

    def __enter__(self) -> "SimulatedS3":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, suppress(OSError), sock.makefile("rb") as stream:
            while line := stream.readline():
                method, target, _ = line.decode("latin-1").split()
                fields = dict(_fields(iter(stream.readline, b"\r\n")))
                body = stream.read(int(fields.get("content-length", 0)))
                with self._lock:
                    answer = self._answer(method, target, fields, body)
                sock.sendall(answer)

    def _answer(self, method: str, target: str, fields: Mapping[str, str], body: bytes) -> bytes:
        parts = urlsplit(target)
        _, bucket, *rest = unquote(parts.path).split("/", 2)
        name, query = "".join(rest), parse_qs(parts.query, keep_blank_values=True)
        self.counts["usage" if method == "PUT" and "logs/" in name else self._purpose] += 1
        if method == "POST":
            for found in re.findall(rb"<Key>([^<]+)</Key>", body):
                gone = self._objects.pop(found.decode(), None)
                self.removed += gone is not None and _PAGE.search(found.decode()) is not None
                self._names = None
            return _response(200, b"<DeleteResult></DeleteResult>")
        if "list-type" in query:
            return self._list(bucket, {field: value[0] for field, value in query.items()})
        if "versioning" in query:
            return _response(200, b"<VersioningConfiguration></VersioningConfiguration>")
        if "lifecycle" in query or "object-lock" in query:
            return _response(404, b"<Error><Code>NoSuchLifecycleConfiguration</Code></Error>")
        if not name:
            return _response(200, b"<LocationConstraint></LocationConstraint>")
        if method == "PUT":
            return self._put(name, fields, body)
        stored = self._objects.get(name)
        if stored is None:
            error = b"<Error><Code>NoSuchKey</Code></Error>"
            return _response(404, error, bodiless=method == "HEAD")
        content, status = stored.content, 200
        if span := re.fullmatch(r"bytes=(\d+)-(\d+)", fields.get("range", "")):
            content, status = content[int(span[1]) : int(span[2]) + 1], 206
        return _response(status, content, stored, bodiless=method == "HEAD")

    def _put(self, name: str, fields: Mapping[str, str], body: bytes) -> bytes:
        stored, wanted = self._objects.get(name), fields.get("if-match")
        if ("if-none-match" in fields and stored) or (
            wanted and (stored is None or wanted.strip('"') != stored.etag)
        ):
            return _response(412, b"<Error><Code>PreconditionFailed</Code></Error>")
        answer = b""
        if source := fields.get("x-amz-copy-source"):
            body = self._objects[unquote(source).split("/", 2)[2]].content
            answer = b"<CopyObjectResult><ETag>x</ETag></CopyObjectResult>"
        kept = {k: v for k, v in fields.items() if k.startswith(("x-amz-meta-", "content-type"))}
        etag = hashlib.md5(body, usedforsecurity=False).hexdigest()
        if stored is None:
            self._names = None
            self.stored += _PAGE.search(name) is not None
        stored = self._objects[name] = _Stored(body, time.time(), etag, kept)
        return _response(200, answer, stored)

    def _list(self, bucket: str, query: Mapping[str, str]) -> bytes:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        if self._names is None:
            self._names = sorted(self._objects)
        after = query.get("continuation-token") or query.get("start-after") or ""
        place = max(
            bisect.bisect_right(self._names, after), bisect.bisect_left(self._names, prefix)
        )
        items: list[str] = []
        folders: dict[str, None] = {}
        last, more = "", False
        for last_place in range(place, len(self._names)):
            name = self._names[last_place]
            if not name.startswith(prefix):
                break
            if len(items) + len(folders) == LISTED:
                more = True
                break
            last = name
            folder, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else ("",) * 3
            if found:
                folders[prefix + folder + delimiter] = None
                continue
            stored = self._objects[name]
            when = datetime.fromtimestamp(stored.modified, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")
            items.append(
                f"<Contents><Key>{name}</Key><Size>{len(stored.content)}</Size>"
                f"<ETag>{stored.etag}</ETag><LastModified>{when[:-3]}Z</LastModified></Contents>"
            )
        inner = "".join(items) + "".join(
            f"<CommonPrefixes><Prefix>{folder}</Prefix></CommonPrefixes>" for folder in folders
        )
        token = f"<NextContinuationToken>{last}</NextContinuationToken>" if more else ""
        head = f"<Name>{bucket}</Name><IsTruncated>{str(more).lower()}</IsTruncated>{token}"
        return _response(200, f"<ListBucketResult>{head}{inner}</ListBucketResult>".encode())


def _fields(lines: Iterator[bytes]) -> Iterator[tuple[str, str]]:
    for line in lines:
        name, _, value = line.decode("latin-1").partition(":")
        yield name.lower(), value.strip()


def _response(
    status: int, body: bytes = b"", stored: _Stored | None = None, *, bodiless: bool = False
) -> bytes:
    lines = [f"HTTP/1.1 {status} OK", f"Date: {formatdate(time.time(), usegmt=True)}"]
    lines += ["Server: SimulatedS3", f"Content-Length: {len(body)}"]
    if stored is not None:
        modified = formatdate(stored.modified, usegmt=True)
        lines += [f'ETag: "{stored.etag}"', f"Last-Modified: {modified}"]
        lines += [f"{name}: {value}" for name, value in stored.fields.items()]
    else:
        lines.append("Content-Type: application/xml")
    head = "\r\n".join([*lines, "", ""]).encode("latin-1")
    return head if bodiless else head + body
