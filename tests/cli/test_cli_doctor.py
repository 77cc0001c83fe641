"""Checks of `memkv doctor` for the machine, for proxies, and across nodes."""

import json
import re
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from memkv_testbed.s3_server import free_port

from memkv_sglang.cli.checks import disk_speed, limits
from memkv_sglang.cli.checks.conflict import check_conflict
from memkv_sglang.client.client import AgentClient
from memkv_sglang.config.schema import NvmeConfig
from tests.cli.cli_node import LIMIT, Run, running_agent, start
from tests.cli.test_cli_commands import bucket_of, kept_names

NGINX = """
daemon off;
user root;
pid {home}/nginx.pid;
error_log {home}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {home}/body;
    proxy_temp_path {home}/proxy;
    fastcgi_temp_path {home}/fastcgi;
    uwsgi_temp_path {home}/uwsgi;
    scgi_temp_path {home}/scgi;
    server {{
        listen 127.0.0.1:{port};
        client_max_body_size {limit};
        location / {{
            proxy_pass {upstream};
            proxy_set_header Host $http_host;
        }}
    }}
}}
"""


def stored_names(environ: dict[str, str]) -> set[str]:
    """Return the names of objects in the bucket, but those that agents keep there."""
    return set(kept_names(environ)) - {"memkv.json"}


@pytest.fixture
def other(environ: dict[str, str], tmp_path: Path) -> Iterator[dict[str, str]]:
    """Another node's settings, with a running agent and the same bucket."""
    (tmp_path / "other").mkdir(mode=0o700)
    settings = {**environ, "MEMKV_AGENT_SOCKET": str(tmp_path / "other" / "agent.sock")}
    settings["MEMKV_NVME_DIRECTORY"] = ""
    with running_agent(settings):
        yield settings


def test_another_node_reads_what_this_node_writes(
    run: Run, environ: dict[str, str], agent: AgentClient, other: dict[str, str]
) -> None:
    bucket_of(environ).ensure()
    before = stored_names(environ)
    process = start(environ, "doctor", "--fleet", "--json", stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        written = ""
        while not written.rstrip().endswith("]"):
            line = process.stdout.readline()
            assert line, "the command has ended"
            written += line
        (finding,) = json.loads(written)
        assert finding["level"] == "ok", finding
        token = finding["advice"].split()[-1]
        found = run("doctor", "--fleet-read", token, **other)
        assert (found.status, "loaded the page from MinIO" in found.out) == (0, True)
        unknown = run("doctor", "--fleet-read", "0" * 16, **other)
        assert (unknown.status, "minio.prefix" in unknown.out) == (1, True)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=LIMIT)
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()
    assert stored_names(environ) == before
    assert run("doctor", "--fleet-read", token, **other).status == 1


def test_files_of_the_http_server_are_checked(run: Run, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("two words")
    token.chmod(0o600)

    def level() -> str:
        found = json.loads(run("doctor", "--json", MEMKV_AGENT_HTTP_TOKEN_FILE=str(token)).out)
        return next(str(one["level"]) for one in found if one["what"] == "http token")

    assert level() == "FAIL"
    token.write_text("secret")
    assert level() == "ok"


def test_the_fleet_check_needs_an_agent_with_minio_and_a_token(
    run: Run, environ: dict[str, str]
) -> None:
    alone = {**environ, "MEMKV_MINIO_ENDPOINT": ""}
    with running_agent(alone):
        outcome = run("doctor", "--fleet", **alone)
    assert (outcome.status, "has no MinIO tier" in outcome.out) == (1, True)
    for arguments in (["--fleet"], ["--fleet-read", "0" * 16]):
        outcome = run("doctor", *arguments)
        assert (outcome.status, outcome.err.count("\n")) == (1, 1)
        assert "no agent" in outcome.err
    assert run("doctor", "--fleet-read", "not a token").status == 2
    assert run("doctor", "--fleet", "--fleet-read", "0" * 16).status == 2


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nginx"), reason="needs nginx")
def test_a_proxy_that_limits_bodies_is_found(
    run: Run, environ: dict[str, str], tmp_path: Path
) -> None:
    bucket_of(environ).ensure()
    before = stored_names(environ)
    for limit, level in (("1m", "FAIL"), ("0", "ok")):
        home, port = tmp_path / f"nginx-{limit}", free_port()
        home.mkdir()
        text = NGINX.format(
            home=home, port=port, limit=limit, upstream=environ["MEMKV_MINIO_ENDPOINT"]
        )
        (home / "nginx.conf").write_text(text)
        nginx = subprocess.Popen(["nginx", "-c", home / "nginx.conf", "-p", home])
        try:
            url = f"http://127.0.0.1:{port}"
            outcome = run("doctor", "--json", MEMKV_MINIO_ENDPOINT=url)
        finally:
            nginx.terminate()
            nginx.wait()
        (finding,) = [one for one in json.loads(outcome.out) if one["what"] == "page size"]
        assert finding["level"] == level, finding
        if level == "FAIL":
            assert "up to 1 MiB can be stored" in finding["detail"]
            assert "client_max_body_size" in finding["advice"]
    assert stored_names(environ) == before


def test_the_disk_is_measured_without_leaving_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_speed, "MOST", 1)
    config = NvmeConfig(directory=str(tmp_path / "nvme"), direct_io="never")
    (finding,) = disk_speed.check_disk_speed(config)
    assert finding.level in ("ok", "warn")
    assert re.search(r"reads [\d.e+]+ GB/s, writes", finding.detail)
    monkeypatch.setattr(disk_speed, "SLOW", 1e15)
    (slow,) = disk_speed.check_disk_speed(config)
    assert slow.level == "warn"
    assert list(tmp_path.iterdir()) == []


def test_low_limits_are_warnings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    assert limits.check_files().level == "warn"
    assert limits.check_locked_memory(tmp_path / "none").level == "ok"
    (tmp_path / "rdma" / "mlx5_0").mkdir(parents=True)
    assert limits.check_locked_memory(tmp_path / "rdma").level == "warn"
    unlimited = resource.RLIM_INFINITY
    monkeypatch.setattr(resource, "getrlimit", lambda _: (unlimited, unlimited))
    assert limits.check_files().level == "ok"
    assert limits.check_locked_memory(tmp_path / "rdma").level == "ok"
    window = tmp_path / "rmem_max"
    assert limits.check_receive_buffer(window).level == "skip"
    for size, level in (("212992", "warn"), ("4194304", "ok")):
        window.write_text(f"{size}\n")
        assert limits.check_receive_buffer(window).level == level


def test_another_package_of_the_same_name_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not list(check_conflict())
    metadata = tmp_path / "Another_Cache-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: Another_Cache\nVersion: 1.0\n")
    (metadata / "top_level.txt").write_text("memkv_sglang\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (finding,) = check_conflict()
    assert finding.level == "FAIL"
    assert "another-cache also installs" in finding.detail
    assert "pip uninstall another-cache" in finding.advice
