"""Why a directory cannot be opened: a wrong setting, or a disk that does not work."""

import errno
from pathlib import Path

from memkv_sglang.config.errors import BrokenDiskError, ConfigError

_WRONG_SETTING = frozenset(
    {
        errno.EACCES,
        errno.EPERM,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EEXIST,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.EINVAL,
    }
)
"""Errors of a path that cannot be reached or made; all others are the disk's."""

_OTHER_REMEDY = "see what the kernel's log says of its disk, or name another directory"
_TOO_FEW_DESCRIPTORS = "raise the limit of open files (ulimit -n)"
_FULL = "free space there, or name another directory"
_FOREIGN = "move the file or symbolic link of this name away, or name another directory"
_REMEDIES: dict[int | None, str] = {
    errno.EMFILE: _TOO_FEW_DESCRIPTORS,
    errno.ENFILE: _TOO_FEW_DESCRIPTORS,
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.ENOTDIR: _FOREIGN,
    errno.EISDIR: _FOREIGN,
    errno.ELOOP: _FOREIGN,
    errno.EINVAL: _FOREIGN,
    errno.EACCES: "give the agent's user access to all files in it",
    errno.EPERM: "give the agent's user access to all files in it",
}


def unusable(directory: Path, error: OSError, way_out: str) -> ConfigError:
    """Return the error for a directory that could not be reached or made."""
    kind = ConfigError if error.errno in _WRONG_SETTING else BrokenDiskError
    return kind(_line(directory, error, way_out))


def broken(directory: Path, error: OSError) -> BrokenDiskError:
    """Return the error for a directory whose content could not be opened."""
    return BrokenDiskError(_line(directory, error, _REMEDIES.get(error.errno, _OTHER_REMEDY)))


def _line(directory: Path, error: OSError, way_out: str) -> str:
    reason = error.strerror or str(error)
    name = f" {error.filename!r}" if error.filename is not None else ""
    return f"nvme.directory: cannot use {directory} ({reason}{name}); {way_out}"
