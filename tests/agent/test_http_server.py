"""The agent's HTTP port: address, TLS, token, and changes of their files."""

import http.client
import socket
import ssl
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from memkv_testbed.certificates import Authority, Certificate

from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.load import load_config
from tests.agent.agent_harness import (
    LIMIT,
    RunningAgent,
    connected_client,
    environment,
    eventually,
    make_config,
    running_agent,
)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


def metrics_url(agent: RunningAgent, **settings: object) -> str:
    with connected_client(make_config(agent.socket.parents[1], **settings)) as client:
        status = client.status()
        assert status is not None
        return status.agent.metrics_url


def get(
    url: str, token: str = "", trusted: Path | None = None, path: str = "/metrics"
) -> tuple[int, str]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url.replace("/metrics", path), headers=headers)
    context = ssl.create_default_context(cafile=trusted) if trusted else None
    try:
        with urllib.request.urlopen(request, timeout=LIMIT, context=context) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def serial_number(url: str, authority: Authority) -> str:
    """Return the serial number of the certificate that a server presents now."""
    host, _, port = url.removeprefix("https://").removesuffix("/metrics").rpartition(":")
    context = ssl.create_default_context(cafile=authority.file)
    with (
        socket.create_connection((host, int(port)), LIMIT) as sock,
        context.wrap_socket(sock, server_hostname=host) as secure,
    ):
        certificate = secure.getpeercert()
    assert certificate is not None
    return str(certificate["serialNumber"])


def write_private(path: Path, text: str) -> Path:
    path.touch(mode=0o600)
    path.write_text(text)
    return path


def install(certificate: Certificate, directory: Path) -> dict[str, object]:
    """Copy a certificate to where the settings that are returned name it."""
    cert_file, key_file = directory / "cert.pem", directory / "key.pem"
    write_private(key_file, certificate.key_file.read_text())
    write_private(cert_file, certificate.cert_file.read_text())
    return {"http_cert_file": str(cert_file), "http_key_file": str(key_file)}


def test_port_listens_on_the_configured_address(tmp_path: Path) -> None:
    with running_agent(make_config(tmp_path, http_address="127.0.0.2")) as agent:
        url = metrics_url(agent)
        assert url.startswith("http://127.0.0.2:")
        assert get(url)[0] == 200
        with pytest.raises(urllib.error.URLError, match="refused"):
            get(url.replace("127.0.0.2", "127.0.0.1"))


def test_port_can_listen_on_ipv6(tmp_path: Path) -> None:
    with running_agent(make_config(tmp_path, http_address="::1")) as agent:
        url = metrics_url(agent)
        assert url.startswith("http://[::1]:")
        assert get(url)[0] == 200


def test_only_metrics_need_the_token(tmp_path: Path) -> None:
    token = write_private(tmp_path / "token", "hush\n")
    with running_agent(make_config(tmp_path, http_token_file=str(token))) as agent:
        url = metrics_url(agent)
        assert get(url)[0] == 401
        assert get(url, "hus")[0] == 401
        assert get(url, "hush")[0] == 200
        assert get(url, path="/livez") == (200, "ok\n")
        eventually(lambda: get(url, path="/readyz") == (200, "ready\n"))
        write_private(token, "new\n")
        eventually(lambda: get(url, "new")[0] == 200)
        assert get(url, "hush")[0] == 401


def test_tls_uses_a_changed_certificate(tmp_path: Path, authority: Authority) -> None:
    files = install(authority.issue("first"), tmp_path)
    with running_agent(make_config(tmp_path, **files)) as agent:
        url = metrics_url(agent)
        assert url.startswith("https://")
        assert get(url, trusted=authority.file)[0] == 200
        before = serial_number(url, authority)

        renewed = authority.issue("second")
        Path(str(files["http_cert_file"])).write_text("-----BEGIN CERTIFICATE-----\nhalf")
        # The new file is incomplete, so the old certificate stays.
        assert serial_number(url, authority) == before
        install(renewed, tmp_path)
        eventually(lambda: serial_number(url, authority) != before)
        assert get(url, trusted=authority.file)[0] == 200


def test_tls_port_answers_no_plain_http(tmp_path: Path, authority: Authority) -> None:
    files = install(authority.issue("server"), tmp_path)
    with running_agent(make_config(tmp_path, **files)) as agent:
        url = metrics_url(agent)
        with pytest.raises((OSError, http.client.HTTPException)):
            get(url.replace("https", "http"))


def test_silent_connections_do_not_use_up_the_port(tmp_path: Path) -> None:
    with running_agent(make_config(tmp_path)) as agent:
        url = metrics_url(agent)
        port = int(url.removesuffix("/metrics").rpartition(":")[2])
        silent = [socket.create_connection(("127.0.0.1", port), LIMIT) for _ in range(200)]
        eventually(lambda: agent.descriptors() < 150)  # the agent has closed most of them at once
        for sock in silent:
            sock.close()
        eventually(lambda: get(url)[0] == 200)


@pytest.mark.parametrize(
    ("setting", "value", "problem"),
    [
        ("agent.http_address", "everywhere", "'everywhere' is not an IP address"),
        ("agent.http_cert_file", "cert.pem", "set without agent.http_key_file"),
    ],
)
def test_invalid_settings_are_named(setting: str, value: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load_config(None, {}, {setting: value})


@pytest.mark.parametrize(("content", "mode"), [("", 0o600), ("two words", 0o600), ("x", 0o644)])
def test_unusable_token_files_are_refused(tmp_path: Path, content: str, mode: int) -> None:
    token = write_private(tmp_path / "token", content)
    token.chmod(mode)
    agent = RunningAgent(make_config(tmp_path, http_token_file=str(token)), environment())
    status, log = agent.wait()
    assert (status, len(log.splitlines())) == (2, 1)
    assert log.startswith("error: agent.http_token_file: ")
