"""Socket options of connections."""

import socket
import ssl
from pathlib import Path
from typing import cast

import pytest

from memkv_sglang.tiers.minio.http import transport


class NoTls:
    """A fake context, so that no TLS server is needed."""

    def wrap_socket(self, sock: socket.socket, *, server_hostname: str) -> socket.socket:
        return sock


def receive_buffer(context: ssl.SSLContext | None) -> int:
    """Return the receive buffer size of a new connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = (socket.AF_INET, socket.SOCK_STREAM, 0, server.getsockname())
        connection = transport.connect([address], "localhost", 5.0, context)
        with socket.socket(fileno=socket.dup(connection.fileno)) as sock:
            connection.close()
            return sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)


@pytest.mark.parametrize(
    ("limit", "wider"),
    [("4194304\n", True), ("16777216\n", True), ("212992\n", False), ("", False)],
)
def test_tls_asks_for_a_wide_window_where_the_system_allows_it(
    limit: str, wider: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rmem_max"
    if limit:
        file.write_text(limit)
    monkeypatch.setattr(transport, "_WINDOW_LIMIT", file)
    usual = receive_buffer(None)
    assert (receive_buffer(cast("ssl.SSLContext", NoTls())) > usual) == wider
