"""Clients that start agents, as inference servers do."""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import msgspec
import pytest

from memkv_sglang.agent.listener import serving_peer
from memkv_sglang.client.client import AgentClient
from memkv_sglang.config.schema import AgentConfig, Config, MinioConfig, NvmeConfig
from tests.agent.agent_harness import LIMIT, alive, eventually


def make_config(home: Path, minio: MinioConfig | None = None, **nvme: object) -> Config:
    """Return the settings of an agent with its socket and pages below `home`."""
    values = {"directory": str(home / "pages"), "capacity": 64 << 20, **nvme}
    return Config(
        agent=AgentConfig(socket=str(home / "run" / "agent.sock"), drain_timeout=1.0),
        nvme=msgspec.convert(values, NvmeConfig),
        minio=minio or MinioConfig(),
    )


def change(config: Config, **settings: object) -> Config:
    """Return a copy with some settings replaced; `minio_bucket` means `minio.bucket`."""
    for name, value in settings.items():
        section, _, field = name.partition("_")
        changed = msgspec.structs.replace(getattr(config, section), **{field: value})
        config = msgspec.structs.replace(config, **{section: changed})
    return config


@contextmanager
def server(config: Config) -> Iterator[AgentClient]:
    """Open a client that starts an agent and requires its own settings."""
    with closing(AgentClient(config, start=True)) as client:
        yield client


def connected(client: AgentClient) -> int:
    """Wait until the client is connected and return the agent's pid."""
    eventually(lambda: client.problem == "" and client.status() is not None)
    report = client.status()
    assert report is not None
    return report.agent.pid


@contextmanager
def ending_agents(path: Path) -> Iterator[None]:
    """On exit, kill the process that serves the socket."""
    try:
        yield
    finally:
        peer = serving_peer(path)
        if peer is not None and peer.pid not in (0, os.getpid()):
            os.kill(peer.pid, signal.SIGKILL)
            eventually(lambda: not alive(peer.pid))


def in_log(caplog: pytest.LogCaptureFixture, text: str) -> int:
    """Count the log records that contain the text."""
    return sum(text in record.getMessage() for record in caplog.records)


@contextmanager
def answering(path: Path, answer: bytes) -> Iterator[None]:
    """Listen on a socket and send the same bytes to each client."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    with closing(socket.socket(socket.AF_UNIX)) as listening:
        listening.bind(str(path))
        listening.listen()
        kept = []

        def serve() -> None:
            with suppress(OSError):
                while True:
                    sock, _ = listening.accept()
                    kept.append(sock)
                    sock.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield
        listening.shutdown(socket.SHUT_RDWR)
        thread.join(LIMIT)
        for sock in kept:
            sock.close()
