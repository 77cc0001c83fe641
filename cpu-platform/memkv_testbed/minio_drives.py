"""Run MinIO with several drives or two servers, to test partial failures."""

import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from memkv_testbed.machines import Machine
from memkv_testbed.minio_server import MinioServer

DRIVES = 4


class DrivesServer(MinioServer):
    """A server with four drives, which are directories. Any two of them hold every object."""

    def __init__(self) -> None:
        """Prepare a server, without starting it."""
        super().__init__()
        self.volumes = [f"{self.data_dir}/{{1...{DRIVES}}}"]
        # Directories on one disk simulate separate disks.
        self._env["MINIO_CI_CD"] = "1"

    def remove_drive(self, number: int) -> None:
        """Remove a drive while the server runs."""
        self._drive(number).rename(self._aside(number))

    def return_drive(self, number: int) -> None:
        """Put the drive back. Replaces an empty drive that MinIO may have created."""
        if self._drive(number).exists():
            self._drive(number).rename(self._drive(number).with_name(f"{number}-empty"))
        self._aside(number).rename(self._drive(number))

    def _drive(self, number: int) -> Path:
        return self.data_dir / str(number)

    def _aside(self, number: int) -> Path:
        return self.data_dir / f"{number}-aside"


def own_address() -> str:
    """Return an address of this machine other than loopback, if there is one.

    In a container, MinIO rejects loopback addresses for the servers of a cluster.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            # This sends nothing, but makes the kernel choose a route.
            sock.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        address: str = sock.getsockname()[0]
        return address


class TwoServers:
    """Two servers of one cluster, with two drives each. A context manager.

    If one server is down, nothing can be written and some objects cannot be read, because two of
    four drives are no quorum.
    """

    def __init__(self, machines: Sequence[Machine] = ()) -> None:
        """Prepare both servers, without starting them; on two machines if these are given."""
        self._machines = machines
        hosts = [machine.address for machine in machines] or [own_address()] * 2
        self.servers = [MinioServer(host=host) for host in hosts]
        first, second = self.servers
        second.root = first.root
        second.access_key, second.secret_key = first.access_key, first.secret_key
        volumes = [f"{server.endpoint}{server.data_dir}/{{1...2}}" for server in self.servers]
        for server in self.servers:
            server.volumes = volumes
            server._env["MINIO_CI_CD"] = "1"
        # Each server waits for the other one, and dies with the thread that starts it.
        self._starter = ThreadPoolExecutor(1)

    @property
    def endpoint(self) -> str:
        """URLs of both servers, separated by a comma."""
        return ",".join(server.endpoint for server in self.servers)

    def __enter__(self) -> Self:
        try:
            started = self._starter.submit(self._start, 1)
            self._start(0)
            started.result()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def restart_second(self) -> None:
        """Restart the second server after `kill`."""
        self._starter.submit(self._start, 1).result()

    def _start(self, number: int) -> None:
        with ExitStack() as stack:
            if self._machines:
                stack.enter_context(self._machines[number].network())
            self.servers[number].start()

    def close(self) -> None:
        """Stop both servers."""
        for server in self.servers:
            server.close()
        self._starter.shutdown()
