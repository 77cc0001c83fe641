"""Proxies from the environment are never used for this machine's own addresses or for MinIO."""

import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st
from memkv_testbed.minio_server import MinioServer

from memkv_sglang.cli.http import check_server_url, fetch, is_this_machine
from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.page import NAMESPACE_DIGEST_SIZE
from memkv_sglang.testing.pages import make_namespace
from memkv_sglang.tiers.base import TierError
from memkv_sglang.tiers.minio import MinioTier
from memkv_sglang.tiers.minio.auth.credentials import StandardChain
from tests.cases.commands import assert_clean, memkv
from tests.cli.cli_node import running_agent

PROXY_VARIABLES = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy")


class _Handler(BaseHTTPRequestHandler):
    """Answers like SGLang, like a credentials endpoint, or like a proxy that refuses."""

    asked: ClassVar[list[str]]
    answers: ClassVar[dict[str, object]] = {}

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        self.rfile.read(length)
        self.asked.append(self.path)
        found = self.answers.get(self.path)
        content = json.dumps(found).encode()
        self.send_response(200 if found is not None else 403)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_PUT = do_HEAD = do_CONNECT = do_GET  # noqa: N815 - the base class demands it

    def log_message(self, *_: object) -> None:
        pass


def serve(address: str, answers: dict[str, object]) -> ThreadingHTTPServer:
    handler = type("Handler", (_Handler,), {"asked": [], "answers": answers})
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    server_type: Any = type("Server", (ThreadingHTTPServer,), {"address_family": family})
    server: ThreadingHTTPServer = server_type((address, 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def asked(server: ThreadingHTTPServer) -> list[str]:
    return server.RequestHandlerClass.asked  # type: ignore[attr-defined, no-any-return]


def stop(server: ThreadingHTTPServer) -> None:
    server.shutdown()
    server.server_close()


SGLANG = {"/server_info": {"page_size": 64}, "/tokenize": {"tokens": list(range(200))}}


@pytest.fixture
def proxy() -> Iterator[ThreadingHTTPServer]:
    """A proxy that refuses everything and records the requests."""
    server = serve("127.0.0.1", {})
    yield server
    stop(server)


@pytest.fixture
def proxied(proxy: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Set every proxy variable, and none that excludes a host."""
    variables = dict.fromkeys(PROXY_VARIABLES, f"http://127.0.0.1:{proxy.server_port}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return variables


@pytest.fixture
def environ(minio_config: MinioConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("node")
    (directory / "run").mkdir(mode=0o700)
    return {
        "HOME": str(directory),
        "MEMKV_AGENT_SOCKET": str(directory / "run" / "agent.sock"),
        "MEMKV_NVME_DIRECTORY": str(directory / "nvme"),
        "MEMKV_NVME_CAPACITY": "64MiB",
        "MEMKV_NVME_SEGMENT_SIZE": "8MiB",
        "MEMKV_MINIO_ENDPOINT": minio_config.endpoint,
        "MEMKV_MINIO_BUCKET": minio_config.bucket,
        "MEMKV_MINIO_ACCESS_KEY": minio_config.access_key,
        "MEMKV_MINIO_SECRET_KEY": minio_config.secret_key,
    }


@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("127.0.0.1", "localhost"),
        ("127.0.0.1", "LocalHost"),
        ("127.0.0.1", "127.1"),
        ("127.0.0.7", "127.0.0.7"),
        ("0.0.0.0", "0.0.0.0"),
        ("::1", "[::1]"),
        ("0.0.0.0", "[::ffff:127.0.0.1]"),
    ],
)
@pytest.mark.usefixtures("proxied")
def test_connections_to_this_machine_are_direct(
    proxy: ThreadingHTTPServer, address: str, host: str
) -> None:
    try:
        server = serve(address, SGLANG)
    except OSError:
        pytest.skip(f"this machine has no {address}")
    url = check_server_url(f"http://{host}:{server.server_port}/", "--server")
    answer = fetch(f"{url}/server_info", 10)
    stop(server)
    assert json.loads(answer) == {"page_size": 64}
    assert asked(proxy) == []


@pytest.mark.slow
def test_no_command_uses_a_proxy_for_this_machine(
    proxy: ThreadingHTTPServer,
    proxied: dict[str, str],
    environ: dict[str, str],
    minio_server: MinioServer,
) -> None:
    root = minio_server.root
    server = serve("127.0.0.1", SGLANG)
    url = f"http://127.0.0.1:{server.server_port}"
    variables = {**environ, **proxied}
    prompt = ("--text", "a prompt", "--server", url)
    with running_agent(variables) as agent:
        agent.describe(make_namespace())
        assert memkv("stats", "--json", environ=variables).returncode == 0
        pinned = memkv("pin", *prompt, environ=variables)
        # The agent describes the namespace in the background.
        while "no namespace" in pinned.stderr:
            pinned = memkv("pin", *prompt, environ=variables)
        assert pinned.returncode == 0
        # Nothing was spilled, so the pin names pages that are not stored yet.
        warning = "warning: namespace .*: 3 of 3 pages are not in the bucket, .*\n"
        assert re.fullmatch(warning, pinned.stderr)
        assert memkv("pins", environ=variables).returncode == 0
        assert memkv("warm", *prompt, environ=variables).stdout.startswith("0 pages copied")
        assert memkv("inspect", environ=variables).returncode == 0
        assert memkv("doctor", environ=variables).returncode == 0
        minio_alone = {**variables, "MEMKV_NVME_DIRECTORY": ""}
        assert memkv("verify", environ=minio_alone).returncode == 0
        gc = memkv("gc", "--dry-run", "--collector-max-age", "1d", environ=variables)
        assert gc.returncode == 0
        keys = dict(zip(("MEMKV_MINIO_ACCESS_KEY", "MEMKV_MINIO_SECRET_KEY"), root, strict=True))
        setup = memkv("bucket", "setup", "--add-policies", environ={**variables, **keys})
        assert setup.returncode == 0
        assert memkv("unpin", pinned.stdout.split()[0], environ=variables).returncode == 0
    stop(server)
    assert len(asked(server)) >= 4
    assert asked(proxy) == []


@pytest.mark.usefixtures("proxied")
def test_other_servers_follow_the_proxy_environment(
    proxy: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "http://sglang.invalid:30000/server_info"
    with pytest.raises(click.ClickException) as refused:
        fetch(url, 5)
    assert asked(proxy) == [url]
    hint = f"sent through the proxy 127.0.0.1:{proxy.server_port}, see no_proxy"
    assert hint in refused.value.message
    for name in ("no_proxy", "NO_PROXY"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "sglang.invalid")
            with pytest.raises(click.ClickException) as direct:
                fetch(url, 5)
        assert "proxy" not in direct.value.message
    assert asked(proxy) == [url]


@pytest.mark.parametrize("value", ["nonsense", "socks5://127.0.0.1:1", "http://[", "http://a:b:c"])
def test_a_bad_proxy_is_one_line(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", value)
    with pytest.raises(click.ClickException, match="no answer from"):
        fetch("http://sglang.invalid:30000/server_info", 5)


@pytest.mark.usefixtures("proxied")
def test_a_redirect_to_this_machine_is_followed_directly(proxy: ThreadingHTTPServer) -> None:
    class Redirecting(_Handler):
        asked: ClassVar[list[str]] = []

        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("Location", target)
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = serve("127.0.0.1", SGLANG)
    target = f"http://localhost:{server.server_port}/server_info"
    first = ThreadingHTTPServer(("127.0.0.1", 0), Redirecting)
    threading.Thread(target=first.serve_forever, daemon=True).start()
    assert json.loads(fetch(f"http://127.0.0.1:{first.server_port}/", 10)) == {"page_size": 64}
    stop(first)
    stop(server)
    assert asked(proxy) == []


@pytest.mark.usefixtures("proxied")
def test_minio_never_uses_a_proxy(proxy: ThreadingHTTPServer, minio_config: MinioConfig) -> None:
    with closing(MinioTier(MinioConfig(endpoint="http://minio.invalid:9000"))) as tier:
        for ask in (tier.namespaces, lambda: tier.clear(bytes(NAMESPACE_DIGEST_SIZE))):
            with pytest.raises(TierError):
                ask()
    with closing(MinioTier(minio_config)) as tier:
        assert tier.namespaces() == {}
    assert asked(proxy) == []


@pytest.mark.usefixtures("proxied")
def test_credentials_are_never_fetched_through_a_proxy(
    proxy: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {
        "AccessKeyId": "lent-key",
        "SecretAccessKey": "lent-secret",
        "Token": "token",
        "Expiration": "2099-01-01T00:00:00Z",
        "Code": "Success",
    }
    server = serve("127.0.0.1", {"/keys": keys})
    for name in ("AWS_ACCESS_KEY_ID", "MINIO_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/nonexistent")
    url = f"http://127.0.0.1:{server.server_port}/keys"
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", url)
    assert StandardChain().retrieve().access_key == "lent-key"
    stop(server)
    assert asked(proxy) == []


def test_which_hosts_are_this_machine() -> None:
    here = (
        *("localhost", "a.localhost", "127.0.0.1", "127.255.0.9", "0.0.0.0", "::1", "::"),
        *("169.254.169.254", "fe80::1", "::ffff:127.0.0.1", "127.1", "0x7f.1"),
        socket.gethostname(),
    )
    elsewhere = ("10.0.0.1", "minio", "localhost.example.com", "127.0.0.1.nip.io", "fd00::1", "")
    assert all(map(is_this_machine, here))
    assert not any(map(is_this_machine, elsewhere))


@given(st.text(max_size=30) | st.from_regex(r"https?://[\[\]a-z0-9:@/?#%.\\ \u00e9-]{0,20}"))
def test_any_url_is_a_server_or_one_line(text: str) -> None:
    try:
        url = check_server_url(text, "--server")
    except click.UsageError as error:
        assert_clean(str(error).encode("ascii", "backslashreplace").decode())
    else:
        assert url.startswith(("http://", "https://"))
        assert url.isascii()


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"null", b"nonsense", b"{}", b'{"page_size": "64"}', b'{"page_size": 0}',
        b'{"page_size": -1}', b'{"page_size": 1e308}', b'{"page_size": NaN}', b"[" * 100_000,
        b'{"page_size": 1' + b"0" * 5000 + b"}", b'{"page_size": "\xff"}',
        b'{"page_size": 64, "speculative_algorithm": []}', b'{"page_size": true}',
    ],
    ids=lambda body: repr(body[:30]),
)  # fmt: skip
def test_a_server_that_is_not_sglang_is_a_one_line_error(body: bytes) -> None:
    class Odd(_Handler):
        asked: ClassVar[list[str]] = []

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Odd)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    from memkv_sglang.cli.prompts import _Server

    with pytest.raises(click.ClickException, match=r"/server_info"):
        _Server(f"http://127.0.0.1:{server.server_port}").page_size()
    stop(server)
