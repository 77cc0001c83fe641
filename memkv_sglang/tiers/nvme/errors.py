"""Why a directory cannot be opened: a wrong setting, or a disk that does not work."""

import errno
from pathlib import Path

from memkv_sglang.config.errors import BrokenDiskError, ConfigError

BROKEN = frozenset({errno.EIO, errno.ENXIO, errno.ENODEV, errno.EUCLEAN, errno.EROFS})
"""What a disk says that fails, is gone, or has a file system that was found damaged."""


def unusable(directory: Path, error: OSError, way_out: str) -> ConfigError:
    """Return the error for a directory that could not be opened."""
    reason = error.strerror or str(error)
    kind = BrokenDiskError if error.errno in BROKEN else ConfigError
    return kind(f"nvme.directory: cannot use {directory} ({reason}); {way_out}")
