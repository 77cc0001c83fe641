"""Run an S3 server that keeps objects in memory, so that a benchmark measures the client."""

import os
import signal
import subprocess
from typing import Self

from memkv_testbed.certificates import Certificate
from memkv_testbed.s3_server import DieWithParent
from memkv_testbed.server_binaries import find_or_build_memory_server

LIMIT = 4 << 30
"""Maximum bytes of all objects. If there are more, the server drops the oldest objects."""


GARBAGE = 512 << 20
"""Bytes of memory, in addition to the objects, at which the server collects garbage."""


class MemoryServer:
    """The server on a free loopback port, as a child process. A context manager.

    It supports only GET, HEAD, PUT and DELETE, and its listings are empty. It checks no signatures,
    so any keys work. It dies with the thread that started it.
    """

    access_key, secret_key = "memory", "memory-secret"

    def __init__(self, certificate: Certificate | None = None, limit: int = LIMIT) -> None:
        """Prepare a server. With a certificate, it speaks https."""
        self._limit = limit
        self._arguments = ["-limit", str(limit)]
        if certificate is not None:
            self._arguments += ["-cert", str(certificate.cert_file)]
            self._arguments += ["-key", str(certificate.key_file)]
        self._scheme = "http" if certificate is None else "https"
        self._process: subprocess.Popen[str] | None = None
        self.endpoint = ""
        """URL of the server; empty until it runs."""

    @property
    def pid(self) -> int:
        """Process id; 0 until it runs."""
        return self._process.pid if self._process else 0

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [str(find_or_build_memory_server()), *self._arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"GOGC": "off", "GOMEMLIMIT": str(self._limit + GARBAGE)},
            preexec_fn=DieWithParent(),
        )
        assert self._process.stdout is not None
        address = self._process.stdout.readline().strip()
        if not address:
            self.__exit__()
            raise RuntimeError("the in-memory S3 server did not start")
        self.endpoint = f"{self._scheme}://{address}"
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
