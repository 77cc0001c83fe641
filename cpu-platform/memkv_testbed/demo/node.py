"""One node of the demo: an SGLang server with `--enable-memkv` and its agent."""

import os
import select
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from sglang_cpu_platform.fork_server import ForkServers

from memkv_sglang.agent.listener import serving_peer
from memkv_sglang.agent.paths import locked_directory, socket_path
from memkv_sglang.agent.protocol import StatusReport
from memkv_sglang.cli.scrape import Samples, scrape
from memkv_sglang.client.client import AgentClient
from memkv_sglang.config.load import load_config
from memkv_testbed.demo.needs import DemoError
from memkv_testbed.demo.server import DEVICE_TOKENS, make_server
from memkv_testbed.s3_server import S3Server

SPILL_SECONDS = 60.0
END_SECONDS = 15.0
_PAUSE = 0.05


class LoadedPages(NamedTuple):
    """Number of pages that an agent has read from each tier."""

    nvme: int
    minio: int


class Loads(NamedTuple):
    """Pages and bytes that were loaded, and how long the calls took."""

    pages: int
    bytes: int
    seconds: float


class Node:
    """Simulates a separate machine: a server with its own agent, socket and directory."""

    def __init__(
        self,
        name: str,
        home: Path,
        model: Path,
        minio: S3Server,
        *,
        endpoint: str = "",
        environment: Mapping[str, str] | None = None,
        extra: Sequence[str] = (),
        device_tokens: int = DEVICE_TOKENS,
        forks: ForkServers | None = None,
    ) -> None:
        """Prepare the node. `start` starts it.

        Args:
            name: name of the node and of its directory.
            home: parent of the directory for socket, pages and log.
            model: directory of the model.
            minio: the shared S3 server.
            endpoint: URL to use instead of MinIO's own, such as that of a proxy.
            environment: more settings (`MEMKV_*`).
            extra: more arguments of the server.
            device_tokens: capacity of the top tier.
            forks: start the server without importing SGLang again.

        """
        self.name = name
        home = home / name
        settings = {
            "MEMKV_AGENT_SOCKET": str(home / "run" / "agent.sock"),
            # If this process is killed, the agents exit by themselves.
            "MEMKV_AGENT_IDLE_TIMEOUT": "30",
            "MEMKV_AGENT_DRAIN_TIMEOUT": "0",
            "MEMKV_MINIO_ACCESS_KEY": minio.access_key,
            "MEMKV_MINIO_SECRET_KEY": minio.secret_key,
            **(environment or {}),
        }
        self._config = load_config(None, settings, {})
        self._client: AgentClient | None = None
        self.server = make_server(
            model,
            home,
            [
                "--enable-memkv",
                *("--memkv-endpoint", endpoint or minio.endpoint),
                *("--memkv-nvme-directory", str(home / "nvme")),
                *("--memkv-nvme-capacity", "2GiB"),
                "--enable-metrics",
                *extra,
            ],
            settings,
            device_tokens,
            forks,
        )

    def connect(self) -> None:
        """Connect to the agent, once the server is ready. Raises `DemoError`."""
        self._client = AgentClient(self._config, start=False)
        if not self._client.wait(END_SECONDS):
            raise DemoError(f"node {self.name} has no agent: {self._client.problem}")

    @property
    def page_size(self) -> int:
        """Tokens per page, which `--enable-memkv` has chosen."""
        return int(self.server.client.get("/get_server_info")["page_size"])

    def requests(self) -> int:
        """Return how many requests the server has answered."""
        port = int(self.server.url.rsplit(":", 1)[1])
        return int(scrape(port).total("sglang:num_requests_total"))

    @property
    def agent_pid(self) -> int:
        """Process id of the agent. Raises `DemoError` if it does not answer."""
        return self._status().agent.pid

    def loaded_pages(self) -> LoadedPages:
        """Return how many pages the agent has read, for servers and for uploads."""
        return LoadedPages(nvme=self.loads("nvme").pages, minio=self.loads("minio").pages)

    def spilled_pages(self) -> int:
        """Return how many pages SGLang has handed to the agent."""
        return int(self._samples().total("memkv_pages_total", tier="nvme", operation="spill"))

    def loads(self, tier: str) -> Loads:
        """Return the totals of the agent's loads from a tier."""
        samples = self._samples()
        return Loads(
            int(samples.total("memkv_pages_total", tier=tier, operation="load", result="loaded")),
            int(samples.total("memkv_bytes_total", tier=tier, operation="load")),
            samples.total("memkv_call_duration_seconds_sum", tier=tier, operation="load"),
        )

    def skipped_slow_pages(self) -> int:
        """Return how many pages lookups skipped because recomputing them is faster."""
        return int(self._samples().total("memkv_skipped_slow_pages_total"))

    def wait_for_spill(self, pages: int) -> None:
        """Wait until `pages` pages were spilled and uploaded to MinIO. Raises `DemoError`."""
        wait_until(
            lambda: self.spilled_pages() >= pages,
            SPILL_SECONDS,
            f"node {self.name} has spilled fewer than {pages} pages",
        )
        if not self._agent().flush(SPILL_SECONDS):
            raise DemoError(f"node {self.name} has not uploaded all pages")

    def _samples(self) -> Samples:
        return scrape(self._status().agent.http_port)

    def _status(self) -> StatusReport:
        status = self._agent().status()
        if status is None:
            raise DemoError(f"the agent of node {self.name} does not answer")
        return status

    def _agent(self) -> AgentClient:
        if self._client is None:
            raise DemoError(f"node {self.name} is not connected")
        return self._client

    def close(self) -> None:
        """Stop server and agent and wait for their exit. Idempotent."""
        self.server.kill()
        if self._client is not None:
            self._client.close()
            self._client = None
        path = socket_path(self._config.agent)
        with locked_directory(path):  # an agent may still be starting
            peer = serving_peer(path)
        if peer is not None:
            _end_process(peer.pid)


def wait_until(condition: Callable[[], bool], seconds: float, problem: str) -> None:
    """Wait until the condition holds. Raises `DemoError` with `problem` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise DemoError(f"{problem} after {seconds:.0f} s")
        time.sleep(_PAUSE)


def _end_process(pid: int) -> None:
    """Stop a process, with SIGKILL if necessary, and wait for its exit."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        ended = select.poll()
        ended.register(process, select.POLLIN)
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                signal.pidfd_send_signal(process, number)
            except ProcessLookupError:
                return
            if ended.poll(END_SECONDS * 1000):
                return
    finally:
        os.close(process)
