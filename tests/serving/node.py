"""A node for tests: an SGLang server with the tier, and the agent that it starts."""

import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, Self

from memkv_testbed.processes import ending, stalled
from sglang_cpu_platform.client import Answer, Client
from sglang_cpu_platform.disaggregation import environment
from sglang_cpu_platform.fork_server import ForkServers
from sglang_cpu_platform.server import CpuServer

from memkv_sglang.agent.protocol import AgentStatus
from memkv_sglang.cli.scrape import scrape
from memkv_sglang.client.client import AgentClient
from memkv_sglang.config.load import load_config
from memkv_sglang.config.schema import MIB, MinioConfig
from tests.patching.patched_copy import sglang_under_test

PAGE = 64
"""Tokens per page, which has 256 KiB for the tiny models."""

THRESHOLD = 256
"""SGLang asks no storage for prompts of fewer tokens."""

DEVICE_TOKENS = 8192
"""Few enough that traffic evicts pages; the host pool has twice as many."""

NEW_TOKENS = 8

LIMIT = 60.0
"""Seconds after which a test gives up waiting."""

Tokens = list[int]


def prompt(seed: int | str, length: int = 1000) -> Tokens:
    """Return a prompt that shares no prefix with those of other seeds."""
    return random.Random(f"prompt {seed}").choices(range(5, 261), k=length)


def whole_pages(tokens: int) -> int:
    """Return how many of `tokens` matching tokens SGLang can load from storage."""
    pages = tokens // PAGE * PAGE
    return pages if pages >= THRESHOLD else 0


def reusable(length: int) -> int:
    """Return the same for a completely stored prompt. Its last token is always computed."""
    return whole_pages(length - 1)


def libraries(home: Path) -> dict[str, str]:
    """Return what prefill and decode servers need; the others get it too, because a fork server
    starts only servers with the same libraries.
    """
    return environment(home / "libraries")


class ServedServer(CpuServer):
    """A server started with `sglang serve` instead of `python -m sglang.launch_server`."""

    def __init__(self, model: Path, **arguments: Any) -> None:
        super().__init__(model, **arguments | {"forks": None})
        python, *_ = self._argv
        options = self._argv[self._argv.index("--model-path") :]
        self._argv = [str(Path(python).with_name("sglang")), "serve", *options]


