"""A server whose settings differ from the running agent's learns so, or gets its own agent."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import msgspec
import pytest
from memkv_testbed.host_pool import HostPool

from memkv_sglang.agent.settings import RunningSettings, make_nonce, report_settings
from memkv_sglang.cli.main import main
from memkv_sglang.client.client import AgentClient
from memkv_sglang.config.schema import Config, MinioConfig, ShardConfig
from memkv_sglang.page import Chain
from memkv_sglang.testing.pages import make_chain, make_namespace
from memkv_sglang.tiers.base import SpillResult
from tests.agent.agent_harness import LIMIT, alive, eventually
from tests.cases.started_agents import change, connected, ending_agents, make_config, server

PAGE = 8192
CHAIN: Chain = make_chain(make_namespace(PAGE), 2)


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make clients retry soon after they refuse an agent."""
    monkeypatch.setattr("memkv_sglang.client.reconnector.UNSUITABLE_PAUSE", 0.2)


@pytest.fixture
def config(tmp_path: Path, minio_config: MinioConfig) -> Iterator[Config]:
    config = make_config(tmp_path, minio_config)
    with ending_agents(Path(config.agent.socket)):
        yield config


def spill(client: AgentClient) -> None:
    with HostPool(2, PAGE, parts=1) as pool:
        pool.fill(CHAIN)
        number = client.register_pool(pool.descriptor, pool.length)
        client.describe(make_namespace(PAGE))
        assert client.spill(CHAIN, pool.buffers(number, range(2))) == [SpillResult.STORED] * 2
        client.release_pool(number)


def test_restarted_server_gets_an_agent_with_its_new_bucket(config: Config) -> None:
    with server(config) as first:
        old = connected(first)
        spill(first)
    other = change(config, minio_bucket=config.minio.bucket + "-2")
    with server(other) as second:
        assert connected(second) != old
        assert not alive(old)
        assert second.flush(LIMIT)
        settings = second.settings()
        assert settings is not None
        assert settings.shown()["minio.bucket"] == other.minio.bucket


def test_a_replaced_agent_finishes_its_uploads(config: Config) -> None:
    with server(config) as first:
        connected(first)
        spill(first)
    other = change(config, nvme_directory=config.nvme.directory + "-2")
    with server(other) as second:
        connected(second)
        eventually(lambda: second.present(CHAIN, LIMIT, "minio") == [True] * 2)


def test_a_second_server_is_refused_naming_the_setting(config: Config) -> None:
    with server(config) as first:
        pid = connected(first)
        with server(change(config, minio_role="reader")) as second:
            eventually(lambda: second.problem.startswith("minio.role: the agent runs with writer"))
            assert "here it is reader" in second.problem
            assert f"pid {pid}" in second.problem
            assert not second.wait(0)
            spill(first)
            assert connected(first) == pid


def test_refused_server_gets_its_agent_once_the_other_leaves(config: Config) -> None:
    with ExitStack() as stack:
        with server(config) as first:
            connected(first)
            second = stack.enter_context(server(change(config, minio_role="reader")))
            eventually(lambda: second.problem.startswith("minio.role"))
        connected(second)
        settings = second.settings()
        assert settings is not None
        assert settings.shown()["minio.role"] == "reader"


def test_two_servers_at_once_do_not_end_each_others_agents(config: Config) -> None:
    both = [config, change(config, minio_prefix="other")]
    with server(both[0]) as one, server(both[1]) as other:
        eventually(lambda: one.wait(0) or other.wait(0))
        winner, loser = (one, other) if one.wait(0) else (other, one)
        pid = connected(winner)
        eventually(lambda: loser.problem.startswith("minio.prefix"))
        eventually(lambda: "1 other client" in loser.problem)
        assert connected(winner) == pid


def test_eight_ranks_of_a_restarted_server_share_one_new_agent(config: Config) -> None:
    with server(config) as first:
        old = connected(first)
    other = change(config, minio_prefix="new")
    ranks = [AgentClient(other, start=True) for _ in range(8)]
    try:
        pids = {connected(rank) for rank in ranks}
    finally:
        for rank in ranks:
            rank.close()
    assert len(pids) == 1
    assert pids != {old}


