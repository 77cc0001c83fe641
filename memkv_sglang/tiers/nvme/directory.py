"""The directory of one agent: its layout, its owner, its lock.

`format` (version), `journal`, `segments/NNNNNNNN.seg`, `namespaces/DIGEST.json`, `quarantine/`.
"""

import fcntl
import logging
import os
from pathlib import Path

from memkv_sglang.config.environment import check_capacity, check_directory
from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.schema import NvmeConfig
from memkv_sglang.flocks import describe_holder
from memkv_sglang.tiers.nvme.disk.direct_io import supports_direct_io
from memkv_sglang.tiers.nvme.errors import unusable
from memkv_sglang.tiers.nvme.files import write_whole
from memkv_sglang.tiers.nvme.journal import UNFINISHED_SUFFIX

FORMAT = "memkv nvme 1\n"
_log = logging.getLogger(__name__)


class Directory:
    """An open directory, locked until `close`."""

    def __init__(self, config: NvmeConfig) -> None:
        """Make the directory if need be and lock it; raises `ConfigError`."""
        self.root = Path(config.directory)
        self.segments = self.root / "segments"
        self.namespaces = self.root / "namespaces"
        self.quarantine = self.root / "quarantine"
        self.journal = self.root / "journal"
        self._format = self.root / "format"
        try:
            check_directory(config, str)
            check_capacity(config, str)
            self._make_root()
            check_directory(config, str)  # again: another user may have made it meanwhile
            self._fd = self._lock()
        except OSError as error:
            raise unusable(self.root, error, self._way_out) from error
        try:
            self._make_contents()
            self.direct_io = self._choose_direct_io(config.direct_io)
            self._report_foreign_files()
        except OSError as error:
            self.close()
            raise unusable(self.root, error, self._way_out) from error
        except ConfigError:
            self.close()
            raise

    def close(self) -> None:
        """Release the lock."""
        os.close(self._fd)

    @property
    def _way_out(self) -> str:
        return f"name a directory that uid {os.geteuid()} can write to"

    def _make_root(self) -> None:
        self.root.parent.mkdir(parents=True, exist_ok=True)
        self.root.mkdir(mode=0o700, exist_ok=True)

    def _lock(self) -> int:
        """Lock the directory itself: the lock goes with its holder and leaves no file."""
        fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = describe_holder(fd)
            os.close(fd)
            raise ConfigError(
                f"nvme.directory: {self.root} is in use by another agent{holder}; stop that one or "
                "name another directory"
            ) from None
        except OSError:
            os.close(fd)
            raise
        return fd

    def _make_contents(self) -> None:
        if not self._format.exists():
            write_whole(self._format, FORMAT.encode())
        elif (found := self._format.read_text(errors="replace")) != FORMAT:
            raise ConfigError(
                f"nvme.directory: {self.root} was made by another version (format "
                f"{found.strip()!r}, this one reads {FORMAT.strip()!r}); empty it or name another"
            )
        for directory in (self.segments, self.namespaces, self.quarantine):
            directory.mkdir(mode=0o700, exist_ok=True)
        unfinished = self.journal.with_name(self.journal.name + UNFINISHED_SUFFIX)
        if not unfinished.is_dir():
            unfinished.unlink(missing_ok=True)

    def _choose_direct_io(self, wish: str) -> bool:
        if wish == "never" or supports_direct_io(self.segments):
            return wish != "never"
        if wish == "always":
            raise ConfigError(
                f"nvme.direct_io: the file system of {self.root} has no O_DIRECT; write auto, or "
                "name a directory on a local disk with ext4 or XFS"
            )
        _log.warning("no O_DIRECT, using ordinary I/O", extra={"fields": {"path": str(self.root)}})
        return False

    def _report_foreign_files(self) -> None:
        own = {self.segments, self.namespaces, self.quarantine, self.journal, self._format}
        foreign = sorted(path.name for path in set(self.root.iterdir()) - own)
        if foreign:
            fields = {"path": str(self.root), "files": foreign[:10]}
            _log.warning("foreign files left alone", extra={"fields": fields})
