"""Base class of the private S3 servers for tests, demos and benchmarks."""

import ctypes
import http.client
import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from memkv_testbed.minio_users import Keys

START_TIMEOUT = 60.0
"""Seconds for a server to start."""

STOP_TIMEOUT = 20.0
"""Seconds for a server to exit."""

PORTS = range(10_000, 30_000)
"""Ports to choose from. They are below Linux's ephemeral ports (`ip_local_port_range`, from 32768).
"""

PR_SET_PDEATHSIG = 1


class S3ServerError(Exception):
    """The server did not start. The message ends with what it printed."""


class S3Server(ABC):
    """An S3 server on a free loopback port, as a child process.

    A context manager. The server runs from entry to exit and leaves nothing behind. It dies with
    the thread that started it, so start it in a thread that lives long enough.

    `access_key` and `secret_key` are a node's keys; `root` has the administrator's. If adding users
    to a server is not simple, it has only the administrator's keys.
    """

    name: str
    """Name of the server in messages."""

    def __init__(self, data_dir: Path | None = None, *, host: str = "127.0.0.1") -> None:
        """Prepare a server, without starting it.

        Without `data_dir`, objects are stored in a temporary directory that is removed on exit.
        Clients reach the server by the name or address `host`.
        """
        self.root = Keys.random()
        self.access_key, self.secret_key = self.root
        self.host = host
        self.port = free_port()
        self.tls = False
        self.work = Path(tempfile.mkdtemp(prefix="memkv-s3-"))
        self.data_dir = data_dir or self.work / "data"
        self._log = self.work / "log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """URL of the server, without a path."""
        return f"{'https' if self.tls else 'http'}://{self.host}:{self.port}"

    @property
    def pid(self) -> int | None:
        """Process id; None while stopped."""
        return self._process.pid if self._process else None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the server. A restart after `stop` or `kill` keeps its port, data and keys.

        Returns when the server answers. Raises `S3ServerError`, `ServerNotFoundError`.
        """
        if self._process is not None:
            return
        self.data_dir.mkdir(parents=True, exist_ok=True)
        command = self.command()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                env=self.environment(),
                cwd=self.work,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=DieWithParent(),
            )
        self._wait_until_ready()

    def stop(self) -> None:
        """Stop the server with SIGTERM. Its data stay."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Kill the server with SIGKILL. Its data stay."""
        self._end(signal.SIGKILL)

    def close(self) -> None:
        """Stop the server and remove its files, except a given data directory. Idempotent."""
        self.kill()
        shutil.rmtree(self.work, ignore_errors=True)

    @abstractmethod
    def command(self) -> Sequence[str]:
        """Return the command line. Called before each start. Raises `ServerNotFoundError`."""

    @abstractmethod
    def environment(self) -> Mapping[str, str]:
        """Return the variables of the process."""

    def is_ready(self) -> bool:
        """Return whether an anonymous request is refused. A starting server defers it instead."""
        connection = (
            http.client.HTTPSConnection(self.host, self.port, timeout=1, context=_trust_any())
            if self.tls
            else http.client.HTTPConnection(self.host, self.port, timeout=1)
        )
        try:
            connection.request("GET", "/")
            return connection.getresponse().status == http.client.FORBIDDEN
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _end(self, number: int) -> None:
        if self._process is None:
            return
        self._process.send_signal(number)
        try:
            self._process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        give_up = time.monotonic() + START_TIMEOUT
        while not self.is_ready():
            if self._process.poll() is not None or time.monotonic() > give_up:
                self.kill()
                printed = self._log.read_text(errors="replace")[-2000:]
                raise S3ServerError(f"{self.name} did not start on {self.endpoint}:\n{printed}")
            time.sleep(0.02)


class DieWithParent:
    """Asks the kernel to kill the child when its parent ends. Runs in the child before exec."""

    def __init__(self) -> None:
        """Remember the parent. Call this in the parent."""
        self._prctl = ctypes.CDLL(None).prctl
        self._parent = os.getpid()

    def __call__(self) -> None:
        """Make the request to the kernel."""
        self._prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self._parent:  # the parent died before the request took effect
            os._exit(1)


def free_port(host: str = "127.0.0.1") -> int:
    """Return a free port that is not ephemeral.

    The kernel could use an ephemeral port for another connection.
    """
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with suppress(OSError), socket.create_server((host, port)):
            return port
    raise OSError("no port is free")


def _trust_any() -> ssl.SSLContext:
    """Return a TLS context that verifies nothing, for checks that send no secrets."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
