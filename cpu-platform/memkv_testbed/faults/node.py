"""A node of the cluster: an agent started by its clients, and the resources it uses."""

import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from memkv_sglang.agent.listener import serving_peer
from memkv_sglang.client.client import AgentClient
from memkv_sglang.config.schema import Config

LIMIT = 60.0
"""Seconds after which a wait fails."""

MODULE = "memkv_testbed.faults.faulty_agent"
"""Module that clients start: an agent whose disk fails on demand."""

FLUSH = 240.0
"""Seconds for an upload queue to drain, which may have thousands of small objects, each synced."""


class Resources(NamedTuple):
    """The resources that a process uses."""

    threads: int
    descriptors: int
    """Open files except segments. The number of segments grows with that of the pages."""
    memory_mb: float
    """Resident anonymous memory. Host pools, which belong to the clients, do not count."""


def resources(pid: int) -> Resources:
    """Return the current resources of a process."""
    process = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    return Resources(
        threads=int(status["Threads"]),
        descriptors=sum(not name.endswith(".seg") for name in _open_files(process)),
        memory_mb=int(status["RssAnon"].split()[0]) / 1024,
    )


def _open_files(process: Path) -> Iterator[str]:
    for link in (process / "fd").iterdir():
        with suppress(FileNotFoundError):  # the file was closed meanwhile
            yield str(link.readlink())


def wait_until(condition: Callable[[], object], what: str = "", limit: float = LIMIT) -> float:
    """Wait until the condition holds; return the seconds it took. Raises `TimeoutError`."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > limit:
            raise TimeoutError(f"timed out after {limit:.0f} s: {what}")
        time.sleep(0.005)
    return time.monotonic() - began


class Node:
    """One node: its settings, and its clients, which start its agent."""

    def __init__(self, config: Config) -> None:
        """Start the agent."""
        self.config = config
        self.socket = Path(config.agent.socket)
        self._clients: list[AgentClient] = []
        self.client = self.connect()

    def connect(self) -> AgentClient:
        """Return another client, like that of another server on the node."""
        client = AgentClient(self.config, start=True, module=MODULE)
        self._clients.append(client)
        if not client.wait(LIMIT):
            raise TimeoutError(client.problem)
        return client

    def agent_pid(self) -> int | None:
        """Return the agent's process id; None while there is no agent."""
        peer = serving_peer(self.socket)
        return peer.pid if peer else None

    def end_agent(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the agent and wait until it has ended. Its clients start another one."""
        pid = self.agent_pid()
        if pid is None:
            return
        with suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            try:
                signal.pidfd_send_signal(pidfd, number)
                poll = select.poll()
                poll.register(pidfd, select.POLLIN)
                if not poll.poll(LIMIT * 1000):
                    raise TimeoutError("the agent did not end")
            finally:
                os.close(pidfd)

    def wait_for_another(self, client: AgentClient, pid: int | None) -> None:
        """Wait until a client has found an agent with another process id."""

        def found() -> bool:
            report = client.status()
            return report is not None and report.agent.pid != pid

        wait_until(found, "another agent")

    def flush(self) -> None:
        """Wait until the upload queue is empty, even if the agent restarts."""
        wait_until(lambda: self.client.flush(5.0), "the upload queue is empty", FLUSH)

    def breaker(self) -> str:
        """Return the state of MinIO's circuit; empty while there is no agent."""
        report = self.client.status()
        return report.engine.breaker if report else ""

    def close(self) -> None:
        """Close every client, so that none starts another agent, and end the agent."""
        for client in self._clients:
            client.close()
        self.end_agent()
