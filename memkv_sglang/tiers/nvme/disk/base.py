"""What is asked of a disk, and the contract of what keeps several such requests in flight."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from memkv_sglang.tiers.nvme.disk.direct_io import read_fully, write_fully


class DiskRequest(NamedTuple):
    """Bytes to be read from a file, or written over it, in one go."""

    fd: int
    vectors: Sequence[memoryview]
    offset: int
    """Where in the file they begin."""
    writes: bool

    @property
    def length(self) -> int:
        """Bytes of all vectors."""
        return sum(map(len, self.vectors))

    def execute(self) -> None:
        """Do it here and now; blocks. Raises `OSError`, `EOFError` where a read file ends."""
        transfer = write_fully if self.writes else read_fully
        transfer(self.fd, self.vectors, self.offset)

    def try_execute(self) -> Exception | None:
        """Carry it out and return what was raised."""
        try:
            self.execute()
        except Exception as error:  # for the move to deal with, whatever it is
            return error
        return None


class Completion(NamedTuple):
    """A request that is on the disk no more: nobody touches its buffers."""

    number: int
    error: Exception | None
    """What went wrong; after a write, what lies on the disk is then undefined."""


class OutOfTimeError(Exception):
    """The deadline had passed before the disk was asked."""


class RequestQueue(ABC):
    """Requests of one call in flight. Used by one thread at a time."""

    @abstractmethod
    def submit(self, number: int, request: DiskRequest, deadline: float) -> None:
        """Send a request on its way; it lands with its number.

        If it has not begun by the deadline (`time.monotonic()`), it lands with `OutOfTimeError`.
        """

    @abstractmethod
    def wait(self) -> Sequence[Completion]:
        """Return requests that have landed, blocking until one has; call with some in flight."""

    @abstractmethod
    def close(self) -> None:
        """Give back what the queue takes, after waiting for what is in flight."""
