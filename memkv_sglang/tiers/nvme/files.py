"""Access directories by descriptor, and write small files that are either complete or missing."""

import errno
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

UNFINISHED_SUFFIX = ".new"
"""File name suffix of a file that is still being written."""

_ALLOCATION_UNIT = 512
"""Unit of `st_blocks`."""


class Folder:
    """An open directory.

    Calls are relative to its descriptor, so they reach this directory even after its path was
    moved, removed or mounted over. Names are single path components. Symbolic links are not
    followed. Calls raise `OSError`.
    """

    def __init__(self, path: Path, descriptor: int, parent: "Folder | None" = None) -> None:
        """Own an open descriptor."""
        self.path = path
        """The path at the time of opening, for messages."""
        self.descriptor = descriptor
        self._parent = parent
        self._identity = _identity(os.fstat(descriptor))

    @classmethod
    def at(cls, path: Path) -> "Folder":
        """Open an existing directory."""
        return cls(path, os.open(path, os.O_RDONLY | os.O_DIRECTORY))

    def subfolder(self, name: str) -> "Folder":
        """Open a subdirectory."""
        flags = os.O_RDONLY | os.O_DIRECTORY
        return Folder(self.path / name, self.open(name, flags), self)

    def make_subfolder(self, name: str) -> "Folder":
        """Open a subdirectory. Creates it if it does not exist."""
        with suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=self.descriptor)
        return self.subfolder(name)

    def displacement(self) -> str:
        """Return why the path no longer leads to this directory; empty if it does."""
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
        """Return the sorted names of all entries."""
        # Open the directory again, because duplicates of a descriptor share their read position.
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
        """Return whether there is an entry of this name, of any type."""
        try:
            self.status(name)
        except FileNotFoundError:
            return False
        return True

    def is_file(self, name: str) -> bool:
        """Return whether the entry is a regular file."""
        with suppress(OSError):
            return stat.S_ISREG(self.status(name).st_mode)
        return False

    def disk_usage(self, names: Iterable[str]) -> int:
        """Return the bytes on disk of these files, ignoring entries that are not regular files."""
        total = 0
        for name in names:
            with suppress(OSError):
                status = self.status(name)
                if stat.S_ISREG(status.st_mode):
                    total += status.st_blocks * _ALLOCATION_UNIT
        return total

    def open(self, name: str, flags: int, mode: int = 0o600) -> int:
        """Open an entry and return its descriptor."""
        return os.open(name, flags | os.O_NOFOLLOW, mode, dir_fd=self.descriptor)

    def open_to_read(self, name: str) -> int:
        """Open a regular file for reading. Raises, without blocking, if it is anything else."""
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
        """Write a file with mode 0600. If that fails, no file is left behind."""
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
        """Replace a file atomically. After a power failure, it has the old or the new content."""
        unfinished = name + UNFINISHED_SUFFIX
        self.write(unfinished, content)
        self.rename(unfinished, name)
        self.sync()

    def rename(self, old: str, new: str) -> None:
        """Rename an entry, replacing any existing file."""
        os.rename(old, new, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)

    def remove(self, name: str) -> None:
        """Remove a file, if it exists."""
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.descriptor)

    def remove_unfinished(self, name: str) -> None:
        """Remove the file that an interrupted write has left behind, if it is a regular file."""
        if self.is_file(name):
            self.remove(name)

    def sync(self) -> None:
        """Wait until the directory's entries are on disk."""
        os.fsync(self.descriptor)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.descriptor)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
