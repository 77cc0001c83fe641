"""Everything the demo starts: MinIO, two nodes, the router, and a server without any cache."""

import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from sglang_cpu_platform.router import Router
from sglang_cpu_platform.server import CpuServer

from memkv_testbed.demo.model import cached_model
from memkv_testbed.demo.node import Node
from memkv_testbed.demo.server import make_server
from memkv_testbed.minio_server import MinioServer

PREFIX = "memkv-demo-"
"""Of the directory that holds everything; short, for the sake of sockets."""

ROUTER_SECONDS = 60.0

Tell = Callable[[str], None]


class Cluster:
    """A context manager: nothing that was started in it is left after it."""

    def __init__(self, tell: Tell) -> None:
        """Prepare; `tell` hears what is being done."""
        self._tell = tell
        self._stack = ExitStack()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End everything and remove its files; idempotent."""
        if not self._closed:
            self._closed = True
            self._tell("cleaning up")
            self._stack.close()

    def start(self) -> None:
        """Start everything but the server without a cache; returns when requests are served."""
        for name in [name for name in os.environ if name.startswith("MEMKV_")]:
            del os.environ[name]  # the user's own servers have nothing to do with these
        self._tell("making the model (once)")
        self.model = cached_model()
        self.home = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix=PREFIX)))
        self._tell("starting MinIO")
        self.minio = self._stack.enter_context(MinioServer())
        self.nodes = [Node(name, self.home, self.model, self.minio) for name in ("A", "B")]
        self._tell("starting two SGLang servers with --enable-memkv, and SGLang's router")
        for node in self.nodes:
            self._stack.callback(node.close)
            node.server.start()
        urls = [node.server.url for node in self.nodes]
        self.router = Router(urls, log=self.home / "router.log")
        self._stack.callback(self.router.kill)
        self.router.start()  # it waits for its servers
        for node in self.nodes:
            node.server.wait_ready()
            node.connect()
        self.router.wait_until(self.router.has_healthy_workers, timeout_s=ROUTER_SECONDS)

    def restart(self, node: Node) -> CpuServer:
        """Kill and start a node's server, whose agent stays; returns a server without any cache.

        The two start at the same time: nothing is measured meanwhile.
        """
        reference = make_server(self.model, self.home / "reference", ["--disable-radix-cache"], {})
        self._stack.callback(reference.kill)
        node.server.kill()
        node.server.start()
        reference.start()
        node.server.wait_ready()
        reference.wait_ready()
        return reference

    def urls(self) -> dict[str, str]:
        """Return where everything is reached, by name."""
        nodes = {f"node {node.name}": node.server.url for node in self.nodes}
        return {"router": self.router.url, **nodes, "MinIO": self.minio.endpoint}
