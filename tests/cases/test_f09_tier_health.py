"""Commands, metrics and the server's own log show which tiers work, and why one does not."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from memkv_testbed.host_pool import HostPool
from memkv_testbed.minio_server import MinioServer
from memkv_testbed.minio_users import Keys
from memkv_testbed.s3_server import free_port

from memkv_sglang.cli.main import main
from memkv_sglang.cli.scrape import scrape
from memkv_sglang.client import health
from memkv_sglang.client.client import AgentClient
from memkv_sglang.config.schema import Config, MinioConfig
from memkv_sglang.engine.status import TierStatus
from memkv_sglang.page import Chain
from memkv_sglang.testing.pages import make_chain, make_namespace
from tests.agent.agent_harness import eventually
from tests.cases.minio_tiers import opened
from tests.cases.started_agents import change, connected, ending_agents, in_log, make_config, server

PAGE = 8192
CHAIN: Chain = make_chain(make_namespace(PAGE), 4)
LIMIT = 60.0


@pytest.fixture(autouse=True)
def frequent_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make clients check often whether the tiers work."""
    monkeypatch.setattr("memkv_sglang.client.health.PERIOD", 0.5)


@pytest.fixture
def config(
    tmp_path: Path, minio_config: MinioConfig, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Config]:
    monkeypatch.setattr(health, "PERIOD", 0.2)
    config = make_config(tmp_path, minio_config)
    with ending_agents(Path(config.agent.socket)):
        yield config


def tier(client: AgentClient, name: str = "minio") -> TierStatus:
    report = client.status()
    assert report is not None
    return next(tier for tier in report.engine.tiers if tier.name == name)


def metric(client: AgentClient, name: str = "minio") -> float:
    report = client.status()
    assert report is not None
    samples = scrape(report.agent.http_port)
    assert [n for n, labels, _ in samples.values if labels.get("tier") == name]
    return samples.total("memkv_tier_works", tier=name)


def wait_for_problem(client: AgentClient, reason: str) -> str:
    eventually(lambda: reason in (tier(client).problem or ""), LIMIT)
    return tier(client).problem or ""


