"""The HTTP client that minio-py uses for the control path.

urllib3's timeouts restart with each byte, so a server that sends one byte at a time could block a
caller forever. In this client, one deadline and one size limit cover the whole request, from
connecting to the last byte of the response, and `close` aborts requests in flight.

This module imports urllib3, which is slow, so import it late.
"""

import http.client
import io
import socket
import ssl
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from urllib3 import BaseHTTPResponse, HTTPHeaderDict, HTTPResponse, PoolManager
from urllib3.exceptions import HTTPError

from memkv_sglang.tiers.minio.http.addresses import Addresses
from memkv_sglang.tiers.minio.http.answers import parseable_xml
from memkv_sglang.tiers.minio.http.tls import ContextSource
from memkv_sglang.tiers.minio.http.transport import open_socket, shut_down

CONNECT_TIMEOUT = 2.0
"""Maximum seconds to open a connection, whatever the settings allow for pages."""

REQUEST_SECONDS = 5.0
"""Maximum seconds for a whole request. A busy server takes long to list 1,000 objects."""

ANSWER_LIMIT = 8 << 20
"""Maximum bytes of a response. A listing of 1,000 long URL-encoded names has 3 MiB."""

KEPT = 4
"""Maximum number of idle connections per server."""

SHORTEST_TIMEOUT = 1e-3
"""Minimum timeout in seconds. 0 would make the socket non-blocking."""

DEFAULT_PORTS = {"http": 80, "https": 443}


class _Origin(NamedTuple):
    scheme: str
    host: str
    port: int


