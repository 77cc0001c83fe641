"""Errors for a directory that cannot be opened, because of a wrong setting or a broken disk."""

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
"""Errors that a wrong path causes. All others are faults of the disk."""

_OTHER_REMEDY = "check the kernel log for disk errors, or name another directory"
_TOO_FEW_DESCRIPTORS = "raise the limit of open files (ulimit -n)"
_FULL = "free space there, or name another directory"
_FOREIGN = "move the file or symbolic link with this name away, or name another directory"
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
    """Return the error for a directory that cannot be reached or created. `way_out` is the fix."""
    kind = ConfigError if error.errno in _WRONG_SETTING else BrokenDiskError
    return kind(_line(directory, error, way_out))


def broken(directory: Path, error: OSError) -> BrokenDiskError:
    """Return the error for a directory whose content cannot be opened."""
    return BrokenDiskError(_line(directory, error, _REMEDIES.get(error.errno, _OTHER_REMEDY)))


def _line(directory: Path, error: OSError, way_out: str) -> str:
    reason = error.strerror or str(error)
    name = f" {error.filename!r}" if error.filename is not None else ""
    return f"nvme.directory: cannot use {directory} ({reason}{name}); {way_out}"
