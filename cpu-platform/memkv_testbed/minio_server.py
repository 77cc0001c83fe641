"""Run a private MinIO server for tests, demos and benchmarks."""

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
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

from memkv_testbed.minio_binary import MinioNotFoundError, find_or_build_minio
from memkv_testbed.minio_users import Keys, MinioUsers

__all__ = ["MinioNotFoundError", "MinioServer", "MinioServerError", "find_or_build_minio"]

START_TIMEOUT = 60.0
"""Time limit for a server to start, in seconds."""

STOP_TIMEOUT = 20.0
"""Time limit for a server to exit, in seconds."""

PORTS = range(10_000, 30_000)
"""Below the ephemeral ports of Linux (`ip_local_port_range`: 32768 to 60999)."""

PR_SET_PDEATHSIG = 1


class MinioServerError(Exception):
    """The server did not start; the text ends with what it printed."""


class MinioServer:
    """A MinIO server on a free loopback port, as a child process.

    A context manager: serves from entry to exit, then leaves nothing behind. It dies with the
    thread that started it, so start it from a thread that lives long enough.

    `access_key` and `secret_key` belong to a user with the nodes' policy
    (`tiers/minio/admin/policy.py`) on every bucket, who may also create buckets; `root` has the
    administrator's keys.
    """

    def __init__(
        self,
        data_dir: Path | None = None,
        *,
        certs_dir: Path | None = None,
        no_compat: bool = False,
        env: Mapping[str, str] | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        """Prepare a server; does not start it.

        Without `data_dir`, objects are in a directory that is removed on exit. `certs_dir` holds
        `public.crt` and `private.key`; with it the server speaks https. `no_compat` passes
        `--no-compat`, which drops strict S3 compatibility for speed. `env` adds variables, e.g.
        `MINIO_DOMAIN`. `host` is the name or address of the server in its URL.
        """
        self.root = Keys.random()
        self.access_key, self.secret_key = Keys.random()
        self.host = host
        self.port = free_port()
        self._tls = certs_dir is not None
        self._work = Path(tempfile.mkdtemp(prefix="memkv-minio-"))
        self.data_dir = data_dir or self._work / "data"
        self.volumes = [str(self.data_dir)]
        """What the server keeps objects on, as its command line has it."""
        self._certs_dir = certs_dir or self._work / "certs"
        self._log = self._work / "log"
        self._flags = ["--no-compat"] if no_compat else []
        self._env = dict(env or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._has_user = False

    @property
    def endpoint(self) -> str:
        """URL of the server, without a path."""
        return f"{'https' if self._tls else 'http'}://{self.host}:{self.port}"

    @property
    def pid(self) -> int | None:
        """Process id, None while stopped."""
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
        """Start the server, or restart it after `stop` or `kill` with the same port, data and keys.

        Returns when it answers. Raises `MinioServerError`, `MinioNotFoundError`.
        """
        if self._process is not None:
            return
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self._certs_dir.mkdir(parents=True, exist_ok=True)
        command = [
            str(find_or_build_minio()),
            "server",
            "--quiet",
            *self._flags,
            *("--certs-dir", str(self._certs_dir)),
            *("--address", f"{self.host}:{self.port}"),
            *self.volumes,
        ]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=_DieWithParent(),
            )
        self._wait_until_ready()
        self.users.wait_until_loaded()
        if not self._has_user:
            self.users.add_node(Keys(self.access_key, self.secret_key))
            self._has_user = True

    @property
    def users(self) -> MinioUsers:
        """Adds further users, with policies of their own."""
        return MinioUsers(f"{self.host}:{self.port}", self.root, tls=self._tls)

    def stop(self) -> None:
        """Stop the server with SIGTERM; keep its data."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Kill the server (SIGKILL); keep its data."""
        self._end(signal.SIGKILL)

    def close(self) -> None:
        """Stop the server and remove all files except a given data directory; idempotent."""
        self.kill()
        shutil.rmtree(self._work, ignore_errors=True)

    def _environment(self) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("MINIO_")}
        own = {
            "MINIO_ROOT_USER": self.root.access_key,
            "MINIO_ROOT_PASSWORD": self.root.secret_key,
            "MINIO_BROWSER": "off",
            "MINIO_UPDATE": "off",
        }
        return inherited | own | self._env

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
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > give_up:
                self.kill()
                printed = self._log.read_text(errors="replace")[-2000:]
                raise MinioServerError(f"MinIO did not start on {self.endpoint}:\n{printed}")
            time.sleep(0.02)

    def _answers(self) -> bool:
        """Return whether a request is served.

        A ready server refuses an anonymous request; one that is starting asks to retry.
        """
        connection = (
            http.client.HTTPSConnection(self.host, self.port, timeout=1, context=_trust_any())
            if self._tls
            else http.client.HTTPConnection(self.host, self.port, timeout=1)
        )
        try:
            connection.request("GET", "/")
            return connection.getresponse().status == http.client.FORBIDDEN
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


class _DieWithParent:
    """Runs in the child before exec: ask the kernel to kill it when its parent is gone."""

    def __init__(self) -> None:
        self._prctl = ctypes.CDLL(None).prctl
        self._parent = os.getpid()

    def __call__(self) -> None:
        self._prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self._parent:  # it died before the request was in place
            os._exit(1)


def free_port(host: str = "127.0.0.1") -> int:
    """Return a free port that is not ephemeral.

    The kernel could assign an ephemeral port to another connection.
    """
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with suppress(OSError), socket.create_server((host, port)):
            return port
    raise OSError("no port is free")


def _trust_any() -> ssl.SSLContext:
    """Return a context for the readiness probe, which sends no secret and trusts no answer."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
