"""Disk requests, and the interface of queues that keep several of them in flight."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from memkv_sglang.tiers.nvme.disk.direct_io import read_fully, write_fully


class DiskRequest(NamedTuple):
    """A vectored read from or write to a file."""

    fd: int
    vectors: Sequence[memoryview]
    offset: int
    """Offset in the file."""
    writes: bool

    @property
    def length(self) -> int:
        """Bytes of all vectors."""
        return sum(map(len, self.vectors))

    def execute(self) -> None:
        """Execute the request synchronously. Raises `OSError`, or `EOFError` at the file's end."""
        transfer = write_fully if self.writes else read_fully
        transfer(self.fd, self.vectors, self.offset)

    def try_execute(self) -> Exception | None:
        """Execute the request synchronously. Returns the exception, or None."""
        try:
            self.execute()
        except Exception as error:  # The task raises it instead.
            return error
        return None


class Completion(NamedTuple):
    """A completed request, whose buffers are no longer in use."""

    number: int
    error: Exception | None
    """The error, or None. After a failed write, the content on disk is undefined."""


class OutOfTimeError(Exception):
    """The deadline passed before the request was sent to the disk."""


class RequestQueue(ABC):
    """Keeps the requests of one call in flight. Not thread-safe."""

    @abstractmethod
    def submit(self, number: int, request: DiskRequest, deadline: float) -> None:
        """Start a request. Its completion in `wait` has the same number.

        If it cannot be started by the deadline (`time.monotonic()`), it fails with
        `OutOfTimeError`.
        """

    @abstractmethod
    def wait(self) -> Sequence[Completion]:
        """Return completed requests; block until there is at least one. Some must be in flight."""

    @abstractmethod
    def close(self) -> None:
        """Wait for requests in flight and release the queue's resources."""