class _Stream:
    """A connected socket with the interface that `http.client` needs. Calls end at `deadline`."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.deadline = 0.0
        self.allowance = 0

    def sendall(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            self._set_timeout()
            view = view[self.socket.send(view) :]

    def receive_into(self, buffer: bytearray) -> int:
        self._set_timeout()
        count = self.socket.recv_into(buffer)
        self.allowance -= count
        if self.allowance < 0:
            raise OSError("the response is too large")
        return count

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Reader(self))

    def is_idle(self) -> bool:
        """Return whether the server has neither closed the connection nor sent anything."""
        self.socket.settimeout(0)
        try:
            self.socket.recv(1)
        except (BlockingIOError, ssl.SSLWantReadError):
            return True
        except OSError:
            pass
        return False

    def interrupt(self) -> None:
        """Abort the call that another thread is blocked in."""
        shut_down(self.socket)

    def close(self) -> None:
        """Do nothing: `http.client` closes its socket before it has read the last response."""

    def disconnect(self) -> None:
        self.socket.close()

    def _set_timeout(self) -> None:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the server took too long")
        self.socket.settimeout(max(left, SHORTEST_TIMEOUT))


class _Reader(io.RawIOBase):
    """Reads from a stream. Closing it leaves the stream open."""

    def __init__(self, stream: _Stream) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._stream.receive_into(buffer)


class _Answer(NamedTuple):
    status: int
    fields: HTTPHeaderDict
    content: bytes


class ControlHttp(PoolManager):
    """Sends each request once. Thread-safe; minio-py requires a `PoolManager`."""

    def __init__(
        self, connect_timeout: float = CONNECT_TIMEOUT, context: ContextSource | None = None
    ) -> None:
        """Create the client, without any connection yet."""
        super().__init__()
        self._connect_timeout = connect_timeout
        self._context = context
        self._system_context: ssl.SSLContext | None = None
        self._addresses: dict[_Origin, Addresses] = {}
        self._idle: dict[_Origin, list[_Stream]] = defaultdict(list)
        self._busy: set[_Stream] = set()
        self._closed = False
        self._lock = threading.Lock()
        self._limits = threading.local()

    @contextmanager
    def limits(self, seconds: float = REQUEST_SECONDS, size: int = ANSWER_LIMIT) -> Iterator[None]:
        """Limit the total time of this thread's requests, and the size of each response."""
        self._limits.deadline, self._limits.size = time.monotonic() + seconds, size
        try:
            yield
        finally:
            del self._limits.deadline, self._limits.size

    def urlopen(  # type: ignore[override]  # minio-py passes no other arguments
        self,
        method: str,
        url: str,
        redirect: bool = True,
        *,
        body: Any = None,
        headers: Any = None,
        fields: Any = None,
        preload_content: bool = True,
        **_: Any,
    ) -> BaseHTTPResponse:
        """Send a request and read the whole response. Follows no redirect. Raises `HTTPError`."""
        deadline = time.monotonic() + REQUEST_SECONDS
        deadline = min(deadline, getattr(self._limits, "deadline", deadline))
        if fields is not None and body is None:  # some of minio-py's providers send forms
            body, content_type = self._form(fields)
            headers = {**(headers or {}), "Content-Type": content_type}
        try:
            answer = self._ask(method, url, body, headers, deadline)
            content = answer.content
            # minio-py parses errors only if they are XML, and does not preload the objects.
            is_xml = answer.status < 300 or "xml" in answer.fields.get("content-type", "")
            if preload_content and is_xml:
                content = parseable_xml(content)
        except (OSError, http.client.HTTPException, ValueError) as error:
            server = "://".join(urlsplit(url)[:2])
            raise HTTPError(f"{server}: {str(error) or type(error).__name__}") from error
        return HTTPResponse(
            io.BytesIO(content),
            answer.fields,
            answer.status,
            preload_content=preload_content,
            decode_content=False,  # a compressed response could be huge
            enforce_content_length=False,
            request_method=method,
        )

    def close(self) -> None:
        """Close all connections. Requests in flight and later ones fail at once."""
        with self._lock:
            self._closed = True
            idle = [stream for streams in self._idle.values() for stream in streams]
            self._idle.clear()
            for stream in self._busy:
                stream.interrupt()
        for stream in idle:
            stream.disconnect()

    @staticmethod
    def _form(fields: Any) -> tuple[bytes, str]:
        from urllib3.filepost import encode_multipart_formdata

        return encode_multipart_formdata(fields)

    def _ask(self, method: str, url: str, body: Any, headers: Any, deadline: float) -> _Answer:
        parts = urlsplit(url)
        origin = _Origin(parts.scheme, parts.hostname or "", parts.port or _default_port(parts))
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        while True:
            stream, reused = self._take(origin, deadline)
            stream.deadline = deadline
            allowance = stream.allowance = getattr(self._limits, "size", ANSWER_LIMIT)
            keep = False
            try:
                answer, keep = _exchange(origin, stream, method, target, body, headers)
            except (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError):
                if not reused or stream.allowance < allowance:
                    raise
                # The server has closed an idle connection, so retry on another one.
            else:
                return answer
            finally:
                self._release(origin, stream, keep=keep)

    def _take(self, origin: _Origin, deadline: float) -> tuple[_Stream, bool]:
        while True:
            with self._lock:
                if self._closed:
                    raise OSError("the connection is closed")
                stream = self._idle[origin].pop() if self._idle[origin] else None
                if stream is not None:
                    self._busy.add(stream)
            if stream is None:
                break
            if stream.is_idle():
                return stream, True
            self._release(origin, stream, keep=False)
        stream = _Stream(self._connect(origin, deadline))
        with self._lock:
            closed = self._closed
            self._busy.add(stream)
        if closed:
            self._release(origin, stream, keep=False)
            raise OSError("the connection is closed")
        return stream, False

    def _release(self, origin: _Origin, stream: _Stream, *, keep: bool) -> None:
        with self._lock:
            self._busy.discard(stream)
            if keep and not self._closed and len(self._idle[origin]) < KEPT:
                self._idle[origin].append(stream)
                return
        stream.disconnect()

    def _connect(self, origin: _Origin, deadline: float) -> socket.socket:
        with self._lock:
            if origin not in self._addresses:
                self._addresses[origin] = Addresses(origin.host, origin.port)
        begin = time.monotonic()
        timeout = min(self._connect_timeout, deadline - begin)
        if timeout <= 0:
            raise TimeoutError("the server took too long")
        addresses = self._addresses[origin].get(timeout)
        left = timeout - (time.monotonic() - begin)
        context = self._tls() if origin.scheme == "https" else None
        return open_socket(addresses, origin.host, left, context)

    def _tls(self) -> ssl.SSLContext:
        if self._context is not None:
            return self._context()
        if self._system_context is None:
            self._system_context = ssl.create_default_context()
        return self._system_context


def _default_port(parts: Any) -> int:
    if parts.scheme not in DEFAULT_PORTS:
        raise ValueError(f"{parts.scheme!r} is neither http nor https")
    return DEFAULT_PORTS[parts.scheme]


def _exchange(
    origin: _Origin, stream: _Stream, method: str, target: str, body: Any, headers: Any
) -> tuple[_Answer, bool]:
    """Return the response, and whether the connection accepts another request."""
    connection = http.client.HTTPConnection(origin.host, origin.port)
    connection.default_port = DEFAULT_PORTS[origin.scheme]
    connection.sock = stream  # it has the methods that http.client calls
    connection.request(method, target, body, headers or {})
    response = connection.getresponse()
    content = response.read()
    fields = HTTPHeaderDict(response.getheaders())
    fields.discard("transfer-encoding")  # the body is already decoded
    keep = not response.will_close
    return _Answer(response.status, fields, content), keep