def test_first_lines_name_the_log_and_the_tiers(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    log = Path(config.agent.socket).with_name("agent.log")
    with server(config) as client:
        pid = connected(client)
        eventually(lambda: in_log(caplog, "tier minio works"))
        assert in_log(caplog, f"agent connected (pid {pid}); it logs to {log}") == 1
        assert in_log(caplog, "tier nvme works") == 1
        assert not in_log(caplog, "does not work")
        assert metric(client) == metric(client, "nvme") == 1.0


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"minio_secret_key": "wrong"}, "MinIO refused"),
        ({"minio_access_key": "nobody"}, "MinIO refused"),
        ({"minio_create_bucket": False}, "there is no bucket"),
        ({"minio_role": "reader"}, "there is no bucket"),
    ],
)
def test_a_broken_tier_is_reported_once_everywhere(
    config: Config,
    settings: dict[str, object],
    reason: str,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setenv("COLUMNS", "300")
    config = change(config, **settings)
    with server(config) as client:
        connected(client)
        client.describe(make_namespace(PAGE))
        wait_for_problem(client, reason)
        eventually(lambda: in_log(caplog, "tier minio does not work"), LIMIT)
        problem = tier(client).problem
        assert problem
        assert metric(client) == 0.0
        assert metric(client, "nvme") == 1.0
        for _ in range(5):  # further failures of the same kind are not logged
            client.lookup(CHAIN, 1.0)
            assert tier(client).problem == problem
        assert in_log(caplog, "tier minio does not work") == 1
        assert in_log(caplog, problem) == 1
        capfd.readouterr()
        main(["stats", f"--agent-socket={config.agent.socket}"])
        assert f"minio is failing: {problem}" in capfd.readouterr().out
        main(["stats", "--json", f"--agent-socket={config.agent.socket}"])
        tiers = json.loads(capfd.readouterr().out)["engine"]["tiers"]
        assert [told["problem"] for told in tiers] == ["", problem]
        main(["doctor", f"--agent-socket={config.agent.socket}"])
        assert f"the agent's minio: {problem.partition('; ')[0]}" in capfd.readouterr().out


def test_no_credentials_at_all(
    config: Config,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with server(change(config, minio_access_key="", minio_secret_key="")) as client:
        connected(client)
        eventually(lambda: tier(client).problem, LIMIT)
        eventually(lambda: in_log(caplog, "tier minio does not work"), LIMIT)
        assert "no credentials" in (tier(client).problem or "")


def test_recovery_is_reported_without_traffic(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    bad, good = Keys.random(), Keys(config.minio.access_key, config.minio.secret_key)
    file = tmp_path / "keys.toml"

    def write(keys: Keys) -> None:
        new = tmp_path / "keys.new"
        new.touch(mode=0o600)
        new.write_text(f'access_key = "{keys.access_key}"\nsecret_key = "{keys.secret_key}"\n')
        new.rename(file)

    write(bad)
    config = change(
        config, minio_access_key="", minio_secret_key="", minio_credentials_file=str(file)
    )
    with server(config) as client:
        connected(client)
        client.describe(make_namespace(PAGE))
        eventually(lambda: in_log(caplog, "tier minio does not work"), LIMIT)
        write(good)
        eventually(lambda: in_log(caplog, "tier minio works"), LIMIT)
        assert metric(client) == 1.0
    log = Path(config.agent.socket).with_name("agent.log").read_text()
    lines = log.count("cannot store a namespace description, still retrying")
    assert lines == 1, "logged repeatedly"


def test_server_that_goes_away_and_comes_back(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with MinioServer(tmp_path / "data") as minio:
        config = change(
            config,
            minio_endpoint=minio.endpoint,
            minio_access_key=minio.access_key,
            minio_secret_key=minio.secret_key,
        )
        with server(config) as client:
            connected(client)
            eventually(lambda: in_log(caplog, "tier minio works"), LIMIT)
            minio.stop()

            def fails() -> bool:
                client.lookup(CHAIN, 0.2)
                return in_log(caplog, "tier minio does not work") > 0

            eventually(fails, LIMIT)
            wait_for_problem(client, "lookup failed")
            minio.start()
            eventually(lambda: in_log(caplog, "tier minio works") == 2, LIMIT)


def test_denied_writes_are_reported(
    config: Config, minio_server: MinioServer, caplog: pytest.LogCaptureFixture
) -> None:
    keys = Keys.random()
    policy = {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Effect": "Allow",
                "Action": ["s3:GetObject", "s3:ListBucket", "s3:CreateBucket"],
                "Resource": ["arn:aws:s3:::*"],
            }
        ],
    }
    minio_server.users.add(keys, policy)
    with opened(config.minio):  # the administrator writes the bucket's format record
        pass
    config = change(config, minio_access_key=keys.access_key, minio_secret_key=keys.secret_key)
    with server(config) as client, HostPool(4, PAGE, parts=1) as pool:
        connected(client)
        eventually(lambda: tier(client).problem == "", LIMIT)
        pool.fill(CHAIN)
        number = client.register_pool(pool.descriptor, pool.length)
        client.spill(CHAIN, pool.buffers(number, range(4)))
        wait_for_problem(client, "spill failed")
        eventually(lambda: in_log(caplog, "tier minio does not work: spill failed"), LIMIT)
        assert client.lookup(CHAIN).length == 4, "what works still does"


def test_no_listener(config: Config) -> None:
    config = change(config, minio_endpoint=f"http://127.0.0.1:{free_port()}")
    with server(config) as client:
        connected(client)
        wait_for_problem(client, "could not look for the bucket")


def test_a_failing_disk_is_reported(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = change(config, nvme_capacity=64 << 20, nvme_segment_size=8 << 20)
    with server(config) as client, HostPool(4, PAGE, parts=1) as pool:
        connected(client)
        eventually(lambda: tier(client).problem == "", LIMIT)
        shutil.rmtree(Path(config.nvme.directory) / "segments")
        pool.fill(CHAIN)
        number = client.register_pool(pool.descriptor, pool.length)
        client.spill(CHAIN, pool.buffers(number, range(4)))
        eventually(lambda: tier(client, "nvme").problem, LIMIT)
        eventually(lambda: in_log(caplog, "tier nvme does not work"), LIMIT)
        assert metric(client, "nvme") == 0.0
