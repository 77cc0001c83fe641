"""The control path's HTTP client against servers that close the connection after each response."""

import socket
import threading
from collections.abc import Iterator

import pytest

from memkv_sglang.tiers.minio.http.control import ControlHttp

BODY = b"x" * 100_000


@pytest.fixture(params=["Connection: close\r\nContent-Length: 100000\r\n", "Connection: close\r\n"])
def closing_server(request: pytest.FixtureRequest) -> Iterator[str]:
    """A server that sends the head, and the body only once the client has read the head."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.recv(65536)
                connection.sendall(f"HTTP/1.1 200 OK\r\n{request.param}\r\n".encode())
                # Larger than the client's read buffer, so that it cannot arrive with the head.
                connection.sendall(BODY)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/object"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(10)


def test_a_response_that_ends_the_connection_is_read_whole(closing_server: str) -> None:
    http = ControlHttp()
    for _ in range(3):  # each request opens a new connection
        assert http.urlopen("GET", closing_server).data == BODY
    http.close()
