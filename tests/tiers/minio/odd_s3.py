"""An S3 server in memory with the faults of real ones that are too large to start in a test."""

import hashlib
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from typing_extensions import override

from memkv_sglang.config.schema import MinioConfig


class Faults(NamedTuple):
    """How a server deviates from S3."""

    conditions: Literal["quoted", "bare", "ignored", "racy"] = "quoted"
    copies_move: bool = True
    chunked: bool = False
    lists: bool = True
    deletes: bool = True
    keep_alive: bool = True
    versioning: str = ""
    """State of the bucket's versioning, or the error code of a server without versioning."""
    version_ids: bool = False
    copies: bool = True
    rules: str = ""
    """The error code of a server that has no lifecycle rules and no object lock."""
    region: str = ""
    """The only region that the server accepts, if any. Its answers to HEAD cannot name it."""
    rules_set: bool = False
    """Whether the bucket has this project's lifecycle rule."""


_RULES = (
    b"<LifecycleConfiguration><Rule><ID>memkv</ID><Status>Enabled</Status>"
    b"<Filter><Prefix></Prefix></Filter><Expiration><Days>7</Days></Expiration></Rule>"
    b"</LifecycleConfiguration>"
)


class Stored(NamedTuple):
    content: bytes
    modified: float

    @property
    def etag(self) -> str:
        return hashlib.md5(self.content, usedforsecurity=False).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faults: Faults
    objects: dict[str, Stored]
    lock: threading.Lock

    def do_HEAD(self) -> None:
        self.do_GET()

    @override
    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        region = self.faults.region
        if region and f"/{region}/s3/" not in self.headers.get("Authorization", region):
            code = f"<Code>AuthorizationHeaderMalformed</Code><Region>{region}</Region>"
            self.close_connection = True
            self._answer(400, f"<Error>{code}</Error>".encode())
            return False
        return True

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        query = parse_qs(parts.query, keep_blank_values=True)
        stored = self.objects.get(unquote(parts.path))
        if "versioning" in query:
            self._versioning()
        elif "lifecycle" in query or "object-lock" in query:
            self._rules("lifecycle" in query)
        elif "list-type" in query:
            self._list(query["prefix"][0])
        elif parts.path.startswith("/minio/"):
            # These servers take the admin API's path for an object's.
            self._refuse(403, "AccessDenied")
        elif parts.path.count("/") == 1:
            self._answer(200)
        elif stored is None:
            self._refuse(404, "NoSuchKey")
        else:
            self._answer(200, stored.content, stored)

    def do_PUT(self) -> None:
        name = unquote(self.path)
        content = self.rfile.read(int(self.headers["Content-Length"]))
        source = self.headers.get("x-amz-copy-source")
        if "?lifecycle" in name:
            self._rules(lifecycle=True)
        elif source and not self.faults.copies:
            self._refuse(501, "NotImplemented")
        elif source:
            old = self.objects[name]
            when = time.time() if self.faults.copies_move else old.modified
            self.objects[name] = Stored(old.content, when)
            body = b"<CopyObjectResult><ETag>x</ETag></CopyObjectResult>"
            self._answer(200, body, chunked=self.faults.chunked)
        elif self.faults.conditions == "racy":
            met = self._condition_met(self.objects.get(name))
            time.sleep(0.05)  # the other writer checks its condition meanwhile
            self._store(name, content, met)
        else:
            with self.lock:
                met = self._condition_met(self.objects.get(name))
                self._store(name, content, met)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        bucket = urlsplit(self.path).path
        for name in re.findall("<Key>([^<]+)</Key>", body):
            if self.faults.deletes:
                self.objects.pop(f"{bucket}/{name}", None)
        self._answer(200, b"<DeleteResult></DeleteResult>")

    @override
    def log_message(self, *_: object) -> None:
        pass

    def _condition_met(self, stored: Stored | None) -> bool:
        if self.faults.conditions == "ignored":
            return True
        if self.headers.get("if-none-match") == "*" and stored is not None:
            return False
        wanted = self.headers.get("if-match")
        if wanted is None:
            return True
        quotes = "" if self.faults.conditions == "bare" else '"'
        return stored is not None and wanted == f"{quotes}{stored.etag}{quotes}"

    def _store(self, name: str, content: bytes, met: bool) -> None:
        if not met:
            self._refuse(412, "PreconditionFailed")
            return
        stored = self.objects[name] = Stored(content, time.time())
        self._answer(200, b"", stored)

    def _list(self, prefix: str) -> None:
        names = sorted(self.objects) if self.faults.lists else []
        items = ""
        for name in names:
            key = name.split("/", 2)[2]
            if key.startswith(prefix):
                items += (
                    f"<Contents><Key>{key}</Key><Size>1</Size><ETag>x</ETag>"
                    "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
                )
        head = "<Name>odd</Name><IsTruncated>false</IsTruncated>"
        self._answer(200, f"<ListBucketResult>{head}{items}</ListBucketResult>".encode())

    def _versioning(self) -> None:
        status = self.faults.versioning
        if status in ("NotImplemented", "AccessDenied"):
            self._refuse(501 if status == "NotImplemented" else 403, status)
            return
        inner = f"<Status>{status}</Status>" if status else ""
        self._answer(200, f"<VersioningConfiguration>{inner}</VersioningConfiguration>".encode())

    def _rules(self, lifecycle: bool) -> None:
        if self.faults.rules:
            self._refuse(501 if self.faults.rules == "NotImplemented" else 403, self.faults.rules)
        elif self.command == "PUT":
            self._answer(200)
        elif lifecycle and self.faults.rules_set:
            self._answer(200, _RULES)
        elif lifecycle:
            self._refuse(404, "NoSuchLifecycleConfiguration")
        else:
            self._refuse(404, "ObjectLockConfigurationNotFoundError")

    def _refuse(self, status: int, code: str) -> None:
        self._answer(status, f"<Error><Code>{code}</Code></Error>".encode())

    def _answer(
        self, status: int, body: bytes = b"", stored: Stored | None = None, chunked: bool = False
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        if stored is not None:
            self.send_header("ETag", f'"{stored.etag}"')
            self.send_header("Last-Modified", formatdate(stored.modified, usegmt=True))
        if self.faults.version_ids:
            self.send_header("x-amz-version-id", "0123")
        if not self.faults.keep_alive:
            self.send_header("Connection", "close")
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
            body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def odd_s3(faults: Faults) -> Iterator[MinioConfig]:
    """Serve, and yield the settings of a bucket."""
    attributes = {"faults": faults, "objects": {}, "lock": threading.Lock()}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Served", (Handler,), attributes))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield MinioConfig(
            endpoint=f"http://127.0.0.1:{server.server_port}",
            bucket="odd",
            access_key="key",
            secret_key="secret-key",
        )
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
