"""Files that hold secrets: read only where nobody else could have read or written them."""

import os
import stat

from memkv_sglang.config.errors import ConfigError

SIZE_LIMIT = 64 << 10
"""Bytes; a file of keys has a few hundred."""


def read_private(path: str, name: str) -> bytes:
    """Return the file's content; `name` is what the user called the setting.

    Raises `ConfigError` unless it is a file of this user or of root that no one else may read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ConfigError(
            f"{name}: cannot read {path} ({error.strerror}); name another file"
        ) from None
    try:
        check_private(os.fstat(descriptor), path, name)
        content = os.read(descriptor, SIZE_LIMIT + 1)
    finally:
        os.close(descriptor)
    if len(content) > SIZE_LIMIT:
        raise ConfigError(f"{name}: {path} has more than {SIZE_LIMIT} bytes; name another file")
    return content


def check_private(status: os.stat_result, path: str, name: str) -> None:
    """Raise `ConfigError` unless the file is this user's or root's, and closed to all others."""
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{name}: {path} is no regular file; name another one")
    if status.st_uid not in (os.geteuid(), 0):
        raise ConfigError(
            f"{name}: {path} belongs to uid {status.st_uid}, this is uid {os.geteuid()}; use a "
            "file of your own"
        )
    if status.st_mode & 0o077:
        raise ConfigError(f"{name}: others may read {path}; chmod 600 {path}")
