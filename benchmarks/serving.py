"""Start real SGLang servers on the CPU, with this project's tier or an alternative."""

import json
import os
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import click
from memkv_testbed.demo.model import cached_model
from memkv_testbed.demo.node import Node
from memkv_testbed.demo.server import make_server
from memkv_testbed.minio_server import MinioServer
from memkv_testbed.tcp_proxy import TcpProxy
from sglang_cpu_platform.fork_server import ForkServers
from sglang_cpu_platform.router import Router
from sglang_cpu_platform.server import CpuServer

from benchmarks.report import Report
from memkv_sglang.plugin.launch import PREFETCH_TIMEOUT

PAGE = 256
"""Tokens per page, as `--enable-memkv` chooses for this model."""

ANSWER_TOKENS = 16

Tokens = list[int]


def tell(text: str) -> None:
    """Print the current activity: servers on a CPU are slow, and users should see progress."""
    click.echo(time.strftime("%H:%M:%S ") + text, err=True)


def tell_medians(report: Report, case: str) -> None:
    """Print the medians of a case."""
    medians = (f"{name} {report.median(case, name):.3f}" for name in report.runs[case])
    tell(f"{case}: {', '.join(medians)}")


def prompt(seed: str, length: int) -> Tokens:
    """Return a prompt that shares no prefix with those of other seeds."""
    return random.Random(seed).choices(range(5, 261), k=length)


def first_token(server: CpuServer, tokens: Sequence[int]) -> float:
    """Return the seconds to the first token."""
    return server.client.generate(tokens, max_new_tokens=ANSWER_TOKENS).ttft_s


class Servers:
    """A context manager for a MinIO and SGLang servers.

    Creating a server starts it, in parallel with others, as a fork of a process that has imported
    SGLang. Call `wait` before using them. All servers are stopped at the end.
    """

    def __init__(self, directory: Path) -> None:
        """Keep all files in a new directory inside `directory`, which is on the disk to measure."""
        self._directory = directory
        self._stack = ExitStack()
        self._nodes: list[Node] = []
        self._servers: list[CpuServer] = []

    def __enter__(self) -> Self:
        for name in [name for name in os.environ if name.startswith("MEMKV_")]:
            del os.environ[name]  # The user's settings must not affect these servers.
        with self._stack:
            self.model = cached_model()
            scratch = tempfile.TemporaryDirectory(prefix="mkv-", dir=self._directory)
            self.home = Path(self._stack.enter_context(scratch))
            self.minio = self._stack.enter_context(MinioServer(self.home / "minio"))
            self._forks = ForkServers()
            self._stack.callback(self._forks.close)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def node(
        self,
        name: str,
        *,
        endpoint: str = "",
        extra: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> Node:
        """Start a server with `--enable-memkv` that does not copy pages from MinIO to its disk."""
        node = Node(
            name,
            self.home,
            self.model,
            self.minio,
            endpoint=endpoint,
            environment={"MEMKV_ENGINE_PROMOTE": "never", **(env or {})},
            extra=extra,
            forks=self._forks,
        )
        self._stack.callback(node.close)
        self._nodes.append(node)
        node.server.start()
        return node

    def peer(
        self,
        name: str,
        extra: Sequence[str] = (),
        env: dict[str, str] | None = None,
        page: int = PAGE,
    ) -> CpuServer:
        """Start a server without the tier. `page_size` is in tokens."""
        arguments = ["--page-size", str(page), *extra]
        server = make_server(self.model, self.home / name, arguments, env or {}, forks=self._forks)
        self._stack.callback(server.kill)
        self._servers.append(server)
        server.start()
        return server

    def slow_line(self) -> TcpProxy:
        """Return a proxy to MinIO whose `rate` can be limited."""
        return self._stack.enter_context(TcpProxy(self.minio.host, self.minio.port))

    def seaweedfs(self, page: int = PAGE, extra: Sequence[str] = (), name: str = "") -> CpuServer:
        """Start a server with SGLang's S3 backend, on the same MinIO."""
        settings = {
            "endpoint": self.minio.endpoint,
            "bucket": f"seaweedfs-{page}",
            "access_key": self.minio.access_key,
            "secret_key": self.minio.secret_key,
            "interface_v1": 1,
            **PREFETCH_TIMEOUT,
        }
        arguments = [*_hicache("seaweedfs"), *_extra(settings), *extra]
        return self.peer(name or f"seaweedfs-{page}", arguments, page=page)

    def file(self) -> CpuServer:
        """Start a server with SGLang's file backend on a shared directory."""
        directory = self.home / "shared"
        directory.mkdir()
        env = {"SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": str(directory)}
        return self.peer("file", [*_hicache("file"), *_extra(PREFETCH_TIMEOUT)], env)

    def host_pool(self, extra: Sequence[str] = (), name: str = "host") -> CpuServer:
        """Start a server with SGLang's host pool, and nothing below it."""
        return self.peer(name, ["--enable-hierarchical-cache", *extra])

    def router(
        self, workers: Sequence[CpuServer], name: str, policy: str, extra: Sequence[str] = ()
    ) -> Router:
        """Start SGLang's router in front of servers that are ready."""
        router = Router(
            [server.url for server in workers],
            log=self.home / f"{name}.log",
            policy=policy,
            extra=extra,
        )
        return self._stack.enter_context(router)

    def wait(self) -> None:
        """Wait until all servers are ready and warmed up."""
        tell(f"starting {len(self._nodes) + len(self._servers)} servers")
        for node in self._nodes:
            node.server.wait_ready()
            node.connect()
        for server in self._servers:
            server.wait_ready()
        tell("warming them up")
        for server in [*(node.server for node in self._nodes), *self._servers]:
            for _ in range(2):
                first_token(server, prompt("warm-up", 4 * PAGE))
                server.client.flush_cache()
        self._nodes, self._servers = [], []


def _hicache(backend: str) -> list[str]:
    return ["--enable-hierarchical-cache", "--hicache-storage-backend", backend]


def _extra(settings: dict[str, object] | dict[str, float]) -> list[str]:
    return ["--hicache-storage-backend-extra-config", json.dumps(settings)]
