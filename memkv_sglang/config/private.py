"""Read files that the user names: regular ones, of bounded size, secrets only if kept private.

All checks are made on the opened file, so that nothing can be swapped between check and use.
Symbolic links are followed: Kubernetes mounts secrets through them.
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
"""Bytes; a configuration has a few thousand, a file of keys a few hundred."""


@contextmanager
def open_regular(path: str, name: str, advice: str = "name another file") -> Iterator[int]:
    """Open a regular file and yield its descriptor; never blocks on a FIFO or a device.

    `name` is what the user called the setting. Raises `ConfigError`, which ends with `advice`.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{name}: cannot read {path} ({reason}); {advice}") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ConfigError(f"{name}: {path} is no regular file; {advice}")
        yield descriptor
    finally:
        os.close(descriptor)


def read_bounded(descriptor: int, path: str, name: str) -> bytes:
    """Return the whole content. Raises `ConfigError` for more than `SIZE_LIMIT` bytes."""
    try:
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            content = file.read(SIZE_LIMIT + 1)
    except OSError as error:
        raise ConfigError(
            f"{name}: cannot read {path} ({error.strerror}); name another file"
        ) from None
    if len(content) > SIZE_LIMIT:
        raise ConfigError(f"{name}: {path} has more than {SIZE_LIMIT} bytes; name another file")
    return content


def read_private(path: str, name: str) -> bytes:
    """Return a secret file's content. Raises `ConfigError` unless `check_private` allows it."""
    with open_regular(path, name) as descriptor:
        check_private(descriptor, path, name)
        return read_bounded(descriptor, path, name)


def check_private(descriptor: int, path: str, name: str) -> None:
    """Raise `ConfigError` unless the file belongs to this user or root and is closed to others.

    A group of this process may read it, but not write it.
    """
    status = os.fstat(descriptor)
    if status.st_uid not in (os.geteuid(), 0):
        raise ConfigError(
            f"{name}: {path} belongs to uid {status.st_uid}, this is uid {os.geteuid()}; use a "
            "file of your own"
        )
    if is_open_to_others(status):
        raise ConfigError(
            f"{name}: others may read or write {path}; chmod 600 {path} (for a Kubernetes secret, "
            "set defaultMode: 0440)"
        )


def is_open_to_others(status: os.stat_result) -> bool:
    """Tell whether anyone may read or write a file but its owner and, to read, our own groups."""
    own_group = status.st_gid in (os.getegid(), *os.getgroups())
    allowed = stat.S_IRWXU | (stat.S_IRGRP if own_group else 0)
    return bool(stat.S_IMODE(status.st_mode) & 0o777 & ~allowed)


def parse_toml(content: bytes) -> dict[str, Any]:
    """Return a TOML document's tables; a byte order mark is skipped. Raises `ValueError`."""
    text = content.removeprefix(codecs.BOM_UTF8).decode()
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
