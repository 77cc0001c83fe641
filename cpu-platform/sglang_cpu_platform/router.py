"""Run SGLang's router (`sglang-router` 0.3.2) in front of several servers."""

import sys
from collections.abc import Sequence
from pathlib import Path

from sglang_cpu_platform.client import Client, RequestFailedError
from sglang_cpu_platform.process import ManagedProcess
from sglang_cpu_platform.server import HOST, free_port

START_TIMEOUT_S = 60.0

# Runs `sglang_router.launch_router` without SGLang. Importing SGLang takes seconds, and only serves
# to trace the router's Python load balancer, which is not used here.
_LAUNCH = """
import sys
sys.modules["sglang"] = None
from sglang_router.launch_router import main
main()
"""


class Router(ManagedProcess):
    """A router that runs during a `with` block. All workers are healthy when the block begins.

    Args:
        workers: URLs of the servers.
        log: file that the output is appended to.
        decode: URLs of decode servers. With these, `workers` are prefill servers.
        bootstrap_ports: bootstrap ports of the prefill servers.
        policy: how it chooses a worker: `cache_aware`, `round_robin`, `random`, ...
        extra: further arguments of `sglang_router.launch_router`.
        python: interpreter of the environment in which the router is installed.

    """

    def __init__(
        self,
        workers: Sequence[str],
        *,
        log: Path,
        decode: Sequence[str] = (),
        bootstrap_ports: Sequence[int] = (),
        policy: str = "round_robin",
        extra: Sequence[str] = (),
        python: str = sys.executable,
    ) -> None:
        port = free_port()
        self.url = f"http://{HOST}:{port}"
        self.client = Client(self.url)
        self._workers = [*workers, *decode]
        roles = ["--worker-urls", *workers]
        if decode:
            roles = ["--pd-disaggregation"]
            for url, bootstrap_port in zip(workers, bootstrap_ports, strict=True):
                roles += ["--prefill", url, str(bootstrap_port)]
            for url in decode:
                roles += ["--decode", url]
        argv = [
            python, "-c", _LAUNCH,
            "--host", HOST,
            "--port", str(port),
            # The default is a fixed port, on which two routers of one machine would collide.
            "--prometheus-host", HOST,
            "--prometheus-port", str(free_port()),
            "--policy", policy,
            *roles,
            "--worker-startup-check-interval", "1",
            *extra,
        ]  # fmt: skip
        super().__init__(f"router {self.url}", argv, env=None, log=log)

    def has_healthy_workers(self) -> bool:
        """Return whether every worker is registered and healthy. `/health` is true too early."""
        try:
            workers = self.client.get("/workers")["workers"]
        except (RequestFailedError, OSError):
            return False
        healthy = {worker["url"] for worker in workers if worker["is_healthy"]}
        return healthy >= set(self._workers)

    def __enter__(self) -> "Router":
        self.start()
        try:
            self.wait_until(self.has_healthy_workers, timeout_s=START_TIMEOUT_S)
        except BaseException:
            self.stop()
            raise
        return self
