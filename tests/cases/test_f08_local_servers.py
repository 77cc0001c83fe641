"""Local servers of demo and tests, and their clients, use no proxy."""

import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from sglang_cpu_platform.client import Client
from sglang_cpu_platform.process import ManagedProcess, ProcessFailedError


class _Ready(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def _proxied(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens on this port


def test_a_client_connects_to_its_server_directly() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Ready) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert Client(f"http://127.0.0.1:{server.server_port}").get("/") == {}
        server.shutdown()


def test_a_server_is_told_to_use_no_proxy(tmp_path: Path) -> None:
    program = "import urllib.request as u; print(int(bool(u.proxy_bypass('127.0.0.1'))))"
    command = [sys.executable, "-c", program]
    process = ManagedProcess("probe", command, env=None, log=tmp_path / "log")
    process.start()
    with pytest.raises(ProcessFailedError):  # the process has ended
        process.wait_until(lambda: False, timeout_s=30)
    process.stop()
    assert (tmp_path / "log").read_text() == "1\n"
