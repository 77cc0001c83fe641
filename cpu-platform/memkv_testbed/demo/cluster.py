"""Start and stop the demo's processes: an S3 server, two nodes, the router, an uncached server."""

import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from sglang_cpu_platform.router import Router
from sglang_cpu_platform.server import CpuServer

from memkv_testbed.demo.model import cached_model
from memkv_testbed.demo.node import Node
from memkv_testbed.demo.prompts import CONTEXT_TOKENS
from memkv_testbed.demo.server import make_server
from memkv_testbed.minio_server import MinioServer
from memkv_testbed.s3_server import S3Server

PREFIX = "memkv-demo-"
"""Prefix of the directory with all files. It is short because socket paths have a length limit."""

ROUTER_SECONDS = 60.0

SetStatus = Callable[[str], None]


class Cluster:
    """All processes of the demo. A context manager that stops them and removes their files."""

    def __init__(
        self,
        set_status: SetStatus,
        context_tokens: int = CONTEXT_TOKENS,
        make_server: Callable[[], S3Server] = MinioServer,
    ) -> None:
        """Prepare the cluster. `start` starts it.

        `set_status` is called with the current activity. The servers' device pools have room for
        one and a half conversations with a context of `context_tokens`. `make_server` prepares the
        S3 server.
        """
        self._make_server = make_server
        self._set_status = set_status
        self._device_tokens = context_tokens * 3 // 2
        self._stack = ExitStack()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop everything and remove its files; idempotent."""
        if not self._closed:
            self._closed = True
            self._set_status("cleaning up")
            self._stack.close()

    def start(self) -> None:
        """Start everything but the uncached server. Returns when the router accepts requests."""
        for name in [name for name in os.environ if name.startswith("MEMKV_")]:
            del os.environ[name]  # The user's own settings must not affect the demo.
        self._set_status("creating the model (first run only)")
        self.model = cached_model()
        self.home = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix=PREFIX)))
        server = self._make_server()
        self._set_status(f"starting {server.name}")
        self.minio = self._stack.enter_context(server)
        self.nodes = [
            Node(name, self.home, self.model, self.minio, device_tokens=self._device_tokens)
            for name in ("A", "B")
        ]
        self._set_status("starting two SGLang servers with --enable-memkv, and SGLang's router")
        for node in self.nodes:
            self._stack.callback(node.close)
            node.server.start()
        urls = [node.server.url for node in self.nodes]
        self.router = Router(urls, log=self.home / "router.log")
        self._stack.callback(self.router.kill)
        self.router.start()  # this waits for the router's servers
        for node in self.nodes:
            node.server.wait_ready()
            node.connect()
        self.router.wait_until(self.router.has_healthy_workers, timeout_s=ROUTER_SECONDS)

    def restart(self, node: Node) -> CpuServer:
        """Restart a node's server, but not its agent. Also start and return an uncached server.

        Both start at the same time, because nothing is measured in the meantime.
        """
        reference = make_server(
            self.model,
            self.home / "reference",
            ["--disable-radix-cache"],
            {},
            self._device_tokens,
        )
        self._stack.callback(reference.kill)
        node.server.kill()
        node.server.start()
        reference.start()
        node.server.wait_ready()
        reference.wait_ready()
        return reference

    def urls(self) -> dict[str, str]:
        """Return the URL of each process by name."""
        nodes = {f"node {node.name}": node.server.url for node in self.nodes}
        return {"router": self.router.url, **nodes, self.minio.name: self.minio.endpoint}
