"""Start MinIO servers and agents for a benchmark, and stop them at its end."""

import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from memkv_testbed.minio_server import MinioServer

from benchmarks.base import tool
from memkv_sglang.agent.launch import MODULE, start_agent
from memkv_sglang.client.client import AgentClient
from memkv_sglang.config.schema import AgentConfig, Config, EngineConfig, MinioConfig, NvmeConfig

START = 30.0
"""Seconds for an agent to start."""

STOP = 15.0
"""Seconds for an agent to exit."""


@contextmanager
def minio(directory: Path, *, tls: bool = False) -> Iterator["Minio"]:
    """Run a MinIO with its data in `directory`. `tls` enables https."""
    with tempfile.TemporaryDirectory(dir=directory, prefix="memkv-bench-") as scratch:
        certificates = _certificate(Path(scratch) / "certs") if tls else None
        with MinioServer(Path(scratch) / "data", certs_dir=certificates) as server:
            yield Minio(server, str(certificates / "public.crt") if certificates else "")


class Minio(NamedTuple):
    """A running server."""

    server: MinioServer
    ca_file: str

    def config(self, bucket: str, *, endpoint: str = "", negative_ttl: float = 0) -> MinioConfig:
        """Return the settings for a bucket. `endpoint` replaces the server's own URL."""
        return MinioConfig(
            endpoint=endpoint or self.server.endpoint,
            bucket=bucket,
            access_key=self.server.access_key,
            secret_key=self.server.secret_key,
            ca_file=self.ca_file,
            negative_ttl=negative_ttl,
        )


class RunningAgent(NamedTuple):
    """An agent and a connected client."""

    client: AgentClient
    pid: int
    config: Config

    def cpu_seconds(self) -> float:
        """Return the CPU seconds that the agent has used."""
        # The id of another process's CPU clock, computed as glibc does; see clock_getcpuclockid(3).
        return time.clock_gettime((~self.pid << 3) | 2)


@contextmanager
def agent(
    nvme: NvmeConfig | None = None,
    minio: MinioConfig | None = None,
    module: str = MODULE,
    engine: EngineConfig | None = None,
) -> Iterator[RunningAgent]:
    """Run an agent that inherits this thread's CPU affinity and network namespace."""
    with tempfile.TemporaryDirectory(prefix="memkv-bench-") as run:
        config = Config(
            agent=AgentConfig(socket=str(Path(run) / "agent.sock"), drain_timeout=0),
            engine=engine or EngineConfig(),
            nvme=nvme or NvmeConfig(),
            minio=minio or MinioConfig(),
        )
        start_agent(config, module)
        client = AgentClient(config, start=False)
        try:
            if not client.wait(START):
                raise RuntimeError(f"no agent: {client.problem}")
            status = client.status()
            assert status is not None
            pid = status.agent.pid
            try:
                yield RunningAgent(client, pid, config)
            finally:
                _end(client, pid)
        finally:
            client.close()


@contextmanager
def importable() -> Iterator[None]:
    """Let child processes import this package from any working directory."""
    before = os.environ.get("PYTHONPATH")
    here = str(Path(__file__).parents[1])
    os.environ["PYTHONPATH"] = here if before is None else f"{here}{os.pathsep}{before}"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _end(client: AgentClient, pid: int) -> None:
    with suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            client.close()  # Close the client first, so that it does not start another agent.
            os.kill(pid, signal.SIGTERM)
            if not select.select([descriptor], [], [], STOP)[0]:
                os.kill(pid, signal.SIGKILL)
        finally:
            os.close(descriptor)


def _certificate(directory: Path) -> Path:
    """Create a self-signed certificate for 127.0.0.1."""
    directory.mkdir()
    command = [
        *(tool("openssl"), "req", "-x509", "-nodes", "-days", "2", "-subj", "/CN=benchmark"),
        *("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
        *("-addext", "subjectAltName=IP:127.0.0.1"),
        *("-keyout", "private.key", "-out", "public.crt"),
    ]
    subprocess.run(command, cwd=directory, check=True, capture_output=True)
    return directory
