"""Misbehaving S3 servers, and a bucket on a real one."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from memkv_testbed.minio_server import MinioServer
from minio import Minio

from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.tiers.minio import MinioTier
from tests.collector.bucket import LIMIT, Bucketful

PIECE_SECONDS = 0.2
"""Pause between two bytes of a slow server."""

Send = Callable[[bytes], None]
Answer = Callable[[bytes, Send, threading.Event], None]
"""Answers a request, given its head; the event is set when the server stops."""


class OddServer:
    """Answers each request by calling a function; a context manager."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._ended = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.asked = threading.Event()
        """Set at the first request."""
        self.connected = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "OddServer":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self.connected.set()
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, suppress(OSError):
            while True:
                head = b""
                while b"\r\n\r\n" not in head:
                    piece = sock.recv(65536)
                    if not piece:
                        return
                    head += piece
                self.asked.set()
                self._answer(head, sock.sendall, self._ended)


def whole(content: bytes, status: str = "200 OK") -> bytes:
    """Return a complete response."""
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(content)}"
    return f"{head}\r\n\r\n".encode() + content


def drip(content: bytes, send: Send, ended: threading.Event) -> None:
    """Send one byte per `PIECE_SECONDS`."""
    for i in range(len(content)):
        send(content[i : i + 1])
        if ended.wait(PIECE_SECONDS):
            return


@contextmanager
def bucket_of(config: MinioConfig, server: MinioServer) -> Iterator[Bucketful]:
    """Create the bucket; yield it with a tier and an administrator's client."""
    admin = Minio(server.endpoint.partition("://")[2], *server.root, secure=False)
    admin.make_bucket(config.bucket)
    tier = MinioTier(config)
    tier.check(time.monotonic() + LIMIT)  # so that the bucket has a format before it has objects
    try:
        yield Bucketful(config, tier, admin)
    finally:
        tier.close()
