"""Every control request ends, whatever the server does, and so does an agent after SIGTERM."""

import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from memkv_testbed.http_proxy import HttpFault, HttpFaultProxy
from memkv_testbed.minio_server import MinioServer
from minio.credentials.providers import IamAwsProvider
from prometheus_client import CollectorRegistry
from urllib3.exceptions import HTTPError

from memkv_sglang.config.schema import CollectorConfig, MinioConfig
from memkv_sglang.metrics import Metrics
from memkv_sglang.testing.pages import make_chain, make_namespace
from memkv_sglang.tiers.base import TierError
from memkv_sglang.tiers.minio import MinioTier
from memkv_sglang.tiers.minio.admin.bucket import Bucket
from memkv_sglang.tiers.minio.auth.signing import credential_provider
from memkv_sglang.tiers.minio.http import control as control_http
from memkv_sglang.tiers.minio.http.control import ControlHttp
from tests.cases.s3_servers import OddServer, Send, drip, whole
from tests.cli.cli_node import start

SECONDS = 1.0
"""The time limit of a request in these tests."""

LIMIT = 20.0
"""Seconds that a busy machine may take for what an idle one does at once."""

LISTING = b"""<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>memkv</Name>\
<IsTruncated>%b</IsTruncated>%b%b</ListBucketResult>"""

TOKEN = b"<NextContinuationToken>x</NextContinuationToken>"

OBJECT = b"""<Contents><Key>name</Key><Size>1</Size>\
<LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>"e"</ETag></Contents>"""


def drips_head(_: bytes, send: Send, ended: threading.Event) -> None:
    drip(b"HTTP/1.1 200 OK\r\n" + b"X-Field: " + b"x" * 10_000, send, ended)


def drips_body(_: bytes, send: Send, ended: threading.Event) -> None:
    send(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    drip(b" " * 100_000, send, ended)


def drips_error(_: bytes, send: Send, ended: threading.Event) -> None:
    send(b"HTTP/1.1 500 no\r\nContent-Type: application/xml\r\nContent-Length: 100000\r\n\r\n")
    drip(b" " * 100_000, send, ended)


def drips_chunks(_: bytes, send: Send, ended: threading.Event) -> None:
    send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    drip(b"1\r\n \r\n" * 10_000, send, ended)


def drips_interim(_: bytes, send: Send, ended: threading.Event) -> None:
    drip(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000, send, ended)


def never_ends(_: bytes, send: Send, ended: threading.Event) -> None:
    send(b"HTTP/1.1 200 OK\r\n\r\n<a>")
    while not ended.is_set():
        send(b" " * 65536)


def chunk_of_no_length(_: bytes, send: Send, ended: threading.Event) -> None:
    send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n")
    while not ended.is_set():
        send(b" " * 65536)


def says_nothing(_: bytes, __: Send, ended: threading.Event) -> None:
    ended.wait()


def same_token(_: bytes, send: Send, __: threading.Event) -> None:
    send(whole(LISTING % (b"true", TOKEN, OBJECT * 10)))


def same_thousand(_: bytes, send: Send, __: threading.Event) -> None:
    send(whole(LISTING % (b"true", TOKEN, OBJECT * 1000)))


def empty_pages(_: bytes, send: Send, __: threading.Event) -> None:
    send(whole(LISTING % (b"true", TOKEN, b"")))


def many_redirects(_: bytes, send: Send, __: threading.Event) -> None:
    send(b"HTTP/1.1 307 x\r\nLocation: /again\r\nContent-Length: 0\r\n\r\n")


SERVERS = [
    drips_head,
    drips_body,
    drips_error,
    drips_chunks,
    drips_interim,
    never_ends,
    chunk_of_no_length,
    says_nothing,
    same_token,
    same_thousand,
    empty_pages,
    many_redirects,
]


@pytest.fixture(autouse=True)
def short_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_http, "REQUEST_SECONDS", SECONDS)


def bucket_at(url: str) -> Bucket:
    config = MinioConfig(endpoint=url, access_key="someone", secret_key="secretsecret")
    return Bucket(config, credential_provider(config), None)


def ends(call: Callable[[], object]) -> None:
    begin = time.monotonic()
    with pytest.raises((TierError, HTTPError)):
        call()
    assert time.monotonic() - begin < SECONDS + LIMIT / 4


@pytest.mark.parametrize("answer", SERVERS, ids=lambda answer: answer.__name__)
def test_a_listing_ends_whatever_the_server_does(answer: Callable[..., None]) -> None:
    with OddServer(answer) as server:
        bucket = bucket_at(server.url)
        # A listing that returns the same token forever repeats itself within one call.
        ends(lambda: [None for _, _ in zip(bucket.objects(""), range(10**6), strict=False)])
        bucket.close()


OPERATIONS: dict[str, Callable[[Bucket], object]] = {
    "ensure": lambda bucket: bucket.ensure(),
    "names": lambda bucket: bucket.names("", recursive=True),
    "folders": lambda bucket: list(bucket.folders("")),
    "read": lambda bucket: bucket.read("name"),
    "write": lambda bucket: bucket.write("name", b"content"),
    "remove": lambda bucket: bucket.remove(["name"]),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_ends(name: str) -> None:
    with OddServer(drips_head) as server:
        ends(lambda: OPERATIONS[name](bucket_at(server.url)))


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_silent_server_does_not_block_callers(scheme: str) -> None:
    """With https, the client already waits for the TLS handshake."""
    with OddServer(says_nothing) as server:
        url = server.url.replace("http", scheme)
        ends(lambda: ControlHttp().urlopen("GET", f"{url}/x"))


def test_a_full_accept_queue_does_not_block_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        port = listener.getsockname()[1]
        waiting = [socket.socket() for _ in range(4)]
        for sock in waiting:
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", port))
        ends(lambda: ControlHttp(0.5).urlopen("GET", f"http://127.0.0.1:{port}/"))
        for sock in waiting:
            sock.close()


def test_slow_name_resolution_does_not_block_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: released.wait() and [])
    ends(lambda: ControlHttp(0.5).urlopen("GET", "http://minio.example/"))
    released.set()


