"""Read files that settings name. They must be regular and small, and private if they hold secrets.

The checks use the open descriptor, so the file cannot be swapped between check and use. Symbolic
links are followed, because Kubernetes mounts secrets through them.
"""

import codecs
import os
import stat
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from memkv_sglang.config.errors import ConfigError

SIZE_LIMIT = 64 << 10
"""Largest file to read, in bytes. A configuration has a few thousand, a key file a few hundred."""


@contextmanager
def open_regular(path: str, name: str, advice: str = "name another file") -> Iterator[int]:
    """Open a regular file and yield its descriptor; never blocks on a FIFO or a device.

    `name` is the setting as the user wrote it. Raises `ConfigError`; its message ends with
    `advice`, unless this user may not read the file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError) as error:  # ValueError means that the path contains a NUL
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, PermissionError):
            advice = f"let uid {os.geteuid()} read it, for example with chgrp and chmod 640"
        raise ConfigError(f"{name}: cannot read {path} ({reason}); {advice}") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ConfigError(f"{name}: {path} is not a regular file; {advice}")
        yield descriptor
    finally:
        os.close(descriptor)


def read_bounded(descriptor: int, path: str, name: str) -> bytes:
    """Return the file's content. Raises `ConfigError` if it exceeds `SIZE_LIMIT`."""
    try:
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            content = file.read(SIZE_LIMIT + 1)
    except OSError as error:
        raise ConfigError(
            f"{name}: cannot read {path} ({error.strerror}); name another file"
        ) from None
    if len(content) > SIZE_LIMIT:
        raise ConfigError(f"{name}: {path} is larger than {SIZE_LIMIT} bytes; name another file")
    return content


def read_private(path: str, name: str) -> bytes:
    """Return a secret file's content. Raises `ConfigError` if `check_private` rejects it."""
    with open_regular(path, name) as descriptor:
        check_private(descriptor, path, name)
        return read_bounded(descriptor, path, name)


def check_private(descriptor: int, path: str, name: str) -> None:
    """Raise `ConfigError` unless this user or root owns the file and other users have no access.

    The process's own groups may read the file but not write it.
    """
    status = os.fstat(descriptor)
    if status.st_uid not in (os.geteuid(), 0):
        raise ConfigError(
            f"{name}: {path} belongs to uid {status.st_uid}, this is uid {os.geteuid()}; use a "
            "file of your own"
        )
    if is_open_to_others(status):
        # Root is not in the group that may read the file of an agent with a user of its own.
        advice = "run as the agent's user, or " if os.geteuid() == 0 else ""
        raise ConfigError(
            f"{name}: other users can read or write {path}; {advice}chmod 600 {path} (for a "
            "Kubernetes secret, set defaultMode: 0440)"
        )


def is_open_to_others(status: os.stat_result) -> bool:
    """Return whether users besides the owner and the process's groups can access a file.

    Write access for the process's groups counts too.
    """
    own_group = status.st_gid in (os.getegid(), *os.getgroups())
    allowed = stat.S_IRWXU | (stat.S_IRGRP if own_group else 0)
    return bool(stat.S_IMODE(status.st_mode) & 0o777 & ~allowed)


def parse_toml(content: bytes) -> dict[str, Any]:
    """Return a TOML document's tables, ignoring a byte order mark. Raises `ValueError`."""
    text = content.removeprefix(codecs.BOM_UTF8).decode()
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
