"""Alerts and dashboards in a real Prometheus that scrapes a real agent.

Needs Debian's package prometheus, which includes promtool.
"""

import json
import re
import shutil
import subprocess
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from memkv_testbed.host_pool import HostPool
from memkv_testbed.minio_server import MinioServer
from memkv_testbed.s3_server import free_port

from memkv_sglang.client.client import AgentClient
from memkv_sglang.engine.recompute import UNKNOWN
from memkv_sglang.engine.served import ServedRequest
from memkv_sglang.testing.pages import make_chain, make_namespace
from tests.cli.cli_node import running_agent
from tests.deploy.queries import ALERTS, BOARDS, DEPLOY, alerts, expressions, fill_in, panels, yaml

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("promtool"), reason="needs Debian's prometheus"),
]

UNIT_TESTS = Path(__file__).with_name("alerts_test.yaml")
LIMIT = 90.0
WINDOW = "20s"
PAGE, PAGES = 64 << 10, 16

EMPTY = {
    "node.json: Events inside tiers, per second",
    "fleet.json: Time since the last collection of the bucket",
}
"""Panels that have no series while nothing fails and no limit is set."""


def test_every_alert_fires_when_it_should_and_not_otherwise(tmp_path: Path) -> None:
    tests = tmp_path / "tests.yaml"
    tests.write_text(UNIT_TESTS.read_text().replace("[RULES]", json.dumps([str(ALERTS)])))
    done = subprocess.run(
        ["promtool", "test", "rules", tests], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    fired = {
        case["alertname"]
        for group in yaml.safe_load(tests.read_text())["tests"]
        for case in group["alert_rule_test"]
        if case["exp_alerts"]
    }
    assert fired == {rule["alert"] for rule in alerts()}


def test_the_configuration_for_compose_is_valid() -> None:
    config = (DEPLOY / "compose" / "prometheus.yaml").read_text()
    done = subprocess.run(
        ["promtool", "check", "config", "--syntax-only", "/dev/stdin"],
        input=config,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


class Prometheus:
    """A Prometheus that scrapes one agent every second and evaluates the alerts at once."""

    def __init__(self, home: Path, target: str) -> None:
        rules = re.sub(r"\n +for: .*", "", ALERTS.read_text()).replace("> 900", "> 2")
        (home / "alerts.yaml").write_text(rules)
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(home / "alerts.yaml")],
            "scrape_configs": [{"job_name": "memkv", "static_configs": [{"targets": [target]}]}],
        }
        (home / "prometheus.yaml").write_text(json.dumps(config))
        self._port = free_port()
        self._log = (home / "prometheus.log").open("wb")
        self._process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={home / 'prometheus.yaml'}",
                f"--storage.tsdb.path={home / 'data'}",
                f"--web.listen-address=127.0.0.1:{self._port}",
            ],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def query(self, expression: str, **when: float) -> list[dict[str, Any]]:
        """Return the series of an expression; with start, end and step, over that time."""
        path = "query_range" if when else "query"
        body = urllib.parse.urlencode({"query": expression, **when}).encode()
        url = f"http://127.0.0.1:{self._port}/api/v1/{path}"
        with urllib.request.urlopen(url, body, timeout=10) as response:
            series: list[dict[str, Any]] = json.load(response)["data"]["result"]
        return series

    def wait_for(self, expression: str) -> None:
        """Wait until an expression has a series."""
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline:
            try:
                if self.query(expression):
                    return
            except OSError:  # Prometheus is still starting
                assert self._process.poll() is None
            time.sleep(0.2)
        raise AssertionError(f"no series: {expression}")

    def wait_for_alert(self, name: str) -> None:
        """Wait until an alert fires."""
        self.wait_for(f'ALERTS{{alertname="{name}", alertstate="firing"}}')

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._log.close()