class Node:
    """One machine of the cluster; `name` separates its directories from other nodes'."""

    forks: ClassVar[ForkServers | None] = None
    """Starts the servers, once the fixture `home` has set it."""

    def __init__(
        self,
        name: str,
        home: Path,
        minio: MinioConfig,
        model: Path,
        *,
        page_size: int | None = PAGE,
        tp: int = 1,
        extra: Sequence[str] = (),
        env: dict[str, str] | None = None,
        enable: Sequence[str] = ("--enable-memkv",),
        server: Callable[..., CpuServer] = CpuServer,
    ) -> None:
        self.home = home / name
        self.pages = self.home / "pages"
        self._environment = {
            "MEMKV_MINIO_ACCESS_KEY": minio.access_key,
            "MEMKV_MINIO_SECRET_KEY": minio.secret_key,
            "MEMKV_AGENT_SOCKET": str(self.home / "run" / "agent.sock"),
            "MEMKV_AGENT_IDLE_TIMEOUT": "60",
            "MEMKV_AGENT_DRAIN_TIMEOUT": "1",
            # On a busy machine lookups take long.
            "MEMKV_ENGINE_LOOKUP_BUDGET": "4s",
            # There, a tiny model may compute pages as fast as they load.
            "MEMKV_ENGINE_SKIP_SLOW_LOADS": "false",
        }
        flags = {
            "minio.endpoint": minio.endpoint,
            "minio.bucket": minio.bucket,
            "nvme.directory": str(self.pages),
            "nvme.capacity": str(256 * MIB),
        }
        self._config = load_config(None, self._environment, flags)
        self._server = server(
            model,
            log=self.home / "server.log",
            page_size=page_size,
            tp=tp,
            max_total_tokens=DEVICE_TOKENS,
            extra=[
                *enable,
                *("--memkv-endpoint", minio.endpoint, "--memkv-minio-bucket", minio.bucket),
                *("--memkv-nvme-directory", str(self.pages)),
                *("--memkv-nvme-capacity", str(256 * MIB)),
                "--enable-metrics",
                *extra,
            ],
            env={**self._environment, **libraries(home), **sglang_under_test(), **(env or {})},
            forks=self.forks,
        )

    @property
    def client(self) -> Client:
        return self._server.client

    @property
    def url(self) -> str:
        return self._server.url

    @property
    def server_pid(self) -> int:
        return self._server.pid

    def log(self) -> str:
        return self._server.log.read_text(errors="replace")

    def start(self) -> None:
        self._server.start()

    def wait_ready(self) -> None:
        """Wait for the server, and until it reuses what it has stored."""
        self._server.wait_ready()
        self.wait_reusing()

    def wait_reusing(self) -> None:
        """Wait until the server reuses what it has stored, so its agent is running (again)."""
        known = prompt(f"known {self.home}", 2 * THRESHOLD)
        self.generate(known)
        wait_until(lambda: self.stored(known) > 0)

    def wait_for_agent(self) -> None:
        """Wait until the node's agent is running."""
        wait_until(self._has_agent)

    def _has_agent(self) -> bool:
        try:
            return self.agent_pid() > 0
        except OSError:
            return False

    def stop_server(self) -> None:
        self._server.stop()

    def kill_server(self) -> None:
        self._server.kill()

    def stop_agent(self) -> None:
        """Stop the agent gracefully and wait for its exit; do nothing if there is none."""
        with suppress(OSError), self.agent() as agent, ending(_pid(agent), LIMIT):
            agent.shutdown()

    def kill_agent(self) -> None:
        with ending(self.agent_pid(), LIMIT) as process:
            signal.pidfd_send_signal(process, signal.SIGKILL)

    def stalled_agent(self) -> AbstractContextManager[None]:
        """Suspend the agent until the block ends."""
        return stalled(self.agent_pid())

    def agent_pid(self) -> int:
        with self.agent() as agent:
            return _pid(agent)

    @contextmanager
    def agent(self) -> Iterator[AgentClient]:
        """Yield a client of the agent. Raises `ConnectionError` if there is none."""
        client = AgentClient(self._config, start=False)
        try:
            if not client.wait(5.0):
                raise ConnectionError(client.problem)
            yield client
        finally:
            client.close()

    def agent_port(self) -> int:
        """Return the port of the agent's HTTP paths."""
        with self.agent() as agent:
            return _report(agent).http_port

    def lookup_counts(self) -> Counter[tuple[str, str, str]]:
        """Count the agent's lookups and loads, and their pages by result, for each tier."""
        counts: Counter[tuple[str, str, str]] = Counter()
        for name, labels, value in scrape(self.agent_port()).values:
            result = {
                "memkv_call_duration_seconds_count": "calls",
                "memkv_pages_total": labels.get("result"),
            }.get(name)
            if result and labels["operation"] != "spill":
                counts[labels["operation"], labels["tier"], result] = int(value)
        return counts

    def forget_disk(self) -> None:
        """Remove the NVMe tier's pages; the agent must not be running."""
        shutil.rmtree(self.pages)

    def generate(self, tokens: Sequence[int], **request: Any) -> Answer:
        return self.client.generate(tokens, max_new_tokens=NEW_TOKENS, **request)

    def flush(self) -> None:
        """Empty the device and host pools once their content has been stored."""
        self._server.client.flush_cache()

    def share(self) -> None:
        """Empty the pools, and wait until everything computed is in the shared tier."""
        self.flush()
        with self.agent() as agent:
            assert agent.flush(LIMIT)

    def stored(self, tokens: Sequence[int], **request: Any) -> int:
        """Flush, send the prompt, and return how many tokens came from storage."""
        self.flush()
        return from_storage(self.generate(tokens, **request))

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        self.kill_server()
        self.stop_agent()

    def __exit__(self, *_: object) -> None:
        self.close()


def from_storage(answer: Answer) -> int:
    """Return how many tokens came from storage; assert that none came from elsewhere."""
    storage = answer.cached_by_source.get("storage", 0)
    assert answer.cached_tokens == storage, answer.cached_by_source
    return storage


def start_all(*servers: Any) -> None:
    """Start servers in parallel; their creator stops them."""
    for server in servers:
        server.start()
    for server in servers:
        server.wait_ready()


def wait_until(condition: Callable[[], bool], limit: float = LIMIT) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, f"not so within {limit:.0f} s"
        time.sleep(0.05)


def _pid(agent: AgentClient) -> int:
    return _report(agent).pid


def _report(agent: AgentClient) -> AgentStatus:
    report = agent.status()
    assert report is not None
    return report.agent