def test_slow_credential_responses_do_not_block_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    with OddServer(drips_body) as server:
        ends(
            lambda: IamAwsProvider(custom_endpoint=server.url, http_client=ControlHttp()).retrieve()
        )


def test_close_ends_a_request_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_http, "REQUEST_SECONDS", 600.0)
    with OddServer(drips_body) as server:
        bucket = bucket_at(server.url)
        failed: list[TierError] = []

        def read() -> None:
            try:
                bucket.read("name")
            except TierError as error:
                failed.append(error)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        assert server.asked.wait(LIMIT)
        bucket.close()
        reader.join(LIMIT)
        assert failed
        ends(lambda: bucket.read("name"))


@pytest.fixture
def dripping(minio_server: MinioServer, minio_config: MinioConfig) -> Iterator[HttpFaultProxy]:
    """A real server behind a proxy that drips the bodies of listings and objects."""
    bucket = Bucket(minio_config, credential_provider(minio_config), None)
    bucket.ensure()
    bucket.close()
    with HttpFaultProxy(minio_server.host, minio_server.port) as proxy:
        proxy.fault = HttpFault(methods=("GET",), rate=1)
        yield proxy


def environ(proxy: HttpFaultProxy, config: MinioConfig, directory: Path) -> dict[str, str]:
    (directory / "run").mkdir(mode=0o700)
    return {
        "MEMKV_AGENT_SOCKET": str(directory / "run" / "agent.sock"),
        "MEMKV_MINIO_ENDPOINT": proxy.url,
        "MEMKV_MINIO_BUCKET": config.bucket,
        "MEMKV_MINIO_ACCESS_KEY": config.access_key,
        "MEMKV_MINIO_SECRET_KEY": config.secret_key,
        "MEMKV_COLLECTOR_CAPACITY": "1MiB",
        "MEMKV_COLLECTOR_INTERVAL": "1s",
    }


def test_commands_end(dripping: HttpFaultProxy, minio_config: MinioConfig, tmp_path: Path) -> None:
    variables = environ(dripping, minio_config, tmp_path)
    verbs = (["gc"], ["pins"], ["inspect"], ["verify"], ["doctor"])
    running = [start(variables, *verb, stdout=subprocess.PIPE) for verb in verbs]
    for process in running:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "Traceback" not in errors


def test_sigterm_during_a_collection(
    dripping: HttpFaultProxy, minio_config: MinioConfig, tmp_path: Path
) -> None:
    process = start(environ(dripping, minio_config, tmp_path), "agent")
    assert process.stderr is not None
    while dripping.requests < 5:  # the collector's listing is the first response that drips
        assert process.poll() is None
        time.sleep(0.05)
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=LIMIT)
    assert process.returncode == 0
    assert time.monotonic() - begin < 3.0  # an idle machine needs about a second


def test_close_does_not_wait_for_a_silent_server(
    minio_server: MinioServer, minio_config: MinioConfig
) -> None:
    with HttpFaultProxy(minio_server.host, minio_server.port) as proxy:
        tier = MinioTier(msgspec.structs.replace(minio_config, endpoint=proxy.url))
        tier.check(time.monotonic() + LIMIT)
        tier.keep_limits(CollectorConfig(interval=1), Metrics(CollectorRegistry()))
        proxy.fault = HttpFault(answer=b"")  # the server no longer answers
        before = proxy.requests
        tier.record_access(make_chain(make_namespace(4096), 1))
        while proxy.requests == before:
            time.sleep(0.01)
        begin = time.monotonic()
        tier.close(time.monotonic() + 0.5)
        assert time.monotonic() - begin < 1.5


def test_setup_of_a_bucket_ends(tmp_path: Path) -> None:
    with OddServer(drips_head) as server:
        variables = {
            "MEMKV_MINIO_ENDPOINT": server.url,
            "MEMKV_MINIO_ACCESS_KEY": "someone",
            "MEMKV_MINIO_SECRET_KEY": "secretsecret",
        }
        process = start(variables, "bucket", "setup", "--add-policies")
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "could not set up bucket" in errors


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("answer", [drips_head, says_nothing], ids=lambda answer: answer.__name__)
def test_sigterm_while_the_bucket_is_opened(
    scheme: str, answer: Callable[..., None], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    with OddServer(answer) as server:
        variables = {
            "MEMKV_AGENT_SOCKET": str(tmp_path / "run" / "agent.sock"),
            "MEMKV_MINIO_ENDPOINT": server.url.replace("http", scheme),
            "MEMKV_MINIO_ACCESS_KEY": "someone",
            "MEMKV_MINIO_SECRET_KEY": "secretsecret",
        }
        process = start(variables, "agent")
        assert server.connected.wait(LIMIT)
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=LIMIT)
        assert time.monotonic() - begin < 3.0
