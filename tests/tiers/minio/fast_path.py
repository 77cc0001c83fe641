"""Runs the compiled loop on one exchange."""

import socket
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from memkv_sglang.page import Page
from memkv_sglang.tiers.minio.http import BulkTemplate, Connection, Endpoint, Request, Sealing
from memkv_sglang.tiers.minio.http.bulk import FallBack, ignore_fallback
from memkv_sglang.tiers.minio.http.transport import PlainTransport
from memkv_sglang.tiers.minio.names import page_metadata

if TYPE_CHECKING:
    from memkv_sglang.tiers.minio.http.bulk_batch import Download

SERVER = Endpoint("http", "server", 80, "/")
TEMPLATE = BulkTemplate(b"GET /", b"", b"", b"key", b"authorization: ")
SECONDS = 5.0


def receive_on(
    connection: Connection,
    page: Page,
    fall_back: FallBack = ignore_fallback,
    sealing: Sealing | None = None,
) -> "Download":
    """Request a page on a connection to `SERVER`; return the finished batch."""
    loop = pytest.importorskip("memkv_sglang.tiers.minio.http.bulk_loop", exc_type=ImportError)
    from memkv_sglang.tiers.minio.http.bulk_batch import Download

    batch = Download(
        [Request(b"page", page)], {SERVER: TEMPLATE}, page_metadata(), fall_back, sealing=sealing
    )
    try:
        loop.transfer([connection], batch, time.monotonic() + SECONDS, SECONDS)
    finally:
        batch.close()
    return batch


def receive(
    response: bytes,
    page: Page,
    sealing: Sealing | None = None,
    piece: int = 1 << 20,
) -> "Download":
    """Receive a page from a server that answers with these bytes, in pieces, and closes."""
    ours, theirs = socket.socketpair()

    def serve() -> None:
        with theirs, suppress(OSError):
            theirs.recv(1 << 16)
            for at in range(0, len(response), piece):
                theirs.sendall(response[at : at + piece])

    thread = threading.Thread(target=serve)
    thread.start()
    connection = Connection(SERVER, PlainTransport(ours), SECONDS)
    try:
        return receive_on(connection, page, sealing=sealing)
    finally:
        connection.close()
        thread.join()
