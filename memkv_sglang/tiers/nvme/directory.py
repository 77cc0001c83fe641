"""Open and lock the directory of one agent.

It contains `format` (the version), `journal`, `segments/NNNNNNNN.seg`, `namespaces/DIGEST.json` and
`quarantine/`.
"""

import errno
import fcntl
import logging
import os
import re
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from memkv_sglang.config.environment import check_capacity, check_directory
from memkv_sglang.config.errors import BrokenDiskError, ConfigError
from memkv_sglang.config.schema import NvmeConfig
from memkv_sglang.flocks import describe_holder, is_ending, lock_holder
from memkv_sglang.tiers.nvme.disk.direct_io import supports_direct_io
from memkv_sglang.tiers.nvme.errors import broken, unusable
from memkv_sglang.tiers.nvme.files import UNFINISHED_SUFFIX, Folder
from memkv_sglang.tiers.nvme.journal import JOURNAL

FORMAT = "memkv nvme 1\n"
FORMAT_FILE = "format"
"""Name of the file with the format's version."""
_FORMAT_LIMIT = 64
"""Maximum bytes of a `format` file, whatever its version."""
_ANY_FORMAT = re.compile(rb"memkv nvme \d{1,9}\n")
_SUBFOLDERS = ("segments", "namespaces", "quarantine")
_log = logging.getLogger(__name__)


class Directory:
    """The open directory, locked until `close`.

    Its files are opened relative to its descriptor, never by path.
    """

    def __init__(self, config: NvmeConfig) -> None:
        """Create the directory if necessary and lock it. Raises `ConfigError`."""
        self.path = Path(config.directory).absolute()
        with ExitStack() as opened:
            try:
                check_directory(config, str)
                check_capacity(config, str)
                self._make_root()
                self.root = Folder.at(self.path)
                opened.callback(self.root.close)
                self._lock(self.root)
                self._check_place(config)
            except OSError as error:
                raise unusable(self.path, error, self._way_out) from error
            try:
                self._check_format()
                self.segments, self.namespaces, self.quarantine = self._open_subfolders(opened)
                self.direct_io = self._choose_direct_io(config.direct_io)
                self._report_foreign_files()
            except OSError as error:
                raise broken(self.path, error) from error
            self._opened = opened.pop_all()

    def close(self) -> None:
        """Release the lock."""
        self._opened.close()

    @property
    def segments_descriptor(self) -> int:
        """Descriptor of the segments directory without a lock; other processes may keep it."""
        return self.segments.descriptor

    def displacement(self) -> str:
        """Return why the path no longer leads to this directory; empty if it does."""
        for folder in (self.root, self.segments, self.namespaces, self.quarantine):
            if reason := folder.displacement():
                return reason
        if os.fstatvfs(self.root.descriptor).f_flag & os.ST_RDONLY:
            return f"the file system of {self.path} is read-only"
        return ""

    @property
    def _way_out(self) -> str:
        return f"name a directory that uid {os.geteuid()} can write to"

    def _make_root(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.mkdir(mode=0o700, exist_ok=True)

    def _lock(self, folder: Folder) -> None:
        """Lock the directory itself. The lock ends with the process and leaves no file behind."""
        try:
            fcntl.flock(folder.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = describe_holder(folder.descriptor)
            if (pid := lock_holder(folder.descriptor)) is not None and is_ending(pid):
                raise BrokenDiskError(
                    f"nvme.directory: {folder.path} is in use by an agent that has ended{holder}, "
                    "because its I/O is still in flight; check the kernel log for disk errors"
                ) from None
            raise ConfigError(
                f"nvme.directory: {folder.path} is in use by another agent{holder}; stop that "
                "agent or name another directory"
            ) from None

    def _check_place(self, config: NvmeConfig) -> None:
        """Check the directory after opening it: another user may have just replaced it."""
        check_directory(config, str)
        if reason := self.root.displacement():
            raise OSError(errno.ESTALE, reason)

    def _check_format(self) -> None:
        self.root.remove_unfinished(FORMAT_FILE + UNFINISHED_SUFFIX)
        self.root.remove_unfinished(JOURNAL + UNFINISHED_SUFFIX)
        try:
            found = self.root.read(FORMAT_FILE, _FORMAT_LIMIT)
        except FileNotFoundError:
            found = b""
        except OSError as error:
            if error.errno != errno.EFBIG:
                raise
            raise self._foreign() from None
        if found == FORMAT.encode():
            return
        if _ANY_FORMAT.fullmatch(found):
            raise ConfigError(
                f"nvme.directory: {self.path} was created by another version (it has format "
                f"{found.decode().strip()!r}, this version reads {FORMAT.strip()!r}); empty it or "
                "name another directory"
            )
        # After a power failure, an unsynced file may be short or end in zeros.
        if not FORMAT.encode().startswith(found.rstrip(b"\0")):
            raise self._foreign()
        self.root.write_durably(FORMAT_FILE, FORMAT.encode())

    def _foreign(self) -> ConfigError:
        return ConfigError(
            f"nvme.directory: {self.path} is not a memkv directory, because its file "
            f"{FORMAT_FILE!r} belongs to another program; name another directory"
        )

    def _open_subfolders(self, opened: ExitStack) -> Iterable[Folder]:
        for name in _SUBFOLDERS:
            folder = self.root.make_subfolder(name)
            opened.callback(folder.close)
            yield folder
        # Also lock the segments directory, because a mount may share it between two directories.
        # Use another descriptor for the lock than for clients, because they keep theirs open, and
        # would keep the lock too.
        lock = self.root.subfolder("segments")
        opened.callback(lock.close)
        self._lock(lock)
        self.root.sync()

    def _choose_direct_io(self, setting: str) -> bool:
        if setting == "never" or supports_direct_io(self.segments):
            return setting != "never"
        if setting == "always":
            raise ConfigError(
                f"nvme.direct_io: the file system of {self.path} does not support O_DIRECT; set "
                "auto, or name a directory on a local disk with ext4 or XFS"
            )
        _log.warning("no O_DIRECT, using buffered I/O", extra={"fields": {"path": str(self.path)}})
        return False

    def _report_foreign_files(self) -> None:
        foreign = sorted(set(self.root.names()) - {*_SUBFOLDERS, JOURNAL, FORMAT_FILE})
        if foreign:
            fields = {"path": str(self.path), "files": foreign[:10]}
            _log.warning("ignored unknown files", extra={"fields": fields})
