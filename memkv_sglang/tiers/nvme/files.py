"""Directories by descriptor, and small files in them that are complete or absent."""

import errno
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

UNFINISHED_SUFFIX = ".new"
"""Ends the name of a file that is still being written."""

_ALLOCATION_UNIT = 512
"""Unit of `st_blocks`."""


class Folder:
    """An open directory.

    Every call is relative to its descriptor, so it stays in this directory even after the path was
    moved, removed or mounted over. Names are single path components, and symbolic links are not
    followed. Calls raise `OSError`.
    """

    def __init__(self, path: Path, descriptor: int, parent: "Folder | None" = None) -> None:
        """Take over an open descriptor."""
        self.path = path
        """Where the directory was when it was opened; for messages."""
        self.descriptor = descriptor
        self._parent = parent
        self._identity = _identity(os.fstat(descriptor))

    @classmethod
    def at(cls, path: Path) -> "Folder":
        """Open a directory that exists."""
        return cls(path, os.open(path, os.O_RDONLY | os.O_DIRECTORY))

    def subfolder(self, name: str) -> "Folder":
        """Open a directory in this one."""
        flags = os.O_RDONLY | os.O_DIRECTORY
        return Folder(self.path / name, self.open(name, flags), self)

    def make_subfolder(self, name: str) -> "Folder":
        """Open a directory in this one, creating it first if it does not exist."""
        with suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=self.descriptor)
        return self.subfolder(name)

    def displacement(self) -> str:
        """Return why the path no longer leads to this directory, empty if it still does."""
        try:
            if self._parent is None:
                found = self.path.stat()
            else:
                found = self._parent.status(self.path.name)
        except OSError as error:
            return f"{self.path} cannot be found ({error.strerror})"
        if _identity(found) != self._identity:
            return f"{self.path} is another directory now"
        return ""

    def names(self) -> list[str]:
        """Return the names of everything in the directory, sorted."""
        # A descriptor of its own: a duplicate would share its read position with other threads.
        descriptor = self.open(".", os.O_RDONLY | os.O_DIRECTORY)
        try:
            with os.scandir(descriptor) as entries:
                return sorted(entry.name for entry in entries)
        finally:
            os.close(descriptor)

    def status(self, name: str) -> os.stat_result:
        """Return the status of an entry."""
        return os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)

    def exists(self, name: str) -> bool:
        """Tell whether there is an entry of this name, whatever it is."""
        try:
            self.status(name)
        except FileNotFoundError:
            return False
        return True

    def is_file(self, name: str) -> bool:
        """Tell whether the entry is a regular file."""
        with suppress(OSError):
            return stat.S_ISREG(self.status(name).st_mode)
        return False

    def disk_usage(self, names: Iterable[str]) -> int:
        """Return the bytes on disk of these files; what is not a regular file counts nothing."""
        total = 0
        for name in names:
            with suppress(OSError):
                status = self.status(name)
                if stat.S_ISREG(status.st_mode):
                    total += status.st_blocks * _ALLOCATION_UNIT
        return total

    def open(self, name: str, flags: int, mode: int = 0o600) -> int:
        """Return a descriptor of an entry."""
        return os.open(name, flags | os.O_NOFOLLOW, mode, dir_fd=self.descriptor)

    def open_to_read(self, name: str) -> int:
        """Return a descriptor of a regular file; does not block on anything else."""
        descriptor = self.open(name, os.O_RDONLY | os.O_NONBLOCK)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, f"{self.path / name} is not a regular file")
        return descriptor

    def read(self, name: str, limit: int) -> bytes:
        """Return the content of a regular file of at most `limit` bytes."""
        with os.fdopen(self.open_to_read(name), "rb") as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise OSError(errno.EFBIG, f"{self.path / name} has more than {limit} bytes")
        return content

    def write(self, name: str, content: bytes | memoryview) -> None:
        """Write a file, mode 0600. After a failure nothing is left of it."""
        descriptor = self.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            with os.fdopen(descriptor, "wb", buffering=0) as file:
                rest = memoryview(content)
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(descriptor)
        except OSError:
            with suppress(OSError):
                self.remove(name)
            raise

    def write_durably(self, name: str, content: bytes) -> None:
        """Replace a file: after a power failure it has the old or the new content, all of it."""
        unfinished = name + UNFINISHED_SUFFIX
        self.write(unfinished, content)
        self.rename(unfinished, name)
        self.sync()

    def rename(self, old: str, new: str) -> None:
        """Rename an entry, over another file if need be."""
        os.rename(old, new, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)

    def remove(self, name: str) -> None:
        """Remove a file, if it exists."""
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.descriptor)

    def remove_unfinished(self, name: str) -> None:
        """Remove what an interrupted write left, unless it is not a file."""
        if self.is_file(name):
            self.remove(name)

    def sync(self) -> None:
        """Wait until the disk has the directory's entries."""
        os.fsync(self.descriptor)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.descriptor)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