def test_agent_started_by_hand_is_not_replaced(config: Config) -> None:
    code = (
        "import sys, msgspec\n"
        "from memkv_sglang.agent.main import run\n"
        "from memkv_sglang.config.schema import Config\n"
        "sys.exit(run(msgspec.json.decode(sys.stdin.buffer.read(), type=Config)))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdin is not None
    with process, process.stdin as stdin:
        stdin.write(msgspec.json.encode(config))
        stdin.close()
        try:
            with closing(AgentClient(config, start=False)) as looking:
                connected(looking)
            with server(change(config, nvme_capacity=128 << 20)) as client:
                eventually(lambda: "by hand or as a service" in client.problem)
                assert client.problem.startswith("nvme.capacity: the agent runs with 64MiB")
                assert f"pid {process.pid}" in client.problem
                assert process.poll() is None
            with server(config) as client:
                assert connected(client) == process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(LIMIT)


def test_read_only_client_neither_compares_nor_blocks(config: Config) -> None:
    with server(config) as first:
        connected(first)
    with closing(AgentClient(change(config, minio_bucket="x" * 5), start=False)) as looking:
        connected(looking)
        with server(change(config, minio_prefix="new")) as second:
            pid = connected(second)
            eventually(lambda: looking.problem == "" and connected(looking) == pid)


def test_secret_that_differs_is_named_and_not_shown(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    secrets = ("n3w-s3cr3t", config.minio.secret_key)
    with server(config) as first:
        connected(first)
        with server(change(config, minio_secret_key=secrets[0])) as second:
            eventually(lambda: second.problem.startswith("minio.secret_key: the agent runs with"))
            assert not any(secret in second.problem + caplog.text for secret in secrets)
    log = Path(config.agent.socket).with_name("agent.log").read_text()
    assert not any(secret in log for secret in secrets)


def difference(running: Config, wanted: Config, **environ: str) -> str:
    nonce = make_nonce()
    report = report_settings(running, {"AWS_SECRET_ACCESS_KEY": "s3cr3t"}, nonce)
    assert b"s3cr3t" not in msgspec.msgpack.encode(report)
    return str(RunningSettings(report, nonce).first_difference(wanted, environ) or "")


def test_equivalent_settings_do_not_differ(tmp_path: Path) -> None:
    (tmp_path / "pages").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "pages")
    one = make_config(tmp_path, MinioConfig(endpoint="http://a:1,http://b:2"))
    for same in (
        change(one, nvme_directory=str(tmp_path / "link")),
        change(one, minio_endpoint="http://b:2, http://a:1"),
        change(one, engine_prefill_speed=9.0),
        change(one, engine_namespace_salt="again"),
        change(one, agent_socket="elsewhere"),
        Config(),
    ):
        assert difference(one, same) == ""
    several = change(one, nvme_directory=f"{tmp_path}/pages,{tmp_path}/more")
    assert difference(several, change(one, nvme_directory=f"{tmp_path}/more,{tmp_path}/link")) == ""
    assert difference(several, one)
    assert difference(change(one, agent_http_port=9100), one) == ""
    assert difference(one, one, AWS_SECRET_ACCESS_KEY="s3cr3t") == ""
    no_minio = make_config(tmp_path)
    assert difference(no_minio, change(no_minio, minio_bucket="other", minio_role="reader")) == ""


def test_shards_are_compared_in_any_order_and_secrets_by_hash(tmp_path: Path) -> None:
    a = ShardConfig(name="a", endpoint="http://a:1")
    b = ShardConfig(name="b", endpoint="http://b:1", access_key="key", secret_key="s3cr3t")
    one = make_config(tmp_path, MinioConfig(shards=(a, b)))
    assert difference(one, change(one, minio_shards=(b, a))) == ""
    moved = msgspec.structs.replace(a, endpoint="http://c:1")
    assert difference(one, change(one, minio_shards=(moved, b))).startswith("minio.shards: the")
    assert difference(one, change(one, minio_shards=(b,))).startswith("minio.shards: the")
    other = msgspec.structs.replace(b, secret_key="other")
    assert difference(one, change(one, minio_shards=(a, other))) == (
        "minio.shards.b.secret_key: the agent runs with another value"
    )


def test_every_setting_that_the_agent_uses_is_compared(tmp_path: Path) -> None:
    one = make_config(tmp_path, MinioConfig(endpoint="http://a:1"))
    for name, value in {
        "nvme_directory": str(tmp_path / "other"),
        "nvme_capacity": 1 << 30,
        "minio_endpoint": "http://a:2",
        "minio_bucket": "other",
        "minio_prefix": "other",
        "minio_role": "reader",
        "minio_credentials_file": "/other",
        "minio_encryption_key_file": "/other",
        "minio_access_key": "other",
        "minio_secret_key": "other",
        "collector_capacity": 1,
        "engine_promote": "never",
        "agent_http_port": 9100,
        "agent_idle_timeout": 90.0,
        "agent_log_level": "debug",
    }.items():
        key = name.replace("_", ".", 1)
        assert difference(one, change(one, **{name: value})).startswith(f"{key}: the agent runs")
    changed = difference(one, one, AWS_SECRET_ACCESS_KEY="two")
    assert changed == "AWS_SECRET_ACCESS_KEY: the agent runs with another value"
    without = make_config(tmp_path)
    assert difference(one, without).startswith("minio.endpoint: the agent runs with http://a:1")


def test_doctor_and_stats_show_the_settings_in_force(
    config: Config, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in os.environ if name.startswith("MEMKV_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "300")
    socket = f"--agent-socket={config.agent.socket}"
    with server(config) as client:
        connected(client)
        capfd.readouterr()
        assert main(["stats", socket, "--minio-bucket", "elsewhere"]) == 0
        text = capfd.readouterr().out
        assert f"minio.bucket = {config.minio.bucket}" in text
        assert f"the agent runs with {config.minio.bucket}, here it is elsewhere" in text
        assert config.minio.secret_key not in text
        assert main(["stats", socket, "--json"]) == 0
        told = json.loads(capfd.readouterr().out)
        assert told["settings"]["minio.bucket"] == config.minio.bucket
        assert told["settings"]["minio.secret_key"] == "(secret)"
        assert told["difference"] == ""
        main(["doctor", socket, "--minio-bucket", "elsewhere"])
        text = " ".join(capfd.readouterr().out.split())  # lines may be wrapped anywhere
        assert f"minio.bucket: the agent runs with {config.minio.bucket}, here it is" in text
        assert f"minio.bucket = {config.minio.bucket}" in text