@contextmanager
def traffic(agent: AgentClient) -> Iterator[None]:
    """Spill, look up and load chains in the background."""
    ending = threading.Event()
    namespace = make_namespace(PAGE)
    agent.describe(namespace)

    def work() -> None:
        with HostPool(PAGES, PAGE, parts=1) as pool:
            number = agent.register_pool(pool.descriptor, pool.length)
            buffers = pool.buffers(number, range(PAGES))
            for i in range(1_000_000):
                if ending.wait(0.05):
                    return
                chain = make_chain(namespace, PAGES, str(i))
                pool.fill(chain)
                agent.spill(chain, buffers)
                for known in (chain, make_chain(namespace, PAGES, str(i // 2))):
                    agent.lookup(known, 1.0, UNKNOWN, f"request-{i}")
                    agent.load(known, buffers, ServedRequest(f"request-{i}", 64, 0.01))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()


class Observed:
    """An agent under traffic, its MinIO, and a Prometheus."""

    def __init__(self, home: Path, stack: ExitStack) -> None:
        (home / "run").mkdir(mode=0o700)
        self.directory = home / "nvme"
        self.minio = stack.enter_context(MinioServer())
        port = free_port()
        self.instance = f"127.0.0.1:{port}"
        self.environ = {
            "MEMKV_CONFIG": "",
            "MEMKV_AGENT_SOCKET": str(home / "run" / "agent.sock"),
            "MEMKV_AGENT_HTTP_PORT": str(port),
            "MEMKV_NVME_DIRECTORY": str(self.directory),
            "MEMKV_NVME_CAPACITY": "128MiB",
            "MEMKV_NVME_SEGMENT_SIZE": "8MiB",
            "MEMKV_ENGINE_UPLOAD_BACKLOG": "4MiB",
            "MEMKV_MINIO_ENDPOINT": self.minio.endpoint,
            "MEMKV_MINIO_BUCKET": "pages",
            "MEMKV_MINIO_CREATE_BUCKET": "true",
            "MEMKV_MINIO_ACCESS_KEY": self.minio.access_key,
            "MEMKV_MINIO_SECRET_KEY": self.minio.secret_key,
        }
        self.prometheus = Prometheus(home, self.instance)
        stack.callback(self.prometheus.close)
        self._agent = ExitStack()
        stack.enter_context(self._agent)
        client = self._agent.enter_context(running_agent(self.environ))
        self._agent.enter_context(traffic(client))
        self.prometheus.wait_for(f"rate(memkv_bytes_total[{WINDOW}]) > 0")

    def stop_agent(self) -> None:
        self._agent.close()

    def corrupt_disk(self) -> None:
        """Overwrite a part of every page on the disk."""
        for segment in (self.directory / "segments").iterdir():
            with segment.open("r+b") as file:
                for offset in range(0, segment.stat().st_size, PAGE // 2):
                    file.seek(offset + 8192)
                    file.write(b"damage")


@pytest.fixture(scope="module")
def observed() -> Iterator[Observed]:
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="memkv-")))
        yield Observed(home, stack)


def test_every_expression_has_series(observed: Observed) -> None:
    for where, text in expressions():
        series = observed.prometheus.query(fill_in(text, observed.instance, WINDOW))
        if where.startswith("Memkv"):
            assert series == [], f"{where} fires on a healthy node"
        elif where not in EMPTY:
            assert series, f"{where}: no series"
            assert all(one["value"][1] != "+Inf" for one in series), where


def test_legends_name_labels_that_the_series_have(observed: Observed) -> None:
    for board in BOARDS:
        for panel in panels(board):
            for target in panel["targets"]:
                expression = fill_in(target["expr"], observed.instance, WINDOW)
                labels = re.findall(r"{{(\w+)}}", target["legendFormat"])
                for series in observed.prometheus.query(expression):
                    assert set(labels) <= series["metric"].keys(), panel["title"]
                    assert labels or target["legendFormat"] != "__auto" or panel["type"] == "stat"


def test_alerts_fire_when_parts_fail(observed: Observed) -> None:
    prometheus = observed.prometheus
    observed.corrupt_disk()
    prometheus.wait_for_alert("MemkvPagesCorrupt")
    observed.minio.stop()
    for alert in ("MemkvCircuitOpen", "MemkvUploadsLate", "MemkvUploadsDropped"):
        prometheus.wait_for_alert(alert)
    observed.directory.rename(observed.directory.with_name("moved"))
    prometheus.wait_for_alert("MemkvDiskOff")
    observed.stop_agent()
    prometheus.wait_for_alert("MemkvAgentDown")
